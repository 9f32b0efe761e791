"""functionalize-in-place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.ir.aliases import BUFFER_WRITE, operator_name, writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, same


@dataclass(frozen=True)
class FunctionalizeInPlace(GraphPass):
    """Turn operations that write into their input into operations that compute a new value.

    What: ``relu_``, ``add_``, ``hardtanh_`` … become ``relu``, ``add``, ``hardtanh``; what read the input afterwards
        reads the new value.
    Why: a pattern may then look at values without the order of reads and writes.
    Before and after: ``relu_(x); f(x)`` becomes ``y = relu(x); f(y)``.
    Refuses: the new value of a buffer (``copy_``), and operations that are not ATen's, whatever their name. Writes into
        views do not arise: capture takes them apart.
    Numerics: same.
    """

    name = "functionalize-in-place"
    stage = Stage.CAPTURED
    ensures = ("functional",)
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            operator = _functional(node) if writes(node) else None
            if operator is not None:
                _replace(node, operator, edit)


def _functional(node: fx.Node) -> Any:
    """ATen's overload of the same name without the underscore, if there is one."""
    name = operator_name(node)
    if not str(node.target).startswith("aten.") or not name.endswith("_") or name == BUFFER_WRITE:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, str(node.target).split(".")[2], None)


def _replace(node: fx.Node, operator: Any, edit: Edit) -> None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    later = [user for user in target.users if node < user]
    options: dict[str, Any] = dict(node.kwargs)
    new = edit.operator(operator, *node.args, at=node, **options)
    kept = value_of(node).dtype  # a write does not change the type, the computation may
    if value_of(new).dtype != kept:
        new = edit.call("cast", new, kept, at=node)
    for user in later:
        user.replace_input_with(target, new)
    edit.replace(node, new)
