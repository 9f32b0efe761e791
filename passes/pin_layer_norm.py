"""pin-layer-norm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.pinning import PinKind


@dataclass(frozen=True)
class PinLayerNorm(PinKind):
    """Keep every LayerNorm in float.

    What: one pin for each ``layer_norm``.
    Why: its variance squares outliers; tools that quantize it lose 0.2 cosine on MiniLM.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-layer-norm"
    kinds = ("layer_norm",)
    why = "its variance squares the outliers of {shape}; tools that quantize it lose 0.2 cosine on MiniLM"
