"""The operations of a QDQ file as the facts that plans are made of, with the grids that stand at their ports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from qatgraph.backends.onnx_file import MOVES, OnnxFile, attribute
from qatgraph.backends.stored_grids import StoredConstant, StoredGrid, grid_of, stored_constant
from qatgraph.planning.facts import NodeFact, ParameterFact, Size
from qatgraph.reference import Array

# What the target's tables call an operation; those with a number of axes get it behind. Others keep their ONNX name.
KINDS = {
    "Add": "add", "Mul": "mul", "Sigmoid": "sigmoid", "LeakyRelu": "leaky_relu", "Softmax": "softmax",
    "GlobalAveragePool": "global_avg_pool", "Concat": "cat", "Relu": "relu", "Clip": "clamp", "Gelu": "gelu",
    "LayerNormalization": "layer_norm", "RMSNormalization": "rms_norm", "Attention": "attention",
    "Reshape": "reshape", "Flatten": "flatten", "Squeeze": "squeeze", "Unsqueeze": "unsqueeze",
    "Transpose": "transpose", "Slice": "slice",
}  # fmt: skip
WITH_AXES = {"Conv": "conv", "ConvTranspose": "conv_transpose", "MaxPool": "max_pool", "AveragePool": "avg_pool"}
PRODUCTS = ("MatMul", "Gemm", "Conv")
# Operands that are not activations.
SETTINGS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Slice", "Clip", "LayerNormalization", "RMSNormalization"})
SKIPPED = frozenset({"QuantizeLinear", "DequantizeLinear", "Constant", "Identity", "Shape", "Cast"})
# What ends up inside the kernel in front, or would if it were folded.
ABSORBED = ("Relu", "Clip", "BatchNormalization")


@dataclass(frozen=True, eq=False)
class Port:
    """What an operation reads: ``grid`` is None for floats; ``source`` is the dequantize, ``border`` says whether its
    integers are an input of the model, ``forks`` whether others read what this one reads, or its integers, and
    ``moved`` whether something that moves numbers stands between."""

    role: str
    value: str
    grid: StoredGrid | None = None
    source: Any = None
    constant: StoredConstant | None = None
    array: Array | None = None
    border: bool = False
    forks: bool = False
    moved: bool = False


@dataclass(frozen=True, eq=False)
class Weight:
    """The constant of a product. ``axis`` is that of its scales as a plan counts: 0 for the results, 1 for K."""

    constant: StoredConstant
    axis: int | None
    turned: bool

    @property
    def rows(self) -> Array:
        """``[N, K]`` of a matrix, ``[O, C / groups, *kernel]`` of a convolution."""
        integers = self.constant.integers
        return integers.reshape(-1, integers.shape[-1]).T if self.turned else integers


@dataclass(frozen=True, eq=False)
class Between:
    """An activation (or a norm, without bounds) between an operation and its quantize."""

    op_type: str
    kind: str
    bounds: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Behind:
    """A quantize behind an operation; ``border`` says whether its integers are an output of the model, ``forks``
    whether several operations read them, ``direct`` whether nothing that moves numbers stands between."""

    node: Any
    grid: StoredGrid
    border: bool
    forks: bool
    direct: bool = True


@dataclass(frozen=True, eq=False)
class Result:
    """What becomes of a result: ``inside`` stands up to the first fork or quantize; ``floats`` are the readers behind
    it that take floats; ``activation`` is a Relu or Clip that alone reads the value, and is read by a node, where no
    quantize stands behind. Quantizes that share their constants count as one, as the engine joins them."""

    value: str
    inside: tuple[Between, ...]
    quantizes: tuple[Behind, ...]
    floats: tuple[Any, ...]
    output: bool
    activation: Any

    @property
    def alone(self) -> StoredGrid | None:
        """The grid of the one quantize, if nothing else reads the result."""
        return self.quantizes[0].grid if len(self.quantizes) == 1 and not self.floats and not self.output else None


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a file. ``add`` is the node that adds the bias, if it stands alone; ``bias_form`` that of
    ``planning.target.BiasForm``, or the word of a data type that is none of them."""

    node: Any
    label: str
    fact: NodeFact
    ports: tuple[Port, ...]
    weight: Weight | None
    bias: Port | None
    bias_form: str
    add: Any
    result: Result

    @property
    def quantized(self) -> bool:
        """Whether an activation that it reads was dequantized."""
        return any(p.grid is not None for p in self.ports)


