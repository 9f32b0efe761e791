"""fold-padding."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Const, Match, Op, Refusal

_AXES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class FoldPadding(RewritePass):
    """Let a convolution pad its input with zeros itself.

    What: zeros that are put around the input become the ``padding`` of the convolution.
    Why: the padded value would be stored, and get a grid of its own; engines pad inside the kernel.
    Before and after: ``conv2d(pad(x, [1, 1, 1, 1]), w)`` becomes ``conv2d(x, w, padding=[1, 1])``.
    Refuses: padding that differs at the two ends of an axis, or is that of another axis; a convolution whose padding
        is a word.
    Numerics: within 1e-12 in float64.
    """

    name = "fold-padding"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Op(
        "conv1d|conv2d|conv3d",
        Op(
            "pad", Any("x"), name="pad", users=1,
            where={"mode": lambda mode: mode == "constant", "value": lambda value: value in (None, 0)},
        ),
        Const("weight"), name="conv",
    )  # fmt: skip

    def check(self, match: Match) -> Refusal | None:
        if isinstance(attribute(match["conv"], "padding"), str):
            return match.refuse(f"its padding is '{attribute(match['conv'], 'padding')}'")
        axes, pads = _axes(match), list(attribute(match["pad"], "pad"))
        if len(pads) > 2 * axes and any(pads[2 * axes :]):
            return match.refuse("it pads channels or samples")
        if pads[::2] != pads[1::2] or min(pads) < 0:
            return match.refuse(f"it pads unevenly: {pads}")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        conv, axes = match["conv"], _axes(match)
        own = list(attribute(conv, "padding"))
        own = own * axes if len(own) == 1 else own
        more = ([*attribute(match["pad"], "pad"), *[0] * 6][: 2 * axes : 2])[::-1]  # the last axis stands first
        padding = [a + b for a, b in zip(own, more, strict=True)]
        bias, stride, dilation, groups = (attribute(conv, n) for n in ("bias", "stride", "dilation", "groups"))
        operands = (match["x"], match["weight"], bias, stride, padding, dilation, groups)
        edit.replace(conv, edit.operator(conv.target, *operands, at=conv, near=conv))


def _axes(match: Match) -> int:
    return _AXES[str(match["conv"].target).split(".")[1]]
