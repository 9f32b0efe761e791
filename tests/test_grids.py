"""Grids: rounding as the engine rounds, and weight grids whose pairs cannot overflow 16 bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from torch import Tensor

from qatgraph import reference
from qatgraph.quantizers.fake_quantize import WeightFakeQuantize
from qatgraph.quantizers.grids import PAIR_LIMIT, power_of_two, quantize, range_grid, weight_scale
from qatgraph.reference import Array
from qatgraph.specs import DType, Granularity, QuantSpec, ScaleRule, Scheme

U8 = QuantSpec(DType.U8, Scheme.AFFINE)
S8 = QuantSpec(DType.S8)
PER_CHANNEL = QuantSpec(DType.S8, granularity=Granularity.PER_CHANNEL, axis=0)
PAIR_SAFE = QuantSpec(DType.S8, granularity=Granularity.PER_CHANNEL, axis=0, scale=ScaleRule.PAIR_SAFE)
PAIR_SAFE_TENSOR = QuantSpec(DType.S8, scale=ScaleRule.PAIR_SAFE)
POWER_OF_TWO = QuantSpec(DType.S8, scale=ScaleRule.POWER_OF_TWO)
TYPES = {"u8": (TensorProto.UINT8, np.uint8), "s8": (TensorProto.INT8, np.int8)}
TINY = float(np.finfo(np.float32).tiny)

many = settings(max_examples=300, deadline=None, derandomize=True)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(TINY, 2.0**126, width=32)


# ---------------------------------------------------------------- rounding is ONNX QuantizeLinear


@cache
def engine(dtype: str) -> Any:
    """ORT's own QuantizeLinear, with scale and zero point as inputs."""
    kind, _ = TYPES[dtype]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero_point", kind, []),
    ]
    node = helper.make_node("QuantizeLinear", [i.name for i in inputs], ["q"])
    graph = helper.make_graph([node], "quantize", inputs, [helper.make_tensor_value_info("q", kind, ["n"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_engine(dtype: str, x: Array, scale: Array, zero_point: Array) -> Array:
    (q,) = engine(dtype).run(None, {"x": x, "scale": scale, "zero_point": zero_point})
    result: Array = q
    return result


def ties(dtype: str) -> tuple[Array, Array, Array]:
    """Values half-way between two points of the grid, where a wrong rounding or division shows."""
    scale = np.float32(0.637)
    x = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * scale
    return x, np.asarray(scale), np.zeros((), TYPES[dtype][1])


@many
@given(
    st.sampled_from(sorted(TYPES)),
    arrays(np.float32, st.integers(1, 40), elements=float32),
    scales,
    st.integers(0, 255),
)
def test_quantize_equals_the_engine_element_by_element(dtype: str, x: Array, scale: float, zero: int) -> None:
    span = np.iinfo(TYPES[dtype][1])
    point = np.array(zero + span.min, TYPES[dtype][1])
    want = run_engine(dtype, x, np.array(scale, np.float32), point)
    ours = quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(float(point)), span.min, span.max, None)
    assert np.array_equal(ours.numpy(), want)
    with np.errstate(over="ignore"):
        assert np.array_equal(reference.quantize(x, np.array(scale, np.float32), point), want)


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_ties_round_as_the_engine_rounds_them(dtype: str) -> None:
    x, scale, zero = ties(dtype)
    span = np.iinfo(zero.dtype)
    ours = quantize(torch.from_numpy(x), torch.tensor(float(scale)), torch.tensor(0.0), span.min, span.max, None)
    assert np.array_equal(ours.numpy(), run_engine(dtype, x, scale, zero))


def test_a_multiplication_with_the_reciprocal_would_differ() -> None:
    x, scale, zero = ties("s8")
    reciprocal = np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127)
    assert (reciprocal != run_engine("s8", x, scale, zero)).any()


def test_rounding_half_away_from_zero_would_differ() -> None:
    x, scale, zero = ties("s8")
    away = np.clip(np.trunc(x / scale + np.copysign(np.float32(0.5), x)), -128, 127)
    assert (away != run_engine("s8", x, scale, zero)).any()


def test_a_channel_axis_scales_each_channel_by_itself() -> None:
    x = torch.tensor([[1.0, -3.0], [1.0, -3.0]])
    rows = quantize(x, torch.tensor([1.0, 0.5]), torch.zeros(2), -127, 127, 0)
    columns = quantize(x, torch.tensor([1.0, 0.5]), torch.zeros(2), -127, 127, 1)
    assert rows.tolist() == [[1.0, -3.0], [2.0, -6.0]]
    assert columns.tolist() == [[1.0, -6.0], [1.0, -6.0]]


# ---------------------------------------------------------------- grids of ranges


def on_grid(zero: float, spec: QuantSpec) -> bool:
    return zero == round(zero) and spec.qmin <= zero <= spec.qmax


@many
@given(st.sampled_from([U8, S8, POWER_OF_TWO]), float32, float32)
@example(U8, -3e38, 3e38)
def test_zero_lies_on_the_grid_and_the_range_fits(spec: QuantSpec, a: float, b: float) -> None:
    low, high = sorted((a, b))
    scale, zero = range_grid(torch.tensor(low), torch.tensor(high), spec)
    assert 0.0 < float(scale) < float("inf")
    assert on_grid(float(zero), spec)
    x = torch.tensor([low, 0.0, high])
    back = (quantize(x, scale, zero, spec.qmin, spec.qmax, None) - zero).double() * scale.double()
    assert float(back[1]) == 0.0
    assert bool(((back - x.double()).abs() <= 1.001 * float(scale)).all())


def test_a_grid_over_the_bare_range_would_miss_zero() -> None:
    low, high = 1.0, 2.0  # range_grid widens it to [0, 2]
    bare = round(-low / ((high - low) / 255))
    assert not on_grid(bare, U8)


@pytest.mark.parametrize("spec", [U8, S8, POWER_OF_TWO], ids=str)
def test_a_dead_activation_gets_scale_one(spec: QuantSpec) -> None:
    scale, zero = range_grid(torch.tensor(0.0), torch.tensor(0.0), spec)
    assert (float(scale), on_grid(float(zero), spec)) == (1.0, True)


def is_power_of_two(value: float) -> bool:
    return bool(np.frexp(value)[0] == 0.5)


@many
@given(st.floats(TINY, 2.0**126, width=32))
@example(float(np.nextafter(np.float32(2**20), np.float32(np.inf))))
@example(TINY)
def test_the_next_power_of_two_is_exact_and_not_smaller(scale: float) -> None:
    power = float(power_of_two(torch.tensor(scale)))
    assert is_power_of_two(power)
    assert power / 2 < scale <= power


def test_a_power_of_two_through_the_logarithm_would_be_too_small() -> None:
    scale = torch.nextafter(torch.tensor(2.0**20), torch.tensor(torch.inf))
    assert 2.0 ** scale.log2().ceil() < scale <= power_of_two(scale)


# ---------------------------------------------------------------- pair-safe weights

# Without head room above (a + b) / 128, float32 division lifts both halves of this pair over a tie: 32 + 97 = 129.
TIE = np.array([[float.fromhex("0x1.3f9788p+2"), float.fromhex("0x1.e9889ep+3")]], np.float32)


def _pairs(element: st.SearchStrategy[float]) -> st.SearchStrategy[Array]:
    return arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=element)


def _on_ties(draw: tuple[int, int, float]) -> Array:
    """A pair whose halves lie at .5 of the grid, and neighbours of it in float32."""
    m, ulps, unit = draw
    pair = np.array([[m + 0.5, 127.5 - m]], np.float64) * unit
    w: Array = pair.astype(np.float32)
    for _ in range(abs(ulps)):
        w = np.nextafter(w, np.float32(np.inf if ulps > 0 else 0.0))
    return w


weights = st.one_of(
    _pairs(st.floats(-1.0, 1.0, width=32)),
    _pairs(float32),  # any ratio
    _pairs(st.floats(-TINY, TINY, width=32)),  # subnormal
    _pairs(st.sampled_from([0.0, 0.5, 1.0, -1.0, 127.0, -127.0, 63.5, 64.5, 1e-30, 1e30])),
    st.tuples(st.integers(0, 127), st.integers(-2, 2), st.floats(2.0**-10, 1.0)).map(_on_ties),
)


def integers(weight: Array, spec: QuantSpec) -> tuple[Array, Array]:
    q, scale = WeightFakeQuantize(spec).integers(torch.from_numpy(weight))
    return q.numpy(), scale.numpy()


def overflows(q: Array) -> bool:
    """Whether 16-bit pair sums lose anything on the worst activations: 255 against the weights of one sign."""
    worst = np.concatenate([np.where(q > 0, 255, 0), np.where(q < 0, 255, 0), np.full_like(q, 255, dtype=np.int64)])
    x = worst.astype(np.uint8)
    return bool((reference.accumulate_pair16(x, 0, q) != reference.accumulate(x, 0, q)).any())


@many
@given(weights, st.sampled_from([PAIR_SAFE, PAIR_SAFE_TENSOR]))
@example(TIE, PAIR_SAFE)
@example(np.full((1, 4), 3e38, np.float32), PAIR_SAFE)
@example(np.full((2, 5), -1.0, np.float32), PAIR_SAFE)
def test_pair_safe_weights_cannot_overflow(weight: Array, spec: QuantSpec) -> None:
    q, scale = integers(weight, spec)
    assert np.isfinite(scale).all()
    assert reference.worst_pair(q) <= PAIR_LIMIT
    assert q.min() >= -127
    assert not overflows(q)


@pytest.mark.parametrize("columns", [2, 7, 64])
def test_a_full_range_grid_on_the_same_weights_does_overflow(columns: int) -> None:
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(columns)).numpy()
    full, _ = integers(weight, PER_CHANNEL)
    safe, _ = integers(weight, PAIR_SAFE)
    assert reference.worst_pair(full) > PAIR_LIMIT
    assert overflows(full)
    assert not overflows(safe)


