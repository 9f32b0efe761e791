"""What an operation of a file must meet to take an int8 row of the target's table. Each condition is a rule.

The table names the grids that a plan may choose. The engine takes each 8-bit grid with scales of the same form, on x86
after it has added 128 to signed activations: so a file's grid counts as the table's when its scales have that form.
"""

from __future__ import annotations

import numpy as np

from qatgraph.backends.lint_rule import Condition, Rule
from qatgraph.backends.onnx_facts import Operation
from qatgraph.backends.onnx_file import attribute
from qatgraph.backends.stored_grids import StoredGrid
from qatgraph.planning.predict import Wants, bias_of, weight_options
from qatgraph.planning.target import Row
from qatgraph.specs import DType, Granularity, QuantSpec


def float_input(row: Row, operation: Operation) -> str:
    """An input of a kernel that takes integers comes as floats.

    Why: the engine fuses an operation to an integer kernel only if a DequantizeLinear stands directly in front of
    every input; one float operand leaves the whole operation in float.
    Remedy: put QuantizeLinear -> DequantizeLinear on this input too, or take the pair off the other inputs.
    Fix: none: a new grid changes the numbers.
    """
    narrow = operation.weight is not None and not _plain(operation.weight.constant.grid)
    if not row.x or narrow:
        return ""
    floats = [p for p in operation.ports if p.grid is None]
    if floats and operation.weight is not None and not operation.quantized:
        return f"only its weight is quantized; its input '{floats[0].value}' is float"
    if floats and floats[0].array is not None:
        return f"its constant operand '{floats[0].value}' is float, while the other is dequantized"
    if floats:
        others = ", ".join(f"'{p.value}'" for p in operation.ports if p.grid is not None)
        return f"its input '{floats[0].value}' is float, while {others} is dequantized"
    if row.weight and operation.weight is None:
        return "its weight is float, while its input is dequantized"
    return ""


def sixteen_bit(row: Row, operation: Operation) -> str:
    """A 16-bit grid stands at an operation that has only an 8-bit kernel.

    Why: ONNX Runtime's CPU provider has integer kernels for 8 bits only; a 16-bit pair is two conversions around a
    float kernel.
    Remedy: quantize to 8 bits, or leave the operation in float without Q/DQ.
    Fix: none: another grid changes the numbers.
    """
    wide = [] if row.moves else [g for g in _grids(operation) if g.dtype in ("u16", "s16")]
    return f"a grid of {wide[0].dtype} stands at it" if wide else ""


def half_precision(row: Row, operation: Operation) -> str:
    """Q/DQ write or read half-precision floats.

    Why: the integer kernels of the CPU provider multiply by float32 scales; around float16 the engine inserts casts
    and runs the operation in float.
    Remedy: keep the quantized part of the model in float32, with float32 scales.
    Fix: none: other scales change the numbers.
    """
    half = [g for g in _grids(operation) if g.scale_type in ("float16", "bfloat16")]
    return f"a scale of {half[0].scale_type} stands at it" if half else ""


def per_axis_activation(row: Row, operation: Operation) -> str:
    """An activation has a scale for each channel.

    Why: an integer kernel sums over the channels with one scale; a scale a channel cannot leave the sum. The
    conversion alone takes many times the time of one with a single scale.
    Remedy: give the activation one scale, and put the factors of the channels into the operation in front.
    Fix: none: one scale changes the numbers.
    """
    wide = [g for g in (*_activations(operation), *_behind(operation)) if g.axis is not None]
    return f"an activation is {wide[0]}" if wide else ""


def scale_rank(row: Row, operation: Operation) -> str:
    """A single scale is stored as a vector of one number.

    Why: QLinearAdd, QLinearMul and QLinearAveragePool take scalars only: around the first two the engine stays in
    float, and with the last it refuses the file.
    Remedy: store the scale and the zero point of a tensor with one scale as scalars.
    Fix: vectors of one number become scalars: the same numbers.
    """
    if row.kernel not in ("QLinearAdd", "QLinearMul", "QLinearAveragePool"):
        return ""
    vectors = [g for g in _grids(operation) if g.scale is not None and g.scale.shape == (1,)]
    return f"{len(vectors)} scales at it have the shape [1]" if vectors else ""


