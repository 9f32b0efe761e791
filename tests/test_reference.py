"""The integer reference, held against slow exact arithmetic and against the kernels of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from qatgraph import reference
from qatgraph.backends import ort_cpu
from qatgraph.quantizers.grids import PAIR_LIMIT
from qatgraph.reference import Array

some = settings(max_examples=200, deadline=None, derandomize=True)
few = settings(max_examples=50, deadline=None, derandomize=True)  # each builds a file and a session
scales = st.floats(2.0**-20, 2.0**10, width=32)
sizes = st.integers(1, 9)
TIES = (np.arange(-128, 128, dtype=np.float32) + np.float32(0.5)) * np.float32(0.637)


@st.composite
def layers(draw: st.DrawFn, safe: bool = False) -> dict[str, Any]:
    """The arguments of ``reference.linear``; with ``safe``, no pair of weights can overflow 16 bits on any machine."""
    rows, inputs, outputs = draw(sizes), draw(sizes), draw(sizes)
    weight = draw(arrays(np.int8, (outputs, inputs), elements=st.integers(-127, 127)))
    per_channel = draw(st.booleans())
    return {
        "x": draw(arrays(np.uint8, (rows, inputs))),
        "x_scale": np.array(draw(scales), np.float32),
        "zero_point": draw(st.integers(0, 255)),
        "weight": pair_safe(weight) if safe else weight,
        "w_scale": draw(arrays(np.float32, outputs if per_channel else (), elements=scales)),
        "bias": draw(
            st.one_of(
                st.none(),
                arrays(np.int32, outputs, elements=st.integers(-(2**30), 2**30)),
                arrays(np.float32, outputs, elements=st.floats(-1e6, 1e6, width=32)),
            )
        ),
    }


def pair_safe(weight: Array) -> Array:
    """Shrink the second of each pair of one sign until the two sum to at most 128."""
    safe = weight.astype(np.int32)
    even = safe.shape[-1] // 2 * 2
    a, b = safe[..., 0:even:2], safe[..., 1:even:2]
    room = np.where(a * b > 0, PAIR_LIMIT - np.abs(a), 127)
    b[...] = np.sign(b) * np.minimum(np.abs(b), room)
    return safe.astype(np.int8)


# ---------------------------------------------------------------- against exact arithmetic, element by element


def wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def slow_accumulate(x: Array, zero_point: int, weight: Array) -> Array:
    rows = [
        [wrapped(sum((int(a) - zero_point) * int(b) for a, b in zip(r, w, strict=True))) for w in weight] for r in x
    ]
    return np.array(rows, np.int32)


def slow_pair16(x: Array, zero_point: int, weight: Array) -> Array:
    out = np.zeros((len(x), len(weight)), np.int32)
    for i, row in enumerate(x.tolist()):
        for j, w in enumerate(weight.tolist()):
            products = [a * b for a, b in zip(row, w, strict=True)] + [0]
            sums = [products[k] + products[k + 1] for k in range(0, len(row), 2)]
            out[i, j] = sum(min(max(s, -32768), 32767) for s in sums) - zero_point * sum(w)
    return out


def slow_linear(x: Array, x_scale: Array, zero_point: int, weight: Array, w_scale: Array, bias: Array | None) -> Array:
    acc = slow_accumulate(x, zero_point, weight)
    out = np.zeros(acc.shape, np.float32)
    for (i, j), value in np.ndenumerate(acc):
        step = np.float32(x_scale) * np.float32(w_scale if w_scale.ndim == 0 else w_scale[j])
        whole = bias is not None and bias.dtype == np.int32
        out[i, j] = np.float32(wrapped(int(value) + (int(bias[j]) if bias is not None and whole else 0))) * step
        if bias is not None and not whole:
            out[i, j] += bias[j]
    return out


def slow_quantize(x: Array, scale: Array, zero_point: Array) -> Array:
    span = np.iinfo(zero_point.dtype)
    raw = [round(float(v / scale)) + int(zero_point) for v in x]  # Python rounds half to even, exactly
    return np.array([min(max(r, span.min), span.max) for r in raw], zero_point.dtype)


def slow_dequantize(q: Array, scale: Array, zero_point: Array) -> Array:
    return np.array([np.float32(int(v) - int(zero_point)) * scale for v in q], np.float32)


def slow_worst_pair(weight: Array) -> int:
    """The largest absolute sum that one pair can reach when an activation is 0 or 1; an odd last one stands alone."""
    pairs = [(r[k], r[k + 1]) for r in ([*row, 0] for row in weight.tolist()) for k in range(0, len(r) - 1, 2)]
    return max((max(abs(a * i + b * j) for i in (0, 1) for j in (0, 1)) for a, b in pairs), default=0)


@some
@given(arrays(np.float32, sizes, elements=st.floats(-1e4, 1e4, width=32)), scales, st.integers(0, 255), st.booleans())
@example(TIES, 0.637, 0, True)
def test_quantize_and_dequantize_are_exact(x: Array, scale: float, zero: int, signed: bool) -> None:
    step, point = np.array(scale, np.float32), np.array(zero, np.uint8)
    point = point.view(np.int8) if signed else point
    q = reference.quantize(x, step, point)
    assert q.dtype == point.dtype
    assert np.array_equal(q, slow_quantize(x, step, point))
    assert np.array_equal(reference.dequantize(q, step, point), slow_dequantize(q, step, point))


@pytest.mark.parametrize(("value", "want"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (3e38, 127)])
def test_a_tie_goes_to_the_even_neighbour_and_too_much_saturates(value: float, want: int) -> None:
    q = reference.quantize(np.array([value], np.float32), np.array(1.0, np.float32), np.array(0, np.int8))
    assert q.tolist() == [want]


@some
@given(layers())
def test_accumulate_and_linear_are_exact(layer: dict[str, Any]) -> None:
    x, zero, weight = layer["x"], layer["zero_point"], layer["weight"]
    assert np.array_equal(reference.accumulate(x, zero, weight), slow_accumulate(x, zero, weight))
    assert np.array_equal(reference.accumulate_pair16(x, zero, weight), slow_pair16(x, zero, weight))
    assert np.array_equal(reference.linear(**layer), slow_linear(**layer))


def test_a_sum_beyond_32_bits_wraps() -> None:
    x, weight = np.full((1, 70_000), 255, np.uint8), np.full((1, 70_000), 127, np.int8)
    assert reference.accumulate(x, 0, weight).tolist() == [[255 * 127 * 70_000 - 2**32]]


def test_leading_axes_stay() -> None:
    x, weight = np.ones((2, 3, 4), np.uint8), np.ones((5, 4), np.int8)
    for accumulate in (reference.accumulate, reference.accumulate_pair16):
        assert np.array_equal(accumulate(x, 0, weight), np.full((2, 3, 5), 4, np.int32))


# ---------------------------------------------------------------- 16-bit pairs


@some
@given(arrays(np.int8, st.tuples(sizes, st.integers(1, 12))))
@example(np.full((1, 2), -128, np.int8))
@example(np.ones((3, 1), np.int8))
def test_the_worst_pair_is_found(weight: Array) -> None:
    assert reference.worst_pair(weight) == slow_worst_pair(weight)
    assert reference.worst_pair(pair_safe(np.maximum(weight, -127))) <= PAIR_LIMIT


@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_pair_saturates(sign: int) -> None:
    x, weight = np.full((1, 2), 255, np.uint8), np.full((1, 2), sign * 127, np.int8)
    assert reference.accumulate(x, 0, weight).tolist() == [[sign * 2 * 255 * 127]]
    assert reference.accumulate_pair16(x, 0, weight).tolist() == [[32767 if sign > 0 else -32768]]
    assert reference.accumulate_pair16(x, 100, weight).tolist() == [[(32767 if sign > 0 else -32768) - sign * 25400]]


@pytest.mark.parametrize(("second", "exact"), [(PAIR_LIMIT - 100, True), (PAIR_LIMIT - 99, False)])
def test_a_pair_of_128_is_safe_and_one_of_129_is_not(second: int, exact: bool) -> None:
    x, weight = np.full((1, 2), 255, np.uint8), np.array([[100, second]], np.int8)
    assert np.array_equal(reference.accumulate_pair16(x, 0, weight), reference.accumulate(x, 0, weight)) is exact


@some
@given(layers(safe=True))
def test_pair_safe_weights_are_exact_in_16_bits(layer: dict[str, Any]) -> None:
    for x in (layer["x"], np.full_like(layer["x"], 255)):
        arguments = x, layer["zero_point"], layer["weight"]
        assert np.array_equal(reference.accumulate_pair16(*arguments), reference.accumulate(*arguments))


@pytest.mark.parametrize("seed", range(3))
def test_full_range_weights_are_not(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, weight = random.integers(0, 256, (8, 64), np.uint8), random.integers(-127, 128, (8, 64), np.int8)
    wrong = reference.accumulate_pair16(x, 0, weight) != reference.accumulate(x, 0, weight)
    assert wrong.mean() > 0.5


# ---------------------------------------------------------------- against ONNX Runtime


def engine(kernel: str, layer: dict[str, Any]) -> Array:
    """The layer as Q/DQ in a file of its own, run by ONNX Runtime with the given kernel."""
    gemm = kernel == "QGemm"
    weight, w_scale, bias = layer["weight"] if gemm else layer["weight"].T, layer["w_scale"], layer["bias"]
    constants = {
        "x_scale": layer["x_scale"],
        "x_zero": np.array(layer["zero_point"], np.uint8),
        "w": np.ascontiguousarray(weight),
        "w_scale": w_scale,
        "w_zero": np.zeros_like(w_scale, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0 if gemm else 1),
    ]
    if gemm and bias is not None:
        constants |= {"b": bias, "b_scale": layer["x_scale"] * w_scale, "b_zero": np.zeros_like(w_scale, np.int32)}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bf"], axis=0))
    if gemm:
        nodes.append(helper.make_node("Gemm", ["xf", "wf", *["bf"] * (bias is not None)], ["y"], transB=1))
    else:
        nodes.append(helper.make_node("MatMul", ["xf", "wf"], ["y" if bias is None else "product"]))
        if bias is not None:
            constants["b"] = bias.reshape(1, 1, -1)
            nodes.append(helper.make_node("Add", ["product", "b"], ["y"]))
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    x = layer["x"] if gemm else layer["x"][None]
    found = run_file(nodes, tensors, kernel, TensorProto.UINT8, x)
    return found if gemm else found[0]


def run_file(nodes: list[Any], tensors: list[Any], kernel: str, kind: int, x: Array) -> Array:
    source = helper.make_tensor_value_info("x", kind, x.shape)
    result = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph(nodes, "tiny", [source], [result], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()
    assert kernel in [n.kernel for n in ort_cpu.audit(model)]
    (y,) = ort_cpu.session(model, threads=1).run(None, {"x": x})
    found: Array = y
    return found


def bias_for(kernel: str, bias: Array | None) -> Array | None:
    """QGemm takes an int32 bias, the addition behind MatMulIntegerToFloat a float one."""
    return None if bias is None else bias.astype(np.int32 if kernel == "QGemm" else np.float32)


@pytest.mark.parametrize("kernel", ["QGemm", "MatMulIntegerToFloat"])
@few
@given(layer=layers(safe=True))
def test_linear_equals_the_engine_bit_for_bit(kernel: str, layer: dict[str, Any]) -> None:
    layer["bias"] = bias_for(kernel, layer["bias"])
    assert np.array_equal(reference.linear(**layer), engine(kernel, layer))


def steady(kernel: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "x": random.integers(0, 256, (4, 8), np.uint8),
        "x_scale": np.array(0.037, np.float32),
        "zero_point": 119,
        "weight": pair_safe(random.integers(-127, 128, (8, 8), np.int8)),
        "w_scale": random.uniform(0.001, 0.01, 8).astype(np.float32),
        "bias": bias_for(kernel, random.integers(-9, 9, 8)),
    }


FAULTS: dict[str, Callable[[Any], Any]] = {
    "x": lambda x: x ^ 1,
    "zero_point": lambda zero: zero + 1,
    "x_scale": lambda scale: np.nextafter(scale, np.float32(1)),
    "w_scale": lambda scale: scale[::-1],
    "weight": lambda weight: weight.T,
    "bias": lambda bias: bias + bias.dtype.type(1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", ["QGemm", "MatMulIntegerToFloat"])
def test_any_other_arithmetic_than_the_engines_is_seen(kernel: str, fault: str) -> None:
    layer = steady(kernel)
    want = engine(kernel, layer)
    assert np.array_equal(reference.linear(**layer), want)
    assert not np.array_equal(reference.linear(**{**layer, fault: FAULTS[fault](layer[fault])}), want)


def test_a_bias_that_fills_32_bits_wraps_in_the_engine_too() -> None:
    layer = steady("QGemm")
    layer["bias"] = np.full(8, 2**31 - 1, np.int32)
    want = engine("QGemm", layer)
    assert np.array_equal(reference.linear(**layer), want)
    assert (want < 0).any()


@few
@given(arrays(np.float32, sizes, elements=st.floats(-1e4, 1e4, width=32)), scales, st.integers(0, 255))
def test_quantize_equals_the_engine(x: Array, scale: float, zero: int) -> None:
    step, point = np.array(scale, np.float32), np.array(zero, np.uint8)
    tensors = [numpy_helper.from_array(step, "scale"), numpy_helper.from_array(point, "zero")]
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    q = run_file([node], tensors, "QuantizeLinear", TensorProto.FLOAT, x)
    assert np.array_equal(reference.quantize(x, step, point), q)
    back = helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["y"])
    y = run_file([back], tensors, "DequantizeLinear", TensorProto.UINT8, q)
    assert np.array_equal(reference.dequantize(q, step, point), y)
