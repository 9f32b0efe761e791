"""remove-no-ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.aliases import writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, within

COPIES = frozenset({"lift_fresh_copy", "contiguous", "clone"})
LAYOUTS = frozenset({"as_strided", "view_as_complex"})  # what they compute depends on the layout in memory
IDENTITIES = COPIES | {"detach", "detach_", "alias"}
SAME_IF_EQUAL_TYPE = frozenset({"cast", "expand", "reshape", "slice"})


@dataclass(frozen=True)
class RemoveNoOps(GraphPass):
    """Remove operations that change nothing, and everything that no output needs.

    What: assertions on metadata, casts to the same type, slices of everything, expands and reshapes to the
        same shape, padding and dropout of nothing, factors and divisors of 1, copies of values that nobody writes; then
        dead nodes (an unused pooler).
    Why: they hide patterns and would each become a node of the artifact.
    Before and after: ``x -> to(float32) -> linear`` becomes ``x -> linear``.
    Refuses: nothing; an operation that might change something stays; a copy stays where the model writes in place, or
        where its layout is read. A ``view`` behind a removed copy becomes a ``reshape``, which takes any layout.
    Numerics: within 1e-12 in float64: where a copy goes, kernels may add in another order.
    """

    name = "remove-no-ops"
    stage = Stage.CAPTURED
    numerics = within(1e-12)

    def apply(self, graph: Graph, edit: Edit) -> None:
        written = any(writes(node) for node in graph.nodes)
        relaid = False  # a value may have another layout in memory than before
        for node in graph.nodes:
            kind = record(node).kind
            if kind in COPIES and (written or any(record(u).kind in LAYOUTS for u in node.users if has_record(u))):
                continue
            if kind == "assert_tensor_metadata":
                edit.erase(node)
            elif node.args and isinstance(node.args[0], fx.Node) and _changes_nothing(kind, node, node.args[0]):
                relaid = relaid or kind in COPIES
                edit.bypass(node, node.args[0])
        if relaid:
            _free_views(graph, edit)
        graph.module.graph.eliminate_dead_code()


def _free_views(graph: Graph, edit: Edit) -> None:
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            edit.replace(node, edit.operator(aten.reshape.default, *node.args, at=node))


def _changes_nothing(kind: str, node: fx.Node, source: fx.Node) -> bool:
    if not (has_record(source) or source.op in ("placeholder", "get_attr")):
        return False
    before, after = value_of(source), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or before.ndim != after.ndim:
        return False
    equal = all(str(a) == str(b) for a, b in zip(before.shape, after.shape, strict=True))
    if kind == "slice":  # the same shape can only be the whole
        return equal and bool(len(node.args) < 5 or node.args[4] == 1)
    return equal and (kind in IDENTITIES | SAME_IF_EQUAL_TYPE or _of_nothing(kind, node))


def _of_nothing(kind: str, node: fx.Node) -> bool:
    """Padding by no element, dropout at no rate, or a factor or divisor of 1."""
    if kind == "pad":
        return not any(attribute(node, "pad"))
    if kind in ("mul", "div"):
        return attribute(node, "other") == 1 if isinstance(attribute(node, "other"), (int, float)) else False
    return kind == "dropout" and bool(attribute(node, "p") == 0)
