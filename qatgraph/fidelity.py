"""How far outputs are from those of the float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Batch

Run = Callable[[Batch], torch.Tensor]


def first_output(value: Any) -> torch.Tensor:
    """The first float tensor in what a model returned.

    Raises:
        VerifyError: QG606 there is none.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.detach()
    raise _incomparable("the model has no float output", "there is no distance between outputs of other types")


def outputs(run: Run, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The first float output of every batch."""
    with torch.no_grad():
        return [run(b) for b in batches]


def cosine(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean and smallest cosine between rows (one a sample) of two models' outputs, in float64.

    A row of zeros has no direction: its cosine is 0, whatever the other is.

    Raises:
        VerifyError: QG606 shapes differ, QG607 a value is NaN or infinite.
    """
    _check_shapes([a.shape for a in have], [b.shape for b in want], "the outputs of the float model")
    _check_finite([*have, *want])
    every = torch.cat([torch.cosine_similarity(_rows(a), _rows(b)) for a, b in zip(have, want, strict=True)])
    return {"cosine_mean": float(every.mean()), "cosine_min": float(every.min())}


def top1(have: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> dict[str, float]:
    """The share of samples whose largest logit is the label.

    Raises:
        VerifyError: QG606 the labels do not fit, QG607 a value is NaN or infinite.
    """
    _check_shapes([a.shape[:-1] for a in have], [b.shape for b in labels], "the labels")
    _check_finite(have)
    right = [(a.argmax(-1) == b).double().flatten() for a, b in zip(have, labels, strict=True)]
    return {"top1": float(torch.cat(right).mean())}


def _rows(output: torch.Tensor) -> torch.Tensor:
    """One row a sample; an output without an axis of samples is one row."""
    return output.double().flatten(1) if output.ndim > 1 else output.double().reshape(1, -1)


def _check_shapes(have: Sequence[torch.Size], want: Sequence[torch.Size], what: str) -> None:
    """Tensors of other shapes would be broadcast against each other, without a word."""
    for i, shapes in enumerate(zip_longest(have, want)):
        if shapes[0] != shapes[1]:
            output, other = ("nothing" if s is None else str(list(s)) for s in shapes)
            raise _incomparable(f"{what} do not fit the outputs", f"in batch {i} they are {other}, not {output}")


def _check_finite(values: Sequence[torch.Tensor]) -> None:
    """NaN is the largest logit for ``argmax``, and no comparison with a limit finds it."""
    if not all(bool(torch.isfinite(t).all()) for t in values):
        raise VerifyError(
            "QG607",
            "an output contains NaN or infinity",
            where="the first float output",
            why="it has no distance to another output",
            todo="look at the batch and at the float model; leave a mask of -inf to the caller of the model",
        )


def _incomparable(what: str, why: str) -> VerifyError:
    todo = "give labels and batches that belong together, and a model with a float output"
    return VerifyError("QG606", what, where="the first float output", why=why, todo=todo)
