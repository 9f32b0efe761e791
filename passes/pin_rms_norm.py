"""pin-rms-norm."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.pinning import PinKind


@dataclass(frozen=True)
class PinRmsNorm(PinKind):
    """Keep every RMSNorm in float.

    What: one pin for each ``rms_norm``.
    Why: it squares its input, and language models that use it have outliers of a hundred times the rest.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-rms-norm"
    kinds = ("rms_norm",)
    why = "its mean of squares is that of the outliers of {shape}: a grid that holds them rounds the rest away"
