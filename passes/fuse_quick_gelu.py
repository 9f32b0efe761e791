"""fuse-quick-gelu."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Number, Op, Refusal


@dataclass(frozen=True)
class FuseQuickGelu(RewritePass):
    """Group the GELU that is approximated with a sigmoid.

    What: the operations of ``x * sigmoid(1.702 x)`` get one region (Hendrycks and Gimpel, arXiv:1606.08415).
    Why: CLIP writes it so, torch has no operator for it, and quantizers must not stand inside.
    Before and after: the arithmetic stays; all of it carries ``@…:mul+quick_gelu``.
    Refuses: what has a region already; other factors do not match.
    Numerics: same.
    """

    name = "fuse-quick-gelu"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Op("mul", Any("x"), Op("sigmoid", Op("mul", Any("x"), Number(1.702))), name="out")

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("it has a region") if record(match["out"]).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group("quick_gelu", *sorted(match.nodes))