def test_without_head_room_a_tie_overflows() -> None:
    bare = TIE.sum() / np.float32(PAIR_LIMIT)
    assert reference.worst_pair(np.rint(TIE / bare)) == PAIR_LIMIT + 1
    assert reference.worst_pair(integers(TIE, PAIR_SAFE)[0]) <= PAIR_LIMIT


def test_pairs_run_along_k() -> None:
    """Neighbours in a column never meet in one 16-bit sum, so they cost no resolution."""
    down = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert torch.equal(weight_scale(down, PAIR_SAFE), torch.full((2,), 1 / 127))
    assert bool((weight_scale(down.T.contiguous(), PAIR_SAFE) > 1 / 127).tolist()[0])


FILTERS = arrays(np.float32, array_shapes(min_dims=3, max_dims=4, max_side=5), elements=st.floats(-4, 4, width=32))
ANEW = np.zeros((1, 3, 2), np.float32)  # two weights at the second position: neighbours only where pairs start anew
ANEW[0, :2, 1] = 1.0


BY_POSITION = QuantSpec.parse("s8 symmetric per-channel(0) pair-safe-by-position")


@many
@given(FILTERS)
@example(ANEW)
def test_pair_safe_filters_are_safe_where_their_pairs_start(weight: Array) -> None:
    assert reference.worst_pair(reference.k_rows(integers(weight, PAIR_SAFE)[0])) <= PAIR_LIMIT
    assert reference.worst_pair(reference.position_rows(integers(weight, BY_POSITION)[0])) <= PAIR_LIMIT


