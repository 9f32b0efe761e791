"""pin-softmax."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.pinning import PinKind


@dataclass(frozen=True)
class PinSoftmax(PinKind):
    """Keep every softmax in float.

    What: one pin for each ``softmax``.
    Why: its results span e^x: a uniform 8-bit grid rounds most of them to zero.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-softmax"
    kinds = ("softmax", "safe_softmax")
    why = "its results over {shape} span e^x: a uniform 8-bit grid rounds most of them to zero"
