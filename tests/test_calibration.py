"""Calibration: any iterable of batches, every grid fixed and on afterwards, all or nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import CaptureError, QatgraphError, TrainError
from qatgraph.ir.graph import Batch
from qatgraph.planning.recipe import Recipe
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FakeQuantize
from qatgraph.quantizers.observers import OBSERVERS, MinMax
from tests.models import ZOO, captured, floats, padded

TOY_NPU = Path(__file__).parent.parent / "examples" / "targets" / "toy_npu.toml"
BATCHES = [ZOO["encoder"].inputs(seed) for seed in range(4)]
FAR = [padded(2, 60, seed) for seed in range(10, 13)]  # more tokens: wider ranges
Grids = dict[str, tuple[float, float]]
EVERY = pytest.mark.parametrize("observer", sorted(OBSERVERS))


@cache
def blueprint(name: str, observer: str, target: str) -> nn.Module:
    graph = captured(name)
    return qg.prepare(graph, qg.plan(graph, target, Recipe.model_validate({"observer": observer})))


def prepared(name: str = "encoder", observer: str = "minmax", target: str = "ort-cpu") -> nn.Module:
    return copy.deepcopy(blueprint(name, observer, target))


def activations(qat: nn.Module) -> dict[str, ActivationFakeQuantize]:
    return {n: m for n, m in qat.named_modules() if isinstance(m, ActivationFakeQuantize)}


def grids(qat: nn.Module) -> Grids:
    return {n: (float(m.scale), float(m.zero_point)) for n, m in activations(qat).items()}


def calibrated(batches: Iterable[Batch], observer: str = "minmax") -> Grids:
    qat = prepared(observer=observer)
    qg.calibrate(qat, batches, progress=False)
    return grids(qat)


# ---------------------------------------------------------------- what it takes and what it leaves

SPELLINGS: dict[str, Callable[[], Iterable[Batch]]] = {
    "a tuple": lambda: tuple(BATCHES),
    "a generator": lambda: (b for b in BATCHES),
    "tuples of arguments": lambda: [tuple(b.values()) for b in BATCHES],
    "dicts in another order": lambda: [dict(reversed(b.items())) for b in BATCHES],
}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_any_iterable_of_any_batches_gives_the_same_grids(spelling: str) -> None:
    assert calibrated(SPELLINGS[spelling]()) == calibrated(BATCHES)
    assert calibrated(list(SPELLINGS[spelling]())[:1]) != calibrated(BATCHES)


def test_afterwards_every_grid_is_fixed_and_on() -> None:
    qat = prepared()
    assert not any(m.on or bool(m.calibrated) for m in qat.modules() if isinstance(m, FakeQuantize))
    qg.calibrate(qat, BATCHES, progress=False)
    quantizers = [m for m in qat.modules() if isinstance(m, FakeQuantize)]
    assert len(quantizers) > len(activations(qat)) > 3
    assert all(m.on and bool(m.calibrated) for m in quantizers)
    before = grids(qat)
    for batch in FAR:
        qat(**batch)
    assert grids(qat) == before
    assert before != dict.fromkeys(before, (1.0, 0.0))


def test_min_max_grids_are_those_of_the_extremes() -> None:
    """Planned by hand: the first linear of the MLP reads LayerNorm(x)."""
    x = floats(4, 32)
    qat = prepared("mlp")
    qg.calibrate(qat, [x[:2], x[2:]], progress=False)
    seen = nn.functional.layer_norm(x, (32,))
    scale, zero = next(v for n, v in grids(qat).items() if n.startswith("up."))
    assert scale == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-6)
    assert zero == round(-float(seen.min()) / scale)
    part = nn.functional.layer_norm(x[:2], (32,))
    assert scale != pytest.approx(float(part.max() - part.min()) / 255, rel=1e-6)


def mantissas(target: str) -> set[float]:
    qat = prepared(target=target)
    qg.calibrate(qat, BATCHES, progress=False)
    return {float(torch.frexp(m.scale)[0]) for m in activations(qat).values()}


def test_scales_are_powers_of_two_where_the_target_says_so() -> None:
    assert mantissas(str(TOY_NPU)) == {0.5}
    assert 0.5 not in mantissas("ort-cpu")


def modes(qat: nn.Module) -> dict[str, bool]:
    return {n: m.training for n, m in qat.named_modules()}


@pytest.mark.parametrize("batches", [BATCHES, []], ids=["well", "with an error"])
def test_the_mode_of_every_module_is_restored(batches: list[Batch]) -> None:
    qat = prepared().train()
    next(m for m in qat.modules() if isinstance(m, nn.Dropout)).eval()  # one differs from the others
    before, seen = modes(qat), set[bool]()
    qat.register_forward_pre_hook(lambda m, args: seen.add(any(modes(qat).values())))
    with nullcontext() if batches else pytest.raises(TrainError):
        qg.calibrate(qat, batches, progress=False)
    assert seen == ({False} if batches else set())
    assert modes(qat) == before
    assert len(set(before.values())) == 2


# ---------------------------------------------------------------- all or nothing


class Blowup(nn.Module):
    """Overflows to infinity, or to NaN, in front of its second linear when the input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        huge = self.first(x).exp()
        y: Tensor = self.second(huge - huge * 0.5)
        return y


