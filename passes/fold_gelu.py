"""fold-gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Match, Number, Op

_ERF = Op("erf", Alt(Op("div", Any("x"), Number(math.sqrt(2))), Op("mul", Any("x"), Number(math.sqrt(0.5)))))
_CUBIC = Op("add", Any("x"), Op("mul", Op("pow", Any("x"), Number(3.0)), Number(0.044715)), where={"alpha": 1})
_TANH = Op("tanh", Op("mul", _CUBIC, Number(math.sqrt(2 / math.pi))), name="tanh")


@dataclass(frozen=True)
class FoldGelu(RewritePass):
    """Recognise the GELU that is written out with ``erf`` or ``tanh``.

    What: ``x * 0.5 * (1 + erf(x / sqrt(2)))`` becomes ``gelu(x)``, and its approximation by ``tanh`` becomes
        ``gelu(x, approximate="tanh")`` (Hendrycks and Gimpel, arXiv:1606.08415).
    Why: engines have one kernel for it, and quantizers must not stand inside.
    Before and after: div, erf, add, mul, mul become one node.
    Refuses: nothing; other spellings do not match.
    Numerics: within 1e-6 (the constant sqrt(2) is rounded to float32 in some models).
    """

    name = "fold-gelu"
    stage = Stage.CAPTURED
    numerics = within(1e-6)
    pattern = Op(
        "mul",
        Op("mul", Any("x"), Number(0.5)),
        Op("add", Alt(_ERF, _TANH), Number(1.0), where={"alpha": 1}),
        name="out",
    )

    def rewrite(self, match: Match, edit: Edit) -> None:
        options = {"approximate": "tanh"} if "tanh" in match else {}
        edit.replace(match["out"], edit.call("gelu", match["x"], at=match["out"], **options))
