"""OpenVINO, the second engine of the same plans: its kernels are those predicted, its integers the reference's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qatgraph as qg
from qatgraph import api, reference
from qatgraph.backends import artifact, emulation, onnx_taps, openvino_cpu, ort_cpu
from qatgraph.backends.openvino_graph import EngineNode, kernel_nodes
from qatgraph.conversion import convert
from qatgraph.errors import LowerError, PlanError, TargetError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import compare_kernels
from qatgraph.latency import measure
from qatgraph.parity import RegionParity, RegionTap, compare_regions
from qatgraph.planning.target import Target, load_target
from qatgraph.proof import feed_of, prove
from qatgraph.reference import Array
from qatgraph.report.machine import has_vnni
from qatgraph.report.report import Report
from qatgraph.saturation import analyse
from tests.false_rows import with_row
from tests.lowered import Lowered, read, write

TARGET = "openvino-cpu"
BATCHES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]


class Net(nn.Module):
    """A residual block, a max pool, two branches side by side, the mean over the image, a bounded layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.pool(torch.relu(x + self.block(x)))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        y: torch.Tensor = self.head(nn.functional.gelu(self.hidden(self.mean(x).flatten(1))))
        return y


class Forked(nn.Module):
    """A convolution that another reads, and a clamp of its own."""

    def __init__(self, mover: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.second, self.mover = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), mover

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        return self.second(x), torch.clamp(self.mover(x), 0.0, 0.5)


@cache
def captured(net: Callable[[], nn.Module] = Net) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = net().eval()
    return model, qg.capture(model, BATCHES[0], {"x": {0: torch.export.Dim("batch")}})


@cache
def made(net: Callable[[], nn.Module] = Net, target: str | Target = TARGET) -> Lowered:
    model, graph = captured(net)
    plan = qg.plan(graph, target)
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, BATCHES, progress=False)
    return Lowered(model, qat, plan, openvino_cpu.lower(convert(Graph.of(qat)), plan))


def verified(one: Lowered) -> Report:
    return prove(openvino_cpu, one.qat, one.file, BATCHES, one.model)


def regions(one: Lowered) -> dict[str, RegionParity]:
    qdq = convert(Graph.of(one.qat))
    return compare_regions(qdq, (t for taps in taps_of(one) for t in taps), quantize=openvino_cpu.quantize)


def taps_of(one: Lowered) -> list[list[RegionTap]]:
    """What its regions read and write, batch by batch."""
    tapped, names = openvino_cpu.tap(one.file, one.plan)
    feeds = (feed_of(Graph.of(one.qat), b) for b in BATCHES)
    return [taps for taps, _ in openvino_cpu.run_taps(tapped, names, feeds)]


def test_every_product_runs_in_int8_as_predicted_and_equals_the_reference() -> None:
    report = verified(made())
    assert report.failures == []
    assert report.kernels["planned"] == report.kernels["realized"] == 10
    assert report.parity["regions"] == 10
    assert report.parity["max_steps"] == report.parity["off_by_one_share"] == 0
    assert report.parity["out_max_steps"] <= 1  # the deviation of its rows
    assert report.parity["out_off_share"] < 1e-3
    assert report.fidelity["engine"]["cosine_mean"] > 0.98
    assert "same_under_x64quantprecision" not in report.fidelity


@pytest.mark.parametrize("region", ["stem:conv2d", "block:conv2d", "left:conv2d", "right:conv2d", "head:linear"])
def test_another_weight_in_the_file_is_found_in_its_region(region: str) -> None:
    proto = made().proto
    core = next(n for n in proto.graph.node if n.name.startswith(f"{region}/") and n.op_type in ("Conv", "Gemm"))
    dequantize = next(n for n in proto.graph.node if core.input[1] in n.output)
    write(proto, dequantize.input[0], -read(proto, dequantize.input[0]))
    found = regions(made().changed(proto))
    assert {n for n, r in found.items() if r.failure} == {region}


def half_away(x: Array, scale: Array, zero_point: Array) -> Array:
    """A quantize of another rounding."""
    low, high = ((np.float32(end) - np.float32(zero_point)) * np.float32(scale) for end in (0, 255))
    factor = np.float32(255) / (high - low)
    raw = np.clip(x, low, high) * factor + -low * factor
    wrong: Array = np.floor(raw + np.float32(0.5)).astype(np.uint8)
    return wrong


