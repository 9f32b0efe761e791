"""keep-pruning-masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.errors import PassError
from qatgraph.ir.masks import Weight, masked, weight_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.channels import LAYERS
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Op, Refusal


@dataclass(frozen=True)
class KeepPruningMasks(RewritePass):
    """Keep the zeros of a pruned weight exactly zero, whatever trains it.

    What: a weight of which at least the share ``least`` is exactly zero is read through a mask, a buffer of zeros and
        ones; each layer reads ``weight * mask``, and its quantizer stands behind the product.
    Why: momentum, weight decay and gradients move zeros away, and a 2:4 pattern that is not kept exactly runs on no
        sparse kernel. A masked weight gets no gradient where it is zero, and conversion multiplies once.
    Before and after: ``linear(x, w, b)`` becomes ``linear(x, mul(w, w/mask), b)``.
    Refuses: a weight with fewer zeros; one that is all zeros, as the B of a new LoRA adapter, which has yet to learn;
        a weight that is no parameter. Weights that are masked already (``torch.nn.utils.prune``) do not match.
    Numerics: same.
    """

    name = "keep-pruning-masks"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Alt(
        Op("|".join(LAYERS), Any("x"), Const("weight"), name="layer"),
        Op("embedding", Const("weight"), name="layer"),
    )
    least: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.least <= 1.0:
            raise PassError(
                "QG202",
                f"'{self.name}' does not take these options",
                where=f"least={self.least!r}",
                why="it is a share of the weight's elements",
                todo="give a number above 0 and up to 1",
            )

    def check(self, match: Match) -> Refusal | None:
        weight = _weight(match)
        if not isinstance(weight.stored, torch.nn.Parameter):
            return match.refuse(f"'{weight.path}' is no parameter, so nothing trains it")
        zeros = float((weight.stored == 0).float().mean())
        if zeros == 1.0:
            return match.refuse(f"'{weight.path}' is all zeros, so it is not pruned: it has yet to learn")
        if zeros < self.least:
            return match.refuse(f"{zeros:.0%} of '{weight.path}' is zero, less than {self.least:.0%}")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        layer, weight = match["layer"], _weight(match)
        edit.reread(layer, weight.argument, _known(weight, layer) or self._product(weight, layer, edit))

    def _product(self, weight: Weight, layer: fx.Node, edit: Edit) -> fx.Node:
        ones = (weight.stored != 0).to(weight.stored.dtype)
        return edit.call("mul", weight.parameter, edit.constant(f"{weight.path}/mask", ones, at=layer), at=layer)


def _weight(match: Match) -> Weight:
    found = weight_of(match["weight"])
    assert found is not None
    return found


def _known(weight: Weight, layer: fx.Node) -> fx.Node | None:
    """The masked weight that an earlier reader of the same tensor got: a mask of the model's own may hide more."""
    reads = (n for n in weight.parameter.graph.nodes if n.op == "get_attr")
    products = (masked(user) for n in reads for user in n.users if user < layer)
    same = (p for p in products if p is not None and p.stored is weight.stored)
    return next((p.argument for p in same if torch.equal(p.tensor, weight.tensor)), None)
