"""Training: the schedule, a loss that falls, equal seeds, and everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import qatgraph as qg
from qatgraph.errors import CaptureError, QatgraphError
from qatgraph.ir.graph import Batch
from qatgraph.training.loop import Schedule, distill, relative_error
from tests.models import ZOO, captured, floats

BATCHES: list[Batch] = [floats(4, 32, seed=seed) for seed in range(6)]


@cache
def calibrated() -> nn.Module:
    graph = captured("mlp")
    qat = qg.prepare(graph, qg.plan(graph))
    qg.calibrate(qat, BATCHES, progress=False)
    return qat


def student() -> nn.Module:
    return copy.deepcopy(calibrated())


def teacher() -> nn.Module:
    return ZOO["mlp"].model()


def train(
    qat: nn.Module, batches: Sequence[Batch] = BATCHES, *, like: nn.Module | None = None, **kw: Any
) -> list[float]:
    return distill(
        qat, like or teacher(), batches, Schedule(**{"steps": 5, "lr": 1e-3, "warmup": 0} | kw), progress=False
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """The names whose tensors are bit-equal."""
    assert a.keys() == b.keys()
    return {n for n in a if torch.equal(a[n], b[n])}


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (52, 0.55), (100, 0.1)])
def test_the_rate_warms_up_and_decays_to_a_tenth(step: int, factor: float) -> None:
    assert Schedule(steps=100, warmup=4).rate(step) == pytest.approx(factor)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_every_step_has_the_rate_of_the_schedule(warmup: int) -> None:
    used: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *args: used.append(optimizer.param_groups[0]["lr"]))
    try:
        train(student(), steps=6, warmup=warmup, lr=1e-3)
    finally:
        hook.remove()
    schedule = Schedule(steps=6, warmup=warmup)
    assert used == pytest.approx([1e-3 * schedule.rate(s) for s in range(6)])
    assert used != pytest.approx([1e-3 * schedule.rate(s + 1) for s in range(6)])


@pytest.mark.parametrize("steps", [0, 1, 7, 13])
def test_the_number_of_steps_is_exact(steps: int) -> None:
    like, calls = teacher(), list[int]()
    like.register_forward_hook(lambda *args: calls.append(1))
    assert len(train(student(), like=like, steps=steps)) == len(calls) == steps


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_relative_squared_error_of_every_float_output() -> None:
    want = {"a": torch.tensor([3.0, 4.0]), "n": 3, "none": None, "ids": torch.tensor([1]), "b": torch.tensor([2.0])}
    have = {**want, "a": torch.tensor([3.0, 5.0]), "ids": torch.tensor([9]), "b": torch.tensor([3.0])}
    assert float(relative_error(have, want)) == pytest.approx(1 / 25 + 1 / 4)
    assert float(relative_error(want, want)) == 0.0


def test_training_lowers_the_loss() -> None:
    losses = train(student(), steps=60, lr=1e-4, warmup=4)
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


def test_without_a_rate_nothing_moves_and_the_loss_stays() -> None:
    """The control: the loss falls because the weights move."""
    qat = student()
    before = weights(qat)
    losses = train(qat, BATCHES[:1], lr=0.0)
    assert same(weights(qat), before) == set(before)
    assert len(set(losses)) == 1
    assert len(set(train(qat, BATCHES[:1]))) == 5
    assert not same(weights(qat), before)


def gradient_norm(clip: float) -> float:
    """The norm of the gradient of the last step, where the loss is huge: the teacher's outputs are tiny."""
    qat, like = student(), teacher()
    like.register_forward_hook(lambda module, args, out: out * 1e-3)
    assert train(qat, like=like, steps=1, clip=clip)[0] > 1e5
    return float(torch.stack([p.grad.norm() for p in qat.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_a_large_gradient_is_clipped(clip: float) -> None:
    assert gradient_norm(clip) == pytest.approx(clip, rel=1e-4)
    assert gradient_norm(1e12) > 1e5


# ---------------------------------------------------------------- seeds


@cache
def trained(seed: int = 0, dropout: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    qat = student()
    losses = train(qat, seed=seed, dropout=dropout)
    return losses, weights(qat)


@pytest.mark.parametrize("dropout", [False, True], ids=["without dropout", "with dropout"])
def test_equal_seeds_train_bit_for_bit_alike_and_others_do_not(dropout: bool) -> None:
    first = trained(0, dropout)
    torch.rand(3)  # the seed must overrule the state of the global generator
    again = trained.__wrapped__(0, dropout)
    assert first[0] == again[0]
    assert same(first[1], again[1]) == set(first[1])
    assert trained(1, dropout)[0] != first[0]
    assert not same(trained(1, dropout)[1], first[1])


def test_dropout_makes_a_run_differ() -> None:
    assert trained(0, True)[0] != trained(0, False)[0]


# ---------------------------------------------------------------- what stays


def state(model: nn.Module) -> dict[str, Any]:
    """All that training must leave alone in a teacher, comparable."""
    return {
        "values": {n: t.tolist() for n, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "trainable": [p.requires_grad for p in model.parameters()],
    }


def test_the_teacher_stays_as_it_is() -> None:
    like, qat = teacher().train(), student()
    like.get_submodule("up").eval()
    like.get_parameter("down.bias").requires_grad_(False)
    like(BATCHES[0]).sum().backward()
    before, seen = state(like), set[bool]()
    like.register_forward_pre_hook(lambda module, args: seen.add(any(m.training for m in module.modules())))
    student_before = state(qat)
    train(qat, like=like)
    assert seen == {False}
    assert state(like) == before
    assert state(qat)["values"] != student_before["values"]  # the same comparison sees what was trained
    assert state(qat)["gradients"] != student_before["gradients"]


@pytest.mark.parametrize("bad", [False, True], ids=["well", "with an error"])
@pytest.mark.parametrize("dropout", [False, True])
def test_modes_are_restored(bad: bool, dropout: bool) -> None:
    qat = student().train()
    next(m for m in qat.modules() if isinstance(m, nn.Dropout)).eval()
    before, seen = [m.training for m in qat.modules()], set[bool]()
    qat.register_forward_pre_hook(lambda module, args: seen.add(all(m.training for m in module.modules())))
    with pytest.raises(CaptureError, match="training batch of step 0") if bad else nullcontext():
        train(qat, [floats(4)] if bad else BATCHES, dropout=dropout)
    assert seen == (set() if bad else {dropout})
    assert [m.training for m in qat.modules()] == before


def test_frozen_parameters_stay_frozen() -> None:
    qat = student()
    qat.get_parameter("up.weight").requires_grad_(False)
    before = weights(qat)
    train(qat)
    assert same(weights(qat), before) == {"up.weight"}
    assert not qat.get_parameter("up.weight").requires_grad
    assert qat.get_parameter("up.weight").grad is None


# ---------------------------------------------------------------- refusals


class Cusp(nn.Module):
    """A derivative that does not exist at 0, where every value is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second((self.first(x) * 0).sqrt())
        return y


def cusp() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Cusp()
    graph = qg.capture(model, floats(3, 4))
    qat = qg.prepare(graph, qg.plan(graph))
    qg.calibrate(qat, [floats(3, 4)], progress=False)
    return qat, model


def refused(code: str, sentence: str, *args: Any, **kw: Any) -> None:
    before = weights(args[0])
    with pytest.raises(QatgraphError, match=sentence) as caught:
        train(*args, **kw)
    assert caught.value.code == code
    assert caught.value.where
    assert caught.value.todo
    assert same(weights(args[0]), before) == set(before)


def test_no_batch() -> None:
    refused("QG703", "there is no batch to train on", student(), [])


def test_nothing_to_train() -> None:
    refused("QG705", "there is no parameter to train", student().requires_grad_(False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float) -> None:
    like = teacher()
    like.register_forward_hook(lambda module, args, out: out * value)
    refused("QG704", "the loss is nan at step 0", student(), like=like)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights() -> None:
    qat, model = cusp()
    refused("QG704", "the gradient is nan at step 0", qat, [floats(3, 4)], like=model, steps=1)


def test_a_rate_that_is_far_too_large() -> None:
    with pytest.raises(QatgraphError, match="QG704: the loss is inf at step 1"):
        train(student(), lr=1e30)
