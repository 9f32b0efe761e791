"""fold-powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Match, Number, Op


@dataclass(frozen=True)
class FoldPowers(RewritePass):
    """Write squares and roots in one way, so that patterns need to know only that one.

    What: ``square(x)`` becomes ``pow(x, 2)``, ``x ** 0.5`` ``sqrt(x)``, and ``x ** -0.5`` and the reciprocal of a root
        ``rsqrt(x)``.
    Why: norms are written with any of them.
    Before and after: ``reciprocal(sqrt(x))`` becomes ``rsqrt(x)``.
    Refuses: nothing; other exponents do not match.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-powers"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Alt(
        Op("square", Any("x"), name="pow"),
        Op("pow", Any("x"), Number(0.5), name="sqrt"),
        Op("pow", Any("x"), Number(-0.5), name="rsqrt"),
        Op("reciprocal", Op("sqrt", Any("x")), name="rsqrt"),
        Op("mul", Op("rsqrt", Any("x")), Number(1.0), name="rsqrt"),  # torch captures 1 / y as reciprocal(y) * 1
    )

    def rewrite(self, match: Match, edit: Edit) -> None:
        aten, x, at = torch.ops.aten, match["x"], match.root
        if "pow" in match:
            new = edit.operator(aten.pow.Tensor_Scalar, x, 2, at=at)
        else:
            new = edit.operator(aten.sqrt.default if "sqrt" in match else aten.rsqrt.default, x, at=at)
        edit.replace(at, new)
