"""fold-addmm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Const, Match, Op, Refusal


@dataclass(frozen=True)
class FoldAddmm(RewritePass):
    """Recognise ``addmm`` with a constant weight as a linear layer.

    What: ``addmm(bias, x, weight)`` becomes ``linear(x, weight/folded, bias)`` over a transposed copy of the weight.
    Why: GPT-2 writes its linear layers so; recipes and targets speak of ``linear``.
    Before and after: ``addmm(b, x, w)`` becomes ``linear(x, w/folded, b)``.
    Refuses: a bias that is not a vector; scalings other than 1; a weight that something else reads too.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-addmm"
    stage = Stage.CAPTURED
    numerics = within(1e-12)
    pattern = Op("addmm", Const("bias"), Any("x"), Const("weight"), name="addmm")

    def check(self, match: Match) -> Refusal | None:
        if value_of(match["bias"]).ndim != 1:
            return match.refuse("the bias is not a vector")
        if match["addmm"].kwargs:
            return match.refuse("addmm scales its operands (alpha or beta is not 1)")
        if len(match["weight"].users) > 1:
            return match.refuse(f"'{match['weight'].target}' has {len(match['weight'].users)} users")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        node = match["addmm"]
        weight = edit.graph.parameter(match["weight"])
        assert weight is not None
        folded = edit.parameter(f"{match['weight'].target}/folded", weight.t(), at=node)
        edit.replace(node, edit.call("linear", match["x"], folded, match["bias"], at=node))
