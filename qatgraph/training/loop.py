"""A short loop: distil the float model into the fake-quantized one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from qatgraph.errors import TrainError
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.progress import track
from qatgraph.quantizers.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Schedule:
    """``steps`` of AdamW: linear warm-up to ``lr``, cosine decay to a tenth of it, gradients clipped to ``clip``."""

    steps: int = 300
    lr: float = 1e-5
    warmup: int = 20
    clip: float = 1.0
    seed: int = 0
    dropout: bool = False

    def rate(self, step: int) -> float:
        """The factor on ``lr`` at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * part))


def distill(
    qat: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Sequence[Batch],
    schedule: Schedule = Schedule(),
    *,
    progress: bool = True,
) -> list[float]:
    """Train for a fixed number of steps; the loss is the relative squared error of every float output.

    Batches come in a seeded order, again and again. The teacher runs in evaluation mode and stays as it is.

    Returns:
        The loss of each step.

    Raises:
        TrainError: QG703 no batch, QG704 the loss or its gradient is not finite, QG705 every parameter is frozen,
            QG706 the model has not been calibrated.
    """
    if not batches:
        raise TrainError("QG703", "there is no batch to train on", where="distill", todo="give at least one batch")
    graph = Graph.prepared(qat)
    uncalibrated = next((n for n, m in qat.named_modules() if isinstance(m, FakeQuantize) and not m.on), None)
    if uncalibrated is not None:
        why = "a quantizer that is off passes values through, so nothing would be learned"
        todo = "call qatgraph.calibrate(qat, batches) first"
        raise TrainError("QG706", "the model has not been calibrated", where=uncalibrated, why=why, todo=todo)
    parameters = [p for p in qat.parameters() if p.requires_grad]
    if not parameters:
        todo = "set requires_grad on what shall be trained, or lower the calibrated model as it is"
        raise TrainError("QG705", "there is no parameter to train", where="distill", why="all are frozen", todo=todo)
    generator = torch.Generator().manual_seed(schedule.seed)
    torch.manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate)
    modes = {m: m.training for m in [*qat.modules(), *teacher.modules()]}
    qat.train(schedule.dropout)
    teacher.eval()
    losses: list[float] = []
    stream = _endless(batches, generator)
    try:
        for step in track(range(schedule.steps), "train", show=progress):
            batch = next(stream)
            graph.check_batch(batch, f"training batch of step {step}")
            args, kwargs = bind(batch)
            with torch.no_grad():
                wanted = teacher(*args, **kwargs)
            loss = relative_error(qat(*args, **kwargs), wanted)
            _check_finite("loss", loss, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            # before the step: one gradient that is not finite makes every clipped one, and so every weight, NaN
            _check_finite("gradient", torch.nn.utils.clip_grad_norm_(parameters, schedule.clip), step)
            optimizer.step()
            rates.step()
            losses.append(loss.item())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return losses


def relative_error(have: object, want: object) -> torch.Tensor:
    """Sum over the float outputs of ``|have - want|^2 / |want|^2``."""
    pairs = zip(pytree.tree_leaves(have), pytree.tree_leaves(want), strict=True)
    floats = [(a, b) for a, b in pairs if isinstance(b, torch.Tensor) and b.is_floating_point()]
    return torch.stack([(a - b).square().sum() / b.square().sum().clamp(min=1e-30) for a, b in floats]).sum()


def _check_finite(what: str, value: torch.Tensor, step: int) -> None:
    if not math.isfinite(value.item()):
        raise TrainError(
            "QG704",
            f"the {what} is {value.item()} at step {step}",
            where=f"step {step}",
            why="a weight or an activation overflows, or the derivative does not exist there",
            todo="lower the learning rate, or look at the batch",
        )


def _endless(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
