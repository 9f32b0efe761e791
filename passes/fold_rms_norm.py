"""fold-rms-norm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Number, Op, Refusal

_SQUARE = Alt(Op("pow", Any("x"), Number(2.0)), Op("mul", Any("x"), Any("x")))
_MEAN = Op("mean", _SQUARE, where={"dim": [-1], "keepdim": True})
_SUM = Op("add", _MEAN, Number(None, "eps"), where={"alpha": 1})
_BARE = Op("rms_norm", Any("x"), name="norm", where={"weight": None}, users=1)
_SHIFTED = Op("add", Const("shifted"), Number(1.0), where={"alpha": 1}, name="sum")


@dataclass(frozen=True)
class FoldRmsNorm(RewritePass):
    """Recognise the RMSNorm that is written out.

    What: ``x * rsqrt(mean(x^2) + eps)`` becomes ``rms_norm(x, eps)`` (Zhang and Sennrich, arXiv:1910.07467); the
        product with a vector behind it becomes its weight, and that with ``1 + w`` the new parameter ``w/folded``.
    Why: Llama-like models and T5 write it so; targets pin it by its kind, and engines have one kernel for it.
    Before and after: pow, mean, add, rsqrt, mul, mul become one node.
    Refuses: a weight that is not a vector over the last axis; a last axis whose size moves.
    Numerics: within 1e-6 (a new parameter is rounded to float32).
    """

    name = "fold-rms-norm"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-6)
    pattern = Alt(
        Op("mul", Any("x"), Op("rsqrt", _SUM), name="out"),
        Op("div", Any("x"), Op("sqrt", _SUM), name="out"),
        Op("mul", _BARE, Const("weight"), name="out"),
        Op("mul", _BARE, _SHIFTED, name="out"),
    )

    def check(self, match: Match) -> Refusal | None:
        last = value_of(match["x"]).shape[-1]
        if not isinstance(last, int):
            return match.refuse("the size of the last axis moves")
        want = list(attribute(match["norm"], "normalized_shape")) if "norm" in match else [last]
        for name in ("weight", "shifted"):
            if name in match and list(value_of(match[name]).shape) != want:
                return match.refuse(f"the weight is {list(value_of(match[name]).shape)}, the norm runs over {want}")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        x, out = match["x"], match["out"]
        if "norm" not in match:
            edit.replace(out, edit.call("rms_norm", x, [int(value_of(x).shape[-1])], None, match["eps"], at=out))
            return
        norm = match["norm"]
        if "weight" in match:
            weight = match["weight"]
        else:
            source = edit.graph.parameter(match["shifted"])
            assert source is not None
            folded = (source.detach() + 1.0).requires_grad_(source.requires_grad)
            weight = edit.parameter(f"{match['shifted'].target}/folded", folded, at=out)
        shape, eps = (attribute(norm, n) for n in ("normalized_shape", "eps"))
        new = edit.call("rms_norm", x, shape, weight, eps, at=out)
        edit.replace(norm, new)
        edit.bypass(out, new)
