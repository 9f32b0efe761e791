"""merge-equal-operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from qatgraph.ir.aliases import draws, writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, same


@dataclass(frozen=True)
class MergeEqualOperations(GraphPass):
    """Compute once what is computed twice from the same values (common-subexpression removal).

    What: of operations with the same operator and the same arguments, the first stays.
    Why: each would become a node of the artifact, and patterns that read a value twice match only one node.
    Before and after: ``mean(x), mean(x)`` becomes one ``mean(x)`` with two readers.
    Refuses: operations that draw random numbers or write into a value; modules, which have a state or a mode.
    Numerics: same.
    """

    name = "merge-equal-operations"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> None:
        first: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            if node.op != "call_function" or writes(node) or draws(node):
                continue
            known = first.setdefault((node.target, _frozen(node.args), _frozen(node.kwargs)), node)
            if known is not node:
                edit.bypass(node, known)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return (type(value), str(value)) if not isinstance(value, fx.Node) else value
