"""Convert: Graph[PREPARED] -> Graph[QDQ], with integer weights and constant scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph, arguments
from qatgraph.ir.masks import Weight, masked, weight_of
from qatgraph.ir.meta import record
from qatgraph.ir.names import attribute_path, quantizer_name
from qatgraph.ir.stages import Stage, verify_structure
from qatgraph.operators import DEQUANTIZE, DEQUANTIZE_BLOCKS, QUANTIZE, ROUND_DYNAMICALLY
from qatgraph.planning.plan import Plan
from qatgraph.quantizers.blocks import BlockFakeQuantize
from qatgraph.quantizers.dynamic import DynamicFakeQuantize
from qatgraph.quantizers.fake_quantize import (
    ActivationFakeQuantize,
    FakeQuantize,
    FixedFakeQuantize,
    WeightFakeQuantize,
)
from qatgraph.quantizers.grids import STORAGE
from qatgraph.regions import behind_padding
from qatgraph.rewriting.edit import Edit
from qatgraph.specs import DType

WIDEST = 255  # the largest |x - zero_point| of an 8-bit activation


def convert(prepared: Graph) -> Graph:
    """The graph as it will run: every quantized reader gets a dequantize of its own, dropout goes.

    Raises:
        LowerError: QG501 a quantizer has not been calibrated, QG502 a bias does not fit into int32, QG507 a weight
            contains NaN or infinity, QG515 a scale is no normal number.
    """
    prepared = Graph(prepared.module)
    graph = prepared.clone()
    edit = Edit(graph, "convert")
    modules = dict(graph.module.named_modules(remove_duplicate=False))
    calls = [(n, modules[str(n.target)]) for n in graph.module.graph.nodes if n.op == "call_module"]
    for node, module in calls:  # first, so that a quantizer sees its true readers
        if isinstance(module, torch.nn.Dropout):
            edit.bypass(node, node.args[0])
    for node, module in calls:
        if isinstance(module, FakeQuantize):
            if not module.on:
                raise _uncalibrated(node)
            if isinstance(module, ActivationFakeQuantize):
                _activation(node, module, edit)
            elif isinstance(module, WeightFakeQuantize):
                (_table if len(node.args) > 1 else _weight)(node, module, edit)
            elif isinstance(module, BlockFakeQuantize):
                _blocks(node, module, edit)
            elif isinstance(module, DynamicFakeQuantize):
                edit.bypass(node, edit.custom(ROUND_DYNAMICALLY, *node.args, at=node, near=node, kind="quantize"))
    plan: Plan = graph.info.plan
    _biases([p.node for p in plan.placements if p.bias == "int32"], graph, edit)
    _masks(edit)
    graph.module.graph.eliminate_dead_code()
    graph = graph.clone()  # holds what the graph reads, and nothing else: no float weights
    graph.set_info(stage=Stage.QDQ)
    graph.module.eval()
    verify_structure(graph.module, Stage.QDQ, "convert")
    return graph


def _uncalibrated(node: fx.Node) -> LowerError:
    return LowerError(
        "QG501",
        "a quantizer has not been calibrated",
        where=quantizer_name(str(node.target)),
        why="its grid is unknown",
        todo="call qatgraph.calibrate(qat, batches), or load a state_dict of a calibrated model",
    )


def _check_scale(scale: torch.Tensor, where: str) -> None:
    tiny = torch.finfo(torch.float32).tiny
    wrong = ~(torch.isfinite(scale) & (scale >= tiny))
    if bool(wrong.any()):
        raise LowerError(
            "QG515",
            "a scale is no positive normal number",
            where=where,
            why=f"it is {float(scale[wrong][0]):g}: engines divide by it, and some take a denormal for zero",
            todo="calibrate again on data that moves this value, or pin the node that reads it in float",
        )


def _activation(node: fx.Node, module: ActivationFakeQuantize, edit: Edit) -> None:
    source, path, users = node.args[0], str(node.target), list(node.users)
    assert isinstance(source, fx.Node)
    kind = STORAGE[module.spec.dtype]
    _check_scale(module.scale, quantizer_name(path))
    scale = edit.constant(f"{path}/scale", module.scale.detach().clone(), node)
    zero = edit.constant(f"{path}/zero_point", module.zero_point.detach().to(kind), node)
    fixed = isinstance(module, FixedFakeQuantize) and source.target is DEQUANTIZE
    q: Any = source.args[0] if fixed else None  # the model takes the integers
    q = q or edit.custom(QUANTIZE, source, scale, zero, at=node, near=node, kind="quantize")
    _dequantize(node, _in_float(users, node, q, edit), q, scale, zero, 0, edit)


def _in_float(users: list[fx.Node], node: fx.Node, q: fx.Node, edit: Edit) -> list[fx.Node]:
    """Those that read floats; where the model returns integers, it returns them."""
    plan: Plan = edit.graph.info.plan
    for output in (u for u in users if u.op == "output" and plan.integer_outputs):
        leaves, spec = pytree.tree_flatten(output.args[0])
        names = zip(edit.graph.info.outputs, leaves, strict=True)
        leaves = [q if leaf is node and name in plan.integer_outputs else leaf for name, leaf in names]
        output.args = (pytree.tree_unflatten(leaves, spec),)
    return [u for u in users if node in u.all_input_nodes]


def _dequantize(
    node: fx.Node, users: Iterable[fx.Node], q: fx.Node, scale: fx.Node, zero: fx.Node, axis: int, edit: Edit
) -> None:
    """One dequantize a user, in the user's module: engines fuse only a dequantize with a single reader."""
    for user in users:
        near = user if user.op == "call_function" else node
        own = edit.custom(
            DEQUANTIZE, q, scale, zero, axis, at=user if near is user else node, near=near, kind="dequantize"
        )
        user.replace_input_with(node, own)
    edit.erase(node)


