"""recompose-layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, same

aten: Any = torch.ops.aten
Layer = tuple[Any, tuple[Any, ...]]  # operator and arguments


@dataclass(frozen=True)
class RecomposeLayers(GraphPass):
    """Read the layers of a decomposed program back.

    What: ``convolution`` and the native forms of normalization and pooling in core ATen become ``conv2d``,
        ``layer_norm``, ``group_norm``, ``batch_norm``, ``max_pool2d`` …
    Why: a program may have been saved after ``run_decompositions()``; patterns and targets speak of layers.
    Before and after: ``getitem(native_layer_norm(x, [32], w, b, eps), 0)`` becomes ``layer_norm(x, [32], w, b, eps)``.
    Refuses: a layer of which more than the first result is read; a convolution of more than three axes.
    Numerics: same.
    """

    name = "recompose-layers"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            recompose = LAYERS.get(record(node).kind)
            if recompose is None:
                continue
            firsts = [user for user in node.users if user.args[1:] == (0,)]
            alone = isinstance(value_of(node), torch.Tensor)
            layer = recompose(node)
            if layer is None:
                edit.refuse(node, "there is no such layer")
            elif not alone and len(firsts) < len(node.users):
                edit.refuse(node, "more than its first result is read")
            else:
                for old in [node] if alone else firsts:
                    edit.replace(old, edit.operator(layer[0], *layer[1], at=old, near=node))
        graph.module.graph.eliminate_dead_code()


def _of(operator: Any, *names: str) -> Callable[[fx.Node], Layer]:
    """A layer whose arguments are those of the node, in this order."""
    return lambda node: (operator, tuple(attribute(node, name) for name in names))


def _batch_norm(node: fx.Node) -> Layer:
    *tensors, momentum, eps = (attribute(node, a.name) for a in node.target._schema.arguments)  # type: ignore[union-attr]
    return aten.batch_norm.default, (*tensors, False, momentum, eps, False)


def _convolution(node: fx.Node) -> Layer | None:
    axes = value_of(node).ndim - 2
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if axes not in (1, 2, 3):
        return None
    if not attribute(node, "transposed"):
        return _of((aten.conv1d, aten.conv2d, aten.conv3d)[axes - 1].default, *names)(node)
    names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    overloads = aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
    return _of(overloads[axes - 1], *names)(node)


LAYERS: dict[str, Callable[[fx.Node], Layer | None]] = {
    "convolution": _convolution,
    "native_batch_norm_legit_no_training": _batch_norm,
    "native_layer_norm": _of(aten.layer_norm.default, "input", "normalized_shape", "weight", "bias", "eps"),
    "native_group_norm": _of(aten.group_norm.default, "input", "group", "weight", "bias", "eps"),
    "max_pool2d_with_indices": _of(
        aten.max_pool2d.default, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    ),
}
