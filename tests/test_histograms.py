"""Percentile and entropy: exact on counts that are worked out by hand or the slow way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qatgraph as qg
from qatgraph.errors import PlanError
from qatgraph.planning.recipe import load_recipe
from qatgraph.quantizers.entropy import least_divergence
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize
from qatgraph.quantizers.grids import range_grid
from qatgraph.quantizers.observers import OBSERVERS, Entropy, MinMax, Observer, Percentile, make_observer
from qatgraph.specs import OBSERVER_NAMES, DType, QuantSpec, ScaleRule, Scheme, parse_observer
from tests.models import ZOO, captured

U8, S8 = QuantSpec(DType.U8, Scheme.AFFINE), QuantSpec(DType.S8)
POWER_OF_TWO = QuantSpec(DType.S8, scale=ScaleRule.POWER_OF_TWO)
SPECS = pytest.mark.parametrize("spec", [U8, S8, POWER_OF_TWO], ids=str)
SEARCHED = pytest.mark.parametrize("name", ["mse", "percentile", "entropy"])


def ends(observer: Observer, spec: QuantSpec, *batches: Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range(spec)
    return float(low), float(high)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- percentile

EDGE = 1.0625  # of the bin of 1.0, where the reach is 128 and a bin 1/16 wide


def ones_and(count: int, *others: float) -> Tensor:
    """So many values in all; the others among ones and minus ones."""
    signs = torch.ones(count - len(others))
    signs[::2] = -1.0
    return torch.cat([signs, torch.tensor(others)])


@pytest.mark.parametrize(
    ("spec", "x", "want"),
    [
        (U8, ones_and(20_000, 100.0, -50.0), (-1.0, EDGE)),  # a bin is closed below
        (U8, ones_and(19_999, 100.0, -50.0), (-50.0, 100.0)),
        (U8, ones_and(20_000, 100.0, 99.0), (-1.0, 99.0625)),  # no more than one at an end
        (U8, ones_and(39_999, 100.0, 99.0), (-1.0, 99.0625)),
        (U8, ones_and(40_000, 100.0, 99.0), (-1.0, EDGE)),
        (S8, ones_and(10_000, -100.0), (-EDGE, EDGE)),
        (S8, ones_and(9_999, -100.0), (-100.0, 100.0)),
        (S8, ones_and(20_000, 100.0, -99.0), (-EDGE, EDGE)),  # both at one end of the magnitudes
        (U8, torch.cat([torch.zeros(19_999), torch.tensor([100.0])]), (0.0, 0.0)),
        (U8, torch.cat([torch.zeros(19_998), torch.tensor([100.0])]), (0.0, 100.0)),  # zeros are values, too
    ],
)
def test_a_percentile_loses_exactly_its_share(spec: QuantSpec, x: Tensor, want: tuple[float, float]) -> None:
    assert ends(Percentile(), spec, x) == want


@SPECS
def test_a_hundred_per_cent_is_the_whole_range(spec: QuantSpec) -> None:
    x = normal(50_000) ** 3
    low, high = ends(MinMax(), U8, x)
    top = max(-low, high)
    assert ends(Percentile(100), spec, x) == ((low, high) if spec is U8 else (-top, top))
    assert ends(Percentile(), spec, x) != ends(Percentile(100), spec, x)


@SPECS
@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_a_percentile_is_that_of_the_sorted_values_to_a_bin(spec: QuantSpec, percent: float) -> None:
    x = normal(100_000) * 3 + 1
    values, lose = (x, (100 - percent) / 2) if spec is U8 else (x.abs(), 100 - percent)
    want = float(values.sort().values[-1 - round(len(x) * lose / 100)])
    width = 2 ** math.frexp(float(x.abs().max()))[1] / 2048
    assert want <= ends(Percentile(percent), spec, x)[1] <= want + width
    assert not want <= ends(Percentile(percent - 0.5), spec, x)[1] <= want + width


# ---------------------------------------------------------------- entropy


def divergence(counts: Tensor, threshold: int, spec: QuantSpec) -> float:
    """The generalized ``KL(P || Q)`` as it is defined, bin by bin; bins are 1 wide."""
    half = len(counts) // 2
    used = [k for k in range(-half, half) if counts[k + half] > 0]
    low, high = max(-threshold, min(*used, 0)), min(threshold, max(used) + 1)
    scale, zero = range_grid(torch.tensor(float(low)), torch.tensor(float(high)), spec)
    levels = {k: math.ceil((k + 0.5) / float(scale) + float(zero) - 0.5 - 1e-9) for k in used}
    inside = [k for k in used if spec.qmin <= levels[k] <= spec.qmax]
    if not inside:
        return math.inf
    p = {k: float(counts[k + half]) for k in inside}
    q = {}
    for level in set(levels.values()):
        members = [k for k in inside if levels[k] == level]
        q.update({k: sum(p[m] for m in members) / len(members) for k in members})
    for k in set(used) - set(inside):
        p[inside[0] if k < inside[0] else inside[-1]] += float(counts[k + half])
    return sum(p[k] * math.log(p[k] / q[k]) - p[k] + q[k] for k in inside) / float(counts.sum())


def histogram(x: Tensor, half: int = 400) -> Tensor:
    return torch.bincount(x.floor().long() + half, minlength=2 * half).double()


SHAPES = {
    "normal": histogram(normal(5000) * 90),
    "skewed": histogram(normal(5000).exp().clamp(max=9.0) * 40 - 20),
    "one-sided": histogram((normal(5000) * 90).abs()),
    "negative": histogram(-(normal(5000) * 60).abs() - 30),
    "heavy-tailed": histogram((normal(5000) ** 3 * 8).clamp(-399, 399)),
    "far outlier": histogram(torch.cat([normal(5000) * 20, torch.tensor([398.0])])),
    "clamped": histogram((normal(5000) * 200).clamp(0, 350)),
    "few": histogram(torch.tensor([-200.0, 3.0, 3.0, 120.0, 350.0])),
}


def excess(counts: Tensor, found: tuple[float, float], spec: QuantSpec) -> float:
    """How much more the found range loses than the best of every fifth threshold."""
    least = min(divergence(counts, t, spec) for t in range(_first(counts, spec), len(counts) // 2 + 1, 5))
    return divergence(counts, int(max(-found[0], found[1])), spec) - least


def _first(counts: Tensor, spec: QuantSpec) -> int:
    """The first threshold with a bin for each level."""
    used = counts.nonzero() - len(counts) // 2
    low, high = min(float(used.min()), 0.0), max(float(used.max()) + 1, 0.0)
    for threshold in range(1, len(counts) // 2):
        ends = torch.tensor(max(-float(threshold), low)), torch.tensor(min(float(threshold), high))
        if float(range_grid(*ends, spec)[0]) > 1 + 1e-6:
            return threshold
    raise AssertionError("no threshold is wide enough")


@SPECS
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_entropy_finds_the_least_divergence(spec: QuantSpec, shape: str) -> None:
    counts = SHAPES[shape]
    assert excess(counts, least_divergence(counts, 1.0, spec), spec) < 1e-9


@pytest.mark.parametrize("shape", ["normal", "heavy-tailed"])
def test_the_same_check_fails_on_other_ranges(shape: str) -> None:
    counts = SHAPES[shape]
    used = counts.nonzero() - len(counts) // 2
    assert excess(counts, (float(used.min()), float(used.max()) + 1), U8) > 1e-6  # the whole range
    assert excess(counts, least_divergence(counts, 1.0, S8), U8) > 1e-6  # half the levels


@SPECS
@pytest.mark.parametrize("width", [2.0**-20, 0.5, 2.0**90])
def test_the_range_scales_with_the_values(spec: QuantSpec, width: float) -> None:
    counts = SHAPES["heavy-tailed"]
    low, high = least_divergence(counts, 1.0, spec)
    assert least_divergence(counts, width, spec) == (low * width, high * width)


def test_entropy_cuts_a_far_outlier_and_keeps_a_full_edge() -> None:
    assert ends(Entropy(), U8, torch.cat([normal(100_000), torch.tensor([200.0])]))[1] < 40.0
    assert ends(Entropy(), U8, (normal(100_000) * 3).clamp(0, 6)) == (0.0, 6.0)  # relu6: a third lies on the edge


# ---------------------------------------------------------------- both


@SEARCHED
@SPECS
@pytest.mark.parametrize("value", [3.0, -0.7, 1e-30, 3e38])
def test_a_constant_lies_on_its_grid(name: str, spec: QuantSpec, value: float) -> None:
    if name == "mse" and spec is POWER_OF_TWO:
        value = 2.0  # it takes any grid on which the value lies
    module = ActivationFakeQuantize(spec, name)
    module.observer.observe(torch.full((100,), value))
    module.settle()
    assert float(module(torch.tensor(value))) == pytest.approx(value, rel=0.01, abs=0)
    assert float(module(torch.tensor(value / 2))) != pytest.approx(value, rel=0.01, abs=0)


@SEARCHED
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_neither_order_nor_batching_matters(name: str, growth: list[int]) -> None:
    x = torch.cat([normal(300, seed) * 10.0**g for seed, g in enumerate(growth)])
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(len(growth)))]
    for spec in (U8, S8):
        assert ends(OBSERVERS[name](), spec, x) == ends(OBSERVERS[name](), spec, *torch.split(shuffled, 97))
        assert ends(OBSERVERS[name](), spec, x) != ends(OBSERVERS[name](), spec, x[: len(x) // 2] / 3)


# ---------------------------------------------------------------- by name


def test_every_name_has_its_observer() -> None:
    assert tuple(OBSERVERS) == OBSERVER_NAMES
    assert {type(make_observer(n)) for n in OBSERVER_NAMES} == set(OBSERVERS.values())
    assert parse_observer("percentile(99.9)") == ("percentile", (99.9,))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("percentil", "'percentile(99.9)'"),
        ("percentile(", "'percentile(99.9)'"),
        ("percentile{99}", "'percentile(99.9)'"),
        ("percentile(x)", "'percentile(99.9)'"),
        ("mse(3)", "'mse'"),
        ("percentile(101)", "at most 100"),
        ("percentile(50)", "more than 50"),
    ],
)
def test_an_unknown_observer_is_refused_in_the_recipe(tmp_path: Path, text: str, hint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'observer = "{text}"', encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        load_recipe(str(path))
    assert caught.value.code == "QG303"
    assert hint in caught.value.why


@pytest.mark.parametrize("text", ["percentile", "percentile(90)", "entropy"])
def test_a_recipe_names_the_observer_that_calibrates(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'observer = "{text}"', encoding="utf-8")
    graph, batches = captured("encoder"), [ZOO["encoder"].inputs(seed) for seed in range(3)]
    plan = qg.plan(graph, recipe=str(path))
    assert {q.observer for q in plan.quantizers} == {"", text}
    assert qg.Plan.from_json(plan.to_json()) == plan
    qat = qg.prepare(graph, plan)
    qg.calibrate(qat, batches, progress=False)
    mine = [m for m in qat.modules() if isinstance(m, ActivationFakeQuantize)]
    for module in mine:
        again = ActivationFakeQuantize(module.spec, text)
        again.load_state_dict(module.state_dict())
        again.settle()
        assert torch.equal(again.scale, module.scale)
    plain = qg.prepare(graph, qg.plan(graph))
    qg.calibrate(plain, batches, progress=False)
    others = [m for m in plain.modules() if isinstance(m, ActivationFakeQuantize)]
    assert [float(m.scale) for m in mine] != [float(m.scale) for m in others]
