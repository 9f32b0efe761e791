"""fold-softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Match, Number, Op, Refusal

_KEPT = {"keepdim": True}
_TOP = Alt(
    Op("amax", Any("x"), where=_KEPT, name="top"),
    Op("getitem", Op("max", Any("x"), where=_KEPT, name="top"), Number(0)),
    Op("max", Any("x"), where={"other": None}, name="top"),
    Number(),
)
_EXP = Op("exp", Alt(Op("sub", Any("x"), _TOP, where={"alpha": 1}, name="shifted"), Any("x")), name="exp")
_SUM = Op("sum", _EXP, where=_KEPT, name="along")
_LOG_SUM = Op("logsumexp", Any("x"), where=_KEPT, name="along")


@dataclass(frozen=True)
class FoldSoftmax(RewritePass):
    """Recognise the softmax that is written out.

    What: ``exp(x - max(x)) / sum(exp(x - max(x)))``, with or without the maximum, ``exp(x - logsumexp(x))`` and
        ``exp(log_softmax(x))`` become ``softmax(x, dim)``.
    Why: targets pin softmax by its kind, and engines have one kernel for it.
    Before and after: amax, sub, exp, sum, div become one node.
    Refuses: a sum over several axes; another type than that of ``x``. A maximum along another axis stays subtracted.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-softmax"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("div", _EXP, _SUM, name="out"),
        Op("mul", _EXP, Op("reciprocal", _SUM), name="out"),
        Op("exp", Op("sub", Any("x"), _LOG_SUM, where={"alpha": 1}), name="out"),
        Op("exp", Op("log_softmax", Any("x"), name="along"), name="out"),
    )

    def check(self, match: Match) -> Refusal | None:
        rank = value_of(match["x"]).ndim
        dims = _dims(match["along"], rank)
        if len(dims) != 1:
            return match.refuse("it sums over several axes")
        same = value_of(match["out"]).dtype == value_of(match["x"]).dtype
        return None if same else match.refuse("its result has another type")

    def rewrite(self, match: Match, edit: Edit) -> None:
        rank = value_of(match["x"]).ndim
        (dim,) = _dims(match["along"], rank)
        alike = "top" not in match or dim in _dims(match["top"], rank)  # what is subtracted is the same along the axis
        x = match["x"] if alike else match["shifted"]
        edit.replace(match["out"], edit.call("softmax", x, dim - rank, at=match["out"]))


def _dims(node: fx.Node, rank: int) -> set[int]:
    """The axes of a reduction, counted from the front; all of them if it names none."""
    dim = attribute(node, "dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return {d % rank for d in dims}
