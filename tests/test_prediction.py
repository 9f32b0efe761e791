"""Predicted kernels against the engine: six linears in six contexts, and the naive forms that the table warns of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import VerifyError
from qatgraph.kernels import KernelNode, compare_kernels
from qatgraph.planning.constraints import Port
from qatgraph.planning.plan import Plan, Prediction
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import Target, load_target
from qatgraph.specs import QuantSpec

# No engine is imported at the top: a subprocess plans with this file where onnx and onnxruntime cannot be imported.

ROOT = Path(__file__).parents[1]
ON_K = QuantSpec.parse("s8 symmetric per-channel(1)")


class SixLayers(nn.Module):
    """Six linears of 16 -> 12 features, each in a context of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.gemm, self.vector, self.fixed, self.on_k = (nn.Linear(16, 12) for _ in range(5))
        self.bare = nn.Linear(16, 12, bias=False)

    def forward(self, sequence: Tensor, table: Tensor, still: Tensor) -> tuple[Tensor, ...]:
        moving = self.row(sequence), self.bare(sequence), self.on_k(sequence)
        return *moving, self.gemm(table), self.vector(table), self.fixed(still)


RECIPE = Recipe(
    override=(
        Override(select="vector:linear", bias="vector"),
        Override(select="fixed:linear", bias="vector"),
        Override(select="on_k:linear", weight=ON_K),
    )
)
# node -> (row, int8, words of the reason, words of the remedy)
EXPECTED: dict[str, tuple[str, bool, Sequence[str], str]] = {
    "row:linear": ("linear.matmul-row-bias", True, ("rank-3", "[batch, 5, 16]", "[12, 16]"), ""),
    "bare:linear": ("linear.matmul-no-bias", True, ("rank-3", "[batch, 5, 16]", "without a bias"), ""),
    "gemm:linear": ("linear.gemm-int32-bias", True, ("rank-2", "[batch, 16]", "int32"), ""),
    "vector:linear": ("linear.gemm-vector-bias", False, ("rank-2", "[batch, 16]", "float bias"), "bias = 'int32'"),
    "fixed:linear": ("linear.static-vector-bias", False, ("static", "[2, 3, 16]", "Reshape"), "bias = 'row'"),
    "on_k:linear": ("linear.scale-on-k", False, ("K", "[12, 16]"), "per-channel(0)"),
}
FLOAT = [n for n, (_, int8, _, _) in EXPECTED.items() if not int8]


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, generator=random) for s in ((size, 5, 16), (size, 16), (2, 3, 16)))  # type: ignore[return-value]


def six() -> qg.Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SixLayers()
    return qg.capture(model, batch(), {"sequence": {0: "batch"}, "table": {0: "batch"}})


@dataclass(frozen=True)
class Lowered:
    plan: Plan
    qat: nn.Module
    file: bytes
    realized: list[KernelNode]


def lowered(folder: Path, target: str | Target = "ort-cpu", recipe: Recipe = RECIPE) -> Lowered:
    from qatgraph.backends import ort_cpu

    graph = six()
    plan = qg.plan(graph, target, recipe)
    qat = qg.prepare(graph, plan)
    qg.calibrate(qat, [batch(1), batch(2)], progress=False)
    data = qg.lower(qat, folder / "six.onnx").read_bytes()
    return Lowered(plan, qat, data, ort_cpu.audit(data))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(tmp_path_factory.mktemp("six"))


# the six layers


@pytest.mark.parametrize("node", EXPECTED)
def test_each_layer_is_predicted_for_its_own_reason(layers: Lowered, node: str) -> None:
    row, int8, words, remedy = EXPECTED[node]
    prediction = layers.plan.prediction(node)
    assert prediction is not None
    assert (prediction.row, prediction.int8) == (row, int8)
    why = next(d.why for d in layers.plan.decisions if d.subject == node)
    assert all(w in why for w in words)
    assert remedy in prediction.remedy
    assert bool(prediction.remedy) == bool(prediction.blocked_by) == (not int8)
    assert (layers.plan.quantizer_at(Port(node, "x")) is not None) == int8


