"""share-through-shape-ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.ops import keeps_grid
from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class ShareThroughShapeOps(PlanningPass):
    """Give the input and the output of a reshape or transpose one grid.

    What: one wish to share for each operation that only moves elements.
    Why: two grids for the same numbers would cost a requantization and an observer for nothing.
    Before and after: the graph is untouched.
    Refuses: the solver drops the wish when the readers of the two values need different grids.
    Numerics: states constraints only.
    """

    name = "share-through-shape-ops"

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if keeps_grid(fact.kind) and fact.inputs:
                source = fact.inputs[0][1]
                yield Constraint(
                    "share",
                    (Port(source, "out"), Port(fact.name, "out")),
                    Author("pass", self.name),
                    f"'{fact.name}' only moves the elements of '{source}'",
                )
