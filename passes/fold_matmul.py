"""fold-matmul."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Op, Refusal

_TURNED = Op("transpose", Const("turned"), where={"dims": lambda dims: dims is None or [d % 2 for d in dims] == [1, 0]})
_BARE = Op("linear", Any("x"), Const("weight"), name="linear", users=1)


@dataclass(frozen=True)
class FoldMatmul(RewritePass):
    """Recognise the product with a weight as a linear layer.

    What: ``x @ w.t()`` becomes ``linear(x, w)``, and ``x @ w`` a ``linear`` over a transposed copy ``w/folded``; the
        sum with a vector behind a linear without bias becomes its bias.
    Why: recipes and targets speak of ``linear``.
    Before and after: ``add(matmul(x, w), b)`` becomes ``linear(x, w/folded, b)``.
    Refuses: what is no matrix, or no parameter; a weight to be copied that something else reads too; a bias that is no
        vector.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-matmul"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("matmul", Any("x"), Alt(_TURNED, Op("expand", _TURNED), Const("straight")), name="out"),
        Op("add", _BARE, Const("bias"), name="out", where={"alpha": 1}),
    )

    def check(self, match: Match) -> Refusal | None:
        if "bias" in match:
            return self._check_bias(match)
        weight = match["turned"] if "turned" in match else match["straight"]
        if value_of(weight).ndim != 2:
            return match.refuse(f"'{weight.target}' is no matrix")
        if not _is_parameter(weight):
            return match.refuse(f"'{weight.target}' is no parameter")
        if "straight" in match and len(weight.users) > 1:
            return match.refuse(f"'{weight.target}' has {len(weight.users)} users")
        return None

    def _check_bias(self, match: Match) -> Refusal | None:
        if attribute(match["linear"], "bias") is not None:
            return match.refuse("the linear has a bias")
        width = value_of(match["weight"]).shape[0]
        shape = list(value_of(match["bias"]).shape)
        return None if shape == [width] else match.refuse(f"the constant is {shape}, the linear has {width} outputs")

    def rewrite(self, match: Match, edit: Edit) -> None:
        out = match["out"]
        if "bias" in match:
            new = edit.call("linear", match["x"], match["weight"], match["bias"], at=out)
            edit.replace(match["linear"], new)
            edit.bypass(out, new)
            return
        weight = match["turned"] if "turned" in match else self._folded(match["straight"], out, edit)
        edit.replace(out, edit.call("linear", match["x"], weight, at=out))

    def _folded(self, weight: fx.Node, at: fx.Node, edit: Edit) -> fx.Node:
        tensor = edit.graph.parameter(weight)
        assert tensor is not None
        return edit.parameter(f"{weight.target}/folded", tensor.t(), at=at)


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    return module is not None and str(node.target) in dict(module.named_parameters(remove_duplicate=False))