def test_a_filter_that_is_safe_in_one_order_overflows_in_the_other() -> None:
    assert reference.worst_pair(reference.position_rows(integers(ANEW, PAIR_SAFE)[0])) == 254
    on = np.zeros((1, 3, 2), np.float32)
    on[0, 2, 0] = on[0, 0, 1] = 1.0  # the last channel of the first position, the first of the second
    assert reference.worst_pair(reference.k_rows(integers(on, BY_POSITION)[0])) == 254


@many
@given(weights, st.sampled_from([PER_CHANNEL, PAIR_SAFE, PAIR_SAFE_TENSOR, S8, POWER_OF_TWO]))
def test_training_and_deployment_use_one_grid_bit_for_bit(weight: Array, spec: QuantSpec) -> None:
    q, scale = integers(weight, spec)
    assert np.array_equal(on_grid_in_training(weight, spec), (q.T * scale).T)


def test_deploying_another_scale_than_the_trained_one_is_seen() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).numpy()
    q, scale = integers(weight, PER_CHANNEL)
    trained = on_grid_in_training(weight, PER_CHANNEL)
    assert np.array_equal(trained, q * scale[:, None])
    assert not np.array_equal(trained, q * np.nextafter(scale, np.float32(1))[:, None])


def on_grid_in_training(weight: Array, spec: QuantSpec) -> Array:
    module = WeightFakeQuantize(spec)
    module.switch_on()
    out: Tensor = module(torch.from_numpy(weight))
    found: Array = out.numpy()
    return found


@pytest.mark.parametrize("spec", [PER_CHANNEL, PAIR_SAFE, PAIR_SAFE_TENSOR, POWER_OF_TWO], ids=str)
def test_a_dead_weight_stays_zero(spec: QuantSpec) -> None:
    q, scale = integers(np.zeros((3, 5), np.float32), spec)
    assert not q.any()
    assert (scale == 1.0).all()
    assert not on_grid_in_training(np.zeros((3, 5), np.float32), spec).any()


def test_one_dead_channel_leaves_the_others_alone() -> None:
    weight = np.array([[0.0, 0.0, 0.0], [0.5, -1.0, 0.25]], np.float32)
    q, scale = integers(weight, PER_CHANNEL)
    assert q.tolist() == [[0, 0, 0], [64, -127, 32]]
    assert scale.tolist() == [1.0, float(np.float32(1.0) / np.float32(127.0))]
