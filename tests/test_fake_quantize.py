"""Fake quantizers: the straight-through gradient, and a prepared model that is an ordinary module."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.ir.graph import Batch, bind
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize
from qatgraph.specs import DType, Granularity, QuantSpec, ScaleRule, Scheme
from tests.models import ZOO, floats

U8 = QuantSpec(DType.U8, Scheme.AFFINE)
S8 = QuantSpec(DType.S8)
PAIR_SAFE = QuantSpec(DType.S8, granularity=Granularity.PER_CHANNEL, axis=0, scale=ScaleRule.PAIR_SAFE)
TABLE = Recipe(override=(Override(select="token:embedding", place="int8"),))  # a small table stays in float otherwise
BATCHES = [ZOO["encoder"].inputs(seed) for seed in range(3)]


def prepared() -> nn.Module:
    graph = ZOO["encoder"].capture()
    return qg.prepare(graph, qg.plan(graph, recipe=TABLE))


def calibrated() -> nn.Module:
    qat = prepared()
    qg.calibrate(qat, BATCHES, progress=False)
    return qat.eval()


@pytest.fixture(scope="module")
def qat() -> nn.Module:
    """A calibrated encoder; read it, do not change it."""
    return calibrated()


def run(model: Callable[..., object], batch: Batch) -> Tensor:
    args, kwargs = bind(batch)
    with torch.no_grad():
        out = model(*args, **kwargs)
    assert isinstance(out, Tensor)
    return out


# ---------------------------------------------------------------- one quantizer


def settled(spec: QuantSpec, low: float, high: float) -> ActivationFakeQuantize:
    module = ActivationFakeQuantize(spec, "minmax")
    module.observer.observe(torch.tensor([low, high]))
    module.settle()
    return module


@pytest.mark.parametrize(("spec", "low"), [(U8, -1.0), (U8, 0.0), (S8, -2.0)], ids=str)
def test_the_gradient_passes_inside_the_range_and_stops_outside(spec: QuantSpec, low: float) -> None:
    high = 2.0
    x = torch.tensor([low - 1.0, low - 0.1, low, 0.0, 0.3, high, high + 0.1, high + 1.0], requires_grad=True)
    settled(spec, low, high)(x).backward(torch.arange(1.0, 9.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]


def test_the_forward_is_the_nearest_point_of_the_grid() -> None:
    module = settled(U8, 0.0, 255.0)
    x = torch.tensor([-3.0, 0.4, 0.5, 1.5, 1.6, 254.6, 300.0])
    assert module(x).tolist() == [0.0, 0.0, 0.0, 2.0, 2.0, 255.0, 255.0]


def test_an_activation_passes_through_until_it_is_calibrated() -> None:
    module, x = ActivationFakeQuantize(U8, "mse"), floats(5, 5)
    assert module(x) is x
    module.observing = True
    assert module(x) is x
    module.observing = False
    module.settle()
    assert not torch.equal(module(x), x)


def test_a_weight_passes_through_until_it_is_switched_on() -> None:
    module, weight = WeightFakeQuantize(PAIR_SAFE), floats(4, 6)
    assert module(weight) is weight
    module.switch_on()
    assert not torch.equal(module(weight), weight)


def test_no_weight_is_clipped_so_every_gradient_passes() -> None:
    module = WeightFakeQuantize(PAIR_SAFE)
    module.switch_on()
    weight = floats(6, 9).requires_grad_()
    module(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_grid_of_a_weight_follows_it() -> None:
    module, weight = WeightFakeQuantize(PAIR_SAFE), floats(4, 6)
    module.switch_on()
    assert torch.equal(module(weight * 2), module(weight) * 2)


@pytest.mark.parametrize("rule", [ScaleRule.FREE, ScaleRule.POWER_OF_TWO], ids=str)
def test_rows_of_a_table_lie_on_the_grid_of_the_table(rule: ScaleRule) -> None:
    module, table, indices = WeightFakeQuantize(QuantSpec(DType.S8, scale=rule)), floats(30, 8), torch.tensor([[3, 7]])
    module.switch_on()
    table[11] = 40.0  # it is not looked up, but it sets the scale
    rows = nn.functional.embedding(indices, table)
    assert torch.equal(module(rows, table), nn.functional.embedding(indices, module(table)))
    assert not torch.equal(module(rows), nn.functional.embedding(indices, module(table)))


# ---------------------------------------------------------------- the prepared model


REWRITTEN = {"gpt2", "erf-gelu", "images", "pixels"}  # by passes, within their declared eps


@pytest.mark.parametrize("name", sorted(ZOO))
def test_before_calibration_it_computes_what_the_model_computes(name: str) -> None:
    case = ZOO[name]
    graph = case.capture()
    qat = qg.prepare(graph, qg.plan(graph)).eval()
    for seed in range(2):
        have, want = run(qat, case.inputs(seed)), run(case.model(), case.inputs(seed))
        if name in REWRITTEN:
            assert torch.allclose(have, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(have, want)


def test_calibration_changes_what_it_computes(qat: nn.Module) -> None:
    have, want = run(qat, BATCHES[0]), run(ZOO["encoder"].model(), BATCHES[0])
    assert not torch.equal(have, want)
    assert torch.cosine_similarity(have.flatten(), want.flatten(), dim=0) > 0.999


def test_gradients_reach_every_weight_and_the_table() -> None:
    model = calibrated()
    model(**BATCHES[0]).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(without) <= {"layer.0.attention.key.bias"}  # softmax does not see a shift of all scores


def test_it_takes_positions_as_well_as_keywords(qat: nn.Module) -> None:
    assert torch.equal(run(qat, tuple(BATCHES[0].values())), run(qat, BATCHES[0]))


def test_a_state_dict_restores_it_bit_for_bit(qat: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        graph = qg.capture(ZOO["encoder"].make().eval(), BATCHES[0], ZOO["encoder"].dynamic)  # other weights
    fresh = qg.prepare(graph, qg.plan(graph, recipe=TABLE)).eval()
    assert not torch.equal(run(fresh, BATCHES[0]), run(qat, BATCHES[0]))
    fresh.load_state_dict(qat.state_dict())
    assert torch.equal(run(fresh, BATCHES[0]), run(qat, BATCHES[0]))
    assert all(m.on for m in fresh.modules() if isinstance(m, FakeQuantize))


def test_an_uncalibrated_state_dict_switches_off_again(qat: nn.Module) -> None:
    model, off = copy.deepcopy(qat), prepared().eval()
    model.load_state_dict(off.state_dict())
    assert torch.equal(run(model, BATCHES[0]), run(off, BATCHES[0]))


def test_everything_that_decides_is_in_the_state_dict(qat: nn.Module) -> None:
    keys = set(qat.state_dict())
    for name, module in qat.named_modules():
        if isinstance(module, FakeQuantize):
            assert f"{name}.calibrated" in keys
        if isinstance(module, ActivationFakeQuantize):
            assert {f"{name}.scale", f"{name}.zero_point"} <= keys


def test_a_deep_copy_is_equal_and_independent(qat: nn.Module) -> None:
    before = run(qat, BATCHES[0])
    twin = copy.deepcopy(qat)
    assert torch.equal(run(twin, BATCHES[0]), before)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(run(qat, BATCHES[0]), before)
    assert not torch.equal(run(twin, BATCHES[0]), before)


def test_a_deep_copy_still_knows_its_graph(qat: nn.Module) -> None:
    before = run(qat, BATCHES[0])
    twin = copy.deepcopy(qat)
    qg.calibrate(twin, [ZOO["encoder"].inputs(9)], progress=False)
    assert torch.equal(run(qat, BATCHES[0]), before)
    assert not torch.equal(run(twin, BATCHES[0]), before)


def test_it_moves_between_devices_and_types(qat: nn.Module) -> None:
    before = run(qat, BATCHES[0])
    assert torch.equal(run(copy.deepcopy(qat).to(torch.device("cpu")), BATCHES[0]), before)
    wide = run(copy.deepcopy(qat).double(), BATCHES[0])
    assert wide.dtype is torch.float64
    assert torch.cosine_similarity(wide.flatten(), before.double().flatten(), dim=0) > 0.9999
    assert torch.equal(run(copy.deepcopy(qat).double().float(), BATCHES[0]), before)


def test_a_model_in_double_can_be_calibrated() -> None:
    model = prepared().double()
    qg.calibrate(model, BATCHES, progress=False)
    assert run(model, BATCHES[0]).dtype is torch.float64


def test_train_and_eval_switch_dropout() -> None:
    model = calibrated()
    assert torch.equal(run(model, BATCHES[0]), run(model, BATCHES[0]))
    model.train()
    assert all(m.training for m in model.modules())
    assert not torch.equal(run(model, BATCHES[0]), run(model, BATCHES[0]))
    model.eval()
    assert not any(m.training for m in model.modules())
    assert torch.equal(run(model, BATCHES[0]), run(model, BATCHES[0]))


def test_it_exports(qat: nn.Module) -> None:
    program = torch.export.export(qat, (), dict(BATCHES[0]))
    assert torch.equal(run(program.module(), BATCHES[1]), run(qat, BATCHES[1]))
    assert not torch.equal(run(program.module(), BATCHES[1]), run(ZOO["encoder"].model(), BATCHES[1]))


def test_a_state_that_lacks_a_quantizer_is_refused(qat: nn.Module) -> None:
    state = {k: v for k, v in qat.state_dict().items() if not k.endswith("calibrated")}
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(qat).load_state_dict(state)
