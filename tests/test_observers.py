"""Observers: the right range, streaming, in bounded memory."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize
from qatgraph.quantizers.grids import quantize, range_grid
from qatgraph.quantizers.observers import MSE, OBSERVERS, MinMax, MovingAverage, Observer
from qatgraph.specs import DType, QuantSpec, ScaleRule, Scheme

U8 = QuantSpec(DType.U8, Scheme.AFFINE)
S8 = QuantSpec(DType.S8)
POWER_OF_TWO = QuantSpec(DType.S8, scale=ScaleRule.POWER_OF_TWO)
SPECS = pytest.mark.parametrize("spec", [U8, S8, POWER_OF_TWO], ids=str)
EVERY = pytest.mark.parametrize("name", sorted(OBSERVERS))


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(count: int = 20000) -> Tensor:
    """A few values are far out: a grid over all of them wastes its points."""
    return normal(count) ** 3


def seen(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer.observe(batch)
    return observer


def squared_error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    scale, zero = range_grid(low, high, spec)
    back = (quantize(x, scale, zero, spec.qmin, spec.qmax, None) - zero) * scale
    return float((back - x).double().square().sum())


# ---------------------------------------------------------------- ranges


def test_min_max_keeps_the_extremes_of_all_batches() -> None:
    low, high = seen(MinMax(), torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 0.5]), torch.tensor([1.0])).range(U8)
    assert (float(low), float(high)) == (-3.0, 2.0)


def test_moving_average_forgets_a_tenth_each_batch() -> None:
    observer = seen(MovingAverage(), torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0]))
    assert [round(float(v), 6) for v in observer.range(U8)] == [-1.2, 2.2]
    assert [float(v) for v in seen(MinMax(), torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0])).range(U8)] != [
        -1.2,
        2.2,
    ]


def brute_force(x: Tensor, spec: QuantSpec) -> float:
    """The least squared error over all pairs of shrunk ends, on the values themselves."""
    shares = torch.arange(1, 41) / 40
    lows = shares if spec is U8 else torch.ones(1)
    errors = []
    for high in shares:
        for low in lows:
            top = x.abs().max()
            ends = (x.min() * low, x.max() * high) if spec is U8 else (-top * high, top * high)
            errors.append(squared_error(x, *ends, spec))
    return min(errors)


@SPECS
def test_mse_finds_the_best_range(spec: QuantSpec) -> None:
    x = heavy_tailed()
    least = 1.02 * brute_force(x, spec)
    assert squared_error(x, *seen(MSE(), x).range(spec), spec) <= least
    if spec is not POWER_OF_TWO:  # the check can fail: where scales move freely, min-max is not the best
        assert squared_error(x, *seen(MinMax(), x).range(spec), spec) > least


@SPECS
@pytest.mark.parametrize("shape", ["heavy-tailed", "normal", "positive", "negative", "one-sided tail"])
def test_mse_is_never_worse_than_min_max(spec: QuantSpec, shape: str) -> None:
    x = {
        "heavy-tailed": heavy_tailed(),
        "normal": normal(3000),
        "positive": normal(3000).abs() + 0.5,
        "negative": -normal(3000).abs() - 0.5,
        "one-sided tail": torch.cat([normal(3000), torch.tensor([60.0])]),
    }[shape]
    ours = squared_error(x, *seen(MSE(), x).range(spec), spec)
    assert ours <= 1.01 * squared_error(x, *seen(MinMax(), x).range(spec), spec)  # the histogram is not the values


@EVERY
def test_a_symmetric_grid_is_centred(name: str) -> None:
    scale, zero = range_grid(*seen(OBSERVERS[name](), normal(500) + 3.0).range(S8), S8)
    assert float(zero) == 0.0
    assert float(scale) > 0.0


@EVERY
def test_a_calibrated_scale_is_a_power_of_two_where_the_grid_says_so(name: str) -> None:
    def settled(spec: QuantSpec) -> float:
        module = ActivationFakeQuantize(spec, name)
        module.observer.observe(normal(500))
        module.settle()
        mantissa, _ = torch.frexp(module.scale)
        return float(mantissa)

    assert settled(POWER_OF_TWO) == 0.5
    assert settled(S8) != 0.5


@EVERY
@SPECS
def test_a_dead_activation_gets_scale_one(name: str, spec: QuantSpec) -> None:
    scale, _ = range_grid(*seen(OBSERVERS[name](), torch.zeros(4), torch.zeros(4)).range(spec), spec)
    assert float(scale) == 1.0


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_a_value_that_is_not_finite_stays_in_the_range(name: str, bad: float, order: int) -> None:
    """Calibration refuses such a range; it must survive the batches that follow."""
    batches = [torch.tensor([bad, 1.0]), torch.tensor([-1.0, 2.0])][::order]
    low, high = seen(OBSERVERS[name](), *batches).range(U8)
    assert not bool(torch.isfinite(low) & torch.isfinite(high))
    low, high = seen(OBSERVERS[name](), batches[order == 1]).range(U8)
    assert bool(torch.isfinite(low) & torch.isfinite(high))


# ---------------------------------------------------------------- streaming


def counts(*batches: Tensor) -> Tensor:
    observer = seen(MSE(), *batches)
    assert isinstance(observer, MSE)
    return observer.histogram.counts


values = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-4.0, 4.0, width=32),
    st.integers(-64, 64).map(float),  # on the edges of bins, also the outermost
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(values, min_size=1, max_size=8), min_size=1, max_size=5))
def test_streaming_counts_equal_those_of_one_shot(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(b) for b in batches]
    assert torch.equal(counts(*tensors), counts(torch.cat(tensors)))


def test_streaming_counts_equal_those_of_one_shot_on_growing_ranges() -> None:
    batches = [normal(20000, seed) * 3.0**seed for seed in range(4)]
    once = counts(torch.cat(batches))
    assert once.sum() == 80000
    assert torch.equal(counts(*batches), once)
    assert not torch.equal(counts(*batches[:3], batches[0]), once)


@EVERY
def test_the_order_of_batches_does_not_matter_but_to_the_average(name: str) -> None:
    batches = [normal(200, seed) * (seed + 1) for seed in range(3)]
    forth = seen(OBSERVERS[name](), *batches).range(U8)
    back = seen(OBSERVERS[name](), *reversed(batches)).range(U8)
    assert (forth == back) == (name != "moving-average")


# ---------------------------------------------------------------- bounded memory


class Hoarder(MinMax):
    """What an observer must not do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self.kept.append(x)