def k_axis_scales(row: Row, operation: Operation) -> str:
    """The scales of a weight lie along the input channels.

    Why: a factor that differs from one input channel to the next cannot leave the sum over them. ONNX Runtime does not
    look at the axis: it refuses the file, fails when it runs, or is silently wrong where K equals N.
    Remedy: put the scales on the output channels: axis 1 of a MatMul's [K, N], axis 0 of Conv and of Gemm with transB.
    Fix: none: other scales change the numbers.
    """
    wants = wants_of(operation)
    if not row.weight or operation.weight is None or weight_options(row, wants) or operation.weight.constant.grid.block:
        return ""
    shape = list(operation.weight.constant.integers.shape)
    return f"its weight {shape} has scales along axis {operation.weight.constant.grid.axis}, that of the input channels"


def block_layout(row: Row, operation: Operation) -> str:
    """A weight of few bits, or in blocks, does not lie as its kernel wants it.

    Why: only MatMulNBits takes it, and the engine makes one of DequantizeLinear -> MatMul alone: weight [K, N], blocks
    of at least 16 and a power of two along axis 0, a float input, and nothing between the two nodes.
    Remedy: store the weight as [K, N] in such blocks, and write MatMul, not Gemm with transB or a Transpose.
    Fix: none: blocks along another axis are another grid.
    """
    weight = operation.weight
    if weight is None or _plain(weight.constant.grid):
        return ""
    grid = weight.constant.grid
    if operation.fact.kind != "linear" or not weight.turned:
        return f"its weight is {grid}, and lies as [N, K] behind {operation.node.op_type}"
    if grid.block and (grid.block < 16 or grid.block & (grid.block - 1)):
        return f"its weight is {grid}: blocks are powers of two from 16 on"
    if grid.block and weight.axis != 1:
        return f"its weight is {grid}: blocks lie along axis 0 of [K, N]"
    return f"its weight is {grid}, and its input is quantized, too" if operation.quantized else ""


def bias_form(row: Row, operation: Operation) -> str:
    """A bias stands in a form that keeps the integer kernel away.

    Why: MatMulAddFusion makes MatMul and the Add of a vector a Gemm of three inputs before the engine looks for
    Q/DQ; a float bias then leaves the Gemm in float, unless a quantize stands behind it.
    Remedy: give the bias as int32 with the scale s_x * s_w, or write the addition as Sum, which nothing fuses.
    Fix: the addition becomes a Sum (a Gemm becomes MatMul and Sum): the same numbers.
    """
    if not row.bias or bias_of(row, operation.fact, wants_of(operation, row)) is not None:
        return ""
    if operation.bias_form not in ("row", "vector"):
        return f"its bias is {operation.bias_form}, which no kernel takes; the row '{row.id}' takes {_forms(row)}"
    return f"its bias is a float {operation.bias_form}, the row '{row.id}' ({row.kernel}) takes {_forms(row)}"


def no_output_quantize(row: Row, operation: Operation) -> str:
    """An operation whose kernel writes integers has no quantize behind it.

    Why: the kernel has no form with a float result, so that without a QuantizeLinear behind it the engine dequantizes
    the inputs and computes in float.
    Remedy: put QuantizeLinear -> DequantizeLinear behind it, or take the pairs in front of it away.
    Fix: none: a new grid changes the numbers.
    """
    result = operation.result
    if not row.out or row.moves or result.quantizes or _normed(operation):
        return ""
    reader = "an output of the model" if result.output else ", ".join(r.op_type for r in result.floats) or "nobody"
    return f"no QuantizeLinear stands behind it ({reader} reads it as float); {row.kernel} writes integers only"


def float_reader(row: Row, operation: Operation) -> str:
    """A result is quantized, and read as float beside.

    Why: with a quantize behind it an integer kernel writes integers and never makes the float value, so the engine
    keeps the float operation for the other reader.
    Remedy: let all readers take the dequantized value behind the one Q/DQ pair.
    Fix: none: the other reader would see rounded numbers.
    """
    result = operation.result
    if _apart(row, operation) or not result.quantizes or not (result.floats or result.output):
        return ""
    if result.output:
        return "its result is quantized, and an output of the model as float"
    return f"its result is quantized, and read as float by {', '.join(f'{r.op_type}' for r in result.floats)}"


def two_quantizes(row: Row, operation: Operation) -> str:
    """A result has several quantizes.

    Why: an integer kernel has one quantize behind it; with two of them, equal ones too, the operation stays in float.
    Remedy: one QuantizeLinear for all readers (the observer saw one tensor).
    Fix: quantizes to equal grids become one: the same numbers. Others are only reported.
    """
    grids = _behind(operation)
    if _apart(row, operation) or len(grids) < 2:
        return ""
    return f"its result has {len(grids)} quantizes: {'; '.join(map(str, grids))}"


