"""What enters and leaves a lowered model: types, and the grids of the outputs that are integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import value_of
from qatgraph.reference import Grid
from qatgraph.regions import constant_of


def interface(qdq: Graph) -> tuple[dict[str, str], dict[str, str]]:
    """The types of inputs and outputs by name, of a graph of the stage qdq: ``uint8``, ``float32`` …"""
    inputs = [value_of(n) for n in qdq.module.graph.find_nodes(op="placeholder")]
    outputs = [value_of(n) for n in _leaves(qdq)]
    return _types(qdq.info.inputs, inputs), _types(qdq.info.outputs, outputs)


def output_grids(qdq: Graph) -> dict[str, Grid]:
    """The grid of each output that is integers."""
    named = zip(qdq.info.outputs, _leaves(qdq), strict=True)
    found = {name: node.args[1:3] for name, node in named if name in qdq.info.plan.integer_outputs}
    return {name: Grid(*(constant_of(qdq, n) for n in parts)) for name, parts in found.items()}


def text(grid: Grid) -> str:
    """``scale 0.05, zero point 128``; nine digits tell every float32 from its neighbours."""
    return f"scale {float(grid.scale):.9g}, zero point {int(grid.zero_point)}"


def in_float(outputs: Sequence[Any], names: Sequence[str], grids: Mapping[str, Grid]) -> list[Any]:
    """The outputs of a model, where those that are integers become the numbers that they stand for."""
    return [_real(v, grids[n]) if n in grids else v for n, v in zip(names, outputs, strict=True)]


def _real(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    return (q.to(torch.int32) - int(grid.zero_point)).float() * float(grid.scale)


def _leaves(qdq: Graph) -> list[Any]:
    return pytree.tree_leaves(qdq.module.graph.output_node().args[0])


def _types(names: Sequence[str], values: Sequence[Any]) -> dict[str, str]:
    tensors = ((n, v) for n, v in zip(names, values, strict=True) if isinstance(v, torch.Tensor))
    return {name: str(value.dtype).removeprefix("torch.") for name, value in tensors}
