"""fold-silu."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Match, Op


@dataclass(frozen=True)
class FoldSilu(RewritePass):
    """Recognise the SiLU that is written as a product with a sigmoid.

    What: ``x * sigmoid(x)`` becomes ``silu(x)`` (Elfwing et al., arXiv:1702.03118).
    Why: engines have one kernel for it, and recipes speak of ``silu``.
    Before and after: sigmoid and mul become one node.
    Refuses: nothing; a sigmoid of another value (a gate) does not match.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-silu"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Op("mul", Any("x"), Op("sigmoid", Any("x")), name="out")

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["out"], edit.call("silu", match["x"], at=match["out"]))
