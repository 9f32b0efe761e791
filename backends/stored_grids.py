"""The grids that stand at the Q/DQ nodes of a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from qatgraph.backends.onnx_file import OnnxFile, attribute
from qatgraph.reference import Array, quantize

# by the names of ``onnx.TensorProto``
WORDS = {
    "UINT8": "u8", "INT8": "s8", "INT32": "s32", "UINT16": "u16", "INT16": "s16", "UINT4": "u4", "INT4": "s4",
    "UINT2": "u2", "INT2": "s2",
}  # fmt: skip
RANGES = {"u8": (0, 255), "s8": (-128, 127), "u16": (0, 2**16 - 1), "s16": (-(2**15), 2**15 - 1)}


@dataclass(frozen=True, eq=False)
class StoredGrid:
    """The scale and the zero point of one Q or DQ. ``scale`` is None if it is computed.

    ``axis`` counts from 0 and is None for one scale; ``block`` is the number of elements along it that share a scale.
    ``given`` says whether the node has a zero point at all.
    """

    dtype: str
    scale: Array | None
    zero_point: Array | None
    axis: int | None
    block: int
    given: bool
    scale_type: str

    @property
    def eight_bit(self) -> bool:
        return self.dtype in ("u8", "s8")

    @property
    def low(self) -> int:
        return RANGES[self.dtype][0]

    @property
    def unsigned(self) -> StoredGrid:
        """The grid that the engine makes of a signed one on x86: 128 is added to all integers."""
        if self.dtype != "s8" or self.zero_point is None:
            return self
        return replace(self, dtype="u8", zero_point=self.zero_point.astype(np.int16) + 128)

    def equals(self, other: StoredGrid) -> bool:
        """Whether both put every number on the same integer."""
        if self.scale is None or other.scale is None or self.zero_point is None or other.zero_point is None:
            return False
        same = (self.dtype, self.axis, self.block) == (other.dtype, other.axis, other.block)
        return same and np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)

    def __str__(self) -> str:
        if self.block:
            return f"{self.dtype} in blocks of {self.block} along axis {self.axis}"
        where = "per tensor" if self.axis is None else f"per channel along axis {self.axis}"
        zero = f", zero point {self.zero_point.flat[0]}" if self.zero_point is not None and self.axis is None else ""
        return f"{self.dtype} {where}{zero}"


def grid_of(file: OnnxFile, node: Any, rank: int) -> StoredGrid:
    """The grid of a Q or DQ over a tensor of some rank."""
    scale = file.constant(node.input[1])
    given = len(node.input) > 2 and bool(node.input[2])
    zero = file.constant(node.input[2]) if given else None
    dtype, scale_type = _dtype(file, node, given), _type_word(file, node.input[1])
    if scale is not None and not given:
        zero = np.zeros(scale.shape, np.int32)
    block = int(attribute(node, "block_size", 0))
    spread = block or (scale is not None and scale.size > 1)
    axis = int(attribute(node, "axis", 1)) if spread else None
    axis = axis + rank if axis is not None and axis < 0 else axis
    return StoredGrid(dtype, scale, zero, axis, block, given, scale_type)


def _dtype(file: OnnxFile, node: Any, given: bool) -> str:
    if node.op_type == "DequantizeLinear":
        return _type_word(file, node.input[0]) or (_type_word(file, node.input[2]) if given else "")
    asked = int(attribute(node, "output_dtype", 0))
    if given:
        return _type_word(file, node.input[2])
    return _word(asked) if asked else "u8"


def _type_word(file: OnnxFile, value: str) -> str:
    kind = file.element_type(value)
    return _word(kind) if kind else ""


def _word(kind: int) -> str:
    from onnx import TensorProto

    name = str(TensorProto.DataType.Name(kind))
    return WORDS.get(name, name.lower())


@dataclass(frozen=True, eq=False)
class StoredConstant:
    """A constant behind a dequantize: as integers in memory, or as the floats that a quantize makes integers of.
    ``clip`` narrows their range in between, as QCDQ files have it."""

    file: OnnxFile
    dequantize: Any
    grid: StoredGrid
    quantize: Any = None
    clip: Any = None

    @cached_property
    def integers(self) -> Array:
        """``[...]`` as the dequantize reads them."""
        found = self._made if self.quantize is not None else self.file.constant(self._source)
        assert found is not None
        if self.clip is None:
            return found
        low, high = (self.file.constant(v) for v in self.clip.input[1:3])
        return np.clip(found, low, high)

    @property
    def _source(self) -> str:
        return str((self.clip or self.dequantize).input[0])

    @property
    def _made(self) -> Array:
        floats = self.file.constant(self.quantize.input[0])
        grid = grid_of(self.file, self.quantize, 0 if floats is None else floats.ndim)
        assert floats is not None
        assert grid.scale is not None
        assert grid.zero_point is not None
        zero = grid.zero_point.astype(np.uint8 if grid.dtype == "u8" else np.int8)
        return quantize(floats, grid.scale, zero, axis=grid.axis or 0)


def stored_constant(file: OnnxFile, dequantize: Any, grid: StoredGrid) -> StoredConstant | None:
    """What a dequantize reads, if it is a constant."""
    source = dequantize.input[0]
    clip = file.producers.get(file.stem(source))
    if clip is not None and clip.op_type == "Clip":
        bounded = len(clip.input) == 3 and all(file.constant(v) is not None for v in clip.input[1:])
        if not bounded:
            return None
        source = clip.input[0]
    else:
        clip = None
    if file.constant(source) is not None:
        return StoredConstant(file, dequantize, grid, clip=clip)
    node = file.producers.get(file.stem(source))
    made = node is not None and node.op_type == "QuantizeLinear" and grid.eight_bit
    if node is None or not made or file.constant(node.input[0]) is None:
        return None
    return StoredConstant(file, dequantize, grid, node, clip)