class Reader:
    """Reads the operations of one file."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        found: list[Operation] = []
        biases: set[str] = set()
        for node in self.file.nodes:
            if node.op_type in SKIPPED or not node.input or not node.output or node.output[0] in biases:
                continue
            if not self.file.needed.intersection(node.output):
                continue  # the engine keeps it, and nobody sees what it does
            if all(self._port("x", i).array is not None for i in node.input if i):
                continue  # a constant that the engine folds
            operation = self._operation(node)
            found.append(operation)
            if operation.add is not None:
                biases.add(operation.add.output[0])
        return tuple(found)

    def _port(self, role: str, value: str) -> Port:
        """The operand, with the dequantize that gives it, also in front of what only moves it."""
        file = self.file
        array = file.constant(value)
        if array is not None:
            return Port(role, value, array=array)
        node = file.producers.get(file.stem(value))
        if node is not None and node.op_type in MOVES:
            moved = self._port(role, node.input[0])
            readers = file.readers.get(value, [])
            if moved.constant is None and any(r.op_type == "QuantizeLinear" for r in readers):
                return Port(role, value)  # the engine moves no pair to where a quantize stands
            return replace(moved, role=role, value=value, forks=len(readers) > 1, moved=True)
        if node is not None and node.op_type == "Pad" and self._into_conv(node):
            return replace(self._port(role, node.input[0]), role=role, value=value)
        if node is None or node.op_type != "DequantizeLinear":
            return Port(role, value)
        picked = file.producers.get(file.stem(node.input[0]))
        if picked is not None and picked.op_type == "Gather" and file.constant(picked.input[0]) is not None:
            return Port(role, value)  # rows of an int8 table: the table is quantized, not an activation
        rank = len(file.shape(node.input[0])) or len(file.shape(value))
        grid = grid_of(file, node, rank)
        stored = stored_constant(file, node, grid)
        if stored is not None:
            return Port(role, value, grid, node, stored)
        return Port(role, value, grid, node, border=node.input[0] in file.inputs, forks=self._forks(node.input[0]))

    def _into_conv(self, pad: Any) -> bool:
        """Whether the engine lets a convolution pad by itself, before it looks for Q/DQ."""
        readers = self.file.readers.get(pad.output[0], [])
        return attribute(pad, "mode", b"constant") == b"constant" and [r.op_type for r in readers] == ["Conv"]

    def _forks(self, integers: str) -> bool:
        """Whether more than one operation reads what is dequantized of these integers."""
        readers = self.file.readers.get(integers, [])
        values = [r.output[0] for r in readers if r.op_type == "DequantizeLinear"]
        return len(readers) > 1 or sum(len(self.file.readers.get(v, [])) for v in values) > 1

    def _operation(self, node: Any) -> Operation:
        file = self.file
        ports = [self._port(role, v) for role, v in self._operands(node)]
        weight, bias, add = None, None, None
        if node.op_type in (*PRODUCTS, "ConvTranspose") and len(ports) > 1:
            constant = ports[1].constant is not None or ports[1].array is not None
            if constant and ports[1].constant is not None:
                weight = self._weight(node, ports[1])
            bias = ports[2] if len(ports) > 2 else None
            if node.op_type == "MatMul" and constant:
                add, bias = self._bias_behind(node)
            kept = ports[:1] if constant else ports[:2]
        else:
            constant, kept = False, ports
        value = add.output[0] if add is not None else node.output[0]
        result = self._result(value)
        fact = self._fact(node, kept, ports[1] if constant else None, bias, result)
        form = _bias_form(bias, add is not None)
        return Operation(node, file.label(node), fact, tuple(kept), weight, bias, form, add, result)

    def _operands(self, node: Any) -> Iterator[tuple[str, str]]:
        values = [v for v in node.input if v]
        for i, value in enumerate(values[:1] if node.op_type in SETTINGS else values):
            yield ("x", "y" if node.op_type in ("Add", "Sum", "Mul", "MatMul") else "weight", "bias")[min(i, 2)], value

    def _weight(self, node: Any, port: Port) -> Weight:
        """The weight with the axes that a plan counts: results first."""
        assert port.constant is not None
        grid, rank = port.constant.grid, len(self.file.shape(port.constant.dequantize.input[0]))
        if node.op_type not in ("MatMul", "Gemm"):
            return Weight(port.constant, grid.axis, turned=False)
        swapped = self._swaps(self.file.stem(port.value)) != bool(attribute(node, "transB", 0))
        axis = None if grid.axis is None else rank - 1 - grid.axis if not swapped else grid.axis
        return Weight(port.constant, axis, turned=not swapped)

    def _swaps(self, value: str) -> bool:
        """Whether a Transpose stands behind the dequantize."""
        node = self.file.producers.get(value)
        return node is not None and node.op_type == "Transpose"

    def _bias_behind(self, node: Any) -> tuple[Any, Port | None]:
        """The Add of a constant that alone reads the product."""
        value = node.output[0]
        readers = self.file.readers.get(value, [])
        if len(readers) != 1 or readers[0].op_type != "Add" or value in self.file.outputs:
            return None, None
        other = self._port("bias", next((v for v in readers[0].input if v != value), value))
        constant = other.array is not None or other.constant is not None
        return (readers[0], other) if constant else (None, None)

    def _result(self, value: str) -> Result:
        inside: list[Between] = []
        end = value
        while True:
            readers = self.file.readers.get(end, [])
            if len(readers) != 1 or readers[0].op_type not in ABSORBED or end in self.file.outputs:
                break
            inside.append(between(self.file, readers[0]))
            end = readers[0].output[0]
        quantizes, floats, output = self._uses(end)
        activation = None
        if not quantizes:
            read = bool(inside) and inside[0].bounds is not None and bool(floats)
            activation = self.file.readers[value][0] if read else None
            inside, (quantizes, floats, output) = [], self._uses(value)
        return Result(value, tuple(inside), tuple(quantizes), tuple(floats), output, activation)

    def _uses(self, value: str) -> tuple[list[Behind], list[Any], bool]:
        """Quantizes, float readers, and whether it is an output; a lone move in front of a quantize does not count."""
        quantizes: list[Behind] = []
        floats: list[Any] = []
        for reader in self.file.readers.get(value, []):
            moved = reader.op_type in MOVES and self._uses(reader.output[0])
            if reader.op_type == "QuantizeLinear":
                grid = grid_of(self.file, reader, len(self.file.shape(value)))
                integers = reader.output[0]
                quantizes.append(Behind(reader, grid, integers in self.file.outputs, self._forks(integers)))
            elif moved and len(moved[0]) == 1 and not moved[1] and not moved[2]:
                quantizes += [replace(b, direct=False) for b in moved[0]]
            else:
                floats.append(reader)
        apart = {tuple(b.node.input): b for b in reversed(quantizes)}
        return list(reversed(apart.values())), floats, value in self.file.outputs

    def _fact(self, node: Any, ports: list[Port], weight: Port | None, bias: Port | None, result: Result) -> NodeFact:
        file = self.file
        shapes = [file.shape(p.value) for p in ports]
        parameters = [_parameter(file, node, "weight", weight)] if weight is not None else []
        if bias is not None and (bias.array is not None or bias.constant is not None):
            parameters.append(_parameter(file, node, "bias", bias))
        inputs = [(p.role, self._origin(p)) for p in ports]
        inputs += [("bias", bias.value)] if bias is not None and len(parameters) < 2 else []
        # what the engine makes of a Clip behind is told more exactly by ``Result.activation``
        readers = [kind_of(file, r) for r in file.readers.get(result.value, []) if r.op_type != "Clip"]
        return NodeFact(
            name=file.label(node),
            kind=kind_of(file, node, matrix=weight is not None),
            module="",
            region="",
            source="",
            inputs=tuple(inputs),
            parameters=tuple(parameters),
            shape=file.shape(result.value),
            x_shape=shapes[0] if shapes else (),
            readers=tuple(sorted({*readers, *(["output"] if result.value in file.outputs else [])})),
            bytes=_bytes(file.shape(result.value)),
            x_bytes=_bytes(shapes[0]) if shapes else 0,
            low=0.0 if node.op_type in ("Relu", "Sigmoid", "Softmax") else None,
        )

    def _origin(self, port: Port) -> str:
        """The node that made the value, in front of its Q/DQ pair; or the graph's input."""
        value = port.value
        node = self.file.producers.get(value)
        while node is not None and node.op_type in (*MOVES, "QuantizeLinear", "DequantizeLinear", "Identity"):
            value = node.input[0]
            node = self.file.producers.get(value)
        return value if node is None else self.file.label(node)


