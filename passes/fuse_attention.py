"""fuse-attention."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Alt, Any, Match, Moved, Number, Op, Pattern, Refusal

_SCORES = Alt(
    Op("matmul|einsum", Any("query"), Any("keys"), name="scores"),
    Op("baddbmm", Any(), Any("query"), Any("keys"), name="scores"),
)
_SCALED = Alt(
    Op("mul", Moved(_SCORES), Number()),
    Op("div", Moved(_SCORES), Number(), where={"rounding_mode": None}),
    Op("mul", Op("tanh", Op("div", Moved(_SCORES), Number())), Number()),  # capped, as in Gemma 2
    _SCORES,
)


def _masked(scores: Pattern) -> Alt:
    inner = Moved(scores)
    value = Alt(Any(), Number())
    return Alt(
        Op("add", inner, Any()), Op("masked_fill", inner, Any()), Op("where", Any(), inner, value),
        Op("where", Any(), value, inner), scores,
    )  # fmt: skip


_LOGITS = Moved(_masked(_masked(_SCALED)))
_SOFTMAX = Op("softmax|safe_softmax", Alt(_LOGITS, Op("cast", _LOGITS)), name="softmax", where={"dim": -1})
_PROBABILITIES = Moved(Alt(_SOFTMAX, Op("cast", Moved(_SOFTMAX))))


@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Group attention that is written out as products and a softmax.

    What: score product, scale, cap, masks, softmax, dropout and the product with the values get one region.
    Why: targets and plans treat attention as one thing, and its scores stay in one precision.
    Before and after: the arithmetic stays; all of it carries ``@…:matmul+attention``.
    Refuses: what has a region already.
    Numerics: same.
    """

    name = "fuse-attention"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Op("matmul|einsum", _PROBABILITIES, Any("value"), name="out")

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("it has a region") if record(match["scores"]).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group("attention", *sorted(match.nodes))
