"""Properties of graphs that passes require and ensure. Each says where it does not hold, or nothing."""

from __future__ import annotations

from collections.abc import Callable

from qatgraph.ir.aliases import BUFFER_WRITE, operator_name, writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record


def functional(graph: Graph) -> str:
    """No operation writes into its input (``relu_``), but for the new value of a buffer."""
    found = (n for n in graph.nodes if writes(n) and operator_name(n) != BUFFER_WRITE)
    return next((f"'{record(n).name}' writes into its input" for n in found), "")


PROPERTIES: dict[str, Callable[[Graph], str]] = {"functional": functional}


def held(graph: Graph) -> set[str]:
    """The properties that a graph has."""
    return {name for name, problem in PROPERTIES.items() if not problem(graph)}
