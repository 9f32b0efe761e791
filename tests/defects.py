"""Planted defects: small QDQ files with one each, at the node "op"; and files without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from qatgraph.reference import Grid
from tests.foreign import RELU, S8, U8, Sketch
from tests.qdq import grid

U16 = grid(0.0001, 32768, np.uint16)
CHANNELS = grid([0.02] * 8, [128] * 8)
ONE = grid([0.02], [128])  # a scale of rank 1
BARE: Any = Grid(np.float32(0.02), None)  # type: ignore[arg-type]
STEP = float(np.float32(0.02) * np.float32(0.01))  # s_x * s_w of what stands below
IMAGE = (1, 8, 6, 6)
Build = Callable[[], Sketch]


def end(s: Sketch, value: str, out: Grid | None) -> Sketch:
    s.out(value if out is None else s.qdq(value, out))
    return s


def linear(
    *shape: int | str,
    bias: str = "none",
    out: Grid | None = None,
    x: Grid = U8,
    axis: int = 1,
    size: tuple[int, int] = (16, 8),
    bound: int = 63,
) -> Sketch:
    s = Sketch()
    weight = s.weight(*size, scale=[0.01] * size[axis], axis=axis, bound=bound)
    y = s.op("MatMul", s.qdq(s.input("x", *(shape or (4, size[0]))), x), weight, name="op")
    if bias == "int32":
        y = s.op("Add", y, s.bias(STEP, size[1]), name="bias")
    elif bias != "none":
        rank = len(shape or (4, 16)) if bias == "row" else 1
        y = s.op("Add", y, s.floats(*[1] * (rank - 1), size[1]), name="bias")
    return end(s, y, out)


def gemm(bias: str, *, out: Grid | None = None, step: float = STEP, values: Any = None, zero: int = 0) -> Sketch:
    s = Sketch()
    operands = [s.qdq(s.input("x", 4, 16)), s.weight(8, 16, scale=[0.01] * 8, axis=0)]
    if bias == "int32":
        operands.append(s.bias(step, 8, values))
    elif bias == "int8":
        operands.append(s.weight(8))
    elif bias == "shifted":
        operands.append(s.dq(s.constant(np.full(8, 90, np.int32)), grid(STEP, zero, np.int32)))
    else:
        operands.append(s.floats(8))
    return end(s, s.op("Gemm", *operands, name="op", transB=1), out)


def conv(
    between: Callable[[Sketch, str], str] | None = None,
    *,
    out: Grid | None = U8,
    x: Grid = U8,
    axis: int = 0,
    zero: int = 0,
    step: float = STEP,
    bias: str = "int32",
    bound: int = 63,
) -> Sketch:
    s = Sketch()
    integers = s.rng.integers(-bound, bound + 1, (8, 8, 3, 3)).astype(np.int8)
    weight = s.dq(s.constant(integers), grid([0.01] * 8, [0] * 7 + [zero], np.int8), axis=axis)
    vector = s.bias(step, 8) if bias == "int32" else s.floats(8)
    y = s.op("Conv", s.qdq(s.input("x", *IMAGE), x), weight, vector, name="op", pads=[1, 1, 1, 1])
    return end(s, between(s, y) if between is not None else y, out)


def one(op_type: str, *, out: Grid | None = U8, x: Grid = U8, **attributes: Any) -> Sketch:
    s = Sketch()
    return end(s, s.op(op_type, s.qdq(s.input("x", *IMAGE), x), name="op", **attributes), out)


def two(op_type: str, *, a: Grid = U8, b: Grid | None = U8, out: Grid | None = U8, **attributes: Any) -> Sketch:
    """An operation of two inputs; the second is float where it has no grid."""
    s = Sketch()
    second = s.input("b", *IMAGE)
    operands = (s.qdq(s.input("a", *IMAGE), a), second if b is None else s.qdq(second, b))
    return end(s, s.op(op_type, *operands, name="op", **attributes), out)


def product(out: Grid | None = None) -> Sketch:
    s = Sketch()
    operands = s.qdq(s.input("a", 2, 4, 16)), s.qdq(s.input("b", 2, 16, 4))
    return end(s, s.op("MatMul", *operands, name="op"), out)


def relu(s: Sketch, y: str) -> str:
    return s.op("Relu", y)


def clip(high: float) -> Callable[[Sketch, str], str]:
    return lambda s, y: s.op("Clip", y, s.constant(np.float32(0)), s.constant(np.float32(high)))


def batch_norm(s: Sketch, y: str) -> str:
    return s.op("BatchNormalization", y, *(s.constant(np.full(8, v, np.float32)) for v in (1.1, 0.1, 0.2, 1.3)))


def also(read: Callable[[Sketch], str]) -> Sketch:
    """A convolution with one output more."""
    s = conv()
    s.out(read(s))
    return s


def border(*, entering: bool) -> Sketch:
    s = Sketch()
    x = s.dq(s.input("x", *IMAGE, dtype=TensorProto.INT8), S8) if entering else s.qdq(s.input("x", *IMAGE))
    y = s.op("Conv", x, s.weight(8, 8, 3, 3), name="op")
    s.out(s.qdq(y) if entering else s.q(y, S8))
    return s


def moved(*, product: bool = False) -> Sketch:
    """A signed activation that the engine moves behind a Transpose, or behind the Reshape in front of a Gemm."""
    s = Sketch()
    x = s.qdq(s.input("x", 2, 4, 16), S8)
    if product:
        y = s.op("Add", s.op("MatMul", x, s.weight(16, 8), name="op"), s.bias(float(S8.scale * np.float32(0.01)), 8))
    else:
        y = s.op("Transpose", x, name="op", perm=[1, 0, 2])
    return end(s, y, None)


def pooler() -> Sketch:
    """A pair that a product wrote, in front of an operation without an integer kernel."""
    s = linear(out=U8)
    value = s.outputs.pop().name
    return end(s, s.op("Tanh", value), None)


def fork() -> Sketch:
    s = Sketch()
    x = s.qdq(s.input("x", 4, 16), S8)
    s.out(s.qdq(s.op("MatMul", x, s.weight(16, 8), name="op")))
    s.out(s.op("Flatten", x))
    return s


def signed_constant() -> Sketch:
    s = Sketch()
    return end(s, s.op("Add", s.qdq(s.input("x", *IMAGE)), s.weight(6), name="op"), U8)


def half() -> Sketch:
    s = Sketch()
    own = [s.constant(np.float16(0.02)), s.constant(np.uint8(128))]
    x = s.op("Cast", s.input("x", 4, 16), to=TensorProto.FLOAT16)
    x = s.op("DequantizeLinear", s.op("QuantizeLinear", x, *own), *own)
    return end(s, s.op("MatMul", x, s.dq(s.constant(np.ones((16, 8), np.int8)), HALF), name="op"), None)


HALF: Any = Grid(np.float16(0.01), np.int8(0))  # type: ignore[arg-type]


def embedding() -> Sketch:
    s = Sketch()
    return end(s, s.op("Gather", s.weight(40, 16), s.input("ids", 2, 5, dtype=TensorProto.INT64), name="op"), None)


def pooled(behind: Grid = U8) -> Sketch:
    """A pool between two pairs, in front of a convolution."""
    s = Sketch()
    y = s.op("MaxPool", s.qdq(s.input("x", *IMAGE)), name="op", kernel_shape=[2, 2])
    return end(s, s.op("Conv", s.qdq(y, behind), s.weight(8, 8, 3, 3)), U8)


def shared() -> Sketch:
    """Two weights with numbers beyond 64 on one zero point."""
    s = Sketch()
    y, zero = s.qdq(s.input("x", 4, 16)), s.constant(np.int8(0), "zero")
    for name in ("op", "second"):
        integers = s.rng.integers(-60, 61, (16, 16)).astype(np.int8)
        integers[:2, 0] = 100, 0
        weight = s.op("DequantizeLinear", s.constant(integers), s.constant(np.float32(0.01)), zero)
        y = s.qdq(s.op("MatMul", y, weight, name=name))
    s.out(y)
    return s


def pair_behind_pair(g: Grid) -> Sketch:
    s = Sketch()
    x = s.dq(s.q(s.qdq(s.input("x", 4, 16)), g, name="op"), g)
    return end(s, s.op("MatMul", x, s.weight(16, 8)), U8)


def masked() -> Sketch:
    """Scores and the smallest float on one grid."""
    s = Sketch()
    lowest = grid(float(np.finfo(np.float32).max / 256), 255)
    y = s.dq(s.q(s.input("x", 4, 16), lowest, name="op"), lowest)
    return end(s, s.op("MatMul", y, s.weight(16, 8)), None)


def padded(pads: int) -> Sketch:
    """A Pad between the pair and a convolution, as exporters write it even where it adds nothing."""
    s = Sketch()
    x = s.op("Pad", s.qdq(s.input("x", *IMAGE)), s.constant(np.array([0, 0, pads, pads] * 2)), name="pad")
    return end(s, s.op("Conv", x, s.weight(8, 8, 3, 3), name="op"), U8)


def float_weight(*, narrow: bool = False) -> Sketch:
    """``narrow``: a Clip between the two nodes keeps -128 out, as QCDQ files have it."""
    s = Sketch()
    x, g = s.qdq(s.input("x", 4, 16)), grid(0.01, 0, np.int8)
    integers = s.q(s.constant(s.rng.uniform(-0.6, 0.6, (16, 8)).astype(np.float32)), g, name="op")
    bounds = [s.constant(np.int8(b)) for b in (-127, 127)]
    integers = s.op("Clip", integers, *bounds) if narrow else integers
    return end(s, s.op("MatMul", x, s.dq(integers, g)), None)


def bare_filter() -> Sketch:
    """A convolution between pairs whose weight no tool has quantized."""
    s = Sketch()
    return end(s, s.op("Conv", s.qdq(s.input("x", *IMAGE)), s.floats(8, 8, 3, 3), name="op"), U8)


def residual(written: str = "Add") -> Sketch:
    s = Sketch()
    x = s.input("x", 2, 4, 16)
    y = s.op(written, s.op("MatMul", s.qdq(x), s.weight(16, 16)), x)
    return end(s, s.op("LayerNormalization", y, s.floats(16), s.floats(16), name="op", axis=-1), None)


def layer_norm() -> Sketch:
    s = Sketch()
    operands = s.qdq(s.input("x", 4, 16)), s.floats(16), s.floats(16)
    return end(s, s.op("LayerNormalization", *operands, name="op", axis=-1), U8)


def transposed() -> Sketch:
    s = Sketch()
    return end(s, s.op("ConvTranspose", s.qdq(s.input("x", *IMAGE)), s.weight(8, 8, 3, 3), name="op"), U8)


def product_and_relu(out: Grid | None) -> Sketch:
    s = Sketch()
    y = s.op("MatMul", s.qdq(s.input("x", 4, 16)), s.weight(16, 8), name="op")
    return end(s, relu(s, y), out)


def activated(product: Sketch, activation: Callable[[Sketch, str], str]) -> Sketch:
    """A float result that one activation reads, and a node behind it."""
    value = product.outputs.pop().name
    return end(product, product.op("Softsign", activation(product, value)), None)


def half_quantized() -> Sketch:
    s = linear(out=U8)
    s.out(s.op("Softsign", "op_out"))
    return s


def computed_bias() -> Sketch:
    s = Sketch()
    operands = s.qdq(s.input("x", 4, 16)), s.weight(16, 8), s.input("b", 8)
    return end(s, s.op("Gemm", *operands, name="op"), None)


def factor(**attributes: float) -> Sketch:
    s = gemm("int32")
    s.nodes[-1].attribute.extend(helper.make_attribute(*a) for a in attributes.items())
    return s


def tile(out: Grid) -> Sketch:
    s = Sketch()
    return end(s, s.op("Tile", s.qdq(s.input("x", 4, 16)), s.constant(np.array([1, 2])), name="op"), out)


def stored(integers: Any, scale: Any, name: str) -> Sketch:
    """A product with this weight; the name goes to the dequantize or to the product."""
    s = Sketch()
    g = grid(scale, np.zeros(np.shape(scale)), np.int8)
    weight = s.dq(s.constant(integers), g, **({"name": "op"} if name == "weight" else {}), axis=1)
    product = {"name": "op"} if name == "product" else {}
    return end(s, s.op("MatMul", s.qdq(s.input("x", 4, 16)), weight, **product), None)


def blocks(size: int, *, turned: bool = False) -> Sketch:
    s = Sketch()
    shape, axis = ((8, 32), 1) if turned else ((32, 8), 0)
    scales = [n // size if i == axis else n for i, n in enumerate(shape)]
    integers = s.constant(s.rng.integers(-8, 8, shape).astype(np.int8))
    scale = s.constant(np.full(scales, 0.1, np.float32))
    weight = s.op("DequantizeLinear", integers, scale, axis=axis, block_size=size)
    weight = s.op("Transpose", weight, perm=[1, 0]) if turned else weight
    return end(s, s.op("MatMul", s.input("x", 4, 32), weight, name="op"), None)


MINUS_128 = np.where(np.arange(128).reshape(16, 8) == 9, -128, 0).astype(np.int8)
# what is planted: the rule that finds it, and the file
DEFECTS: dict[str, tuple[str, Build]] = {
    "scales on K, K is N": ("k-axis-scales", lambda: linear(4, 8, size=(8, 8), axis=0)),
    "scales on K, K is not N": ("k-axis-scales", lambda: linear(axis=0)),
    "filter with scales on its inputs": ("k-axis-scales", lambda: conv(axis=1)),
    "bias of another scale": ("bias-scale", lambda: gemm("int32", step=STEP * 1.5)),
    "bias of another scale in a Conv": ("bias-scale", lambda: conv(x=grid(0.03, 128))),
    "bias scale off by rounding": ("bias-scale-rounding", lambda: gemm("int32", step=STEP * (1 + 2e-7))),
    "bias at the end of 32 bits": ("bias-overflow", lambda: gemm("int32", values=[2**31 - 5] * 8)),
    "bias with a zero point": ("bias-zero-point", lambda: gemm("shifted", zero=7)),
    "filter with several zero points": ("weight-zero-points", lambda: conv(zero=3)),
    "scale of zero": ("bad-scale", lambda: stored(0 * MINUS_128, [0.01] * 7 + [0], "weight")),
    "denormal scale": ("bad-scale", lambda: stored(0 * MINUS_128, [0.01] * 7 + [1e-40], "weight")),
    "scale of a mask": ("mask-on-grid", masked),
    "16-bit activations": ("sixteen-bit", lambda: linear(x=U16)),
    "float16": ("half-precision", half),
    "scale of rank 1": ("scale-rank", lambda: two("Add", out=ONE)),
    "activation with a scale a channel": ("per-axis-activation", lambda: conv(x=CHANNELS)),
    "Add with a float operand": ("float-input", lambda: two("Add", b=None)),
    "MatMul, bias vector": ("bias-form", lambda: linear(bias="vector")),
    "MatMul, bias row at rank 2": ("bias-form", lambda: linear(bias="row")),
    "MatMul at static rank 3, bias vector": ("bias-form", lambda: linear(2, 4, 16, bias="vector")),
    "Gemm, float bias": ("bias-form", lambda: gemm("float")),
    "Gemm, int8 bias": ("bias-form", lambda: gemm("int8", out=U8)),
    "Conv without a quantize": ("no-output-quantize", lambda: conv(out=None)),
    "Sigmoid without a quantize": ("no-output-quantize", lambda: one("Sigmoid", out=None)),
    "Conv with a float reader": ("float-reader", lambda: also(lambda s: s.op("Softsign", "op_out"))),
    "MatMul with a quantize and a float reader": ("float-reader", lambda: half_quantized()),
    "Conv as an output": ("float-reader", lambda: also(lambda s: "op_out")),
    "Conv on two grids": ("two-quantizes", lambda: also(lambda s: s.qdq("op_out", grid(0.05, 100)))),
    "Conv behind two equal quantizes": ("two-quantizes", lambda: also(lambda s: s.qdq("op_out"))),
    "ReLU in front of symmetric s8": ("activation-not-redundant", lambda: conv(relu, out=S8)),
    "Clip in front of symmetric s8": ("activation-not-redundant", lambda: conv(clip(3.5), out=S8)),
    "ReLU between a product and s8": ("activation-not-redundant", lambda: product_and_relu(S8)),
    "ReLU of a float product": ("activation-behind", lambda: activated(linear(), relu)),
    "ReLU of a float Gemm": ("activation-behind", lambda: activated(gemm("int32"), relu)),
    "Clip of a float product": ("activation-behind", lambda: activated(linear(2, 4, 16), clip(2))),
    "Clip inside the grid": ("activation-not-redundant", lambda: conv(clip(2), out=RELU)),
    "batch norm not folded": ("batch-norm-between", lambda: conv(batch_norm)),
    "MaxPool between two grids": ("moved-grid", lambda: pooled(grid(0.05, 100))),
    "MaxPool without zero points": (
        "missing-zero-point",
        lambda: one("MaxPool", x=BARE, out=BARE, kernel_shape=[2, 2]),
    ),
    "signed input of the model": ("signed-border", lambda: border(entering=True)),
    "signed output of the model": ("signed-border", lambda: border(entering=False)),
    "signed activation of two readers": ("signed-fork", fork),
    "signed constant operand": ("signed-fork", signed_constant),
    "LayerNormalization between pairs": ("no-int8-kernel", layer_norm),
    "ConvTranspose between pairs": ("no-int8-kernel", transposed),
    "Tanh behind a pair of its own": ("no-int8-kernel", lambda: one("Tanh", out=None)),
    "Tanh between pairs": ("no-int8-kernel", lambda: one("Tanh")),
    "bias that is computed": ("silent-float", computed_bias),
    "Gemm with alpha": ("gemm-factors", lambda: factor(alpha=2.0)),
    "Gemm with beta": ("gemm-factors", lambda: factor(beta=2.0)),
    "Relu alone between pairs": ("activation-not-redundant", lambda: one("Relu")),
    "Tile between two grids": ("moved-grid", lambda: tile(grid(0.05, 100))),
    "table dequantized before Gather": ("dequantized-table", embedding),
    "weight stored in float": ("float-weight", float_weight),
    "weight stored in float, narrowed": ("float-weight", lambda: float_weight(narrow=True)),
    "Conv with a float weight between pairs": ("engine-quantizes-weight", bare_filter),
    "pair behind an equal pair": ("double-quantize", lambda: pair_behind_pair(U8)),
    "pair behind another pair": ("double-quantize", lambda: pair_behind_pair(grid(0.05, 100))),
    "shared zero point": ("shared-zero-point", shared),
    "residual addition as Add": ("skip-layer-norm", residual),
    "weight that saturates": ("saturation", lambda: linear(bound=127)),
    "filter that saturates": ("saturation", lambda: conv(bound=127)),
    "weight of -128": ("weight-minus-128", lambda: stored(MINUS_128, 0.01, "product")),
    "blocks behind a Transpose": ("block-layout", lambda: blocks(16, turned=True)),
    "blocks of 8": ("block-layout", lambda: blocks(8)),
}
CLEAN: dict[str, Build] = {
    "MatMul": linear,
    "MatMul and quantize": lambda: linear(out=U8),
    "MatMul, bias row at rank 3": lambda: linear(2, 4, 16, bias="row"),
    "MatMul, bias vector at dynamic rank 3": lambda: linear("batch", 4, 16, bias="vector"),
    "MatMul, int32 bias": lambda: linear(bias="int32"),
    "MatMul, int32 bias at rank 3": lambda: linear(2, 4, 16, bias="int32"),
    "MatMul, bias vector at rank 3, quantize": lambda: linear(2, 4, 16, bias="vector", out=U8),
    "Gemm, int32 bias": lambda: gemm("int32"),
    "Gemm, float bias and quantize": lambda: gemm("float", out=U8),
    "Conv": conv,
    "Conv, float bias": lambda: conv(bias="float"),
    "Conv and ReLU": lambda: conv(relu, out=RELU),
    "Conv and the Clip of its grid": lambda: conv(clip(5.1), out=RELU),
    "Conv from s8 to s8": lambda: conv(x=S8, out=S8, step=float(np.float32(0.03) * np.float32(0.01))),
    "Conv from u8 to s8": lambda: conv(out=S8),
    "Conv behind a Pad": lambda: padded(1),
    "Conv behind a Pad of nothing": lambda: padded(0),
    "Add": lambda: two("Add"),
    "Add of u8 and s8": lambda: two("Add", b=S8),
    "Mul": lambda: two("Mul"),
    "Concat": lambda: two("Concat", axis=1),
    "Sigmoid": lambda: one("Sigmoid"),
    "LeakyRelu": lambda: one("LeakyRelu"),
    "Softmax": lambda: one("Softmax", axis=-1),
    "AveragePool": lambda: one("AveragePool", kernel_shape=[2, 2]),
    "GlobalAveragePool": lambda: one("GlobalAveragePool"),
    "MaxPool on one grid": pooled,
    "Tanh behind the pair of a product": pooler,
    "Tile on one grid": lambda: tile(U8),
    "Relu that its quantize does": lambda: one("Relu", x=RELU, out=RELU),
    "ReLU of a float product and its bias": lambda: activated(linear(2, 4, 16, bias="row"), relu),
    "ReLU of a float product at the end": lambda: product_and_relu(None),
    "two activations": product,
    "two activations and quantize": lambda: product(U8),
    "residual addition as Sum": lambda: residual("Sum"),
    "blocks of 16": lambda: blocks(16),
}
