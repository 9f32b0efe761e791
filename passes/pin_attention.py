"""pin-attention."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.pinning import PinKind


@dataclass(frozen=True)
class PinAttention(PinKind):
    """Keep the scores and the softmax of every attention in float.

    What: one pin for each ``attention``.
    Why: a mask of -inf ruins any grid that it enters.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-attention"
    kinds = ("attention",)
    why = "scores and softmax over {shape} stay in float: a mask of -inf ruins any grid that it enters"
