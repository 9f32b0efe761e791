"""What becomes of the products of a file, read from its nodes alone: the check of what the rules explain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qatgraph.backends.lint_rule import Finding, Subject
from qatgraph.backends.onnx_file import MOVES, OnnxFile

KINDS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
SAYS_NOTHING = ("engine-disagrees", "saturation", "weight-minus-128", "float-weight")  # about an operation in float


@dataclass(frozen=True)
class Product:
    """``int8``: the engine runs it on integers; ``float``: it does not, though an operand is dequantized; ``bare``: no
    operand is. ``work`` is its share of the multiplications of all products, with every dynamic size taken as 1.
    """

    node: str
    runs: Literal["int8", "float", "bare"]
    work: float


def products(subject: Subject) -> tuple[Product, ...]:
    """Every product of the file that an output depends on, but those of constants."""
    file = subject.file
    operations = {o.label: o for o in subject.operations}
    found: list[tuple[str, Literal["int8", "float", "bare"], float]] = []
    for node in _nodes(file):
        label = file.label(node)
        operation = operations.get(label)
        known = subject.engine.kernels.get(label, ())
        int8 = subject.in_integers(operation) if operation is not None else any(k.int8 for k in known)
        found.append((label, "int8" if int8 else "float" if _paired(file, node) else "bare", _work(file, node)))
    total = sum(work for *_, work in found) or 1.0
    return tuple(Product(label, runs, work / total) for label, runs, work in found)


def unexplained(found: tuple[Product, ...], findings: tuple[Finding, ...]) -> tuple[str, ...]:
    """The products of dequantized operands that run in float without a finding that says why: there must be none."""
    if any(f.rule == "engine-refuses" for f in findings):
        return ()
    said = {f.node for f in findings if f.rule not in SAYS_NOTHING}
    return tuple(p.node for p in found if p.runs == "float" and p.node not in said)


def _nodes(file: OnnxFile) -> Iterator[Any]:
    for node in file.nodes:
        constant = all(_folded(file, v) for v in node.input if v)
        if node.op_type in KINDS and file.needed.intersection(node.output) and not constant:
            yield node


def _folded(file: OnnxFile, value: str) -> bool:
    node = file.producers.get(value)
    conversion = node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return file.constant(value) is not None or (node is not None and conversion and _folded(file, node.input[0]))


def _paired(file: OnnxFile, node: Any) -> bool:
    """Whether an operand comes of a dequantize."""
    return any(_dequantized(file, v) for v in node.input[:2])


def _dequantized(file: OnnxFile, value: str) -> bool:
    node = file.producers.get(file.stem(value))
    if node is not None and node.op_type in MOVES:
        return _dequantized(file, node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _work(file: OnnxFile, node: Any) -> float:
    """Multiplications: the size of the result times the length of a sum."""
    x, w = (_sizes(file, v) for v in node.input[:2])
    sums = w[1:] if node.op_type == "Conv" else w[:1] if node.op_type == "ConvTranspose" else x[-1:]
    return float(np.prod(_sizes(file, node.output[0])) * np.prod(sums))


def _sizes(file: OnnxFile, value: str) -> list[int]:
    return [s if isinstance(s, int) else 1 for s in file.shape(value)]
