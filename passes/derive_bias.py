"""derive-bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.rewriting.channels import LAYERS
from qatgraph.rewriting.passes import PlanningPass


@dataclass(frozen=True)
class DeriveBias(PlanningPass):
    """Put the bias of a linear or convolution on the grid of its accumulator, where the target wants an integer bias.

    What: the bias gets the scale ``s_x * s_w`` in int32, zero point 0.
    Why: an engine adds it to the int32 accumulator without any rescaling.
    Before and after: the graph is untouched; rows whose bias is not ``int32`` ignore it.
    Refuses: nothing.
    Numerics: states constraints only.
    """

    name = "derive-bias"

    def state(self, graph: Graph, context: Any) -> Iterator[Constraint]:
        for fact in context.facts:
            if fact.kind in LAYERS and fact.parameter("bias") is not None:
                n = fact.name
                yield Constraint(
                    "derive",
                    (Port(n, "bias"), Port(n, "x"), Port(n, "weight")),
                    Author("pass", self.name),
                    f"the accumulator of '{n}' counts in units of s_x * s_w, so its bias does too",
                )
