"""How each kind of operation is written in ONNX: one entry a kind in ``WRITERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qatgraph.backends.onnx_builder import CORE, File
from qatgraph.backends.onnx_products import IN_FLOAT, MICROSOFT, pack_blocks
from qatgraph.probing.cases import Case, Grid
from qatgraph.probing.convolutions import pads
from qatgraph.probing.floats import EPSILON
from qatgraph.probing.products import real_bias
from qatgraph.specs import DType

Writer = Callable[[File, Case, dict[str, str]], str]


def _weight(file: File, case: Case, *, turned: bool) -> str:
    """A constant ``[N, K]`` weight, or ``[K, N]`` if turned, in float or with DQ behind."""
    assert case.weight is not None
    grid, turn = case.weight.grid, np.transpose if turned else np.asarray
    if not case.quantized:
        return file.constant("weight", np.ascontiguousarray(turn(case.weight.real)))
    axis = 1 - grid.axis if turned and grid.axis is not None else grid.axis
    integers = file.constant("weight", np.ascontiguousarray(turn(case.weight.q)))
    return file.dequantize(integers, replace(grid, axis=axis), "weight")


def _dynamic(file: File, case: Case, values: dict[str, str]) -> str:
    assert case.weight is not None
    integers = file.add("DynamicQuantizeLinear", values["x"], results=3)
    weight = file.constant("weight", np.ascontiguousarray(case.weight.q.T))
    sums = file.add("MatMulInteger", integers, weight, f"{integers}2")
    unit = file.add("Mul", f"{integers}1", file.constant("weight/scale", case.weight.grid.scale))
    result = file.add("Mul", file.add("Cast", sums, to=1), unit)
    if case.bias is None:
        return result
    return file.add("Sum" if case.bias.size == 1 else "Add", result, _bias(file, case))  # as the lowering does, and why


def _in_blocks(file: File, case: Case, values: dict[str, str]) -> str:
    assert case.weight is not None
    grid, (n, k) = case.weight.grid, case.weight.q.shape
    assert grid.block is not None
    bits = 4 if grid.dtype is DType.S4 else 8
    packed = file.constant("weight", pack_blocks(case.weight.q, grid.block, bits))
    bias = [] if case.bias is None else ["", "", _bias(file, case)]
    return file.add(
        "MatMulNBits", values["x"], packed, file.constant("weight/scale", grid.scale), *bias, domain=MICROSOFT,
        K=k, N=n, bits=bits, block_size=grid.block, accuracy_level=IN_FLOAT,
    )  # fmt: skip


def _linear(file: File, case: Case, values: dict[str, str]) -> str:
    if case.row.on_request:
        return (_dynamic if case.row.dynamic_x else _in_blocks)(file, case, values)
    if case.form == "gemm" or not (
        case.quantized or case.inputs["x"].q.ndim > 2
    ):  # in float as torch's exporter writes it
        bias = [_bias(file, case)] if case.bias is not None else []
        return file.add("Gemm", values["x"], _weight(file, case, turned=False), *bias, transB=1)
    result = file.add("MatMul", values["x"], _weight(file, case, turned=True))
    if case.bias is None:
        return result
    single = case.quantized and case.bias.size == 1 and case.row.placement == "int8"  # as the lowering does, and why
    return file.add("Sum" if single else "Add", result, _bias(file, case))


def _bias(file: File, case: Case) -> str:
    assert case.bias is not None
    assert case.weight is not None
    x, weight = case.inputs["x"], case.weight
    if case.bias_form == "int32" and case.quantized:
        scale = np.asarray(x.grid.scale * weight.grid.scale, np.float32)
        grid = Grid(DType.S32, scale, 0, None if weight.grid.axis is None else 0)
        return file.dequantize(file.constant("bias", case.bias), grid, "bias")
    bias = real_bias(case)
    return file.constant(
        "bias", bias.reshape([1] * (x.q.ndim - 1) + [-1]) if case.bias_form == "row" and case.quantized else bias
    )


def _embedding(file: File, case: Case, values: dict[str, str]) -> str:
    assert case.weight is not None
    table = case.weight
    indices = file.input("indices", case.parameters["indices"], case.dynamic)
    if not case.quantized:
        return file.add("Gather", file.constant("weight", table.real), indices)
    if case.form != "gather":
        return file.add("Gather", _weight(file, case, turned=False), indices)
    rows = file.dequantize(file.add("Gather", file.constant("weight", table.q), indices), table.grid, CORE)
    return file.add("Sum", rows) if case.readers[:1] == ("transpose",) else rows  # as the lowering does, and why


def _norm(op: str, *roles: str) -> Writer:
    def write(file: File, case: Case, values: dict[str, str]) -> str:
        constants = [file.constant(role, case.parameters[role]) for role in roles]
        return file.add(op, values["x"], *constants, axis=-1, epsilon=EPSILON)

    return write


def _attention(file: File, case: Case, values: dict[str, str]) -> str:
    heads = case.attributes["heads"]
    return file.add("Attention", *values.values(), q_num_heads=heads, kv_num_heads=heads)


def _safe_softmax(file: File, case: Case, values: dict[str, str]) -> str:
    """As torch's exporter writes it: zeros where a row of the softmax is no number."""
    found = file.add("Softmax", values["x"], axis=-1)
    return file.add("Where", file.add("IsNaN", found), file.constant("zero", np.float32(0)), found)


