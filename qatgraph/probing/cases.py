"""One small problem for a row: an operation, its integers on their grids, its neighbours, the borders of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qatgraph import reference
from qatgraph.planning.target import Row
from qatgraph.reference import Array, dequantize, dequantize_blocks
from qatgraph.specs import DType

STORAGE = {DType.U8: np.uint8, DType.S8: np.int8, DType.S4: np.int8, DType.S32: np.int32}
GONE = "no node of its own"  # the kernel of an operation of which the engine leaves nothing
FEW = 16  # as many numbers are shown one by one


@dataclass(frozen=True, eq=False)
class Grid:
    """How integers stand for numbers: ``(q - zero_point) * scale``, one float32 scale, one a channel of ``axis``, or
    one for each ``block`` of neighbours along K, ``[N, blocks]``."""

    dtype: DType
    scale: Array
    zero_point: int = 0
    axis: int | None = None
    block: int | None = None

    @property
    def zero(self) -> Array:
        """The zero point in the type of the integers, as often as there are scales."""
        return np.full(self.scale.shape, self.zero_point, STORAGE[self.dtype])

    @property
    def plain(self) -> reference.Grid:
        """As the reference takes it."""
        return reference.Grid(self.scale, self.zero)

    def __str__(self) -> str:
        where = "" if self.axis is None else f" along axis {self.axis}"
        where = where if self.block is None else f" in blocks of {self.block}"
        return f"scale {numbers(self.scale)}{where}, zero point {self.zero_point}"


@dataclass(frozen=True, eq=False)
class Operand:
    """Integers on their grid."""

    q: Array
    grid: Grid

    @property
    def real(self) -> Array:
        """The float32 numbers that they stand for."""
        if self.grid.block is not None:
            return dequantize_blocks(self.q, self.grid.scale, self.grid.block)
        return dequantize(self.q, self.grid.scale, self.grid.zero, axis=self.grid.axis or 0)

    def __str__(self) -> str:
        return f"{self.grid.dtype.value}{list(self.q.shape)} {self.grid}: {numbers(self.q)}"


@dataclass(frozen=True, eq=False)
class Case:
    """What an engine is asked to do.

    ``op`` is one kind, and ``form`` how the file writes it. ``inputs`` are the activations by role, ``weight`` and
    ``bias`` (int32 on the grid of the sum, or float32) constants, ``parameters`` other arrays, ``attributes`` other
    arguments. ``out`` is the grid of the result, None where it is float. ``quantized``: whether Q/DQ stand around the
    operation; else it is asked of the float numbers that the integers stand for.

    Neighbours and borders: ``activation`` stands between the operation and its grid ``out``; ``readers`` are what
    reads the result, in a row, and ``read_grid`` the grid if the last of them quantizes it; ``border``: whether the
    inputs are quantized of floats, integers of the file, or written by a kernel; ``shared``: something else reads the
    first input; ``dynamic``: axes of the first input that have no size in the file; ``typed``: the file tells the
    shape of every value.
    """

    row: Row
    op: str
    form: str
    inputs: Mapping[str, Operand]
    weight: Operand | None = None
    bias: Array | None = None
    bias_form: str = "none"
    out: Grid | None = None
    quantized: bool = True
    parameters: Mapping[str, Array] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    activation: str = ""
    readers: tuple[str, ...] = ()
    read_grid: Grid | None = None
    border: Literal["floats", "integers", "kernel"] = "floats"
    shared: bool = False
    dynamic: tuple[int, ...] = ()
    typed: bool = False

    def text(self) -> str:
        """The whole problem, readable, one line a part."""
        return "\n".join(f"  {label:<10}{value}" for label, value in self._lines() if value)

    def _lines(self) -> Iterator[tuple[str, str]]:
        around = "with Q/DQ around it" if self.quantized else "in float"
        yield "operation", f"{self.op} {self.form} {around}".replace("  ", " ")
        yield from ((role, str(operand)) for role, operand in self.inputs.items())
        yield "weight", str(self.weight or "")
        if self.bias is not None:
            yield "bias", f"{self.bias_form}[{self.bias.size}]: {numbers(self.bias)}"
        yield from ((name, f"{list(a.shape)}: {numbers(a)}") for name, a in self.parameters.items())
        yield "with", ", ".join(f"{k}={v}" for k, v in self.attributes.items())
        yield "then", self.activation
        yield "out", f"{self.out.dtype.value} {self.out}" if self.out is not None else ""
        yield "read by", ", then ".join(self.readers)
        yield "read as", f"{self.read_grid.dtype.value} {self.read_grid}" if self.read_grid is not None else ""
        yield "dynamic", ", ".join(f"axis {i}" for i in self.dynamic)
        notes = {"the file's inputs are integers": self.border == "integers",
                 "a kernel writes its inputs": self.border == "kernel", "something else reads its input": self.shared,
                 "the file tells every shape": self.typed}  # fmt: skip
        yield "context", ", ".join(note for note, holds in notes.items() if holds)


@dataclass(frozen=True, eq=False)
class Realized:
    """What an engine did: the kernel of the operation, whether it works on 8-bit integers, and the numbers."""

    kernel: str
    int8: bool
    output: Array


@dataclass(frozen=True)
class Engine:
    """Something that does cases. ``neighbours``: whether it does what reads the result, too, as a file must;
    ``integer_inputs``: whether it may be asked for files whose inputs are integers. ``version``: its number, empty if
    it has none."""

    title: str
    realize: Callable[[Case], Realized]
    neighbours: bool = False
    integer_inputs: bool = True
    version: str = ""


def numbers(values: Array) -> str:
    """An array in one line: all of it if it is short or one number, else its range."""
    flat = values.reshape(-1)
    if flat.size and bool((flat == flat[0]).all()):
        return f"{flat[0]:.9g}" if flat.size == 1 else f"{flat.size} times {flat[0]:.9g}"
    if flat.size <= FEW:
        return np.array2string(values, separator=", ", formatter={"all": lambda v: f"{v:.9g}"}).replace("\n", "")
    return f"{flat[:4].tolist()} … of {flat.size}, from {flat.min():.9g} to {flat.max():.9g}"
