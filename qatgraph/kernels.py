"""Kernels: what the plan predicted against what the engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qatgraph.ops import keeps_grid
from qatgraph.planning.plan import Plan, Prediction

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"  # the operators of ONNX


@dataclass(frozen=True)
class KernelNode:
    """One node of the graph that the engine really runs.

    ``int8``: it reads 8-bit integers. ``moves``: it only moves or picks elements of an activation, which an engine may
    do before or behind a quantize as it likes. ``reads``: its first input, in front of a
    transpose.
    """

    name: str
    kernel: str
    int8: bool
    moves: bool = False
    reads: str = ""


@dataclass(frozen=True)
class Mismatch:
    """A broken prediction, with the rule that made it."""

    node: str
    rule: str
    predicted: str
    realized: str

    def __str__(self) -> str:
        return f"'{self.node}': row '{self.rule}' predicts {self.predicted}, the engine runs {self.realized}"


def owner(name: str) -> str:
    """The planned node behind an engine node: ``a.query:linear/MatMul/MatMulAddFusion`` -> ``a.query:linear``.

    Names of nodes hold no slash; the engine appends its own parts behind ours.
    """
    return name.partition("/")[0]


def compare_kernels(plan: Plan, realized: Sequence[KernelNode]) -> list[Mismatch]:
    """Every prediction that the engine does not honour, and every int8 kernel that nobody planned."""
    shapes = {f.name for f in plan.nodes if keeps_grid(f.kind)}
    by_owner: dict[str, list[KernelNode]] = {}
    for node in realized:
        by_owner.setdefault(owner(node.name), []).append(node)
    found = []
    for prediction in plan.predictions:
        have = by_owner.get(prediction.node, [])
        if prediction.node in shapes and not have:
            continue  # two that undo each other go, or one becomes a part of a kernel
        if not _honoured(prediction, have):
            found.append(Mismatch(prediction.node, prediction.row, _wanted(prediction), _seen(have)))
    for name, nodes in by_owner.items():
        stray = [n for n in nodes if n.int8 and not n.moves]
        if stray and plan.prediction(name) is None:
            found.append(Mismatch(name, "no row", "no int8 kernel", _seen(stray)))
    return found


def compare_borders(plan: Plan, realized: Sequence[KernelNode]) -> str:
    """Whether so many quantizes run, and so many values are dequantized, as the borders of the plan say; empty if so.

    An engine may dequantize a value once for each operation that reads floats: such copies count once. What it inserts
    itself is named after its kernel alone, and is not counted.
    """
    planned = {
        QUANTIZE: sum(len(p.quantizes) for p in plan.partitions),
        DEQUANTIZE: sum(len(p.dequantizes) for p in plan.partitions),
    }
    named = [n for n in realized if n.name != n.kernel]
    ran = {
        QUANTIZE: sum(n.kernel == QUANTIZE for n in named),
        DEQUANTIZE: len({n.reads for n in named if n.kernel == DEQUANTIZE}),
    }
    wrong = [k for k in planned if planned[k] != ran[k]]
    return "; ".join(f"the plan has {planned[k]} {k} at its borders, the engine runs {ran[k]}" for k in wrong)


def _honoured(prediction: Prediction, have: Iterable[KernelNode]) -> bool:
    """One node runs the kernel in the predicted precision, and none runs in the other.

    No kernel in float is no promise; no kernel in int8 promises that nothing is left of the node.
    """
    if prediction.int8 and not prediction.kernel:
        return not list(have)
    kernels = prediction.kernel.split("|")
    right = [n for n in have if (not prediction.kernel or n.kernel in kernels) and n.int8 == prediction.int8]
    wrong = [n for n in have if n.int8 and not n.moves and not prediction.int8]
    return (bool(right) or not prediction.kernel) and not wrong


def _wanted(prediction: Prediction) -> str:
    if prediction.int8 and not prediction.kernel:
        return "no kernel of its own"
    return f"{'int8' if prediction.int8 else 'float'} {prediction.kernel.replace('|', ' or ')}"


def _seen(nodes: Iterable[KernelNode]) -> str:
    return ", ".join(f"{'int8' if n.int8 else 'float'} {n.kernel}" for n in nodes) or "no node of this name"
