"""Integer products of the reference and what they are quantized with, against the kernels of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qatgraph import reference
from qatgraph.backends import ort_cpu
from qatgraph.reference import Array, Grid
from tests.qdq import Between, grid, steps

few = settings(max_examples=30, deadline=None, derandomize=True)  # each builds a file and a session
some = settings(max_examples=100, deadline=None, derandomize=True)


def integers(random: np.random.Generator, dtype: Any, *shape: int, most: int = 255) -> Array:
    span = np.iinfo(dtype)
    return random.integers(max(span.min, -most), min(span.max, most) + 1, shape).astype(dtype)


@st.composite
def products(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of ``reference.gemm``; weights so small that no pair of them can saturate on any CPU."""
    rows, k, n = (draw(st.integers(1, 9)) for _ in range(3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.uint8, np.int8]))
    x_zero, out_zero = integers(random, dtype, 2)
    return {
        "x": integers(random, dtype, rows, k),
        "x_grid": grid(random.uniform(0.001, 0.1), x_zero, dtype),
        "weight": integers(random, np.int8, n, k, most=63),
        "w_scale": random.uniform(0.001, 0.02, n if draw(st.booleans()) else ()).astype(np.float32),
        "bias": random.integers(-5000, 5000, n).astype(np.int32) if draw(st.booleans()) else None,
        "out_grid": grid(random.uniform(0.01, 0.1), out_zero, dtype),
    }


def engine(kernel: str, layer: dict[str, Any]) -> Array:
    weight = Grid(layer["w_scale"], np.zeros(layer["w_scale"].shape, np.int8))
    inputs = [(layer["x"], layer["x_grid"])]
    if kernel == "QLinearMatMul":
        return Between("MatMul", kernel, inputs, layer["out_grid"], [(layer["weight"].T, weight)], (1,)).run()
    constants = [(layer["weight"], weight)]
    if layer["bias"] is not None:
        scale = np.asarray(layer["x_grid"].scale * layer["w_scale"])
        constants.append((layer["bias"], Grid(scale, weight.zero_point.astype(np.int32))))
    return Between("Gemm", kernel, inputs, layer["out_grid"], constants, (0, 0), {"transB": 1}).run()


@pytest.mark.parametrize("kernel", ["QGemm", "QLinearMatMul"])
@few
@given(layer=products())
def test_a_linear_equals_the_engine(kernel: str, layer: dict[str, Any]) -> None:
    if kernel == "QLinearMatMul":
        layer["bias"] = None
    assert steps(reference.gemm(**layer), engine(kernel, layer)) == 0


@few
@given(st.integers(0, 2**32), st.sampled_from([np.uint8, np.int8]), st.booleans())
def test_a_product_of_two_activations_equals_the_engine(seed: int, dtype: Any, stacked: bool) -> None:
    random = np.random.default_rng(seed)
    batch = (2, 3) if stacked else ()
    a, b = integers(random, dtype, *batch, 5, 7), integers(random, dtype, *batch, 7, 4)
    zeros = integers(random, dtype, 3)
    a_grid, b_grid, out_grid = (
        grid(random.uniform(0.01, 0.1) * s, z, dtype) for s, z in zip((1, 1, 5), zeros, strict=True)
    )
    want = Between("MatMul", "QLinearMatMul", [(a, a_grid), (b, b_grid)], out_grid).run()
    assert steps(reference.matmul(a, a_grid, b, b_grid, out_grid), want) == 0


def single(operator: str, inputs: dict[str, Array], results: int, **attributes: Any) -> list[Array]:
    """One operator on its inputs, as it is."""
    names = [f"y{i}" for i in range(results)]
    node = helper.make_node(operator, [*inputs], names, **attributes)
    sources = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in inputs.items()
    ]
    graph = helper.make_graph([node], operator, sources, [helper.make_empty_tensor_value_info(n) for n in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found: list[Array] = ort_cpu.session(model.SerializeToString(), threads=1).run(None, inputs)
    return found


@few
@given(st.integers(0, 2**32), st.booleans())
def test_integer_products_equal_the_engine(seed: int, per_column: bool) -> None:
    random = np.random.default_rng(seed)
    a, b = integers(random, np.uint8, 5, 7), integers(random, np.uint8, 7, 4)
    a_zero = integers(random, np.uint8, 1)
    b_zero = integers(random, np.uint8, 4 if per_column else 1)
    (want,) = single("MatMulInteger", {"a": a, "b": b, "az": a_zero.reshape(()), "bz": b_zero}, 1)
    assert np.array_equal(reference.matmul_integer(a, b, a_zero, b_zero), want)
    rows = integers(random, np.uint8, 5)  # which the standard allows, and the engine does not have
    slow = [[sum((int(p) - int(z)) * (int(q) - int(b_zero[0])) for p, q in zip(r, c, strict=True)) for c in b.T]
            for r, z in zip(a, rows, strict=True)]  # fmt: skip
    assert reference.matmul_integer(a, b, rows, b_zero[:1]).tolist() == slow


@some
@given(st.integers(0, 2**32), st.floats(-3, 3), st.floats(0, 3))
def test_a_dynamic_grid_equals_the_engine(seed: int, centre: float, spread: float) -> None:
    x = (np.random.default_rng(seed).standard_normal(9) * spread + centre).astype(np.float32)
    q, found = reference.dynamic_quantize(x)
    for have, want in zip(
        (q, found.scale, found.zero_point), single("DynamicQuantizeLinear", {"x": x}, 3), strict=True
    ):
        assert have.dtype == want.dtype
        assert np.array_equal(have, want)


@few
@given(st.integers(0, 2**32), st.integers(0, 2), st.sampled_from([np.uint8, np.int8]))
def test_quantizing_along_an_axis_equals_the_engine(seed: int, axis: int, dtype: Any) -> None:
    random = np.random.default_rng(seed)
    x = (5 * random.standard_normal((3, 4, 5))).astype(np.float32)
    n = x.shape[axis]
    scale, zero = random.uniform(0.01, 0.2, (n,)).astype(np.float32), integers(random, dtype, n)
    (want,) = single("QuantizeLinear", {"x": x, "s": scale, "z": zero}, 1, axis=axis)
    q = reference.quantize(x, scale, zero, axis=axis)
    assert steps(q, want) == 0
    (back,) = single("DequantizeLinear", {"x": q, "s": scale, "z": zero}, 1, axis=axis)
    assert np.array_equal(reference.dequantize(q, scale, zero, axis=axis), back)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "x": lambda x: x ^ 1,
    "weight": lambda weight: weight[::-1],
    "w_scale": lambda scale: scale[::-1],
    "bias": lambda bias: -bias,
    "x_grid": lambda g: Grid(g.scale, g.zero_point + np.uint8(1)),
    "out_grid": lambda g: Grid(g.scale, g.zero_point + np.uint8(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_linear_than_the_engines_is_seen(fault: str) -> None:
    random = np.random.default_rng(0)
    layer: dict[str, Any] = {
        "x": integers(random, np.uint8, 9, 16),
        "x_grid": grid(0.03, 99),
        "weight": integers(random, np.int8, 6, 16, most=63),
        "w_scale": random.uniform(0.001, 0.02, 6).astype(np.float32),
        "bias": random.integers(-5000, 5000, 6).astype(np.int32),
        "out_grid": grid(0.05, 100),
    }
    want = engine("QGemm", layer)
    assert steps(reference.gemm(**layer), want) == 0
    assert steps(reference.gemm(**{**layer, fault: FAULTS[fault](layer[fault])}), want) > 0