def activation_not_redundant(row: Row, operation: Operation) -> str:
    """A Relu or Clip in front of a quantize does something that the quantize does not.

    Why: the engine drops an activation only if clamping to the integers already does it: a Relu when the zero point is
    the smallest integer, a Clip when its bounds lie outside the grid. A symmetric s8 grid behind a Relu is the usual
    case: half of it is unused, too.
    Remedy: quantize behind the activation to u8 with zero point 0 (s8: -128), for a Clip with the scale of its range.
    Fix: the quantize goes in front of the activation, which becomes a Clip of its integers: the same numbers, since
    rounding keeps the order. Not where a pair stands in front of the activation already.
    """
    grid = None if _apart(row, operation) else operation.result.alone
    for between in operation.result.inside if grid is not None else ():
        if between.bounds is not None and grid is not None and not _redundant(between.bounds, grid):
            return f"a {between.op_type} that does more than its quantize stands between it and {grid}"
    return ""


def activation_behind(row: Row, operation: Operation) -> str:
    """A Relu or Clip alone reads a product with a float result.

    Why: the engine takes the activation for a part of the group, finds no quantize behind it, and leaves the product in
    float (a Gemm it fuses with the Relu to a float kernel).
    Remedy: write Max(x, 0) for Relu(x), and Min(Max(x, low), high) for Clip(x, low, high), or quantize the result.
    Fix: Relu becomes Max, Clip becomes Max and Min: the same numbers.
    """
    node = operation.result.activation
    if row.out or node is None or _apart(row, operation):
        return ""
    return f"a {node.op_type} alone reads its float result"


def batch_norm_between(row: Row, operation: Operation) -> str:
    """A batch norm stands between an operation and its quantize.

    Why: the engine folds no batch norm into a quantized weight, and takes none into an integer kernel.
    Remedy: fold the batch norm into the weight and the bias before quantizing.
    Fix: none: the folded weight needs another grid.
    """
    return "BatchNormalization stands between it and its quantize" if row.out and _normed(operation) else ""


def moved_grid(row: Row, operation: Operation) -> str:
    """An operation that only moves numbers stands between two grids.

    Why: the engine drops the pairs around it and moves integers only where both have the same scale and zero point.
    Remedy: give the pair behind it the constants of the pair in front.
    Fix: none: another grid changes the numbers.
    """
    grids = [p.grid for p in operation.ports if p.grid is not None]
    out = operation.result.alone
    if not row.moves or not grids or out is None or grids[0].unsigned.equals(out.unsigned):
        return ""
    return f"{grids[0]} in front of it and {out} behind it are not the same grid"


def missing_zero_point(row: Row, operation: Operation) -> str:
    """Q/DQ without a zero-point input stand around an operation that moves numbers.

    Why: the engine compares the zero points of both pairs and does not know that a missing one is 0.
    Remedy: give the zero point as an input, even if it is 0.
    Fix: the missing zero points are written out: the same numbers.
    """
    grids = [*_activations(operation), *_behind(operation)]
    return "a Q or DQ at it has no zero point" if row.moves and any(not g.given for g in grids) else ""


def signed_border(row: Row, operation: Operation) -> str:
    """Signed integers enter or leave the model itself.

    Why: on x86 the engine turns signed activations to unsigned ones before it fuses; at an input or output of the
    model it cannot, and the operation stays in float.
    Remedy: use u8 at inputs and outputs of the model.
    Fix: none: the interface of the model would change.
    """
    if any(p.border and p.grid is not None and p.grid.dtype == "s8" for p in operation.ports):
        return "it reads signed integers that are an input of the model"
    if row.out and any(b.border and b.grid.dtype == "s8" for b in operation.result.quantizes):
        return "it writes signed integers that are an output of the model"
    return ""