def test_the_reasons_and_the_remedies_differ() -> None:
    plan = qg.plan(six(), recipe=RECIPE)
    blocked = [p for p in plan.predictions if not p.int8]
    assert {p.node for p in blocked} == set(FLOAT)
    assert len({p.blocked_by for p in blocked}) == len({p.remedy for p in blocked}) == len(FLOAT) == 3


def test_a_layer_without_a_bias_is_not_explained_by_the_bias_of_another(layers: Lowered) -> None:
    why = next(d.why for d in layers.plan.decisions if d.subject == "bare:linear")
    assert "a bias of" not in why


def test_the_engine_runs_what_was_predicted(layers: Lowered) -> None:
    assert compare_kernels(layers.plan, layers.realized) == []
    assert sum(k.int8 for k in layers.realized) == 3


def test_the_report_says_so(layers: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "six.onnx"
    path.write_bytes(layers.file)
    report = qg.verify(layers.qat, path, [batch(3)])
    report.check()
    assert (report.kernels["planned"], report.kernels["realized"], report.kernels["mismatches"]) == (3, 3, [])


@pytest.mark.parametrize("node", EXPECTED)
def test_a_prediction_turned_round_is_reported_with_its_node_and_row(layers: Lowered, node: str) -> None:
    turned = tuple(replace(p, int8=not p.int8) if p.node == node else p for p in layers.plan.predictions)
    (mismatch,) = compare_kernels(replace(layers.plan, predictions=turned), layers.realized)
    assert (mismatch.node, mismatch.rule) == (node, EXPECTED[node][0])


def test_the_remedies_are_true(tmp_path: Path) -> None:
    """Each of the three, mended as its prediction says, runs in int8."""
    mended = Recipe(
        override=(
            Override(select="vector:linear", bias="int32"),
            Override(select="fixed:linear", bias="row"),
            Override(select="on_k:linear", weight=QuantSpec.parse("s8 symmetric per-channel(0) pair-safe")),
        )
    )
    found = lowered(tmp_path, recipe=mended)
    assert all(p.int8 for p in found.plan.predictions)
    assert compare_kernels(found.plan, found.realized) == []


# what compare_kernels sees


def with_predictions(*predictions: Prediction) -> Plan:
    return replace(planned(), predictions=predictions)


@cache
def planned() -> Plan:
    return qg.plan(six(), recipe=RECIPE)


INT8 = Prediction("a:linear", "QGemm", "row-a", True, "int32")
PINNED = Prediction("a:linear", "Gemm|FusedGemm", "row-b", False, pinned=True)


@pytest.mark.parametrize(
    ("prediction", "realized", "broken"),
    [
        (INT8, [KernelNode("a:linear/Gemm", "QGemm", True)], False),
        (INT8, [KernelNode("a:linear/Gemm", "Gemm", False)], True),
        (INT8, [KernelNode("a:linear/MatMul", "MatMulIntegerToFloat", True)], True),
        (INT8, [], True),
        (PINNED, [KernelNode("a:linear/Gemm", "FusedGemm", False)], False),
        (PINNED, [KernelNode("a:linear/MatMul/MatMulAddFusion", "Gemm", False)], False),
        (PINNED, [KernelNode("a:linear/Gemm", "QGemm", True)], True),
        (PINNED, [KernelNode("a:linear/Gemm", "Gemm", False), KernelNode("a:linear/Gemm#2", "QGemm", True)], True),
        (PINNED, [KernelNode("b:linear/Gemm", "Gemm", False)], True),
        (replace(PINNED, kernel=""), [KernelNode("a:linear/Gemm", "Gemm", False)], False),
        (replace(PINNED, kernel=""), [KernelNode("a:linear/Gemm", "QGemm", True)], True),
    ],
)
def test_what_counts_as_kept(prediction: Prediction, realized: list[KernelNode], broken: bool) -> None:
    found = compare_kernels(with_predictions(prediction), realized)
    assert [m.node for m in found] == ["a:linear"] * broken
    assert all(m.rule == prediction.row for m in found)


def test_an_int8_kernel_that_nobody_planned_is_reported() -> None:
    stray = KernelNode("elsewhere/MatMul", "MatMulIntegerToFloat", True)
    (found,) = compare_kernels(with_predictions(), [stray, KernelNode("elsewhere/Add", "Add", False)])
    assert (found.node, found.predicted) == ("elsewhere", "no int8 kernel")


def test_a_target_without_a_float_row_predicts_any_float_kernel() -> None:
    """A row that does not fit leaves the node without one: then any float kernel keeps the word of the plan."""
    table = load_target("ort-cpu")
    only = table.model_copy(update={"row": tuple(r for r in table.row if r.placement == "int8")})
    prediction = qg.plan(six(), only, RECIPE).prediction("vector:linear")
    assert prediction is not None
    assert (prediction.kernel, prediction.int8) == ("", False)
    assert compare_kernels(with_predictions(prediction), [KernelNode("vector:linear/Gemm", "Gemm", False)]) == []


# a false row


FALSE = """
[[row]]
id = "linear.wishful"
op = "linear"
placement = "int8"
kernel = "QGemm"
form = "gemm"
rank = [2]
x = ["u8 affine per-tensor"]
weight = ["s8 symmetric per-channel(0) pair-safe"]
bias = ["vector"]
accumulator = "int32"
why = "it is hoped that {shape} with a float bias runs in int8"
"""


def false_table(folder: Path) -> str:
    """ort-cpu with one lie: a float bias at rank 2 is said to run in int8."""
    text = (resources.files("qatgraph.backends") / "ort_cpu.toml").read_text(encoding="utf-8")
    honest = '[[row]]\nid = "linear.gemm-vector-bias"'
    assert honest in text
    path = folder / "wishful.toml"
    path.write_text(text.replace(honest, f"{FALSE}\n{honest}"), encoding="utf-8")
    return str(path)


def test_a_false_row_fails_verification_by_name(tmp_path: Path) -> None:
    found = lowered(tmp_path, false_table(tmp_path))
    prediction = found.plan.prediction("vector:linear")
    assert prediction is not None
    assert (prediction.row, prediction.int8) == ("linear.wishful", True)
    (mismatch,) = compare_kernels(found.plan, found.realized)
    assert (mismatch.node, mismatch.rule) == ("vector:linear", "linear.wishful")
    assert "Gemm" in mismatch.realized
    report = qg.verify(found.qat, tmp_path / "six.onnx", [batch(3)])
    assert not report.ok
    with pytest.raises(VerifyError) as caught:
        report.check()
    assert caught.value.code == "QG601"
    assert "'vector:linear'" in caught.value.text()
    assert "'linear.wishful'" in caught.value.text()


@pytest.mark.parametrize("row_id", sorted({row for row, _, _, _ in EXPECTED.values()}))
def test_a_false_kernel_in_any_row_is_reported(layers: Lowered, row_id: str) -> None:
    table = load_target("ort-cpu")
    rows = tuple(r.model_copy(update={"kernel": "Wishful"}) if r.id == row_id else r for r in table.row)
    plan = qg.plan(six(), table.model_copy(update={"row": rows}), RECIPE)
    found = compare_kernels(plan, layers.realized)
    assert [(m.node, m.rule) for m in found] == [(n, row_id) for n, e in EXPECTED.items() if e[0] == row_id]


# without the engine


BLOCK = """
import sys
from importlib.machinery import ModuleSpec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in {blocked} else None

    def create_module(self, spec):
        raise ImportError(spec.name + " is blocked")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Blocker())
"""
ENGINES = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")


def python_without(modules: Sequence[str], code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which ``modules`` can be found but not imported."""
    command = [sys.executable, "-c", BLOCK.format(blocked=tuple(modules)) + code, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)


PLAN_SIX = """
import torch
from tests.test_prediction import RECIPE, six
import qatgraph as qg

torch.set_num_threads(1)
print(qg.plan(six(), recipe=RECIPE).to_json(), end="")
"""


def test_the_prediction_needs_no_engine() -> None:
    """And another order of hashing gives the same bytes."""
    done = python_without(ENGINES, PLAN_SIX, PYTHONHASHSEED="12345")
    assert done.returncode == 0, done.stderr
    assert done.stdout == planned().to_json()


@pytest.mark.parametrize("engine", ENGINES)
def test_there_the_engine_cannot_be_had(engine: str) -> None:
    done = python_without(ENGINES, f"import {engine}")
    assert done.returncode != 0
    assert f"{engine} is blocked" in done.stderr


# the naive forms, made by hand: the engine does what the rows say


@dataclass(frozen=True)
class Form:
    """DQ(x) and DQ(w) -> MatMul -> Add(b), or -> Gemm, as an exporter would write a linear.

    ``axis`` is where the scales of w[K, N] lie: 1 is N, 0 is K.
    """

    shape: tuple[int | str, ...]
    op: str = "MatMul"
    bias: str = "none"
    axis: int = 1
    n: int = 12

    def constants(self) -> dict[str, Any]:
        random = np.random.default_rng(0)
        k, scales = 16, (16, self.n)[self.axis]
        vector = random.normal(size=self.n).astype(np.float32)
        have: dict[str, Any] = {
            "x_scale": np.float32(0.02),
            "x_zero": np.uint8(128),
            "w": random.integers(-60, 61, (k, self.n)).astype(np.int8),
            "w_scale": random.uniform(0.002, 0.05, scales).astype(np.float32),
            "w_zero": np.zeros(scales, np.int8),
        }
        if self.bias == "int32":
            step = (have["x_scale"] * have["w_scale"]).astype(np.float32)
            have |= {
                "b": np.rint(vector / step).astype(np.int32),
                "b_scale": step,
                "b_zero": np.zeros(scales, np.int32),
            }
        elif self.bias != "none":
            have["b"] = vector.reshape([1] * (len(self.shape) - 1) + [-1]) if self.bias == "row" else vector
        return have

    def model(self) -> bytes:
        from onnx import TensorProto, checker, helper, numpy_helper

        def dequantize(value: str, **axis: int) -> Any:
            inputs = [{"x": "q"}.get(value, value), f"{value}_scale", f"{value}_zero"]
            return helper.make_node("DequantizeLinear", inputs, [f"{value}_float"], f"hand:linear/DQ_{value}", **axis)

        constants = self.constants()
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"], "hand:linear/Q"),
            dequantize("x"),
            dequantize("w", axis=self.axis),
        ]
        bias = "b"
        if self.bias == "int32":
            nodes.append(dequantize("b", axis=0))
            bias = "b_float"
        inputs = ["x_float", "w_float"]
        if self.op == "Gemm":
            nodes.append(helper.make_node("Gemm", [*inputs, bias], ["y"], "hand:linear/Gemm"))
        else:
            product = "y" if self.bias == "none" else "product"
            nodes.append(helper.make_node("MatMul", inputs, [product], "hand:linear/MatMul"))
            if self.bias != "none":
                nodes.append(helper.make_node("Add", [product, bias], ["y"], "hand:linear/Add"))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*self.shape[:-1], self.n])
        tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
        graph = helper.make_graph(nodes, "hand", [x], [y], tensors)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        checker.check_model(proto, full_check=True)
        return bytes(proto.SerializeToString())

    def input(self) -> Any:
        sizes = [4 if isinstance(s, str) else s for s in self.shape]
        return np.random.default_rng(1).normal(size=sizes).astype(np.float32)

    def exact(self) -> Any:
        """What the Q/DQ graph means, in double precision."""
        have = self.constants()
        q = np.clip(np.rint(self.input() / have["x_scale"]) + 128, 0, 255)
        weight = have["w"] * np.expand_dims(have["w_scale"].astype(float), 1 - self.axis)
        bias = have.get("b", 0) * have.get("b_scale", np.float32(1)).astype(float)
        return (q - 128) * float(have["x_scale"]) @ weight + bias

    def error(self) -> float:
        """The largest error of the engine, relative to the largest value."""
        from qatgraph.backends import ort_cpu

        (have,) = ort_cpu.session(self.model()).run(None, {"x": self.input()})
        want = self.exact()
        return float(np.abs(have - want).max() / np.abs(want).max())

    def kernels(self) -> list[KernelNode]:
        from qatgraph.backends import ort_cpu

        return [k for k in ort_cpu.audit(self.model()) if k.kernel not in ort_cpu.PLUMBING and k.kernel != "Add"]


FORMS: list[tuple[str, Form]] = [
    ("linear.gemm-int32-bias", Form(("batch", 16), "Gemm", "int32")),
    ("linear.gemm-int32-bias", Form((4, 16), "Gemm", "int32")),
    ("linear.matmul-row-bias", Form(("batch", 3, 16), bias="row")),
    ("linear.matmul-row-bias", Form((2, 3, 16), bias="row")),
    ("linear.matmul-row-bias", Form((2, 2, 3, 16), bias="row")),
    ("linear.matmul-row-bias", Form((2, "batch", 2, 3, 16), bias="row")),
    ("linear.matmul-vector-bias", Form(("batch", 3, 16), bias="vector")),
    ("linear.matmul-vector-bias", Form((2, "length", 16), bias="vector")),
    ("linear.matmul-vector-bias", Form(("batch", 2, 3, 16), bias="vector")),
    ("linear.matmul-vector-bias", Form(("batch", 2, 2, 3, 16), bias="vector")),
    ("linear.matmul-no-bias", Form(("batch", 16))),
    ("linear.matmul-no-bias", Form((2, 3, 16))),
    ("linear.matmul-no-bias", Form(("batch", 2, 3, 16))),
    ("linear.gemm-vector-bias", Form(("batch", 16), "Gemm", "vector")),
    ("linear.gemm-vector-bias", Form(("batch", 16), bias="vector")),
    ("linear.gemm-vector-bias", Form((4, 16), bias="vector")),
    ("linear.gemm-vector-bias", Form(("batch", 16), bias="row")),
    ("linear.static-vector-bias", Form((2, 3, 16), bias="vector")),
    ("linear.static-vector-bias", Form((2, 2, 3, 16), bias="vector")),
]


@pytest.mark.parametrize(("row_id", "form"), FORMS, ids=str)
def test_the_engine_does_with_a_form_what_its_row_says(row_id: str, form: Form) -> None:
    row = next(r for r in load_target("ort-cpu").row if r.id == row_id)
    assert form.bias in row.bias
    assert not row.rank or len(form.shape) in row.rank
    (kernel,) = form.kernels()
    assert kernel.kernel in row.kernel.split("|")
    assert kernel.int8 == (row.placement == "int8")
    assert form.error() < 1e-5


def test_every_row_of_a_linear_has_a_form_that_shows_it() -> None:
    shown = {row_id for row_id, _ in FORMS} | {"linear.scale-on-k"}  # this one below
    rows = load_target("ort-cpu").rows("linear")
    assert shown == {r.id for r in rows if (r.bias or r.weight) and not (r.out or r.on_request)}


@pytest.mark.parametrize("shape", [("batch", 3, 16), (2, 3, 16), ("batch", 16)], ids=str)
def test_scales_on_k_are_refused_or_wrong(shape: tuple[int | str, ...]) -> None:
    """The engine takes the form for an int8 product either way; with K == N nothing tells that it is wrong."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    from qatgraph.backends import ort_cpu

    assert ON_K in next(r for r in load_target("ort-cpu").row if r.id == "linear.scale-on-k").weight
    oblong, square = Form(shape, axis=0), Form(shape, axis=0, n=16)
    assert [k.int8 for k in oblong.kernels()] == [k.int8 for k in square.kernels()] == [True]
    session = ort_cpu.session(oblong.model())
    with pytest.raises(Fail, match="zero point is not valid"):
        session.run(None, {"x": oblong.input()})
    assert square.error() > 0.05
    assert replace(square, axis=1).error() < 1e-5  # the same with the scales on N is right