@pytest.mark.parametrize("behind", ["", "layer_norm"])
def test_ties_count_but_behind_what_the_engine_joins(behind: str) -> None:
    scale, zero = np.asarray(0.5, np.float32), np.asarray(128, np.uint8)
    ties = (np.arange(-100, 100, dtype=np.float32) + np.float32(0.5)) * scale
    least, largest = openvino_cpu.quantize.least_and_largest(ties, scale, zero, behind=behind)
    wrong = half_away(ties, scale, zero)
    assert bool(((wrong < least) | (wrong > largest)).any()) == (not behind)


def seen_on_haswell(file: bytes) -> list[RegionTap]:
    """What the regions of a file of ``Net`` read and write on an emulated CPU with AVX2 and without VNNI."""
    tapped, names = openvino_cpu.tap(file, made().plan)
    feed = feed_of(Graph.of(made().qat), BATCHES[0])
    outputs = openvino_cpu.run_on("Haswell", tapped, feed)
    ((taps, _),) = onnx_taps.read_taps([feed | dict(zip(artifact.interface(tapped)[1], outputs, strict=True))], names)
    return taps


@pytest.mark.slow
def test_without_vnni_every_region_is_exact_and_would_not_be_with_pairs_at_each_position() -> None:
    """The first convolution reads three channels: an odd number."""
    if not emulation.available():
        pytest.skip("NOT RUN: qemu-x86_64 is not installed")
    qdq = convert(Graph.of(made().qat))
    found = compare_regions(qdq, seen_on_haswell(made().file), quantize=openvino_cpu.quantize)
    assert len(found) == 10
    assert {n: r.failure for n, r in found.items() if r.failure} == {}
    proto = made().proto
    core = next(n for n in proto.graph.node if n.name == "stem:conv2d/Conv")
    weight = next(n for n in proto.graph.node if core.input[1] in n.output).input[0]
    anew = np.zeros_like(read(proto, weight))
    anew[:, :2, 0, 1] = 127  # the second position: neighbours where pairs start anew, and there alone
    assert reference.worst_pair(reference.k_rows(anew)) == 127
    write(proto, weight, anew)
    (stem,) = (t for t in seen_on_haswell(proto.SerializeToString()) if t.node == "stem:conv2d")
    (own,) = (t for t in taps_of(made().changed(proto))[0] if t.node == "stem:conv2d")
    np.testing.assert_array_equal(stem.integers[0], own.integers[0])
    assert not has_vnni() or bool((stem.out < own.out).any())


def test_a_product_that_runs_in_float_is_a_broken_prediction() -> None:
    """Of a quantize that is gone the engine cannot know; the plan still promises a kernel."""
    proto = made().proto
    conv = next(n for n in proto.graph.node if n.name == "stem:conv2d/Conv")
    dequantize = next(n for n in proto.graph.node if conv.input[0] in n.output)
    quantize = next(n for n in proto.graph.node if dequantize.input[0] in n.output)
    conv.input[0] = quantize.input[0]
    broken = compare_kernels(made().plan, openvino_cpu.audit(proto.SerializeToString()))
    assert "stem:conv2d" in {m.node for m in broken}


def test_the_plan_of_one_target_is_refused_for_the_file_of_another() -> None:
    plan = qg.plan(captured()[1], "ort-cpu")
    assert plan.hash() != made().plan.hash()
    other = ort_cpu.lower(convert(Graph.of(made().qat)), replace(made().plan, target="ort-cpu"))
    with pytest.raises(qg.QatgraphError, match="QG603"):
        verified(replace(made(), file=other))


MOVERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda x: x,
    "a max pool": lambda x: torch.max_pool2d(x, 2),
    "a transpose": lambda x: x.transpose(2, 3),
    "a reshape": lambda x: x.flatten(1),
    "a concatenation": lambda x: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("mover", MOVERS)
def test_behind_what_only_moves_integers_a_clamp_is_refused_too(mover: str) -> None:
    model = made(Forked if mover == "nothing" else lambda: Forked(MOVERS[mover]))
    assert model.plan.int8_nodes() == ["second:conv2d"]
    assert verified(model).failures == []


class Behind(nn.Module):
    """A convolution, and what reads its integers as floats."""

    def __init__(self, reader: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.reader = nn.Conv2d(3, 16, 3), reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.first(x))


READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a mean": lambda x: x.mean((2, 3)),
    "a concatenation": lambda x: torch.erf(torch.cat([x, x], 1)),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_may_read_integers_in_the_place_of_floats_breaks_no_promise(reader: str) -> None:
    model = made(lambda: Behind(READERS[reader]))
    assert model.plan.int8_nodes() == ["first:conv2d"]
    assert verified(model).failures == []


def test_a_clamp_that_the_kernel_takes_in_costs_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3)).eval()
    plan = qg.plan(qg.capture(net, BATCHES[0]), TARGET)
    assert plan.int8_nodes() == ["0:conv2d", "1:clamp", "2:max_pool2d", "3:conv2d"]


def test_a_clamp_of_its_own_behind_integers_is_refused_by_the_table_and_found_by_verify() -> None:
    """The engine rounds its bounds to integers of the grid."""
    assert made(Forked).plan.int8_nodes() == ["second:conv2d"]
    assert verified(made(Forked)).failures == []
    false = next(r for r in load_target(TARGET).row if r.id == "conv.integers").model_copy(update={"not_read_by": ()})
    broken = made(Forked, with_row(load_target(TARGET), false))
    assert broken.plan.int8_nodes() == ["first:conv2d", "second:conv2d"]
    assert any(told.startswith("output 'output_1': values differ by 0.0") for told in verified(broken).failures)


def quantized(x: Array, scale: Array, zero: Array) -> Array:
    """By the engine."""
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]
    border = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    result = [helper.make_tensor_value_info("q", TensorProto.UINT8, x.shape)]
    constants = [numpy_helper.from_array(a, n) for a, n in ((scale, "scale"), (zero, "zero"))]
    graph = helper.make_graph(nodes, "quantize", border, result, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return openvino_cpu.run(openvino_cpu.session(model.SerializeToString()), {"x": x})[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(2**-13, 20, width=32), st.integers(0, 255), st.integers(0, 2**16))
def test_the_engine_quantizes_as_the_reference_does(step: float, zero_point: int, seed: int) -> None:
    """Between, at and on both sides of the middle of two integers, and far beyond the ends."""
    scale, zero, random = np.asarray(step, np.float32), np.asarray(zero_point, np.uint8), np.random.default_rng(seed)
    ties = (random.integers(0, 256, 300) - zero_point).astype(np.float32) * scale + np.float32(0.5) * scale
    x = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, -np.float32(np.inf)),
                        random.uniform(-300, 300, 300).astype(np.float32) * scale, [1e9, -1e9]])  # fmt: skip
    x = x.astype(np.float32)[None]
    np.testing.assert_array_equal(quantized(x, scale, zero), reference.multiply_quantize(x, scale, zero))


def test_a_true_division_is_not_what_the_engine_does() -> None:
    scale, zero = np.asarray(0.0123, np.float32), np.asarray(3, np.uint8)
    x = ((np.arange(256) - 3).astype(np.float32) * scale + np.float32(0.5) * scale)[None]
    differ = quantized(x, scale, zero) != reference.quantize(x, scale, zero)
    assert 0 < differ.mean() < 1