@cache
def exploding() -> nn.Module:
    torch.manual_seed(0)
    graph = qg.capture(Blowup(), floats(3, 4))
    return qg.prepare(graph, qg.plan(graph))


def blowup() -> nn.Module:
    return copy.deepcopy(exploding())


def broken() -> Iterator[Batch]:
    yield floats(3, 4)
    raise OSError("the disk is gone")


FAULTS: dict[str, tuple[Callable[[], Iterable[Batch]], type[Exception], str]] = {
    "no batch": (list, TrainError, "QG701: there is no batch to calibrate on"),
    "a used generator": (lambda: iter(()), TrainError, "the iterable is empty or used up"),
    "an overflow": (lambda: [floats(3, 4), floats(3, 4) * 1e4], TrainError, "QG702: an activation contains NaN or inf"),
    "NaN": (lambda: [floats(3, 4) * 1e4, floats(3, 4)], TrainError, "where: second:linear.x"),
    "another rank": (lambda: [floats(3, 4), floats(3)], CaptureError, "QG110.*\n.*calibration batch 1, input 'x'"),
    "NaN in the data": (lambda: [floats(3, 4) / 0], CaptureError, "it contains NaN or infinity"),
    "an iterable that breaks": (broken, OSError, "the disk is gone"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("earlier", [True, False], ids=["calibrated before", "not calibrated"])
def test_an_error_leaves_the_model_exactly_as_before(fault: str, earlier: bool) -> None:
    batches, kind, sentence = FAULTS[fault]
    qat = blowup()
    if earlier:
        qg.calibrate(qat, [floats(3, 4, seed=1)], progress=False)
    before, out = pickle.dumps(dict(qat.state_dict())), qat(floats(3, 4))
    flags = [(m.on, m.training) for m in qat.modules() if isinstance(m, FakeQuantize)]
    with pytest.raises(kind, match=sentence) as caught:
        qg.calibrate(qat, batches(), progress=False)
    if isinstance(caught.value, QatgraphError):
        assert caught.value.todo
    assert pickle.dumps(dict(qat.state_dict())) == before
    assert torch.equal(qat(floats(3, 4)), out)
    assert [(m.on, m.training) for m in qat.modules() if isinstance(m, FakeQuantize)] == flags
    assert not any(m.observing for m in activations(qat).values())


def test_the_same_comparison_sees_a_calibration_that_succeeds() -> None:
    qat = blowup()
    before, out = pickle.dumps(dict(qat.state_dict())), qat(floats(3, 4))
    qg.calibrate(qat, [floats(3, 4)], progress=False)
    assert pickle.dumps(dict(qat.state_dict())) != before
    assert not torch.equal(qat(floats(3, 4)), out)


@EVERY
@pytest.mark.parametrize("first", ["other data", "a failure"])
def test_a_second_calibration_starts_anew(observer: str, first: str) -> None:
    qat = prepared(observer=observer)
    if first == "other data":
        qg.calibrate(qat, FAR, progress=False)
        assert grids(qat) != calibrated(BATCHES, observer)
    else:
        with pytest.raises(CaptureError):
            qg.calibrate(qat, [*FAR, floats(1)], progress=False)
    qg.calibrate(qat, BATCHES, progress=False)
    assert grids(qat) == calibrated(BATCHES, observer)
    assert calibrated([*FAR, *BATCHES], observer) != calibrated(BATCHES, observer)  # mixed grids would be others


# ---------------------------------------------------------------- memory and the bar


def footprint(qat: nn.Module, batches: int) -> int:
    """Bytes of all that the observers hold after so many batches."""
    qg.calibrate(qat, (ZOO["encoder"].inputs(seed) for seed in range(batches)), progress=False)
    return len(pickle.dumps([m.observer for m in activations(qat).values()]))


@EVERY
def test_memory_does_not_grow_with_the_batches(observer: str) -> None:
    assert footprint(prepared(observer=observer), 30) == footprint(prepared(observer=observer), 2)


class Hoarder(MinMax):
    """What an observer must not do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self.kept.append(x)


def hoarding() -> nn.Module:
    qat = prepared()
    for module in activations(qat).values():
        module.observer = Hoarder()
    return qat


def test_an_observer_that_keeps_its_batches_is_seen() -> None:
    assert footprint(hoarding(), 30) > footprint(hoarding(), 2)


def test_the_bar_goes_to_standard_error_and_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    qg.calibrate(prepared(), BATCHES, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "calibrate" in shown.err
    assert "4/4" in shown.err
    qg.calibrate(prepared(), BATCHES, progress=False)
    assert capsys.readouterr() == ("", "")
