"""fold-gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Match, Number, Op, Refusal

_ERF = Op("erf", Op("div", Any("x"), Number(math.sqrt(2))))


@dataclass(frozen=True)
class FoldGelu(RewritePass):
    """Recognise the GELU that is written out with ``erf``.

    What: ``x * 0.5 * (1 + erf(x / sqrt(2)))`` becomes ``gelu(x)`` (Hendrycks and Gimpel, arXiv:1606.08415).
    Why: engines have one kernel for it, and quantizers must not stand inside.
    Before and after: div, erf, add, mul, mul become one node.
    Refuses: a sum with an ``alpha``; other spellings do not match.
    Numerics: within 1e-6 (the constant sqrt(2) is rounded to float32 in some models).
    """

    name = "fold-gelu"
    stage = Stage.CAPTURED
    numerics = within(1e-6)
    pattern = Op("mul", Op("mul", Any("x"), Number(0.5)), Op("add", _ERF, Number(1.0), name="sum"), name="out")

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("the sum scales its operand (alpha)") if match["sum"].kwargs else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["out"], edit.call("gelu", match["x"], at=match["out"]))
