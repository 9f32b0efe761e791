"""The integer reference of each int8 region: what its kernel makes of integers, by the converted graph's constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from qatgraph import reference
from qatgraph.ir.graph import Graph, arguments
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.operators import DEQUANTIZE, DEQUANTIZE_BLOCKS, QUANTIZE, ROUND_DYNAMICALLY
from qatgraph.ops import keeps_grid
from qatgraph.reference import Array, EngineQuantize, Grid
from qatgraph.rewriting.matcher import attribute

Result = Callable[..., Array]
ONNX = EngineQuantize(reference.quantize)


def constant_of(graph: Graph, node: Any) -> Array:
    """The numbers of a constant."""
    tensor = graph.parameter(node)
    assert tensor is not None, f"{node} is not a constant"
    return tensor.detach().cpu().numpy()


@dataclass(frozen=True)
class Region:
    """One planned node with its grids, in the graph of the stage qdq.

    ``inputs`` are the dequantizes in front of its activations, or what rounds one to a grid of its own, ``out`` the
    quantize that its kernel does too, if it writes integers. ``quantize`` is how the engine makes integers of floats.
    ``without_vnni``: as x86 with AVX2 and no VNNI computes it, where pair sums saturate.
    """

    qdq: Graph
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    out: fx.Node | None
    without_vnni: bool = False
    quantize: EngineQuantize = ONNX

    @classmethod
    def of(cls, qdq: Graph, node: fx.Node, *, without_vnni: bool = False, quantize: EngineQuantize = ONNX) -> Region:
        read = [behind_padding(a) for _, a in arguments(node) if isinstance(a, fx.Node)]
        found = [b for b in read if b.target in (DEQUANTIZE, ROUND_DYNAMICALLY)]
        inputs = [a for a in found if not isinstance(a.args[0], fx.Node) or a.args[0].op != "get_attr"]
        prediction = qdq.info.plan.prediction(record(node).name)
        out = None if prediction.requant == "float-result" else _quantize_behind(node)
        return cls(qdq, node, tuple(inputs), out, without_vnni and prediction.in_pairs, quantize)

    def result(self) -> Result:
        """What the kernel makes of the integers that it reads."""
        prediction = self.qdq.info.plan.prediction(record(self.node).name)
        if prediction.requant == "in-float":
            return _in_float(self)
        return RESULTS[record(self.node).kind](self)

    @property
    def reads_floats(self) -> bool:
        """Whether the kernel reads the float border itself: it finds a grid for it, or only its weight is integers."""
        return self.in_blocks or any(n.target is ROUND_DYNAMICALLY for n in self.inputs)

    def quantized(self, x: Array) -> tuple[Array, Grid]:
        """The integers that a kernel makes of its one activation, and their grid."""
        if self.reads_floats:
            return reference.dynamic_quantize(x)
        (grid,) = self.grids
        return reference.quantize(x, grid.scale, grid.zero_point), grid

    @property
    def in_blocks(self) -> bool:
        weight = dict(arguments(self.node)).get("weight")
        return weight is not None and weight.target is DEQUANTIZE_BLOCKS

    @property
    def block(self) -> int:
        """How many neighbours along K share a scale."""
        return int(dict(arguments(self.node))["weight"].args[2])

    def slack(self, x: Array, *others: Array) -> Array | None:
        """How far a sum of floats may be from ``result``; None where the sums are of integers."""
        if not self.in_blocks:
            return None
        weight, scale = self.weight
        return reference.sum_slack(x, weight, scale, self.block, self.bias)

    def quantize_steps(self) -> list[Callable[[Array], tuple[Array, Array]]]:
        """The least and the largest integers that each quantize in front may make of the float border; twice what a
        table holds at the indices."""
        if self.reads_floats:
            return []
        if record(self.node).kind == "embedding":
            table = self.constant(self.node.args[0])
            return [lambda indices: (table[indices],) * 2]
        steps, each = self.quantize.least_and_largest, zip(self.grids, self.quantizes, strict=True)
        return [partial(steps, scale=g.scale, zero_point=g.zero_point, behind=_kind_in_front(q)) for g, q in each]

    @property
    def quantizes(self) -> tuple[fx.Node, ...]:
        """What gives the integers in front of its activations: a quantize, what the model takes, or, of a kernel that
        reads floats, its own first node."""
        if self.reads_floats:
            return self.inputs or (self.node,)
        return tuple(_source(n) for n in self.inputs)

    @property
    def writes(self) -> fx.Node:
        """The node whose value the kernel writes: a quantize, the dequantize behind a table, or the node itself."""
        if record(self.node).kind == "embedding":
            return next(iter(self.node.users))
        return self.out or self.node

    @property
    def grids(self) -> list[Grid]:
        return [self.grid(n) for n in self.inputs]

    @property
    def out_grid(self) -> Grid:
        assert self.out is not None
        return self.grid(self.out)

    def grid(self, node: fx.Node) -> Grid:
        """The grid of a quantize or dequantize."""
        return Grid(*(self.constant(n) for n in node.args[1:3]))

    def constant(self, node: Any) -> Array:
        return constant_of(self.qdq, node)

    def attribute(self, name: str) -> Any:
        return attribute(self.node, name)

    def sizes(self, name: str) -> list[int]:
        """An attribute with a number for each spatial axis, written out."""
        value, axes = self.attribute(name), self.axes
        numbers = [value] if isinstance(value, int) else list(value)
        return numbers * axes if len(numbers) == 1 else numbers

    @property
    def windows(self) -> dict[str, Any]:
        """How a convolution lays its filter on the input, in the words of ``reference.conv``; empty for a linear."""
        kernel = self.weight[0].shape[2:]
        if not kernel:
            return {}
        stride, dilation, groups = self.sizes("stride"), self.sizes("dilation"), self.attribute("groups")
        return {
            "stride": stride,
            "padding": _pads(self, kernel, dilation),
            "dilation": dilation,
            "groups": groups,
        }

    @property
    def axes(self) -> int:
        return int(value_of(self.node).ndim) - 2

    @property
    def weight(self) -> tuple[Array, Array]:
        """The integers of the weight and their scale."""
        node = dict(arguments(self.node))["weight"]
        return self.constant(node.args[0]), self.constant(node.args[1])

    @property
    def constants(self) -> dict[str, tuple[Array, ...]]:
        """Of a product of integers, by role, the integers and scales that a file has to hold."""
        found: dict[str, tuple[Array, ...]] = {}
        if self.inputs and not self.reads_floats:
            found["x"] = (self.grids[0].scale, self.grids[0].zero_point)
        for role in ("weight", "bias"):
            node = dict(arguments(self.node)).get(role)
            if node is not None and node.target in (DEQUANTIZE, DEQUANTIZE_BLOCKS):
                found[role] = (self.constant(node.args[0]), self.constant(node.args[1]))
        return found

    @property
    def bias(self) -> Array | None:
        """An int32 bias as it is, since an engine adds it to the accumulator; as the float that it stands for if it
        counts in other units than the accumulator."""
        node = dict(arguments(self.node)).get("bias")
        if node is None:
            return None
        if node.target is not DEQUANTIZE:
            return self.constant(node)
        value, scale, zero = (self.constant(n) for n in node.args[:3])
        unit = self.grids[0].scale * self.weight[1]
        return value if _equal(scale, unit) else reference.dequantize(value, scale, zero, axis=0)


def behind_padding(node: fx.Node) -> fx.Node:
    """What a kernel reads that pads by itself: the value that is padded, or the value as it is."""
    if has_record(node) and record(node).kind == "pad":
        return node.all_input_nodes[0]
    return node


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _kind_in_front(node: fx.Node) -> str:
    """The kind of the operation that gives what a quantize reads, also in front of what only moves it; else empty."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if not has_record(source):
        return ""
    kind = record(source).kind
    return _kind_in_front(source) if keeps_grid(kind) else kind


