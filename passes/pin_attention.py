"""pin-attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint, pin
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class PinAttention(PlanningPass):
    """Keep every attention scores in float.

    What: one pin for each ``attention``.
    Why: scores and softmax over {shape} stay in float: a mask of -inf ruins any grid that it enters.
    Before and after: the graph is untouched; verification proves that the artifact runs the node in float.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-attention"

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if fact.kind == "attention":
                why = "scores and softmax over {shape} stay in float: a mask of -inf ruins any grid that it enters"
                yield pin(fact.name, by=self.name, why=why.format(**fact.words()))