def footprint(observer: Observer, batches: int) -> int:
    """Bytes of everything that the observer holds after so many batches."""
    return len(pickle.dumps(seen(observer, *(normal(100, seed) * (1 + seed) for seed in range(batches)))))


@EVERY
def test_memory_does_not_grow_with_the_batches(name: str) -> None:
    assert footprint(OBSERVERS[name](), 50) == footprint(OBSERVERS[name](), 2)


def test_an_observer_that_keeps_batches_is_seen() -> None:
    assert footprint(Hoarder(), 50) > footprint(Hoarder(), 2)


@EVERY
def test_all_state_is_in_buffers(name: str) -> None:
    one = seen(OBSERVERS[name](), heavy_tailed())
    other = OBSERVERS[name]()
    other.load_state_dict(one.state_dict())
    assert [float(v) for v in other.range(U8)] == [float(v) for v in one.range(U8)]
    assert [float(v) for v in OBSERVERS[name]().range(U8)] != [float(v) for v in one.range(U8)]


@pytest.mark.parametrize("text", ["u8 affine per-tensor", "s8 symmetric per-tensor"])
def test_mse_finds_a_range_far_inside_one_outlier(text: str) -> None:
    """One end is searched far down too: of two million values one is 200, and most of its range is not worth it."""
    spec, observer = QuantSpec.parse(text), MSE()
    x = torch.cat([torch.randn(2 * 10**6, generator=torch.Generator().manual_seed(0)).abs(), torch.tensor([200.0])])
    observer.observe(x)
    assert float(observer.range(spec)[1]) < 0.35 * 200
