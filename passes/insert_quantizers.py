"""insert-quantizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qatgraph.ir.graph import Graph, arguments, set_argument
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.names import attribute_path
from qatgraph.ir.stages import Stage
from qatgraph.planning.plan import Plan, Quantizer
from qatgraph.quantizers.blocks import BlockFakeQuantize
from qatgraph.quantizers.dynamic import DynamicFakeQuantize
from qatgraph.quantizers.fake_quantize import (
    ActivationFakeQuantize,
    FakeQuantize,
    FixedFakeQuantize,
    WeightFakeQuantize,
)
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, same
from qatgraph.specs import ScaleRule


@dataclass(frozen=True)
class InsertQuantizers(GraphPass):
    """Put the plan's fake quantizers into the graph.

    What: one module for each quantizer of the plan, called on every value that it stands on.
    Why: the result trains as an ordinary ``nn.Module`` and already rounds as the target will.
    Before and after: ``x -> linear(w)`` becomes ``x -> fake_quantize -> linear(fake_quantize(w))``.
    Refuses: nothing; a plan for another graph is refused before.
    Numerics: same, until calibration switches the quantizers on.
    """

    name = "insert-quantizers"
    stage = Stage.CANONICAL
    leaves = Stage.PREPARED
    numerics = same
    plan: Any = field(default=None)

    def apply(self, graph: Graph, edit: Edit) -> None:
        plan: Plan = self.plan
        nodes = {record(n).name: n for n in graph.nodes}
        for quantizer in plan.quantizers:
            if quantizer.spec.scale is ScaleRule.DERIVED:
                continue  # a derived bias follows its accumulator at conversion
            _insert(quantizer, nodes, edit)


def _insert(quantizer: Quantizer, nodes: dict[str, fx.Node], edit: Edit) -> None:
    first = next(p for p in quantizer.ports if str(p) == quantizer.name)
    owner = record(nodes[first.node]).module
    path = attribute_path(owner, quantizer.name.removeprefix(owner).removeprefix(":"))
    module: FakeQuantize
    if first.role == "weight":
        weight, axis = value_of(dict(arguments(nodes[first.node]))["weight"]), quantizer.spec.axis
        channels = None if axis is None else weight.shape[axis]
        in_blocks = quantizer.spec.block is not None
        module = BlockFakeQuantize(quantizer.spec) if in_blocks else WeightFakeQuantize(quantizer.spec, channels)
    elif quantizer.spec.scale is ScaleRule.DYNAMIC:
        module = DynamicFakeQuantize(quantizer.spec)
    elif quantizer.spec.scale is ScaleRule.FIXED:
        module = FixedFakeQuantize(quantizer.spec, *_integers(quantizer, nodes))
    else:
        bounds = [b for p in quantizer.ports if p.role == "out" and (b := _bound(nodes[p.node])) is not None]
        module = ActivationFakeQuantize(quantizer.spec, quantizer.observer, min(bounds, default=None))
    # a producer that writes integers comes first: then its readers already read the quantized value; and of the readers
    # the one that runs first, since the others read what is made in front of it
    for port in sorted(quantizer.ports, key=lambda p: (p.role != "out", nodes[p.node])):
        node = nodes[port.node]
        if port.role == "out":
            _on_result(node, path, module, edit)
        elif port.role == "weight" and record(node).kind == "embedding":
            _on_result(node, path, module, edit, dict(arguments(node))["weight"])
        else:
            _on_argument(node, port.role, path, module, edit)


def _integers(quantizer: Quantizer, nodes: dict[str, fx.Node]) -> list[torch.Tensor]:
    """Scale and zero point of the integer input whose grid it is."""
    source = next(nodes[p.node] for p in quantizer.ports if record(nodes[p.node]).kind == "dequantize")
    return [value_of(source.args[i]) for i in (1, 2)]  # type: ignore[arg-type]


def _bound(node: fx.Node) -> float | None:
    """The largest value that a clamp lets through."""
    bound = attribute(node, "max") if record(node).kind == "clamp" else None
    return float(bound) if isinstance(bound, (int, float)) else None


def _on_result(node: fx.Node, path: str, module: FakeQuantize, edit: Edit, *more: fx.Node) -> None:
    """Every user of the node reads the quantized result."""
    users = list(node.users)
    quantized = edit.module(path, module, node, *more, at=min(users), near=node)  # nodes compare by order of execution
    for user in users:
        user.replace_input_with(node, quantized)


def _on_argument(node: fx.Node, role: str, path: str, module: FakeQuantize, edit: Edit) -> None:
    source = dict(arguments(node))[role]
    if source.target == path:
        return
    known = next((u for u in source.users if u.target == path and u.args[0] is source), None)
    set_argument(node, role, known or edit.module(path, module, source, at=node, near=node))