def between(file: OnnxFile, node: Any) -> Between:
    """An activation or a norm with the bounds of its result."""
    bounds: list[float] = [0.0, float("inf")]
    if node.op_type == "Clip":
        bounds[0] = float(attribute(node, "min", -np.inf))
        bounds[1] = float(attribute(node, "max", np.inf))
        for i, value in enumerate(node.input[1:3]):
            known = file.constant(value) if value else None
            bounds[i] = float(known.flat[0]) if known is not None else bounds[i]
    normed = node.op_type == "BatchNormalization"
    return Between(node.op_type, kind_of(file, node), None if normed else (bounds[0], bounds[1]))


def kind_of(file: OnnxFile, node: Any, *, matrix: bool = True) -> str:
    """What the tables call the operation; a product of two activations is a matmul."""
    if node.op_type in ("MatMul", "Gemm"):
        return "linear" if matrix else "matmul"
    if node.op_type in WITH_AXES:
        return f"{WITH_AXES[node.op_type]}{max(len(file.shape(node.input[0])) - 2, 0)}d"
    return KINDS.get(node.op_type, str(node.op_type))


def _parameter(file: OnnxFile, node: Any, role: str, port: Port) -> ParameterFact:
    shape = port.array.shape if port.array is not None else _sizes(file.shape(port.source.input[0]))
    if role == "weight" and node.op_type in ("MatMul", "Gemm") and not attribute(node, "transB", 0):
        made = file.producers.get(file.stem(port.value))
        if port.array is not None or made is None or made.op_type != "Transpose":
            shape = shape[::-1]
    return ParameterFact(role, port.value, port.value, tuple(shape), int(np.prod(shape, dtype=np.int64)) * 4)


def _bias_form(bias: Port | None, added: bool) -> str:
    if bias is None:
        return "none"
    if bias.array is not None:
        return "row" if added and bias.array.ndim > 1 else "vector"
    if bias.grid is None:
        return "computed"
    return "int32" if bias.grid.dtype == "s32" else bias.grid.dtype


def _sizes(shape: tuple[Size, ...]) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else 1 for s in shape)


def _bytes(shape: tuple[Size, ...]) -> int:
    return int(np.prod(_sizes(shape), dtype=np.int64)) * 4
