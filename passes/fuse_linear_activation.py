"""fuse-linear-activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import has_record, record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, same
from qatgraph.rewriting.pattern import Refusal

ACTIVATIONS = frozenset({"gelu", "relu", "tanh"})


@dataclass(frozen=True)
class FuseLinearActivation(GraphPass):
    """Group a linear with the activation that alone reads it.

    What: both nodes get one region.
    Why: targets decide on the pair (an engine may fuse bias and activation), and plans read better by region.
    Before and after: the arithmetic stays; ``linear`` and ``gelu`` carry ``@…:linear+gelu``.
    Refuses: a linear that something else reads too.
    Numerics: same.
    """

    name = "fuse-linear-activation"
    stage = Stage.CAPTURED
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> list[Refusal]:
        refusals = []
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            if record(node).kind not in ACTIVATIONS or not isinstance(source, fx.Node):
                continue
            if not has_record(source) or record(source).kind != "linear" or record(source).region:
                continue
            if len(source.users) > 1:
                refusals.append(Refusal(record(node).name, f"'{record(source).name}' has {len(source.users)} users"))
                continue
            edit.group(record(node).kind, source, node)
        return refusals
