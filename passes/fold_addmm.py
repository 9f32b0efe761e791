"""fold-addmm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Op, Refusal

_TURNED = Op("transpose", Const("turned"), where={"dims": lambda dims: dims is None or [d % 2 for d in dims] == [1, 0]})


@dataclass(frozen=True)
class FoldAddmm(RewritePass):
    """Recognise ``addmm`` with a constant weight as a linear layer.

    What: ``addmm(bias, x, weight)`` becomes ``linear(x, weight/folded, bias)`` over a transposed copy of the weight; if
        the weight is transposed in the graph, the linear reads it as it is.
    Why: GPT-2 writes its linear layers so, and decomposed programs; recipes and targets speak of ``linear``.
    Before and after: ``addmm(b, x, w)`` becomes ``linear(x, w/folded, b)``.
    Refuses: a bias that is not a vector; scalings other than 1; a weight to be copied that something else reads too.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-addmm"
    stage = Stage.CAPTURED
    numerics = within(1e-12)
    pattern = Op("addmm", Const("bias"), Any("x"), Alt(_TURNED, Const("weight")), name="addmm")

    def check(self, match: Match) -> Refusal | None:
        if value_of(match["bias"]).ndim != 1:
            return match.refuse("the bias is not a vector")
        if match["addmm"].kwargs:
            return match.refuse("addmm scales its operands (alpha or beta is not 1)")
        if "weight" in match and len(match["weight"].users) > 1:
            return match.refuse(f"'{match['weight'].target}' has {len(match['weight'].users)} users")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        node = match["addmm"]
        weight = match["turned"] if "turned" in match else self._folded(match["weight"], node, edit)
        edit.replace(node, edit.call("linear", match["x"], weight, match["bias"], at=node))

    def _folded(self, weight: fx.Node, at: fx.Node, edit: Edit) -> fx.Node:
        tensor = edit.graph.parameter(weight)
        assert tensor is not None
        return edit.parameter(f"{weight.target}/folded", tensor.t(), at=at)
