"""A case of probing as an ONNX file, written node by node: in milliseconds, and apart from the lowering it checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qatgraph.backends.onnx_builder import File
from qatgraph.backends.onnx_operations import WRITERS, write_clamp, write_relu
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Case, Grid, Operand
from qatgraph.reference import Array
from qatgraph.specs import DType


@dataclass(frozen=True)
class Style:
    """How a target's files are written: the forms of ReLU and clamp in float, and what stands for a kernel that reads
    and writes integers: a ``table`` with an entry for each, or a ``product`` with a diagonal matrix."""

    opset: int
    relu: str
    clamp: str
    kernel: Literal["table", "product"]

    @classmethod
    def of(cls, target: Target, kernel: Literal["table", "product"]) -> Style:
        relu, clamp = (
            next((r.form for r in target.rows(kind) if r.placement != "int8"), "") for kind in ("relu", "clamp")
        )
        return cls(target.opset, relu, clamp, kernel)


def write_case(case: Case, style: Style) -> tuple[bytes, dict[str, Array]]:
    """The file and its feed; the first output is the result."""
    from onnx import TensorProto

    file = File()
    values = {role: _operand(file, role, operand, case, style) for role, operand in case.inputs.items()}
    others = [file.add("Tanh", next(iter(values.values())), at="other")] if case.shared else []
    result = WRITERS[case.op](file, case, values)
    if case.activation:
        result = _reader(file, case.activation, result, Style(style.opset, "", "", style.kernel), "then")
    if case.out is not None:
        result = file.quantize(result, case.out, "out")
    elif _meets_quantize(case.readers) and case.row.placement == "int8" and _product(file, result):
        result = file.add("Sum", result)  # docs/decisions/product-then-quantize.md
    for reader in case.readers:
        if reader == "quantize":
            assert case.read_grid is not None
            result = file.quantize(result, case.read_grid, "read")
        elif reader in ("kernel", "dequantize"):
            assert case.out is not None
            result = file.dequantize(result, case.out, "read")
            result = _kernel(file, result, case.out, "read", style) if reader == "kernel" else result
        else:
            result = _reader(file, reader, result, style, "read")
    integers = case.readers[-1] in ("kernel", "quantize") if case.readers else case.out is not None
    grid = case.read_grid or case.out
    kind = TensorProto.FLOAT if not integers else TensorProto.UINT8 if _unsigned(grid) else TensorProto.INT8
    outputs = [(result, kind), *((name, TensorProto.FLOAT) for name in others)]
    return file.bytes(outputs, style.opset, typed=case.typed), file.feed


def _unsigned(grid: Grid | None) -> bool:
    return grid is not None and grid.dtype is DType.U8


def _meets_quantize(readers: tuple[str, ...]) -> bool:
    """Whether a quantize stands behind the result, also behind what only moves it."""
    return next((r for r in readers if r != "transpose"), "") == "quantize"


def _product(file: File, value: str) -> bool:
    return next(n for n in file.nodes if value in n.output).op_type in ("MatMul", "Gemm")


def _operand(file: File, role: str, operand: Operand, case: Case, style: Style) -> str:
    """The float value that the operation reads: a graph input, with Q/DQ behind it, or integers with DQ behind."""
    dynamic = case.dynamic if role == next(iter(case.inputs)) else ()
    if not case.quantized or case.row.on_request:
        return file.input(role, operand.real, dynamic)
    if case.border == "integers":
        return file.dequantize(file.input(role, operand.q, dynamic), operand.grid, role)
    value = file.dequantize(
        file.quantize(file.input(role, operand.real, dynamic), operand.grid, role), operand.grid, role
    )
    return (
        value
        if case.border == "floats"
        else file.dequantize(_kernel(file, value, operand.grid, role, style), operand.grid, role)
    )


def _kernel(file: File, value: str, grid: Grid, at: str, style: Style) -> str:
    """Integers by a kernel, from the number that it reads, which gives each its own."""
    at = f"{at}-kernel"
    if style.kernel == "table":
        return file.quantize(file.add("LeakyRelu", value, at=at, alpha=1.0), grid, at)
    shape = file.shape(value)
    diagonal = 2 * np.eye(shape[1] if len(shape) > 3 else shape[-1], dtype=np.int8)
    op, diagonal = (
        ("Conv", diagonal.reshape(*diagonal.shape, *[1] * len(shape[2:]))) if len(shape) > 3 else ("MatMul", diagonal)
    )
    weight = file.dequantize(file.constant(f"{at}/weight", diagonal), Grid(DType.S8, np.asarray(0.5, np.float32)), at)
    return file.quantize(file.add(op, value, weight, at=at), grid, f"{at}-result")


def _reader(file: File, kind: str, value: str, style: Style, at: str) -> str:
    if kind == "relu":
        return write_relu(file, value, style.relu, at)
    if kind == "clamp":
        return write_clamp(file, value, style.clamp, at)
    if kind == "transpose":
        return file.add("Transpose", value, at=at)
    return file.add(kind.capitalize(), value, at=at)
