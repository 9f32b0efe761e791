"""remove-no-ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, same
from qatgraph.rewriting.pattern import Refusal

COPIES = frozenset({"lift_fresh_copy", "contiguous", "clone"})
IDENTITIES = COPIES | {"detach", "detach_", "alias"}
SAME_IF_EQUAL_TYPE = frozenset({"cast", "expand", "reshape", "slice"})


@dataclass(frozen=True)
class RemoveNoOps(GraphPass):
    """Remove operations that change nothing, and everything that no output needs.

    What: assertions on metadata, casts to the same type, slices of everything, expands and reshapes to the
        same shape, copies of values that nobody writes; then dead nodes (an unused pooler).
    Why: they hide patterns and would each become a node of the artifact.
    Before and after: ``x -> to(float32) -> linear`` becomes ``x -> linear``.
    Refuses: nothing; an operation that might change something stays; a copy stays where the model writes in place.
    Numerics: same.
    """

    name = "remove-no-ops"
    stage = Stage.CAPTURED
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> list[Refusal]:
        written = any(_writes(node) for node in graph.nodes)
        for node in graph.nodes:
            kind = record(node).kind
            if written and kind in COPIES:
                continue
            if kind == "assert_tensor_metadata":
                edit.erase(node)
            elif node.args and isinstance(node.args[0], fx.Node) and _changes_nothing(kind, node, node.args[0]):
                edit.bypass(node, node.args[0])
        graph.module.graph.eliminate_dead_code()
        return []


def _writes(node: fx.Node) -> bool:
    """Whether the operation writes into its input, as ``relu_`` does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and record(node).kind not in IDENTITIES


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
    return equal and kind in IDENTITIES | SAME_IF_EQUAL_TYPE