def signed_fork(row: Row, operation: Operation) -> str:
    """Signed integers are read by several operations, or are a constant operand.

    Why: on x86 the engine turns a signed activation to unsigned only where one quantize meets one dequantize with one
    reader. A fork (a residual, query, key and value) stays signed, and what reads or writes it stays in float.
    Remedy: quantize activations to u8 (onnxruntime.quantization: activation_type=QuantType.QUInt8).
    Fix: signed activations become unsigned, 128 is added to their zero points: the same numbers. Not where weights
    behind Q/DQ are float: the engine would quantize them by itself.
    """
    as_gemm = not row.out and (operation.node.op_type == "Gemm" or row.kernel == "QGemm")
    if row.moves or as_gemm:
        return ""
    for port in operation.ports:
        if port.grid is not None and port.grid.dtype == "s8" and (port.forks or port.constant is not None):
            what = "is a signed constant" if port.constant is not None else "is signed, and read by others, too"
            return f"its input '{port.value}' {what}"
    if row.out and any(b.forks and b.grid.dtype == "s8" for b in operation.result.quantizes):
        return "its result is signed, and read by several operations"
    return ""


def gemm_factors(row: Row, operation: Operation) -> str:
    """A Gemm multiplies by alpha or beta, or transposes its input.

    Why: QGemm has no factors for the bias and no transposed input, and the engine leaves such a Gemm in float.
    Remedy: put the factor into the scale of the weight or the bias, or write MatMul.
    Fix: none: another scale changes the numbers.
    """
    node = operation.node
    if node.op_type != "Gemm":
        return ""
    factors = {name: attribute(node, name, plain) for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))}
    odd = [
        f"{k} = {v:g}"
        for k, v in factors.items()
        if v != (0 if k == "transA" else 1) and (k != "beta" or operation.bias)
    ]
    return f"it has {', '.join(odd)}" if odd else ""


CONDITIONS: tuple[Condition, ...] = (
    k_axis_scales, block_layout, sixteen_bit, half_precision, scale_rank, per_axis_activation, float_input, bias_form,
    batch_norm_between, no_output_quantize, float_reader, two_quantizes, activation_not_redundant, activation_behind,
    moved_grid, missing_zero_point, signed_border, signed_fork, gemm_factors,
)  # fmt: skip
RULES = tuple(Rule(c, "wrong" if c is k_axis_scales else "slow", condition=True) for c in CONDITIONS)


def wants_of(operation: Operation, row: Row | None = None) -> Wants:
    """The forms of the file, as a recipe would ask for them.

    Behind a float vector the engine makes the int32 bias itself when a quantize follows; and at rank 3 it makes three
    inputs of an int32 bias as it does of a row.
    """
    form = operation.bias_form
    alone = operation.result.alone is not None or (row is not None and bool(row.out))
    if form == "vector" and (alone or operation.fact.kind != "linear"):
        form = "int32" if operation.fact.kind != "linear" or operation.fact.rank == 2 else "row"
    if form == "int32" and operation.fact.kind == "linear" and operation.fact.rank > 2:
        form = "row"
    grid = operation.weight.constant.grid if operation.weight is not None else None
    axis = operation.weight.axis if operation.weight is not None else None
    if grid is None:
        return Wants(bias=form)
    granularity = Granularity.PER_TENSOR if axis is None else Granularity.PER_CHANNEL
    return Wants(weight=(QuantSpec(DType.S8, granularity=granularity, axis=axis),), bias=form)


def _plain(grid: StoredGrid) -> bool:
    return grid.eight_bit and not grid.block


def _activations(operation: Operation) -> list[StoredGrid]:
    return [p.grid for p in operation.ports if p.grid is not None and p.constant is None]


def _behind(operation: Operation) -> list[StoredGrid]:
    return [b.grid for b in operation.result.quantizes]


def _grids(operation: Operation) -> list[StoredGrid]:
    weight = [operation.weight.constant.grid] if operation.weight is not None else []
    return [*_activations(operation), *weight, *_behind(operation)]


def _apart(row: Row, operation: Operation) -> bool:
    """Whether a float addition of the bias stands between the kernel and what reads the result."""
    return operation.add is not None and row.kernel == "MatMulIntegerToFloat"


def _normed(operation: Operation) -> bool:
    return any(n.bounds is None for n in operation.result.inside)


def _redundant(bounds: tuple[float, float], grid: StoredGrid) -> bool:
    """Whether clamping to the grid's integers gives what the activation gives."""
    if grid.scale is None or grid.zero_point is None or not grid.eight_bit:
        return False
    scale, zero = float(grid.scale.flat[0]), int(grid.zero_point.flat[0])
    low, high = (np.rint(bound / scale) + zero for bound in bounds)
    return bool(low <= grid.low and high >= grid.low + 255)


def _forms(row: Row) -> str:
    return " or ".join(f for f in row.bias if f != "none") or "none"
