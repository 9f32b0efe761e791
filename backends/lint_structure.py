"""Rules about the nodes of a file: what stands where, and what the engine makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qatgraph.backends import lint_grids, lint_match
from qatgraph.backends.lint_rule import Hit, Match, Rule, Subject
from qatgraph.backends.onnx_facts import PRODUCTS, Operation
from qatgraph.backends.onnx_file import MOVES, OnnxFile, attribute
from qatgraph.backends.stored_grids import grid_of

UNCHANGED = 64  # the engine turns a signed weight to unsigned only if a number is larger (avx2_weight_s8_to_u8.cc)
INTEGER_CLIP = 12  # the opset from which on Clip takes 8-bit integers
MOVED_TYPE = "output_dtype INT8 does not match"
# Operations that only move or pick numbers: nobody expects a kernel of their own for them.
PICKS = frozenset(
    {"Gather", "GatherElements", "Split", "Expand", "Tile", "Resize", "Pad", "DepthToSpace", "Where", "Slice"}
)


def engine_refuses(subject: Subject) -> Iterator[Hit]:
    """ONNX Runtime does not load the file.

    Why: what it says stands in the finding; the other findings often name the node.
    Remedy: mend the findings that are wrong, then audit again.
    Fix: none: it depends on the cause.
    """
    if subject.engine.refuses:
        yield Hit("the file", subject.engine.refuses)


def signed_move(subject: Subject) -> Iterator[Hit]:
    """ONNX Runtime refuses the file for a signed activation in front of an operation that only moves numbers.

    Why: from opset 21 on, the engine moves the pair behind the operation, notes the data type in it, and then turns the
    zero point to unsigned on x86: the two no longer agree ("output_dtype INT8 does not match"). It moves a pair so in
    front of a MatMul with a bias at static rank 3, too.
    Remedy: quantize activations to u8, or export at opset 20 or lower.
    Fix: signed activations become unsigned, 128 is added to their zero points: the same numbers.
    """
    for operation in subject.operations if MOVED_TYPE in subject.engine.refuses else ():
        signed = any(p.grid is not None and p.grid.dtype == "s8" and p.constant is None for p in operation.ports)
        moves = operation.node.op_type in MOVES and not operation.result.quantizes
        reshaped = operation.add is not None and operation.fact.rank > 2 and not operation.fact.dynamic
        if signed and (moves or reshaped):
            yield Hit(
                operation.label, f"{operation.node.op_type} reads signed integers that the engine moves behind it"
            )


def engine_quantizes_weight(subject: Subject) -> Iterator[Hit]:
    """ONNX Runtime quantizes a float weight by itself, and computes something else than the file.

    Why: where a convolution stands between a dequantize and a quantize and its weight is float, the engine makes 8-bit
    integers of the weight with one scale of its own, without a word. The tool left the weight in float; nobody
    calibrated or trained this scale.
    Remedy: let the tool quantize the weight, too (it may not know the class of the layer: a subclass of Conv2d), or
    take the pairs around the convolution away. The session option disabled_optimizers=["WeightBiasQuantization"]
    keeps the weight as it is.
    Fix: none: only the tool knows the scale.
    """
    for operation in subject.operations:
        if _engine_weight(subject, operation):
            yield Hit(operation.label, "its weight is float in the file, and the engine runs it on integers")


def shared_zero_point(subject: Subject) -> Iterator[Hit]:
    """Weights share a zero point, and ONNX Runtime refuses the file under session.x64quantprecision=1.

    Why: under that option, the one that gives exact results on x86 without VNNI, the engine turns each signed weight
    with numbers beyond 64 to unsigned and replaces its zero point; a shared one it replaces twice ("Attempt to replace
    the existing tensor").
    Remedy: give the dequantize of every weight constants of its own.
    Fix: every weight gets a zero point of its own: the same numbers.
    """
    users: dict[str, list[str]] = {}
    for operation in subject.operations:
        weight = operation.weight
        if weight is None or weight.constant.grid.dtype != "s8" or not weight.constant.grid.given:
            continue
        if int(np.abs(weight.constant.integers.astype(np.int16)).max(initial=0)) > UNCHANGED:
            users.setdefault(subject.file.stem(weight.constant.dequantize.input[2]), []).append(operation.label)
    for value, labels in users.items():
        if len(labels) > 1:
            yield Hit(labels[0], f"{len(labels)} weights share the zero point '{value}', those of {_few(labels)}")


def silent_float(subject: Subject) -> Iterator[Hit]:
    """An operation between Q/DQ runs in float, and no row of the table was near.

    Why: the row that comes next does not take an operation of this rank, shape or neighbourhood.
    Remedy: bring the operation into the form that the row takes, or take the Q/DQ away.
    Fix: none: it depends on the form.
    """
    for operation in _floats(subject):
        match = subject.matches[operation.label]
        if match.row is None and match.blocked:
            yield Hit(operation.label, f"{operation.node.op_type} runs in float: {match.blocked}")


def no_int8_kernel(subject: Subject) -> Iterator[Hit]:
    """Q/DQ stand around an operation that has no integer kernel.

    Why: the CPU provider runs it in float in any case: the pairs cost two conversions and round twice for nothing.
    Remedy: let it read the float in front of the pair (and in the tool: exclude the operation from quantization).
    Fix: none: without the rounding the numbers differ.
    """
    for operation in _floats(subject):
        match = subject.matches[operation.label]
        if (
            match.row is None
            and not match.blocked
            and operation.node.op_type not in PICKS
            and _own_pair(subject, operation)
        ):
            why = match.floats.why.format(**operation.fact.words()) if match.floats is not None else ""
            yield Hit(operation.label, f"{operation.node.op_type} has no integer kernel", why=why)


def double_quantize(subject: Subject) -> Iterator[Hit]:
    """A value is dequantized and at once quantized again.

    Why: the second pair rounds what the first has rounded; on equal grids it does nothing at all, and hides from
    a reader which pair belongs to which operation.
    Remedy: keep one pair: the grid that the reader was calibrated for.
    Fix: pairs on equal grids are removed: the same numbers. Others are only reported.
    """
    file = subject.file
    for node in file.nodes:
        first = file.producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if first is not None and first.op_type == "DequantizeLinear":
            equal = grid_of(file, first, 0).equals(grid_of(file, node, 0))
            grids = "to the same grid" if equal else f"from {grid_of(file, first, 0)} to {grid_of(file, node, 0)}"
            yield Hit(
                file.label(node), f"it quantizes what {file.label(first)} has just dequantized, {grids}", exact=equal
            )


def dequantized_table(subject: Subject) -> Iterator[Hit]:
    """A whole embedding table is dequantized before rows of it are picked.

    Why: the engine makes all rows float, once or in every run; the int8 table then saves nothing in memory.
    Remedy: Gather from the int8 table, then DequantizeLinear with its one scale.
    Fix: the two nodes change places: the same numbers.
    """
    for node, dequantize in tables(subject.file):
        if any(k.int8 for k in subject.engine.kernels.get(subject.file.label(node), ())):
            continue  # a quantize to the same grid stands behind it
        shape = list(subject.file.shape(dequantize.input[0]))
        yield Hit(
            subject.file.label(node), f"it picks rows of the table {shape} behind {subject.file.label(dequantize)}"
        )


def float_weight(subject: Subject) -> Iterator[Hit]:
    """A weight is stored in float, in front of its quantize.

    Why: the engine quantizes it when it loads the file: the file is four times as large as its integers.
    Remedy: store the integers, and only the DequantizeLinear behind them.
    Fix: the integers are stored: the same numbers.
    """
    for node, shape in float_weights(subject.file):
        yield Hit(subject.file.label(node), f"it quantizes a constant of shape {shape}")


def skip_layer_norm(subject: Subject) -> Iterator[Hit]:
    """A residual addition and a LayerNormalization are fused to one kernel that is slower than both.

    Why: SkipLayerNormalization of the CPU provider takes several times as long as Add and LayerNormalization do.
    Remedy: write the residual addition as Sum, which nothing fuses.
    Fix: the Add becomes a Sum: the same numbers.
    """
    for kind, label in subject.engine.fused:
        if kind == "SkipLayerNormalization":
            yield Hit(label, "ONNX Runtime runs it as SkipLayerNormalization, with the addition in front of it")


def engine_disagrees(subject: Subject) -> Iterator[Hit]:
    """The engine does not do what the target's table says: the table is wrong or has a gap.

    Why: the table was measured with other versions of the engine, or never in this surrounding.
    Remedy: report it with the file; the engine is right, and the other findings of this node are left out.
    Fix: none: the file is not at fault.
    """
    wrong = {hit.node for hit in lint_grids.bias_scale(subject)}
    for operation in subject.operations:
        match, runs = subject.matches[operation.label], subject.runs(operation)
        if not match.certain or runs is None or runs == match.int8 or not _concerned(subject, operation):
            continue
        if _engine_weight(subject, operation):
            continue  # a finding of its own
        if operation.label in wrong or any(rule == "k-axis-scales" for rule, _ in match.misfits):
            continue  # then it is luck what the engine does
        kernels = ", ".join(sorted({k.kernel for k in subject.kernels(operation)}))
        said = (
            f"the row '{match.row.id}' promises {match.row.kernel}"
            if match.int8 and match.row
            else _against(subject, operation)
        )
        yield Hit(operation.label, f"the engine runs {kernels}, but {said}")


def conditions(subject: Subject) -> Iterator[tuple[str, Hit]]:
    """(id of the rule, where) of each condition that keeps an operation in float, or makes it wrong."""
    floats = list(_floats(subject))
    for operation in subject.operations:
        match, label = subject.matches[operation.label], operation.label
        for rule, what in match.misfits:
            if operation in floats or rule == "k-axis-scales":
                yield rule, Hit(label, what, _of_table(match, operation, rule), _exact(subject, operation, rule))
        paired = operation.quantized and operation.result.alone is not None and subject.runs(operation) is False
        if paired and operation.node.op_type in PICKS:
            yield "moved-grid", Hit(label, f"{operation.node.op_type} stands between two grids, or does not only move")
        if paired and lint_match.in_kernel(subject.target, operation):
            alone = "it stands alone between two pairs, and runs in float"
            yield "activation-not-redundant", Hit(label, alone, exact=False)


RULES = (
    Rule(engine_refuses, "wrong"),
    Rule(signed_move, "wrong"),
    Rule(engine_quantizes_weight, "wrong"),
    Rule(silent_float, "slow"),
    Rule(no_int8_kernel, "slow"),
    Rule(dequantized_table, "slow"),
    Rule(skip_layer_norm, "slow"),
    Rule(float_weight, "slow"),
    Rule(double_quantize, "slow"),
    Rule(shared_zero_point, "risk"),
    Rule(engine_disagrees, "risk"),
)


def tables(file: OnnxFile) -> Iterator[tuple[Any, Any]]:
    """Each Gather of rows (axis 0) of a dequantized constant, with the dequantize, which has one scale."""
    for node in file.nodes:
        source = file.producers.get(node.input[0]) if node.op_type == "Gather" else None
        if source is None or source.op_type != "DequantizeLinear" or attribute(node, "axis", 0):
            continue
        grid = grid_of(file, source, 2)
        if file.constant(source.input[0]) is not None and grid.axis is None and grid.eight_bit:
            yield node, source


def float_weights(file: OnnxFile) -> Iterator[tuple[Any, list[int]]]:
    """Each quantize of a float constant of several axes, with its shape."""
    for node in file.nodes:
        constant = file.constant(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if constant is not None and constant.ndim > 1:
            yield node, list(constant.shape)


def _floats(subject: Subject) -> Iterator[Operation]:
    """The operations between Q/DQ that run in float, where table and engine agree, or one of them is silent."""
    for operation in subject.operations:
        match, runs = subject.matches[operation.label], subject.runs(operation)
        if match.int8 or runs or not _concerned(subject, operation):
            continue
        if runs is None and not match.certain:
            continue
        yield operation


def _own_pair(subject: Subject, operation: Operation) -> bool:
    """Whether the operation needs no pair: it has one on both sides, or in front of it one where a float is at hand."""
    origins = [origin for _, origin in operation.fact.inputs]
    pairs = [origin for port, origin in zip(operation.ports, origins, strict=False) if port.grid is not None]
    return operation.result.alone is not None or any(origin not in subject.writers for origin in pairs)


def _engine_weight(subject: Subject, operation: Operation) -> bool:
    """Whether the engine runs a product of a float constant on integers."""
    return _float_weight(operation) and subject.runs(operation) is True


def _float_weight(operation: Operation) -> bool:
    product = operation.node.op_type in PRODUCTS and operation.weight is None
    return product and operation.fact.parameter("weight") is not None


def _concerned(subject: Subject, operation: Operation) -> bool:
    """Whether somebody meant the operation to run on integers."""
    weighted = operation.node.op_type in PRODUCTS and operation.weight is not None
    if not (operation.quantized or weighted) or lint_match.in_kernel(subject.target, operation):
        return False
    moves = lint_match.moves(operation) or operation.node.op_type in PICKS
    return not moves or operation.result.alone is not None


def clampable(file: OnnxFile, operation: Operation) -> bool:
    """Whether the activations behind can clamp the integers of the one quantize instead."""
    result = operation.result
    behind = result.quantizes[0] if result.alone is not None else None
    if behind is None or not behind.direct or behind.border or file.opset() < INTEGER_CLIP:
        return False
    grid, readers = behind.grid, file.readers.get(behind.node.output[0], [])
    readable = all(r.op_type == "DequantizeLinear" and grid_of(file, r, 0).equals(grid) for r in readers)
    bounded = all(b.bounds is not None for b in result.inside)
    return bounded and readable and grid.eight_bit and grid.given and grid.axis is None and grid.scale is not None


def _exact(subject: Subject, operation: Operation, rule: str) -> bool:
    """Whether the repair of a condition is one for this operation."""
    if rule == "bias-form":
        return operation.bias is not None and operation.bias.array is not None
    if rule == "activation-not-redundant":
        return clampable(subject.file, operation)
    if rule == "signed-fork":  # or the engine quantizes these weights as soon as it can fuse
        return not any(o.quantized and _float_weight(o) for o in subject.operations)
    grids = [b.grid for b in operation.result.quantizes]
    return rule != "two-quantizes" or all(g.equals(grids[0]) for g in grids)


def _of_table(match: Match, operation: Operation, rule: str) -> str:
    """What the table says of the form that the file has, if it has a row for it; empty if not."""
    row = match.floats
    if row is None or len(match.misfits) > 1 or not (row.bias if rule == "bias-form" else row.weight):
        return ""
    return row.why.format(**operation.fact.words()) if rule in ("bias-form", "k-axis-scales") else ""


def _few(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _against(subject: Subject, operation: Operation) -> str:
    match = subject.matches[operation.label]
    if match.misfits:
        return f"the table holds against it: {match.misfits[0][1]}"
    return f"the table has no row for it{': ' + match.blocked if match.blocked else ''}"
