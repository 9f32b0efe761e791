"""No sum overflows 16 bits where the CPU has no VNNI: arithmetic on the file's integers, and an emulated Haswell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qatgraph import reference
from qatgraph.backends import emulation, ort_cpu
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import owner
from qatgraph.proof import feed_of, prove
from qatgraph.reference import Array
from qatgraph.report.report import Report
from tests.lowered import LOWERED, Lowered, case_of, lower, lowered, product_weights, read, write
from tests.models import ZOO, Case

ABSENT = "NOT RUN: qemu-x86_64 is not installed"


@pytest.fixture
def haswell() -> str:
    """The CPU to emulate: AVX2, no VNNI."""
    if not emulation.available():
        pytest.skip(ABSENT)
    return "Haswell"


@pytest.fixture
def no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def verify(found: Lowered, seed: int = 3) -> Report:
    return prove(ort_cpu, found.qat, found.file, [case_of("mlp").inputs(seed)], None)


# arithmetic on the integers of the file


@pytest.mark.parametrize("name", LOWERED)
def test_no_pair_of_weights_in_the_file_can_overflow(name: str) -> None:
    weights = {owner(n): w for n, w in product_weights(lowered(name).file).items()}
    planned = {p.node: p for p in lowered(name).plan.predictions if p.int8 and p.accumulator}
    assert set(weights) == set(planned)
    assert all(w.dtype == np.int8 for w in weights.values())
    paired = [reference.k_rows(w) for n, w in weights.items() if planned[n].accumulator == "pair16-without-vnni"]
    assert max(map(reference.worst_pair, paired)) <= 128
    assert min(int(w.min()) for w in weights.values()) >= -127


def test_the_pairs_lie_along_k_in_both_forms() -> None:
    """Gemm keeps the weight as [N, K], MatMul as [K, N]: the pairs are found on the right axis of either."""
    mlp, encoder = (product_weights(lowered(n).file) for n in ("mlp", "encoder"))
    assert mlp["up:linear/Gemm"].shape == encoder["layer.0.mlp.up:linear/MatMul"].shape == (64, 32)
    assert reference.worst_pair(mlp["up:linear/Gemm"].T) > 128  # on the other axis they would overflow


def test_weights_at_the_edge_use_the_whole_range() -> None:
    """Equal weights are the worst case: every pair sums to 128 exactly, and not to less."""

    def edge() -> torch.nn.Module:
        model = ZOO["mlp"].make()
        for parameter in (p for p in model.parameters() if p.ndim == 2):
            torch.nn.init.constant_(parameter, 0.125)
        return model

    weights = product_weights(lower(Case(edge, ZOO["mlp"].inputs, ZOO["mlp"].dynamic)).file)
    assert {reference.worst_pair(w) for w in weights.values()} == {128}


def full_range(proto: Any) -> None:
    write(proto, "up.weight/int8", np.where(read(proto, "up.weight/int8") < 0, -127, 127).astype(np.int8))


def lowest(proto: Any) -> None:
    weight = read(proto, "up.weight/int8")
    weight[0, :2] = -128, 0
    write(proto, "up.weight/int8", weight)


def hidden(proto: Any) -> None:
    """The weight stands behind an Identity, where it is not looked for."""
    dequantize = next(n for n in proto.graph.node if "up.weight/int8" in n.input)
    proto.graph.node.insert(0, helper.make_node("Identity", ["up.weight/int8"], ["hidden"], "hidden"))
    dequantize.input[0] = "hidden"


def other_bias_scale(proto: Any) -> None:
    name = "up:dequantize#3/DequantizeLinear/scale"
    write(proto, name, read(proto, name) * np.float32(2))


PLANTED: dict[Callable[[Any], None], str] = {
    full_range: r"'up:linear': a pair of weights sums to 254, which overflows 16 bits without VNNI",
    lowest: r"'up:linear': a weight is -128, which overflows 16 bits on 64-bit Arm",
    hidden: r"'up:linear': its int8 weight is not found in the file",
    other_bias_scale: r"'up:linear/Gemm': its int32 bias does not count in s_x \* s_w",
}


@pytest.mark.usefixtures("no_emulator")
@pytest.mark.parametrize("plant", PLANTED, ids=lambda p: p.__name__)
def test_the_report_names_the_node_whose_weights_are_planted(plant: Callable[[Any], None]) -> None:
    proto = lowered("mlp").proto
    plant(proto)
    with pytest.raises(VerifyError, match=PLANTED[plant]):
        verify(lowered("mlp").changed(proto)).check()


@pytest.mark.usefixtures("no_emulator")
def test_the_report_says_what_was_looked_at_and_what_was_not_run() -> None:
    report = verify(lowered("mlp"))
    report.check()
    assert {k: report.overflow[k] for k in ("products", "unsafe", "same_on_haswell")} == {
        "products": 2, "unsafe": [], "same_on_haswell": ABSENT
    }  # fmt: skip
    assert f"| same_on_haswell | {ABSENT} |" in report.to_markdown()


# on an emulated CPU with AVX2 and without VNNI


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "gpt2", "table"])
def test_a_whole_file_gives_the_same_bits_there(name: str, haswell: str) -> None:
    batch = case_of(name).inputs(4)
    feed = feed_of(Graph.of(lowered(name).qat), batch)
    emulated = ort_cpu.run_on(haswell, lowered(name).file, feed)
    assert [a.tobytes() for a in emulated] == [a.tobytes() for a in lowered(name).run(batch)]


@pytest.mark.slow
def test_a_file_with_full_range_weights_differs_there_and_the_report_says_so(haswell: str) -> None:
    proto = lowered("mlp").proto
    full_range(proto)
    report = verify(lowered("mlp").changed(proto))
    assert report.overflow["same_on_haswell"] is False
    assert any(haswell in f for f in report.failures)
    assert verify(lowered("mlp")).overflow["same_on_haswell"] is True


@pytest.mark.slow
def test_a_file_that_does_not_run_there_is_refused_with_the_reason(haswell: str) -> None:
    with pytest.raises(VerifyError, match=r"QG605[^$]*emulated Haswell[^$]*why: .*(protobuf|INVALID)"):
        ort_cpu.run_on(haswell, b"no model", {})


@dataclass(frozen=True)
class Product:
    """One int8 GEMM of the shapes that lowering writes, ``k`` -> 8; scales are 1, so that float results are the sums.

    ``safe``: pairs that sum to exactly 128, in every split and sign; else pairs of 127 and 127.
    """

    kernel: str
    bias: bool
    k: int
    safe: bool

    @property
    def name(self) -> str:
        return "_".join(map(str, (self.kernel, self.bias, self.k, self.safe)))

    def weight(self) -> Array:
        """``[8, k]``"""
        first = np.array([64, 127, 1, 100, -64, -127, -1, 127], np.int8)[:, None]
        second = np.array([64, 1, 127, 28, -64, -1, -127, -127], np.int8)[:, None]
        if not self.safe:
            first, second = (np.sign(v).astype(np.int8) * np.int8(127) for v in (first, second))
        return np.tile(np.hstack([first, second]), self.k // 2 + 1)[:, : self.k]

    def integers(self) -> Array:
        """Rows at which pair sums are largest, and random ones: ``[64, k]``."""
        rows = np.random.default_rng(self.k).integers(0, 256, (64, self.k))
        even = np.arange(self.k) % 2 == 0
        rows[0], rows[1], rows[2], rows[3] = 255, np.where(even, 255, 0), np.where(even, 0, 255), 0
        return rows.astype(np.uint8)

    def feed(self) -> Array:
        rows = self.integers().astype(np.float32) - 128  # what quantizes to these integers
        return rows if self.kernel == "QGemm" else rows.reshape(4, 16, self.k)

    def wrong(self, have: Array) -> float:
        """The share of outputs that are not the exact sum."""
        want = reference.accumulate(self.integers(), 128, self.weight()) + self.bias * np.arange(8)
        return float((have.reshape(-1, 8) != want).mean())

    def parts(self) -> tuple[list[Any], list[Any], Any, Any]:
        """Nodes, initializers, input and output; all names start with that of the product."""
        gemm, n = self.kernel == "QGemm", self.name
        weight = self.weight() if gemm else self.weight().T
        bias = np.arange(8, dtype=np.int32 if gemm else np.float32)
        constants: dict[str, Array] = {"w": weight, "b": bias if gemm else bias.reshape(1, 1, 8)}
        x_zero: Array = np.asarray(128, np.uint8)
        zeros: dict[str, Array] = {"q": x_zero, "x": x_zero, "w": np.zeros(8, np.int8), "b": np.zeros(8, np.int32)}
        for role, zero in zeros.items():
            constants |= {f"{role}_zero": zero, f"{role}_one": np.ones(zero.shape, np.float32)}

        def scaled(kind: str, source: str, role: str, result: str, **axis: int) -> Any:
            inputs = [f"{n}{v}" for v in (source, f"{role}_one", f"{role}_zero")]
            return helper.make_node(kind, inputs, [f"{n}{result}"], f"{n}{result}", **axis)

        axis = 0 if gemm else 1
        nodes = [
            scaled("QuantizeLinear", "", "q", "q"),
            scaled("DequantizeLinear", "q", "x", "dx"),
            scaled("DequantizeLinear", "w", "w", "dw", axis=axis),
        ]
        if gemm:
            nodes += [scaled("DequantizeLinear", "b", "b", "db", axis=0)] * self.bias
            operands = [f"{n}{v}" for v in ("dx", "dw", "db")[: 2 + self.bias]]
            nodes.append(helper.make_node("Gemm", operands, [f"{n}y"], n, transB=1))
        else:
            product = f"{n}p" if self.bias else f"{n}y"
            nodes.append(helper.make_node("MatMul", [f"{n}dx", f"{n}dw"], [product], n))
            nodes += [helper.make_node("Add", [product, f"{n}b"], [f"{n}y"], f"{n}add")] * self.bias
        shape = ["batch", self.k] if gemm else ["batch", 16, self.k]
        used = {v for node in nodes for v in node.input}
        tensors = [numpy_helper.from_array(v, n + k) for k, v in constants.items() if n + k in used]
        x = helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)
        return nodes, tensors, x, helper.make_tensor_value_info(f"{n}y", TensorProto.FLOAT, [*shape[:-1], 8])


PRODUCTS = [
    Product(kernel, bias, k, safe)
    for kernel in ("QGemm", "MatMulIntegerToFloat")
    for bias in (True, False)
    for k in (64, 63, 2, 1)
    for safe in (True, False)
]


@cache
def side_by_side() -> bytes:
    """All products in one file, so that one emulated run is enough."""
    nodes, tensors, inputs, outputs = zip(*(p.parts() for p in PRODUCTS), strict=True)
    graph = helper.make_graph([*chain(*nodes)], "products", inputs, outputs, [*chain(*tensors)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@cache
def emulated() -> dict[str, Array]:
    found = ort_cpu.run_on("Haswell", side_by_side(), {p.name: p.feed() for p in PRODUCTS})
    return dict(zip((p.name for p in PRODUCTS), found, strict=True))


def test_every_product_runs_in_the_kernel_that_it_stands_for() -> None:
    kernels = {k.name: k.kernel for k in ort_cpu.audit(side_by_side()) if k.int8}
    assert kernels == {p.name: p.kernel for p in PRODUCTS}


@pytest.mark.slow
@pytest.mark.usefixtures("haswell")
@pytest.mark.parametrize("product", [p for p in PRODUCTS if p.safe], ids=lambda p: p.name)
def test_pairs_that_sum_to_128_are_exact_there_at_extreme_inputs(product: Product) -> None:
    assert product.wrong(emulated()[product.name]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("haswell")
@pytest.mark.parametrize("product", [p for p in PRODUCTS if not p.safe], ids=lambda p: p.name)
def test_pairs_of_full_range_are_wrong_there_as_the_model_of_saturation_says(product: Product) -> None:
    have = emulated()[product.name]
    model = reference.accumulate_pair16(product.integers(), 128, product.weight()) + product.bias * np.arange(8)
    assert np.array_equal(have.reshape(-1, 8), model)
    assert (product.wrong(have) > 0.25) == (product.k > 1)  # a product alone cannot overflow
