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
        TrainError: QG703 no batch, QG704 the loss is not finite.
    """
    if not batches:
        raise TrainError("QG703", "there is no batch to train on", where="distill", todo="give at least one batch")
    graph = Graph.of(qat)
    generator = torch.Generator().manual_seed(schedule.seed)
    torch.manual_seed(schedule.seed)
    parameters = [p for p in qat.parameters() if p.requires_grad]
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
            if not math.isfinite(loss.item()):
                raise TrainError(
                    "QG704",
                    f"the loss is {loss.item()} at step {step}",
                    where=f"step {step}",
                    why="the step before made a weight or an activation overflow, or the data contains NaN",
                    todo="lower the learning rate, or look at the batch",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
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
    terms = [(a - b).square().sum() / b.square().sum().clamp(min=1e-30) for a, b in pairs if b.is_floating_point()]
    return torch.stack(terms).sum()


def _endless(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