def _silu(file: File, case: Case, values: dict[str, str]) -> str:
    return file.add("Mul", values["x"], file.add("Sigmoid", values["x"]))


def write_relu(file: File, value: str, form: str, at: str) -> str:
    if form != "max":
        return file.add("Relu", value, at=at)
    return file.add("Max", value, file.constant(f"{at}/zero", np.float32(0)), at=at)


def write_clamp(file: File, value: str, form: str, at: str) -> str:
    """Between 0 and 6."""
    low, high = (file.constant(f"{at}/{name}", np.float32(v)) for name, v in (("low", 0), ("high", 6)))
    if form != "min-max":
        return file.add("Clip", value, low, high, at=at)
    return file.add("Min", file.add("Max", value, low, at=at), high, at=at)


def _ends(case: Case) -> list[int]:
    """The zeros at the beginnings of the spatial axes, then at their ends."""
    return [end for side in zip(*pads(case), strict=True) for end in side]


def _conv(file: File, case: Case, values: dict[str, str]) -> str:
    bias = [_bias(file, case)] if case.bias is not None else []
    size = case.attributes
    return file.add(
        "Conv", values["x"], _weight(file, case, turned=False), *bias, strides=size["stride"],
        dilations=size["dilation"], pads=_ends(case), group=size["groups"],
    )  # fmt: skip


def _transposed(file: File, case: Case, values: dict[str, str]) -> str:
    weight = _weight(file, case, turned=False)
    return file.add("ConvTranspose", values["x"], weight, strides=case.attributes["stride"])


def _pool(op: str) -> Writer:
    def write(file: File, case: Case, values: dict[str, str]) -> str:
        size = case.attributes
        own: dict[str, Any] = {"ceil_mode": int(size["ceil"])}
        if "count_include_pad" in size:  # as the lowering does, and why
            own["count_include_pad"] = int(size["count_include_pad"] and any(size["padding"]))
        return file.add(op, values["x"], kernel_shape=size["kernel"], strides=size["stride"],
                        pads=_ends(case), **own)  # fmt: skip

    return write


def _node(op: str, **attributes: Any) -> Writer:
    """One node that reads the inputs, and takes the case's attributes of the names given."""

    def write(file: File, case: Case, values: dict[str, str]) -> str:
        own = {name: case.attributes[name] for name in ("alpha", "axis") if name in case.attributes}
        return file.add(op, *values.values(), **attributes, **own)

    return write


def _moving(op: str, *numbers: list[int]) -> Writer:
    """One node with constants of whole numbers behind its input."""

    def write(file: File, case: Case, values: dict[str, str]) -> str:
        constants = [file.constant(f"case/{i}", np.array(n, np.int64)) for i, n in enumerate(numbers)]
        return file.add(op, values["x"], *constants)

    return write


def _slice(file: File, case: Case, values: dict[str, str]) -> str:
    """The first half of the last axis."""
    width = case.inputs["x"].q.shape[-1]
    return _moving("Slice", [0], [(width + 1) // 2], [-1])(file, case, values)


WRITERS: dict[str, Writer] = {
    "linear": _linear,
    "embedding": _embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _transposed),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _pool("MaxPool")),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _pool("AveragePool")),
    "global_avg_pool": _node("GlobalAveragePool"),
    "layer_norm": _norm("LayerNormalization", "scale", "shift"),
    "rms_norm": _norm("RMSNormalization", "scale"),
    "attention": _attention,
    "softmax": _node("Softmax", axis=-1),
    "safe_softmax": _safe_softmax,
    "gelu": _node("Gelu"),
    "silu": _silu,
    "sigmoid": _node("Sigmoid"),
    "leaky_relu": _node("LeakyRelu"),
    "relu": lambda file, case, values: write_relu(file, values["x"], case.form, CORE),
    "clamp": lambda file, case, values: write_clamp(file, values["x"], case.form, CORE),
    "add": _node("Add"),
    "residual_add": lambda file, case, values: file.add("Sum" if case.form == "sum" else "Add", *values.values()),
    "mul": _node("Mul"),
    "matmul": _node("MatMul"),
    "cat": _node("Concat"),
    # as qatgraph/probing/elementwise.py has them
    "reshape": _moving("Reshape", [-1]),
    "flatten": _node("Flatten"),
    "squeeze": _moving("Squeeze", [1]),
    "unsqueeze": _moving("Unsqueeze", [1]),
    "transpose": _node("Transpose"),
    "slice": _slice,
}
