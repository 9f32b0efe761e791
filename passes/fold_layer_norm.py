"""fold-layer-norm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Number, Op, Refusal

_LAST = {"dim": [-1], "keepdim": True}
_CENTRED = Op("sub", Any("x"), Op("mean", Any("x"), where=_LAST), where={"alpha": 1})
_SQUARE = Alt(Op("pow", _CENTRED, Number(2.0)), Op("mul", _CENTRED, _CENTRED))
_VARIANCE = Alt(Op("mean", _SQUARE, where=_LAST), Op("var", Any("x"), where={**_LAST, "correction": 0}))
_SUM = Op("add", _VARIANCE, Number(None, "eps"), where={"alpha": 1})


@dataclass(frozen=True)
class FoldLayerNorm(RewritePass):
    """Recognise the LayerNorm that is written out.

    What: ``(x - mean) / sqrt(var + eps)`` becomes ``layer_norm(x, eps)`` (Ba et al., arXiv:1607.06450); the product
        with a vector and the sum with a vector behind it become its weight and bias.
    Why: targets pin it by its kind, and engines have one kernel for it.
    Before and after: mean, sub, pow, mean, add, sqrt, div, mul, add become one node.
    Refuses: a weight or bias that is not a vector over the last axis; a last axis whose size moves.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-layer-norm"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("div", _CENTRED, Op("sqrt", _SUM), name="out"),
        Op("mul", _CENTRED, Op("rsqrt", _SUM), name="out"),
        Op(
            "mul", Op("layer_norm", Any("x"), name="norm", where={"weight": None, "bias": None}, users=1),
            Const("weight"), name="out",
        ),
        Op("add", Op("layer_norm", Any("x"), name="norm", where={"bias": None}, users=1), Const("bias"), name="out",
           where={"alpha": 1}),
    )  # fmt: skip

    def check(self, match: Match) -> Refusal | None:
        last = value_of(match["x"]).shape[-1]
        if not isinstance(last, int):
            return match.refuse("the size of the last axis moves")
        want = list(attribute(match["norm"], "normalized_shape")) if "norm" in match else [last]
        for name in ("weight", "bias"):
            if name in match and list(value_of(match[name]).shape) != want:
                return match.refuse(f"the {name} is {list(value_of(match[name]).shape)}, the norm runs over {want}")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        x, out = match["x"], match["out"]
        if "norm" not in match:
            size = int(value_of(x).shape[-1])
            edit.replace(out, edit.call("layer_norm", x, [size], None, None, match["eps"], at=out))
            return
        norm = match["norm"]
        shape, weight, bias, eps = (attribute(norm, n) for n in ("normalized_shape", "weight", "bias", "eps"))
        weight, bias = (match.bound.get(n, have) for n, have in (("weight", weight), ("bias", bias)))
        new = edit.call("layer_norm", x, shape, weight, bias, eps, at=out)
        edit.replace(norm, new)
        edit.bypass(out, new)
