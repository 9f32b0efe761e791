"""pin-softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint, pin
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class PinSoftmax(PlanningPass):
    """Keep every softmax in float.

    What: one pin for each ``softmax``.
    Why: its results over {shape} span e^x: a uniform 8-bit grid rounds most of them to zero.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-softmax"

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if fact.kind == "softmax":
                why = "its results over {shape} span e^x: a uniform 8-bit grid rounds most of them to zero"
                yield pin(fact.name, by=self.name, why=why.format(**fact.words()))