@cache
def behind_layer_norm() -> tuple[Array, Array, dict[str, Array]]:
    """The float border and the integers of a quantize that the engine joins to a LayerNorm, and the grid."""
    random = np.random.default_rng(0)
    scale, zero = np.asarray(0.021, np.float32), np.asarray(121, np.uint8)
    w = {n: random.normal(1, 0.3, 384).astype(np.float32) for n in ("gamma", "beta")}
    grid: dict[str, Array] = {"scale": scale, "zero": zero}
    product = {"w": random.integers(-64, 65, (384, 64)).astype(np.int8), "ws": np.float32(0.01), "wz": np.int8(0)}
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in (w | grid | product).items()]
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["border"]),
        helper.make_node("QuantizeLinear", ["border", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["y"]),
    ]
    floats = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 384])
    kinds = {"y": TensorProto.FLOAT, "border": TensorProto.FLOAT, "q": TensorProto.UINT8}
    outputs = [helper.make_tensor_value_info(n, k, None) for n, k in kinds.items()]
    graph = helper.make_graph(nodes, "joined", [floats], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    feed = {"x": random.normal(size=(200, 16, 384)).astype(np.float32)}
    _, border, integers = openvino_cpu.run(openvino_cpu.session(model.SerializeToString()), feed)
    return border, integers, grid


def beyond(near: float, shift: float = 0.0) -> int:
    """How many integers are none that the quantize may make of the border."""
    border, integers, grid = behind_layer_norm()
    rule = reference.EngineQuantize(reference.multiply_quantize, frozenset({"layer_norm"}), near)
    border = border + np.float32(shift) * grid["scale"]
    least, largest = rule.least_and_largest(border, grid["scale"], grid["zero"], behind="layer_norm")
    return int(((integers < least) | (integers > largest)).sum())


def test_a_quantize_that_is_joined_to_a_layer_norm_rounds_ties_alone_otherwise() -> None:
    assert beyond(near=0) < 1e-4 * behind_layer_norm()[1].size
    assert beyond(openvino_cpu.quantize.near) == 0


def test_a_shift_of_a_thousandth_of_a_step_is_not_taken_for_a_tie() -> None:
    assert beyond(openvino_cpu.quantize.near, shift=1e-3) > 0


def test_what_is_joined_to_a_product_is_read_under_its_own_name() -> None:
    operations = {"a": ("Conv", "QuantizeLinear"), "b": ("Add",), "c": ("Relu",), "d": ("Gelu",), "e": ("MaxPool",)}
    nodes = [
        helper.make_node(op, [f"{name}/in"], [f"{name}/out"], f"{name}/{op}")
        for name, ops in operations.items()
        for op in ops
    ]
    written = helper.make_graph(nodes, "graph", [], [helper.make_tensor_value_info("e/out", TensorProto.FLOAT, None)])
    joined = ["a/Conv/WithoutBiases", "Multiply_1", "a/QuantizeLinear", "b/Add", "c/Relu", "d/Gelu"]
    both, half = (EngineNode("Convolution", "u8", joined, ["u8", other]) for other in ("u8", "f32"))
    assert [(n.name, n.int8, n.moves) for n in kernel_nodes(written, [both])] == [
        ("a/Conv", True, False), ("b/Add", True, False), ("d/Gelu", False, False)]  # fmt: skip
    assert [(n.int8, n.moves) for n in kernel_nodes(written, [half]) if n.name == "b/Add"] == [(True, True)]
    (last,) = kernel_nodes(written, [EngineNode("Pooling", "u8", ["e/out"], ["u8"])])
    assert (last.name, last.kernel) == ("e/MaxPool", "Pooling")


def test_a_clamp_on_integers_is_written_as_max_and_min(tmp_path: Path) -> None:
    class Bounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.clamp(x, -1.0, 0.5)

    graph = qg.capture(Bounded(), BATCHES[0])
    path = qg.lower(qg.prepare(graph, qg.plan(graph, TARGET)).eval(), tmp_path / "model.onnx")
    assert [n.op_type for n in onnx.load(path).graph.node] == ["Max", "Min"]
    (have,) = openvino_cpu.run(openvino_cpu.session(str(path)), {"x": BATCHES[0].numpy()})
    np.testing.assert_array_equal(have, np.clip(BATCHES[0].numpy(), -1.0, 0.5))


def test_latency_is_that_of_the_target_s_engine(tmp_path: Path) -> None:
    model, graph = captured()
    file = tmp_path / "model.onnx"
    file.write_bytes(made().file)
    found = measure(model, graph, file, BATCHES[0], "openvino_cpu")
    assert "OpenVINO" in found["how"]
    assert TARGET in found["how"]
    assert min(found[k] for k in ("engine_ms", "float_ms", "float_same_options_ms")) > 0


def test_what_the_engine_lacks_is_said() -> None:
    with pytest.raises(PlanError, match="QG313"):
        analyse(openvino_cpu, made().qat, made().model, BATCHES, BATCHES[0])
    with pytest.raises(LowerError, match="QG505"):
        openvino_cpu.session(b"no file")
    with pytest.raises(LowerError, match="QG508"):
        openvino_cpu.run(openvino_cpu.session(made().file), {"x": np.zeros((1, 2), np.float32)})


def test_a_missing_package_is_named_before_any_work(monkeypatch: Any) -> None:
    for name in [n for n in sys.modules if n.startswith("qatgraph.backends.openvino")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match="QG412") as caught:
        api.load_backend(made().plan)
    assert "pip install 'qatgraph[openvino]'" in str(caught.value)
