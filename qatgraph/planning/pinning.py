"""What the passes that pin every node of some kinds have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint, pin
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class PinKind(PlanningPass):
    """Keep every node of ``kinds`` in float; ``why`` is a sentence with the words of ``NodeFact.words``."""

    kinds: ClassVar[tuple[str, ...]]
    why: ClassVar[str]

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if fact.kind in self.kinds:
                yield pin(fact.name, by=self.name, why=self.why.format(**fact.words()))
