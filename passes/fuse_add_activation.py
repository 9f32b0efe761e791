"""fuse-add-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Op, Refusal


@dataclass(frozen=True)
class FuseAddActivation(RewritePass):
    """Group a residual addition with the ReLU or limit that alone reads it.

    What: both nodes get one region.
    Why: an engine that adds integers clamps in the same kernel, so that no grid belongs between the two.
    Before and after: the arithmetic stays; ``residual_add`` and ``relu`` carry ``@…:residual_add+relu``.
    Refuses: a sum that something else reads too, or that has a region already.
    Numerics: same.
    """

    name = "fuse-add-activation"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Op("relu|clamp", Op("residual_add", Any(), Any(), name="add"), name="act")

    def check(self, match: Match) -> Refusal | None:
        users = len(match["add"].users)
        if users > 1:
            return match.refuse(f"'{record(match['add']).name}' has {users} users")
        return match.refuse("the sum has a region") if record(match["add"]).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group(record(match["act"]).kind, match["add"], match["act"])
