"""Numbers that a grid does not take well: dead and constant activations, dead channels, biases beyond int32, denormals.

Each is cured, said or refused before there is a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import compare_kernels
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.proof import feed_of, prove
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from qatgraph.quantizers.findings import findings
from qatgraph.quantizers.grids import BIAS_STEPS, bias_floor, weight_scale
from qatgraph.reference import Array
from qatgraph.specs import QuantSpec
from tests.models import floats

TINY = float(np.finfo(np.float32).tiny)
PER_CHANNEL, PER_TENSOR = (QuantSpec.parse(f"s8 symmetric {g} pair-safe") for g in ("per-channel(0)", "per-tensor"))
IMAGE = (4, 3, 6, 6)


class Linears(nn.Module):
    """Two linears, the first in integers through and through: [batch, 16] -> [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Normed(nn.Module):
    """Convolutions with batch norm and ReLU6: [batch, 3, 6, 6] -> [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.second, self.third = nn.Conv2d(8, 8, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y: Tensor = self.third(self.act(self.second(x)).flatten(1))
        return y


def near_zero(model: nn.Module) -> None:
    """Folded, channel 3 has weights of about 1e-9 and a bias of about 1."""
    if isinstance(model, Normed):
        model.norm.weight.data[3], model.norm.bias.data[3] = 1e-9, 1.0
    if isinstance(model, Linears):
        model.first.weight.data[3] *= 1e-9
        model.first.bias.data[3] = 1.0


def all_zero(model: nn.Module) -> None:
    """Folded, channel 3 has no weights and a bias."""
    if isinstance(model, Normed):
        model.norm.weight.data[3], model.norm.bias.data[3] = 0.0, 0.7131
    if isinstance(model, Linears):
        model.first.weight.data[3] = 0.0
        model.first.bias.data[3] = 0.7131


def dead(model: nn.Module) -> None:
    """Nothing passes the first ReLU6."""
    assert isinstance(model, Normed)
    model.norm.bias.data.fill_(-100.0)


def as_it_is(model: nn.Module) -> None:
    pass


Kind = Callable[[], nn.Module]
Spoil = Callable[[nn.Module], None]
KINDS: dict[Kind, tuple[int, ...]] = {Linears: (4, 16), Normed: IMAGE}
BOTH = pytest.mark.parametrize("kind", KINDS)


@cache
def _prepared(kind: Kind, spoil: Spoil, grid: QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    spoil(model)
    x = floats(*KINDS[kind], seed=1)
    recipe = Recipe(override=(Override(select="first:*", weight=grid),))
    graph = qg.capture(model, x, {"x": {0: "batch"}})
    qat = qg.prepare(graph, qg.plan(graph, recipe=recipe)).eval()
    qg.calibrate(qat, [x], progress=False)
    return qat


def prepared(kind: Kind, spoil: Spoil = as_it_is, grid: QuantSpec = PER_CHANNEL) -> nn.Module:
    return copy.deepcopy(_prepared(kind, spoil, grid))


def modules(qat: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """The fake quantizers by the first word of their path."""
    return {n.partition(".")[0]: m for n, m in qat.named_modules() if isinstance(m, kind)}


def first_weight(qat: nn.Module) -> WeightFakeQuantize:
    found = modules(qat, WeightFakeQuantize)["first"]
    assert isinstance(found, WeightFakeQuantize)
    return found


def lowered(qat: nn.Module) -> bytes:
    graph = Graph.prepared(qat)
    return ort_cpu.lower(convert(graph), graph.info.plan)


def run(qat: nn.Module, x: Tensor) -> Array:
    found: Array = ort_cpu.run(ort_cpu.session(lowered(qat)), feed_of(Graph.of(qat), x))[0]
    return found


def distance(qat: nn.Module, x: Tensor) -> float:
    """The engine from the fake-quantized model, of its largest value."""
    want = qat(x).detach().numpy()
    return float(np.abs(run(qat, x) - want).max() / np.abs(want).max())


# a bias that would overflow int32


@pytest.mark.parametrize(
    ("kind", "grid"), [(Linears, PER_CHANNEL), (Normed, PER_CHANNEL), (Linears, PER_TENSOR)], ids=str
)
def test_the_scale_of_a_channel_follows_its_bias_where_that_would_overflow(kind: Kind, grid: QuantSpec) -> None:
    qat, x = prepared(kind, near_zero, grid), floats(*KINDS[kind], seed=1)
    report = prove(ort_cpu, qat, lowered(qat), [x], None)
    assert report.failures == []
    assert report.notes == says(qat)
    assert distance(qat, x) < 0.02
    first_weight(qat).floor.zero_()
    if grid is PER_TENSOR:  # the other channels already make the scale large enough
        convert(Graph.of(qat))
        return
    with pytest.raises(LowerError, match="QG502"):
        convert(Graph.of(qat))


@BOTH
def test_a_model_without_such_a_channel_is_what_it_was(kind: Kind) -> None:
    qat = prepared(kind)
    bare = copy.deepcopy(qat)
    first_weight(bare).floor.zero_()
    assert bool((first_weight(qat).floor > 0).all())
    assert lowered(qat) == lowered(bare)


def test_the_scale_that_is_trained_is_the_one_that_is_deployed() -> None:
    """Also where it follows the bias, which training moves: the floor stays until the next calibration."""
    qat = prepared(Linears, near_zero)
    module, layer = first_weight(qat), qat.get_submodule("first")
    bias = layer.get_parameter("bias")
    bias.data[3] *= 1.5
    weight = layer.get_parameter("weight").detach()
    q, scale = module.integers(weight)
    assert torch.equal(module(weight), q.float() * scale[:, None])
    assert float(scale[3]) > float(weight_scale(weight, module.spec)[3]) * 100
    convert(Graph.of(qat))
    bias.data[3] *= 10
    with pytest.raises(LowerError, match="QG502") as caught:
        convert(Graph.of(qat))
    assert "calibrate again" in caught.value.todo
    qg.calibrate(qat, [floats(4, 16, seed=1)], progress=False)
    convert(Graph.of(qat))


def test_every_calibration_makes_room_anew() -> None:
    qat = prepared(Linears, near_zero)
    before = first_weight(qat).floor.clone()
    qat.get_submodule("first").get_parameter("bias").data[3] *= 0.5
    qg.calibrate(qat, [floats(4, 16, seed=1)], progress=False)
    assert float(first_weight(qat).floor[3]) == pytest.approx(float(before[3]) / 2)


some = settings(max_examples=200, deadline=None, derandomize=True)
positive = st.floats(TINY, 1e6, width=32)


@some
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=4), positive)
def test_with_that_scale_a_bias_has_at_most_a_quarter_of_the_steps_and_no_step_is_zero(
    bias: list[float], x_scale: float
) -> None:
    floor = bias_floor(torch.tensor(bias), torch.tensor(x_scale), PER_CHANNEL)
    unit = torch.tensor(x_scale) * floor
    assert bool((unit.double() >= TINY * 0.999).all())
    steps = torch.tensor(bias).double().abs() / unit.double()
    assert bool((steps <= BIAS_STEPS * 1.001).all())
    assert bool(bias_floor(torch.tensor(bias), torch.tensor(x_scale), PER_TENSOR) == floor.max())


# channels and activations that are dead


@BOTH
def test_the_bias_of_a_channel_without_weights_is_kept(kind: Kind) -> None:
    qat, x = prepared(kind, all_zero), floats(*KINDS[kind], seed=1)
    assert prove(ort_cpu, qat, lowered(qat), [x], None).failures == []
    exact = stored_bias(qat)
    first_weight(qat).floor.zero_()
    coarse = stored_bias(qat)  # in steps of s_x * 1
    assert abs(exact - 0.7131) < 1e-6
    assert abs(coarse - 0.7131) > 1e-4


def stored_bias(qat: nn.Module) -> float:
    """What the int32 bias of the first layer's channel 3 stands for."""
    buffers = dict(convert(Graph.of(qat)).module.named_buffers())
    q, scale = (next(v for n, v in buffers.items() if n.startswith("first") and n.endswith(e)) for e in ENDS)
    return float(q[3]) * float(scale[3])


ENDS = ("bias/int32", "bias/scale")


@pytest.mark.parametrize("bounded", [True, False])
def test_a_dead_clamp_still_runs_inside_the_kernel(bounded: bool) -> None:
    """On a grid of steps of 1, the clamp at 6 would not end where the grid ends, and both would run in float."""
    qat = prepared(Normed, dead)
    if not bounded:
        for module in modules(qat, ActivationFakeQuantize).values():
            vars(module)["bound"] = None
            assert isinstance(module, ActivationFakeQuantize)
            module.settle()
    found = compare_kernels(Graph.prepared(qat).info.plan, ort_cpu.audit(lowered(qat)))
    assert bool(found) is not bounded
    if bounded:
        assert prove(ort_cpu, qat, lowered(qat), [floats(*IMAGE, seed=1)], None).failures == []


# what is said


def says(qat: nn.Module) -> list[str]:
    return findings(Graph.prepared(qat))


def test_an_ordinary_model_has_no_odd_grids() -> None:
    assert [says(prepared(k)) for k in KINDS] == [[], []]


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        (Linears, all_zero, "the weights of 1 of 8 channels (3) are all zero"),
        (Normed, all_zero, "the weights of 1 of 8 channels (3) are all zero"),
        (Linears, near_zero, "the weights of 1 of 8 channels (3) are too small for the bias"),
        (Normed, dead, "calibration saw nothing but zeros"),
    ],
)
def test_what_is_odd_about_the_weights_is_said(kind: Kind, spoil: Spoil, sentence: str) -> None:
    qat = prepared(kind, spoil)
    found = says(qat)
    assert any(sentence in s for s in found)
    assert found == qg.calibrate(qat, [floats(*KINDS[kind], seed=1)], progress=False)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0.0, "nothing but zeros"),
        (2.5, "nothing but 2.5"),
        (-1.0, "nothing but -1"),
        (1e-39, "nothing but 1e-39"),
        (None, "would be denormal"),
    ],
)
def test_what_is_odd_about_an_input_is_said(value: float | None, sentence: str) -> None:
    qat = prepared(Linears)
    x = floats(4, 16, seed=1) * 1e-38 if value is None else torch.full((4, 16), value)
    found = [s for s in qg.calibrate(qat, [x], progress=False) if s.startswith("'first:linear.x'")]
    assert len(found) == 1
    assert sentence in found[0]
    if value == 1e-39 or value is None:
        assert np.isfinite(run(qat, x)).all()
        assert distance(qat, x) < 0.02


# what is refused


@pytest.mark.parametrize("value", [0.0, 1e-39, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_no_positive_normal_number_is_refused(value: float) -> None:
    qat = prepared(Linears)
    module = modules(qat, ActivationFakeQuantize)["first"]
    assert isinstance(module, ActivationFakeQuantize)
    module.scale.fill_(value)
    with pytest.raises(LowerError) as caught:
        convert(Graph.of(qat))
    assert (caught.value.code, caught.value.where) == ("QG515", "first:linear.x")


def test_a_weight_scale_that_would_be_infinite_is_refused() -> None:
    qat = prepared(Linears)
    first_weight(qat).floor.fill_(float("inf"))
    with pytest.raises(LowerError) as caught:
        convert(Graph.of(qat))
    assert (caught.value.code, caught.value.where) == ("QG515", "first.weight")
