"""fuse-linear-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Op, Refusal


@dataclass(frozen=True)
class FuseLinearActivation(RewritePass):
    """Group a linear with the activation that alone reads it.

    What: both nodes get one region.
    Why: targets decide on the pair (an engine may fuse bias and activation), and plans read better by region.
    Before and after: the arithmetic stays; ``linear`` and ``gelu`` carry ``@…:linear+gelu``.
    Refuses: a linear that something else reads too, or that has a region already.
    Numerics: same.
    """

    name = "fuse-linear-activation"
    stage = Stage.CAPTURED
    numerics = same
    pattern = Op("gelu|relu|tanh", Op("linear", Any(), name="linear"), name="act")

    def check(self, match: Match) -> Refusal | None:
        users = len(match["linear"].users)
        if users > 1:
            return match.refuse(f"'{record(match['linear']).name}' has {users} users")
        return match.refuse("the linear has a region") if record(match["linear"]).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group(record(match["act"]).kind, match["linear"], match["act"])