def _quantize_behind(node: fx.Node) -> fx.Node | None:
    """The quantize that alone reads the result, also behind what the kernel takes in."""
    readers = list(node.users)
    if len(readers) != 1:
        return None
    if readers[0].target is QUANTIZE:
        return readers[0]
    inside = has_record(readers[0]) and record(readers[0]).kind in ("relu", "clamp")
    return _quantize_behind(readers[0]) if inside else None


def _linear(r: Region) -> Result:
    (weight, scale), bias = r.weight, r.bias
    if r.in_blocks:
        return lambda x: reference.linear_in_blocks(x, weight, scale, r.block, bias)
    add = reference.accumulate_pair16 if r.without_vnni else reference.accumulate
    if r.reads_floats:
        return lambda x: reference.linear_dynamic(x, weight, scale, bias, accumulator=add)
    (grid,) = r.grids
    if r.out is None:
        return _float_linear(r)
    out = r.out_grid
    return lambda q: reference.gemm(q, grid, weight, scale, bias, out, accumulator=add)


def _conv(r: Region) -> Result:
    (grid,), (weight, scale), bias, out = r.grids, r.weight, r.bias, r.out_grid
    add = reference.accumulate_conv_pair16 if r.without_vnni else reference.accumulate_conv
    return lambda q: reference.conv(q, grid, weight, scale, bias, out, **r.windows, accumulator=add)


def _pads(r: Region, kernel: tuple[int, ...], dilation: list[int]) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis, with those of a pad in front; ``same`` puts the odd one behind, as torch
    does."""
    padding, x = r.attribute("padding"), dict(arguments(r.node))["x"]
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        own = [(w // 2, w - w // 2) for w in whole]
    else:
        own = [(p, p) for p in ([0] * r.axes if padding == "valid" else r.sizes("padding"))]
    if behind_padding(x) is x:
        return own
    ends = [*attribute(x, "pad"), *[0] * (2 * r.axes)][: 2 * r.axes]  # the last axis stands first
    more = list(zip(ends[::2], ends[1::2], strict=True))[::-1]
    return [(a + c, b + d) for (a, b), (c, d) in zip(own, more, strict=True)]


def _in_float(r: Region) -> Result:
    """The float operation on what the integers stand for, and the engine's quantize behind."""
    grid, sums = r.out_grid, IN_FLOAT.get(record(r.node).kind, _as_torch)(r)
    return lambda *integers: r.quantize(sums(*integers), grid.scale, grid.zero_point)


