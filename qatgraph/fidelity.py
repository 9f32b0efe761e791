"""How far outputs are from those of the float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qatgraph.ir.graph import Batch

Run = Callable[[Batch], torch.Tensor]


def first_output(value: Any) -> torch.Tensor:
    leaf = next(t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point())
    tensor: torch.Tensor = leaf.detach()
    return tensor


def outputs(run: Run, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The first float output of every batch."""
    with torch.no_grad():
        return [run(b) for b in batches]


def cosine(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean and smallest cosine between rows (one a sample) of two models' outputs, in float64."""
    rows = [
        torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1)) for a, b in zip(have, want, strict=True)
    ]
    every = torch.cat(rows)
    return {"cosine_mean": float(every.mean()), "cosine_min": float(every.min())}


def top1(have: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> dict[str, float]:
    """The share of samples whose largest logit is the label."""
    right = [(a.argmax(-1) == b).double() for a, b in zip(have, labels, strict=True)]
    return {"top1": float(torch.cat(right).mean())}
