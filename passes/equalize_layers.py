"""equalize-layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import ROLES, Weight, weight_of
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.channels import LAYERS, Channels, problem_of, replace_weight
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, changes_grid

# f(s x) = s f(x) for s > 0, element by element
HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "dropout")
POOLS = {
    "global_avg_pool": 2,
    **{f"{kind}{n}d": n for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)},
}
SWEEPS = 100  # over all links; each sweep lowers the largest weights that are out of balance, a few are enough
DEAD = 2.0**-40  # a channel below it says nothing, and scaled up, its smallest values would come out of rounding


@dataclass(frozen=True)
class EqualizeLayers(GraphPass):
    """Equalize the weight ranges of the channels between two layers (cross-layer equalization).

    What: each channel between two layers is divided by a factor in the first and multiplied by it in the second, so
        that the ranges of its two weights come within a factor of 2 of each other; along chains until nothing moves.
        Nagel et al., arXiv:1906.04721, with factors rounded to powers of two. It needs no data.
    Why: one scale for a whole weight rounds its small channels to nothing; that is what per-tensor weight grids cost.
    Before and after: ``fc2(relu(fc1(x)))`` reads ``fc1.weight/equalized``, ``fc1.bias/equalized`` and
        ``fc2.weight/equalized``.
    Refuses: to scale a channel up until its bias is the largest number of the layer (the paper absorbs such biases);
        a result that something else reads, also a residual; an operation between that does not keep the scale
        of a channel (gelu, silu, relu6) or its place; a weight that is computed, shared or no parameter. A channel of
        zeros keeps its scale. A weight behind a pruning mask stays behind it.
    Numerics: weights and biases change; within 1e-12 in float64 (powers of two do not round).
    """

    name = "equalize-layers"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = changes_grid(1e-12, *ROLES)

    def apply(self, graph: Graph, edit: Edit) -> None:
        layers: dict[fx.Node, _Layer] = {}
        links: list[tuple[_Layer, _Layer]] = []
        for node in [n for n in graph.nodes if record(n).kind in LAYERS]:
            found = _next_layer(node)
            if isinstance(found, str):
                edit.refuse(node, found)
            elif found is not None:
                second, block = found
                first = layers.get(node) or _Layer(node, Channels.of(node))
                layers |= {node: first, second: _Layer(second, Channels.of(second, block))}
                links.append((first, layers[second]))
        for _ in range(SWEEPS):
            moved = [_balance(*link) for link in links]
            if not any(moved):
                break
        for layer in layers.values():
            layer.write(edit)


@dataclass
class _Layer:
    """A layer in the making: its weight as scaled so far, and the exponents of what it was scaled by."""

    node: fx.Node
    channels: Channels
    weight: torch.Tensor = field(init=False)
    bias: torch.Tensor | None = field(init=False)
    output: torch.Tensor | None = None
    input: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.weight = self._read("weight").tensor.double()
        has_bias = attribute(self.node, "bias") is not None
        self.bias = self._read("bias").tensor.double() if has_bias else None

    def _read(self, role: str) -> Weight:
        found = weight_of(attribute(self.node, role))
        assert found is not None
        return found

    def divide_output(self, exponents: torch.Tensor) -> None:
        self.output = -exponents if self.output is None else self.output - exponents
        self.weight = self.channels.scaled(self.weight, output=_powers(-exponents))
        self.bias = None if self.bias is None else self.bias * _powers(-exponents)

    def multiply_input(self, exponents: torch.Tensor) -> None:
        self.input = exponents if self.input is None else self.input + exponents
        self.weight = self.channels.scaled(self.weight, input=_powers(exponents))

    def room(self, ranges: torch.Tensor) -> torch.Tensor:
        """By how many powers of two each channel may grow: no bias becomes larger than all else in the layer.

        A small weight beside a bias of ordinary size would make that constant the largest value of the activation.
        """
        if self.bias is None:
            return torch.full_like(ranges, 64, dtype=torch.int64)
        size = self.bias.abs()
        free = torch.maximum(ranges, size).max() / size.clamp(min=DEAD)
        return torch.frexp(free).exponent.to(torch.int64).sub(1).clamp(0, 64)

    def write(self, edit: Edit) -> None:
        output, input = (None if e is None or not e.any() else _powers(e) for e in (self.output, self.input))
        if output is None and input is None:
            return
        weight = self._read("weight")
        scaled = self.channels.scaled(weight.stored.detach().double(), output=output, input=input)
        replace_weight(self.node, weight, scaled, "equalized", edit)
        if output is not None and attribute(self.node, "bias") is not None:
            bias = self._read("bias")
            replace_weight(self.node, bias, bias.stored.detach().double() * output, "equalized", edit)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents)


def _balance(first: _Layer, second: _Layer) -> bool:
    """One step: the power of two nearest to ``sqrt(r1 / r2)`` of each channel whose ranges are not within 2."""
    r1, r2 = first.channels.output_range(first.weight), second.channels.input_range(second.weight)
    alive = (r1 > DEAD) & (r2 > DEAD)
    ratio = torch.where(alive, r1 / r2, 1.0)
    exponents = torch.frexp(ratio).exponent.to(torch.int64) // 2
    exponents = torch.where((ratio < 0.5) | (ratio > 2.0), exponents, 0).maximum(-first.room(r1))
    if not bool(exponents.any()):
        return False
    first.divide_output(exponents)
    second.multiply_input(exponents)
    return True


def _next_layer(layer: fx.Node) -> tuple[fx.Node, int] | str | None:
    """The layer that alone reads the channels of this one, and how many of its columns read each; or why there is none.

    A layer at the end of the model has none, and that is no news.
    """
    node, axis = layer, value_of(layer).ndim - _axes(layer)
    while True:
        readers = [u for u in node.users if not (has_record(u) and record(u).kind.startswith("sym_"))]
        if len(readers) != 1:
            return f"'{record(node).name}' has {len(readers)} readers"
        reader = readers[0]
        if reader.op == "output":
            return None
        if record(reader).kind in LAYERS and reader.args[0] is node:
            return _joined(layer, node, axis, reader)
        moved = _moved(node, axis, reader)
        if isinstance(moved, str):
            return moved
        node, axis = reader, moved


def _axes(layer: fx.Node) -> int:
    """How far from the last axis a layer has its channels."""
    return int(value_of(attribute(layer, "weight")).ndim) - 1


def _joined(layer: fx.Node, node: fx.Node, axis: int, reader: fx.Node) -> tuple[fx.Node, int] | str:
    if axis != value_of(node).ndim - _axes(reader):
        return f"'{record(reader).name}' sums over another axis than that of its channels"
    problem = problem_of(layer, "weight") or problem_of(layer, "bias") or problem_of(reader, "weight")
    return problem or (reader, _size(node, axis) // _size(layer, value_of(layer).ndim - _axes(layer)))


def _moved(node: fx.Node, axis: int, reader: fx.Node) -> int | str:
    """Where the channels stand behind an operation, or why they do not get through it."""
    kind, rank = record(reader).kind, value_of(node).ndim
    if kind in HOMOGENEOUS and reader.args[0] is node:
        return axis
    if kind in POOLS and axis < rank - POOLS[kind]:
        return axis
    if kind == "mean" and (dims := attribute(reader, "dim")) and axis not in (gone := [d % rank for d in dims]):
        return axis if attribute(reader, "keepdim") else axis - sum(d < axis for d in gone)
    if kind in ("flatten", "reshape") and axis == 1 and _flattens(node, reader):
        return axis
    if kind == "reshape" and axis == rank - 1 and value_of(reader).shape[-1] == value_of(node).shape[-1]:
        return int(value_of(reader).ndim) - 1
    return f"'{record(reader).name}', which reads it, does not keep the scale and place of a channel"


def _flattens(node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``[batch, channels, …]`` becomes ``[batch, channels * …]``."""
    have, want = value_of(node).shape, value_of(reader).shape
    fixed = all(isinstance(s, int) for s in have[1:])
    return len(want) == 2 and fixed and str(want[0]) == str(have[0]) and want[1] == math.prod(have[1:])


def _size(node: fx.Node, axis: int) -> int:
    return int(value_of(node).shape[axis])
