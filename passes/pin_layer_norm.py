"""pin-layer-norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint, pin
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class PinLayerNorm(PlanningPass):
    """Keep every LayerNorm in float.

    What: one pin for each ``layer_norm``.
    Why: its variance squares the outliers of {shape}; tools that quantize it lose 0.2 cosine on MiniLM.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-layer-norm"

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if fact.kind == "layer_norm":
                why = "its variance squares the outliers of {shape}; tools that quantize it lose 0.2 cosine on MiniLM"
                yield pin(fact.name, by=self.name, why=why.format(**fact.words()))
