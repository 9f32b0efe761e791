"""fold-global-pool."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Match, Op, Refusal


@dataclass(frozen=True)
class FoldGlobalPool(RewritePass):
    """Write the average over a whole image in one way.

    What: ``mean`` over both spatial axes and ``adaptive_avg_pool2d`` to one pixel become ``global_avg_pool``.
    Why: engines have a kernel for the whole image; the mean over axes is another one, and often in float only.
    Before and after: ``mean(x, [-2, -1])`` becomes ``flatten(global_avg_pool(x), 1)``.
    Refuses: other ranks than 4; a mean that changes the type; a pool to more than one pixel.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-global-pool"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("mean", Any("x"), name="out", where={"dim": lambda dim: sorted(dim or ()) == [-2, -1]}),
        Op("adaptive_avg_pool2d", Any("x"), name="out"),
    )

    def check(self, match: Match) -> Refusal | None:
        x, out = value_of(match["x"]), value_of(match["out"])
        if x.ndim != 4 or x.dtype != out.dtype:
            return match.refuse("its input is no batch of images of its type")
        return (
            match.refuse("its result has several pixels") if out.ndim == 4 and tuple(out.shape[-2:]) != (1, 1) else None
        )

    def rewrite(self, match: Match, edit: Edit) -> None:
        out = match["out"]
        pool = edit.call("adaptive_avg_pool2d", match["x"], [1, 1], at=out)
        edit.rename_kind(pool, "global_avg_pool")
        keeps = attribute(out, "keepdim") is not False
        edit.replace(out, pool if keeps else edit.call("flatten", pool, 1, at=out))
