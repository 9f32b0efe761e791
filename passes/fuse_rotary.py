"""fuse-rotary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Alt, Any, Match, Op, Refusal

_FIRST, _SECOND = Op("slice", Any("x"), name="first"), Op("slice", Any("x"), name="second")
_TURNED = Alt(
    Op("cat", Op("neg", _SECOND), _FIRST),  # halves, as in Llama
    Op("flatten|reshape", Op("stack", Op("neg", _SECOND), _FIRST)),  # pairs, as in GPT-J
)
_COSINE, _SINE = Any("cosine"), Any("sine")


@dataclass(frozen=True)
class FuseRotary(RewritePass):
    """Group a rotary position embedding.

    What: slices, negation, concatenation, the two products and their sum get one region (Su et al., arXiv:2104.09864):
        the halves of the last axis turn against each other, or its pairs.
    Why: the sum is no residual add, and quantizers must not stand inside.
    Before and after: the arithmetic stays; all of it carries ``@…:slice+rotary``.
    Refuses: slices that are neither the halves of the last axis nor its pairs; what has a region already.
    Numerics: same.
    """

    name = "fuse-rotary"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Alt(
        Op("add", Op("mul", Any("x"), _COSINE), Op("mul", _TURNED, _SINE), name="out", where={"alpha": 1}),
        Op(
            "cat|stack",
            Op("sub", Op("mul", _FIRST, _COSINE), Op("mul", _SECOND, _SINE), where={"alpha": 1}),
            Op("add", Op("mul", _SECOND, _COSINE), Op("mul", _FIRST, _SINE), where={"alpha": 1}),
            name="out",
        ),
    )

    def check(self, match: Match) -> Refusal | None:
        if record(match["out"]).region:
            return match.refuse("it has a region")
        width = value_of(match["x"]).shape[-1]
        parts = [_part(match[name], width) for name in ("first", "second")]
        halves = [(0, width // 2, 1), (width // 2, width, 1)]
        pairs = [(0, width, 2), (1, width, 2)]
        return None if parts in (halves, pairs) else match.refuse(f"it turns {parts[0]} against {parts[1]}")

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group("rotary", *sorted(match.nodes))


def _part(node: fx.Node, width: int) -> tuple[int, int, int] | None:
    """(start, end, step) of a slice along the last axis."""
    dim, start, end, step = (attribute(node, name) for name in ("dim", "start", "end", "step"))
    if dim % value_of(node).ndim != value_of(node).ndim - 1:
        return None
    return start or 0, width if end is None else min(end, width), step
