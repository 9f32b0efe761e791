"""fold-constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.ir.aliases import draws, writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.names import attribute_path
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, same


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Compute before the model runs what depends on no input and no parameter.

    What: masks, positions and rotary tables of fixed size become buffers; parameters are never folded, they train.
    Why: language models compute dozens of them; they hide patterns, and each would become a node of the artifact.
    Before and after: ``arange(8) -> unsqueeze -> le`` becomes one buffer.
    Refuses: results of more than ``max_bytes``; sizes that move; random numbers; buffers that the model writes.
    Numerics: same.
    """

    name = "fold-constants"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    max_bytes: int = 2**20

    def apply(self, graph: Graph, edit: Edit) -> None:
        values: dict[fx.Node, torch.Tensor] = {}
        moving = {n.args[0].target for n in graph.nodes if writes(n) and isinstance(n.args[0], fx.Node)}
        for node in graph.module.graph.nodes:
            value = self._value(graph, node, values)
            if value is not None and not (node.op == "get_attr" and node.target in moving):
                values[node] = value
        for node, value in values.items():
            if node.op != "call_function" or all(user in values for user in node.users):
                continue
            if value.numel() * value.element_size() > self.max_bytes:
                edit.refuse(node, f"it has {value.numel() * value.element_size()} bytes")
                continue
            found = record(node)
            path = attribute_path(found.module, f"{found.name.rpartition(':')[2]}/folded")
            node.replace_all_uses_with(edit.constant(path, value.contiguous(), at=node))
            edit.changes += 1
        graph.module.graph.eliminate_dead_code()

    def _value(self, graph: Graph, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
        if node.op == "get_attr":
            tensor = graph.parameter(node)
            return None if isinstance(tensor, torch.nn.Parameter) else tensor
        if node.op != "call_function" or writes(node) or draws(node) or not _fixed(node):
            return None
        if any(source not in values for source in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, torch.Tensor) else None


def _fixed(node: fx.Node) -> bool:
    value: Any = value_of(node)
    return isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)