def _weight(node: fx.Node, module: WeightFakeQuantize, edit: Edit) -> None:
    q, scale, zero = _integer_weight(node, _weight_behind(node.args[0]), module, edit)
    _dequantize(node, list(node.users), q, scale, zero, module.spec.axis or 0, edit)


def _blocks(node: fx.Node, module: BlockFakeQuantize, edit: Edit) -> None:
    """One dequantize a user, as in ``_dequantize``."""
    q, scale, _ = _integer_weight(node, _weight_behind(node.args[0]), module, edit)
    for user in list(node.users):
        parts = (q, scale, module.spec.block)
        user.replace_input_with(node, edit.custom(DEQUANTIZE_BLOCKS, *parts, at=user, near=user, kind="dequantize"))
    edit.erase(node)


def _table(node: fx.Node, module: WeightFakeQuantize, edit: Edit) -> None:
    """``fake_quantize(embedding(table), table)`` -> ``dequantize(embedding(int8 table))``."""
    lookup, source = node.args
    assert isinstance(lookup, fx.Node)
    q, scale, zero = _integer_weight(lookup, _weight_behind(source), module, edit)
    lookup.update_arg(0, q)
    lookup.meta["val"] = lookup.meta["val"].to(torch.int8)
    rows = edit.custom(DEQUANTIZE, lookup, scale, zero, 0, at=node, near=lookup, kind="dequantize")
    edit.bypass(node, rows)


def _integer_weight(
    at: fx.Node, source: Weight, module: WeightFakeQuantize | BlockFakeQuantize, edit: Edit
) -> tuple[fx.Node, fx.Node, fx.Node]:
    path, weight = source.path, source.tensor
    if not bool(torch.isfinite(weight).all()):
        raise LowerError(
            "QG507",
            "a weight contains NaN or infinity",
            where=str(source.parameter.target),
            why="it has no grid, and the file would hide it behind finite numbers",
            todo="look for the step at which training diverged; lower an earlier state",
        )
    integers, scale = module.integers(weight)
    _check_scale(scale, str(source.parameter.target))
    q = edit.constant(f"{path}/int8", integers, at)
    return (
        q,
        edit.constant(f"{path}/scale", scale, at),
        edit.constant(f"{path}/zero_point", torch.zeros_like(scale, dtype=torch.int8), at),
    )


def _biases(names: list[str], graph: Graph, edit: Edit) -> None:
    """Biases on the grid of their accumulator: int32 in units of ``s_x * s_w``."""
    nodes = {record(n).name: n for n in graph.nodes}
    for name in names:
        node = nodes[name]
        source, weight, bias = (arg for _, arg in list(arguments(node))[:3])
        x: Any = behind_padding(source)
        scale = _parameter(graph, x.args[1]) * _parameter(graph, weight.args[1])
        steps = _weight_behind(bias).tensor.double() / scale.double()
        sums = _parameter(graph, weight.args[0]).double().abs().flatten(1).sum(1) * WIDEST
        top = float((steps.abs() + sums).max())
        if not top <= DType.S32.qmax:  # also when it is NaN
            raise LowerError(
                "QG502",
                f"the bias of '{name}' does not fit into int32",
                where=f"{name}.bias",
                why=f"with the products it may reach {top:.3g} accumulator steps, and the engine's sum would wrap",
                todo="calibrate again after training, which makes room for it, write the bias in float (bias = 'row' "
                "in a recipe line for this node), or keep the node in float",
            )
        q = torch.round(steps).to(torch.int32)
        owner = record(node).module  # by port: a bias that two linears read has two grids
        path = attribute_path(owner, f"{name}.bias".removeprefix(owner).removeprefix(":"))
        parts = [
            edit.constant(f"{path}/int32", q, node),
            edit.constant(f"{path}/scale", scale, node),
            edit.constant(f"{path}/zero_point", torch.zeros_like(scale, dtype=torch.int32), node),
        ]
        node.update_arg(2, edit.custom(DEQUANTIZE, *parts, 0, at=node, near=node, kind="dequantize"))


def _masks(edit: Edit) -> None:
    """What is left of the masks, in front of layers in float: multiply once, so that the file holds the zeros."""
    for node in edit.graph.nodes:
        weight = masked(node) if node.users else None
        if weight is not None:
            node.replace_all_uses_with(edit.constant(weight.path, weight.tensor, node))


def _weight_behind(argument: object) -> Weight:
    weight = weight_of(argument)
    assert weight is not None
    return weight


def _parameter(graph: Graph, node: fx.Node) -> torch.Tensor:
    tensor = graph.parameter(node)
    assert tensor is not None
    return tensor.detach()