def _float_linear(r: Region) -> Result:
    (grid,), (weight, scale), bias = r.grids, r.weight, r.bias
    add = reference.accumulate_pair16 if r.without_vnni else reference.accumulate
    return lambda q: reference.linear(q, grid.scale, int(grid.zero_point), weight, scale, bias, accumulator=add)


def _float_conv(r: Region) -> Result:
    (grid,), (weight, scale), bias = r.grids, r.weight, r.bias
    add = reference.accumulate_conv_pair16 if r.without_vnni else reference.accumulate_conv
    return lambda q: reference.conv_float(q, grid, weight, scale, bias, **r.windows, accumulator=add)


def _as_torch(r: Region) -> Result:
    """What torch makes of the numbers that the integers stand for."""

    def result(*integers: Array) -> Array:
        reals = (reference.dequantize(q, g.scale, g.zero_point) for q, g in zip(integers, r.grids, strict=True))
        values = dict(zip(r.inputs, map(torch.from_numpy, reals), strict=True))
        given: Any = [fx.node.map_arg(a, lambda n: values[n]) for a in (r.node.args, r.node.kwargs)]
        target: Any = r.node.target
        found: Array = target(*given[0], **given[1]).numpy()
        return found

    return result


def _matmul(r: Region) -> Result:
    a, b = r.grids
    if r.out is None:
        return lambda p, q: reference.matmul_float(p, a, q, b)
    out = r.out_grid
    return lambda p, q: reference.matmul(p, a, q, b, out)


def _lookup(r: Region) -> Result:
    """What the dequantize behind a table makes of the integers that were looked up."""
    grid = r.grid(next(iter(r.node.users)))
    return lambda q: reference.dequantize(q, grid.scale, grid.zero_point)


def _add(r: Region) -> Result:
    (a, b), out = r.grids, r.out_grid
    return lambda p, q: reference.add(p, a, q, b, out)


def _mul(r: Region) -> Result:
    (a, b), out = r.grids, r.out_grid
    return lambda p, q: reference.mul(p, a, q, b, out)


def _sigmoid(r: Region) -> Result:
    (grid,), out = r.grids, r.out_grid
    return lambda q: reference.sigmoid(q, grid, out)


def _leaky_relu(r: Region) -> Result:
    (grid,), out, alpha = r.grids, r.out_grid, r.attribute("negative_slope")
    return lambda q: reference.leaky_relu(q, grid, out, alpha=alpha)


def _cat(r: Region) -> Result:
    grids, out, axis = r.grids, r.out_grid, r.attribute("dim")
    return lambda *parts: reference.concat(list(zip(parts, grids, strict=True)), out, axis=axis)


def _softmax(r: Region) -> Result:
    (grid,), out, axis = r.grids, r.out_grid, r.attribute("dim")
    return lambda q: reference.softmax(q, grid, out, axis=axis)


def _max_pool(r: Region) -> Result:
    kernel, dilation = r.sizes("kernel_size"), r.sizes("dilation")
    stride = r.sizes("stride") if r.attribute("stride") else kernel
    pads, ceil = [(p, p) for p in r.sizes("padding")], r.attribute("ceil_mode")
    return lambda q: reference.max_pool(q, kernel, stride=stride, padding=pads, dilation=dilation, ceil=ceil)


def _average_pool(r: Region) -> Result:
    (grid,), out, kernel = r.grids, r.out_grid, r.sizes("kernel_size")
    stride = r.sizes("stride") if r.attribute("stride") else kernel
    pads = [(p, p) for p in r.sizes("padding")]
    how = {"count_include_pad": r.attribute("count_include_pad"), "ceil": r.attribute("ceil_mode")}
    return lambda q: reference.average_pool(q, grid, out, kernel, stride=stride, padding=pads, **how)


def _global_pool(r: Region) -> Result:
    (grid,), out = r.grids, r.out_grid
    return lambda q: reference.global_average_pool(q, grid, out)


IN_FLOAT = {"linear": _float_linear, **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _float_conv)}
RESULTS: dict[str, Callable[[Region], Result]] = {
    "linear": _linear,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _conv),
    "embedding": _lookup,
    "matmul": _matmul,
    **dict.fromkeys(["add", "residual_add"], _add),
    "mul": _mul,
    "sigmoid": _sigmoid,
    "leaky_relu": _leaky_relu,
    "cat": _cat,
    "softmax": _softmax,
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d"], _max_pool),
    **dict.fromkeys(["avg_pool1d", "avg_pool2d", "avg_pool3d"], _average_pool),
    "global_avg_pool": _global_pool,
}
