"""fold-split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, same

SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})


@dataclass(frozen=True)
class FoldSplit(GraphPass):
    """Write the parts of a split as slices.

    What: ``split``, ``chunk`` and ``unbind``, and what takes their parts, become one ``slice`` or ``select`` a part.
    Why: a tuple of tensors has no grid that could be shared, and patterns need to know only slices.
    Before and after: ``getitem(chunk(x, 2, -1), 1)`` becomes ``slice(x, -1, 4, 8)``.
    Refuses: parts whose size moves.
    Numerics: same.
    """

    name = "fold-split"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            if record(node).kind not in SPLITS:
                continue
            dim = int(attribute(node, "dim"))
            sizes = [part.shape[dim] if record(node).kind != "unbind" else 1 for part in value_of(node)]
            if all(isinstance(size, int) for size in sizes):
                _part(node, dim, sizes, edit)
            else:
                edit.refuse(node, "the size of its parts moves")
        graph.module.graph.eliminate_dead_code()


def _part(node: fx.Node, dim: int, sizes: list[int], edit: Edit) -> None:
    x: Any = node.args[0]
    dim = dim - value_of(x).ndim if dim >= 0 else dim
    for user in list(node.users):
        index = int(user.args[1])  # type: ignore[arg-type]
        start = sum(sizes[: index % len(sizes)])
        if record(node).kind == "unbind":
            new = edit.call("select", x, dim, start, at=user)
        else:
            new = edit.call("slice", x, dim, start, start + sizes[index], at=user)
        edit.replace(user, new)
    edit.erase(node)
