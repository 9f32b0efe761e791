"""fold-safe-softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Match, Number, Op, Refusal

_SOFTMAX = Op("softmax", Any("x"), name="softmax")
_HIDDEN = Alt(Op("eq", Any("x"), Number(-math.inf)), Op("isneginf", Any("x")))
_KEPT = {"keepdim": True}
# the rows of which nothing is visible
_EMPTY = Alt(
    Op("all", _HIDDEN, where=_KEPT, name="rows"),
    Op("logical_not", Op("any", Op("logical_not", _HIDDEN), where=_KEPT, name="rows")),
    Op("isnan", _SOFTMAX),
)
_ZERO = Alt(
    Number(0.0), Op("full_like", Any(), Number(0.0)), Op("zeros_like", Any()), Op("full", where={"fill_value": 0.0})
)


@dataclass(frozen=True)
class FoldSafeSoftmax(RewritePass):
    """Recognise the softmax that gives zeros where everything is masked.

    What: ``where(all(x == -inf), 0, softmax(x))`` and ``where(isnan(softmax(x)), 0, softmax(x))`` become
        ``safe_softmax(x, dim)``.
    Why: torch writes masked attention so when it takes it apart; it is pinned as softmax is.
    Before and after: softmax, isnan, where become one node.
    Refuses: rows along another axis than that of the softmax.
    Numerics: within 1e-12 in float64, for scores that are numbers or -inf.
    """

    name = "fold-safe-softmax"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("where", _EMPTY, _ZERO, _SOFTMAX, name="out"),
        Op("masked_fill", _SOFTMAX, _EMPTY, Number(0.0), name="out"),
        Op("nan_to_num", _SOFTMAX, name="out", where={"nan": lambda nan: nan in (None, 0)}),
    )

    def check(self, match: Match) -> Refusal | None:
        if "rows" not in match:
            return None
        dim, rows = attribute(match["softmax"], "dim"), attribute(match["rows"], "dim")
        same = rows == dim or rows == [dim]
        return None if same else match.refuse(f"it looks along {rows}, the softmax runs along {dim}")

    def rewrite(self, match: Match, edit: Edit) -> None:
        dim = attribute(match["softmax"], "dim")
        edit.replace(match["out"], edit.call("safe_softmax", match["x"], dim, at=match["out"]))
