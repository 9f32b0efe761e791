"""Rules about the numbers of a file: scales, zero points, weights and biases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qatgraph.backends.lint_rule import Hit, Rule, Subject
from qatgraph.backends.onnx_facts import Operation
from qatgraph.backends.onnx_file import CONVERSIONS, attribute
from qatgraph.reference import Array
from qatgraph.reference.saturation import k_rows, worst_pairs

ROUNDING = 1e-5  # relative: a few roundings of float32 in a product of two
SAFE_PAIR = 128  # times 255 is the last sum of a pair that 16 bits hold
INT32 = 2**31 - 1
MASKED = 1e8  # no activation is that large; masks are from 1e9 on
TINY = float(np.finfo(np.float32).tiny)


def bias_scale(subject: Subject) -> Iterator[Hit]:
    """The scale of an int32 bias is not the product of the scales of input and weight.

    Why: the integer kernel adds the bias to sums that count in s_x * s_w and never reads the bias's own scale. Only a
    Conv is left in float when the two are far apart; up to some percent, and in a Gemm, nobody looks.
    Remedy: quantize the bias again with s_x * s_w, per output channel if the weight is; check what changed the scale of
    the input after the bias was made.
    Fix: none: other integers are another bias; only the float model knows the right one.
    """
    for operation, stored, wanted in _biases(subject):
        off = _off(stored, wanted)
        if off > ROUNDING:
            yield Hit(operation.label, f"its bias counts in steps up to {off:.3g} times s_x * s_w beside s_x * s_w")


def bias_scale_rounding(subject: Subject) -> Iterator[Hit]:
    """The scale of an int32 bias differs from s_x * s_w in its last bits.

    Why: the integer kernel takes s_x * s_w, a float computation of the file takes the written scale: they agree but for
    rounding. It was made in another precision or order than float32 s_x * s_w.
    Remedy: nothing, unless the file must give the same bits everywhere: then write float32(s_x) * float32(s_w).
    Fix: none: it would not be exact.
    """
    for operation, stored, wanted in _biases(subject):
        off = _off(stored, wanted)
        if 0 < off <= ROUNDING:
            yield Hit(operation.label, f"its bias scale is off by {off:.1g} of s_x * s_w")


def bias_overflow(subject: Subject) -> Iterator[Hit]:
    """An int32 bias leaves its sum no room.

    Why: products are added to the bias in 32 bits, which wrap around without a word; a bias at the end of the range was
    clamped when it was quantized. Both come of an input or weight scale that is far too small for this bias.
    Remedy: give the weight of this channel a larger scale (a channel of almost only zeros needs none below
    |b| / (s_x * 2^30)), or keep the bias in float behind the product.
    Fix: none: another grid changes the numbers.
    """
    for operation, _, _ in _biases(subject):
        assert operation.bias is not None
        assert operation.bias.constant is not None
        bias = np.abs(operation.bias.constant.integers.astype(np.int64))
        rows = np.abs(_rows(operation).astype(np.int64)) if operation.weight is not None else np.zeros((1, 1), np.int64)
        room = INT32 - 255 * rows.reshape(len(rows), -1).sum(1)
        over = bias.reshape(-1) > (room if room.size == bias.size else room.min())
        if over.any():
            yield Hit(
                operation.label,
                f"{int(over.sum())} of {over.size} channels can leave 32 bits: the bias reaches {int(bias.max()):,}",
            )


def bias_zero_point(subject: Subject) -> Iterator[Hit]:
    """An int32 bias has a zero point.

    Why: the integer kernel adds the stored integers as they are.
    Remedy: subtract the zero point from the integers and write 0.
    Fix: none: a file that was right in float was wrong in its kernel; say which is meant.
    """
    for operation, _, _ in _biases(subject):
        assert operation.bias is not None
        zero = operation.bias.grid.zero_point if operation.bias.grid is not None else None
        if zero is not None and zero.any():
            yield Hit(operation.label, f"the zero point of its bias is {int(zero.flat[0])}")


def weight_zero_points(subject: Subject) -> Iterator[Hit]:
    """The output channels of a filter have several zero points.

    Why: QLinearConv demands one zero point for all channels and fails otherwise.
    Remedy: quantize the weight symmetrically: zero point 0.
    Fix: none: another grid changes the numbers.
    """
    for operation in subject.operations:
        zero = operation.weight.constant.grid.zero_point if operation.weight is not None else None
        if operation.node.op_type == "Conv" and zero is not None and zero.size > 1 and np.ptp(zero.astype(np.int32)):
            yield Hit(operation.label, f"its channels have zero points from {int(zero.min())} to {int(zero.max())}")


def bad_scale(subject: Subject) -> Iterator[Hit]:
    """A scale is zero, negative, denormal, infinite or no number.

    Why: a quantize divides by it, and a kernel multiplies by it: the results are constant, infinite, or differ between
    CPUs that flush denormals and those that do not. It comes of a channel or an activation without any spread.
    Remedy: give a constant tensor the scale of its largest absolute value over 127, or 1 where that is zero.
    Fix: none: another scale changes the numbers.
    """
    for node in subject.file.nodes:
        scale = subject.file.constant(node.input[1]) if node.op_type in CONVERSIONS else None
        if scale is None:
            continue
        numbers = scale.astype(np.float32)
        bad = ~np.isfinite(numbers) | (numbers < TINY)
        if bad.any():
            yield Hit(
                subject.file.label(node),
                f"{int(bad.sum())} of {bad.size} scales are bad, such as {numbers[bad].flat[0]}",
            )


def mask_on_grid(subject: Subject) -> Iterator[Hit]:
    """A grid reaches to the numbers of a mask, and everything else rounds to zero.

    Why: a mask adds minus infinity, or the smallest float, to what is hidden. An observer that takes the smallest and
    the largest number gives the sum, or the mask, a grid whose single step is larger than every score.
    Remedy: let the mask and the addition of it stay in float (in the tool: exclude Where, Add and Mul of the mask), or
    write the mask as a number of the size of the scores, such as -100.
    Fix: none: another grid changes the numbers.
    """
    for node in subject.file.nodes:
        scale = subject.file.constant(node.input[1]) if node.op_type == "QuantizeLinear" else None
        steps = scale[np.isfinite(scale)].astype(np.float64) if scale is not None else np.zeros(0)
        if (steps * 255 > MASKED).any():
            yield Hit(subject.file.label(node), f"a step of it is {steps.max():.2g}")


def saturation(subject: Subject) -> Iterator[Hit]:
    """A weight can overflow the 16-bit sums of x86 CPUs without VNNI.

    Why: VPMADDUBSW adds two neighbouring products of u8 and s8 to 16 bits and saturates without a word: 255 times two
    weights of one sign is more than 16 bits hold when they sum to more than 128. CPUs with VNNI or AMX are exact.
    Remedy: choose scales under which no pair exceeds 128 (qatgraph's default), use 7 bits (reduce_range), u8 weights,
    or the session option session.x64quantprecision=1, which is slower.
    Fix: none: another grid changes the numbers.
    """
    for operation in subject.operations:
        row = subject.matches[operation.label].row
        if operation.weight is None or row is None or row.accumulator != "pair16-without-vnni":
            continue
        if operation.weight.constant.grid.dtype != "s8" or not subject.in_integers(operation):
            continue
        worst = worst_pairs(k_rows(_rows(operation), groups=int(attribute(operation.node, "group", 1))))
        over = int((worst > SAFE_PAIR).sum())
        if over:
            yield Hit(
                operation.label,
                f"in {over} of {len(worst)} output channels a pair of weights exceeds 128 (worst {int(worst.max())})",
            )


def weight_minus_128(subject: Subject) -> Iterator[Hit]:
    """A signed weight uses -128.

    Why: on 64-bit Arm without dot product, and in depthwise convolutions there, (-128) * (-128) twice wraps the 16-bit
    sum of two products.
    Remedy: quantize weights to [-127, 127]: scale max|w| / 127, no zero point.
    Fix: none: the next integer is another weight.
    """
    for operation in subject.operations:
        weight = operation.weight
        if weight is not None and weight.constant.grid.dtype == "s8":
            count = int((weight.constant.integers == -128).sum())
            if count:
                yield Hit(operation.label, f"{count} of its {weight.constant.integers.size} weights are -128")


RULES = (
    Rule(bias_scale, "wrong"),
    Rule(bias_overflow, "wrong"),
    Rule(bias_zero_point, "wrong"),
    Rule(weight_zero_points, "wrong"),
    Rule(bad_scale, "wrong"),
    Rule(mask_on_grid, "wrong"),
    Rule(saturation, "risk"),
    Rule(weight_minus_128, "risk"),
    Rule(bias_scale_rounding, "risk"),
)


def _biases(subject: Subject) -> Iterator[tuple[Operation, Array, Array]]:
    """The operations whose kernel takes the int32 bias as it is, with the scale of the bias and ``s_x * s_w``."""
    for operation in subject.operations:
        grids = [p.grid for p in operation.ports[:1]]
        bias, weight = operation.bias, operation.weight
        if bias is None or bias.grid is None or bias.constant is None or weight is None or grids[0] is None:
            continue
        kernels = {k.kernel for k in subject.kernels(operation)}
        takes = kernels & {"QGemm", "QLinearConv", "Conv", "FusedConv"} if kernels else operation.add is None
        x, w, b = grids[0].scale, weight.constant.grid.scale, bias.grid.scale
        if takes and bias.grid.dtype == "s32" and x is not None and w is not None and b is not None and x.size == 1:
            yield (
                operation,
                np.asarray(b, np.float32),
                np.asarray(x, np.float32).reshape(()) * np.asarray(w, np.float32),
            )


def _off(stored: Array, wanted: Array) -> float:
    """The largest distance of the scales, relative."""
    if stored.size > 1 and wanted.size > 1 and stored.size != wanted.size:
        return float("inf")
    a, b = stored.reshape(-1).astype(np.float64), wanted.reshape(-1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs(a - b) / np.abs(b)
    return float(np.nan_to_num(off[a != b] if off.shape == (a != b).shape else off, nan=np.inf).max(initial=0))


def _rows(operation: Operation) -> Array:
    assert operation.weight is not None
    return operation.weight.rows
