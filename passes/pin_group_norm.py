"""pin-group-norm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.pinning import PinKind


@dataclass(frozen=True)
class PinGroupNorm(PinKind):
    """Keep every GroupNorm and InstanceNorm in float.

    What: one pin for each ``group_norm`` and ``instance_norm``.
    Why: its variance squares outliers, as that of LayerNorm does.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-group-norm"
    kinds = ("group_norm", "instance_norm")
    why = "its variance squares the outliers of {shape}, in each group of channels by itself"
