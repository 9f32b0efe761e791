"""Dynamic activations, from the recipe to the proof: one grid a tensor at run time, and each planted fault is found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qatgraph as qg
from qatgraph import reference
from qatgraph.backends import emulation, ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import TrainError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import owner
from qatgraph.parity import compare_regions
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe, load_recipe
from qatgraph.proof import feed_of, prove
from qatgraph.quantizers.dynamic import DynamicFakeQuantize, dynamic_grid, round_dynamically
from qatgraph.report.machine import has_vnni
from qatgraph.specs import QuantSpec
from tests.lowered import Lowered, faults, lower, read, write
from tests.models import ZOO, captured

DYNAMIC = QuantSpec.parse("u8 affine per-tensor dynamic")
STATIC = QuantSpec.parse("u8 affine per-tensor")
UP = "up:linear"


@cache
def encoder() -> Lowered:
    return lower(ZOO["encoder"], load_recipe("int8-dynamic"), seeds=())


def found(lowered: Lowered) -> list[str]:
    return faults(lowered, ZOO["encoder"].inputs(3))


# ---------------------------------------------------------------- the grid


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.floats(-30, 30), st.floats(-4, 4), st.integers(0, 2**16))
def test_fake_quantizer_and_reference_find_the_same_grid(size: int, power: float, shift: float, seed: int) -> None:
    x = ((np.random.default_rng(seed).normal(size=size) + shift) * 10.0**power).astype(np.float32)
    scale, zero = dynamic_grid(torch.from_numpy(x))
    q, grid = reference.dynamic_quantize(x)
    assert scale.numpy().tobytes() == grid.scale.astype(np.float32).tobytes()
    assert int(zero) == int(grid.zero_point)
    rounded = round_dynamically(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(rounded, reference.dequantize(q, grid.scale, grid.zero_point))


def test_the_gradient_passes_and_nothing_is_observed() -> None:
    quantizer = DynamicFakeQuantize(DYNAMIC)
    x = torch.linspace(-3, 5, 100, requires_grad=True)
    assert quantizer(x) is x
    quantizer.switch_on()
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())
    assert [n for n, _ in quantizer.named_buffers()] == ["calibrated"]


# ---------------------------------------------------------------- the plan


def rows(plan: Plan) -> dict[str, str]:
    return {p.node: p.row for p in plan.predictions if plan.placement(p.node).placement == "int8"}


def test_nobody_gets_a_dynamic_row_who_does_not_ask() -> None:
    assert "linear.dynamic" not in rows(qg.plan(captured("encoder"))).values()
    found = rows(qg.plan(captured("encoder"), recipe="int8-dynamic"))
    assert set(found.values()) == {"linear.dynamic"}


def test_one_line_makes_one_linear_dynamic_and_a_fixed_grid_is_another() -> None:
    plan = qg.plan(captured("mlp"), recipe=Recipe(override=(Override(select=UP, x=DYNAMIC),)))
    assert rows(plan)[UP] == "linear.dynamic"
    assert rows(plan)["down:linear"] != "linear.dynamic"
    assert "dynamic" not in rows(qg.plan(captured("mlp"), recipe=Recipe(override=(Override(select=UP, x=STATIC),))))[UP]
    assert DYNAMIC.meet(STATIC) is STATIC.meet(DYNAMIC) is None


def test_calibration_needs_batches_only_where_a_grid_does() -> None:
    graph = captured("mlp")
    for recipe, fine in (("int8-dynamic", True), ("int8", False)):
        qat = qg.prepare(graph, qg.plan(graph, recipe=recipe))
        if fine:
            qg.calibrate(qat, [], progress=False)
        else:
            with pytest.raises(TrainError, match="QG701"):
                qg.calibrate(qat, [], progress=False)


# ---------------------------------------------------------------- the proof


def test_the_kernels_and_regions_are_those_planned() -> None:
    report = prove(ort_cpu, encoder().qat, encoder().file, [ZOO["encoder"].inputs(3)], encoder().model)
    assert report.failures == []
    assert report.kernels["planned"] == report.kernels["realized"] == report.parity["regions"] == 6
    assert report.parity["float_max_rel"] <= 1e-6
    assert report.fidelity["engine"]["cosine_min"] > 0.99
    kernels = {n.kernel for n in ort_cpu.audit(encoder().file) if n.int8}
    assert "DynamicQuantizeMatMul" in kernels


def test_a_planted_scale_and_a_planted_weight_are_found() -> None:
    proto = encoder().proto
    integers = next(n for n in proto.graph.node if n.op_type == "MatMulInteger")
    weight = read(proto, integers.input[1])
    weight[0, 0] += 1 if weight[0, 0] < 60 else -1
    write(proto, integers.input[1], weight)
    assert "its weight" in found(encoder().changed(proto))
    proto = encoder().proto
    unit = next(n for n in proto.graph.node if n.name == f"{owner(integers.name)}/Mul")
    write(proto, unit.input[1], read(proto, unit.input[1]) * np.float32(1.001))
    seen = found(encoder().changed(proto))
    assert "its weight" in seen
    assert any("float outputs differ" in f for f in seen)


@pytest.mark.skipif(not emulation.available(), reason="needs qemu-x86_64")
def test_pair_safe_weights_are_exact_without_vnni_and_the_full_range_is_not() -> None:
    """The control: with weights of 127 the sums of the same kernel saturate."""
    x = np.concatenate([np.full((4, 64), 1.0, np.float32), np.full((4, 64), -0.01, np.float32)])
    for top, exact in ((64, True), (127, False)):
        weight = np.full((8, 64), top, np.int8)
        file = _product(weight)
        (native,) = ort_cpu.run(ort_cpu.session(file), {"x": x})
        (haswell,) = ort_cpu.run_on("Haswell", file, {"x": x})
        want = reference.linear_dynamic(x, weight, np.ones(8, np.float32), None)
        saturated = reference.linear_dynamic(
            x, weight, np.ones(8, np.float32), None, accumulator=reference.accumulate_pair16
        )
        np.testing.assert_array_equal(haswell, saturated)
        assert np.array_equal(haswell, want) is exact
        if has_vnni():
            np.testing.assert_array_equal(native, want)


def _product(weight: np.ndarray) -> bytes:
    from onnx import TensorProto

    from qatgraph.backends.onnx_builder import File

    file = File()
    q = file.add("DynamicQuantizeLinear", file.input("x", np.zeros((8, 64), np.float32)), results=3)
    sums = file.add("MatMulInteger", q, file.constant("w", np.ascontiguousarray(weight.T)), f"{q}2")
    unit = file.add("Mul", f"{q}1", file.constant("s", np.ones(8, np.float32)))
    result = file.add("Mul", file.add("Cast", sums, to=1), unit)
    return file.bytes([(result, TensorProto.FLOAT)], 21, typed=False)


def test_a_planted_scale_in_the_graph_is_found_in_every_region() -> None:
    tapped, names = ort_cpu.tap(encoder().file, encoder().plan)
    qdq = convert(Graph.of(encoder().qat))
    feeds = [feed_of(qdq, ZOO["encoder"].inputs(5))]
    taps = [t for found, _ in ort_cpu.run_taps(tapped, names, feeds) for t in found]
    assert not [p.failure for p in compare_regions(qdq, taps).values() if p.failure]
    for name, buffer in qdq.module.named_buffers():
        if name.endswith("/scale"):
            buffer.mul_(2)
    assert all(p.failure for p in compare_regions(qdq, taps).values())
