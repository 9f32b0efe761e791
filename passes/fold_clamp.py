"""fold-clamp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any as Anything

from torch import fx

from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Alt, Any, Match, Number, Op, Refusal

_BOUNDS = {"hardtanh": ("min_val", "max_val")}  # the names of the bounds, where they are not min and max


def _whole(bound: Anything) -> bool:
    """A bound that is written as an integer: the exporter then takes another operation than for a float."""
    return isinstance(bound, int)


@dataclass(frozen=True)
class FoldClamp(RewritePass):
    """Write every limit as one operation: ``clamp(x, min, max)``, or ``relu(x)``.

    What: ``hardtanh``, ``relu6``, ``clip``, ``clamp_min``, ``clamp_max``, ``minimum`` and ``maximum`` with a number
        become ``clamp``; two limits in a row become one; a clamp at 0 from below alone is ``relu``; bounds are floats.
    Why: patterns and targets read both bounds at one place.
    Before and after: ``hardtanh(x, 0, 6)`` becomes ``clamp(x, 0, 6)``.
    Refuses: integers; limits that exclude each other; a bound of another type or larger shape.
    Numerics: same.
    """

    name = "fold-clamp"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Alt(
        Op("clamp|relu", Op("clamp|relu", Any("x"), name="inner", users=1), name="out"),
        Op("minimum|maximum", Any("x"), Number(None, "bound"), name="out"),
        Op("hardtanh|relu6|clip|clamp_min|clamp_max", Any("x"), name="out"),
        Op("clamp", Any("x"), name="out", where={"min": 0.0, "max": None}),
        Op("clamp", Any("x"), name="out", where={"min": _whole}),
        Op("clamp", Any("x"), name="out", where={"max": _whole}),
    )

    def check(self, match: Match) -> Refusal | None:
        x, out = value_of(match["x"]), value_of(match["out"])
        if not out.is_floating_point():
            return match.refuse("it limits integers")
        if (x.dtype, x.shape) != (out.dtype, out.shape):
            return match.refuse("the bound changes the type or the shape")
        low, high = _limits(match)
        if low is not None and high is not None and low > high:
            return match.refuse(f"nothing lies between {low:g} and {high:g}")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        low, high = _limits(match)
        if low == 0.0 and high is None:
            new = edit.call("relu", match["x"], at=match["out"])
        else:
            new = edit.call("clamp", match["x"], low, high, at=match["out"])
        edit.replace(match["out"], new)


Limits = tuple[float | None, float | None]


def _limits(match: Match) -> Limits:
    low, high = _bounds(match["out"], match.bound.get("bound"))
    if "inner" not in match:
        return low, high
    first = _bounds(match["inner"])
    return _between(first[0], low, high, low), _between(first[1], low, high, high)


def _between(bound: float | None, low: float | None, high: float | None, missing: float | None) -> float | None:
    """A bound of the inner limit as the outer one leaves it."""
    if bound is None:
        return missing
    bound = bound if low is None else max(bound, low)
    return bound if high is None else min(bound, high)


def _bounds(node: fx.Node, number: float | None = None) -> Limits:
    kind = record(node).kind
    fixed: dict[str, Limits] = {
        "relu": (0.0, None), "relu6": (0.0, 6.0), "minimum": (None, number), "maximum": (number, None),
    }  # fmt: skip
    if kind in fixed:
        return fixed[kind]
    low, high = (_float(attribute(node, name)) for name in _BOUNDS.get(kind, ("min", "max")))
    return low, high


def _float(bound: Anything) -> float | None:
    return None if bound is None else float(bound)
