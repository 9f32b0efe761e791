"""pin-small-embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint, pin
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class PinSmallEmbeddings(PlanningPass):
    """Keep embedding tables in float that are too small to be worth a grid.

    What: one pin for each table of fewer than ``min_bytes`` bytes in float32.
    Why: on MiniLM the position and token-type tables cost 0.0008 cosine and save 0.6 MB of 23.
    Before and after: the graph is untouched.
    Refuses: nothing; a recipe line that names the node lifts the pin.
    Numerics: states constraints only.
    """

    name = "pin-small-embeddings"
    min_bytes: int = 4 * 2**20

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            table = fact.parameter("weight")
            if fact.kind == "embedding" and table is not None and table.bytes < self.min_bytes:
                saved = table.bytes * 3 / 4 / 2**20
                why = f"an 8-bit grid would save only {saved:.2f} MiB on the table {list(table.shape)} of '{fact.name}'"
                yield pin(fact.name, by=self.name, why=why)
