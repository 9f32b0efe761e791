"""Parity: each quantized region by itself, on the integers that the engine saw, against the integer reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from qatgraph import reference
from qatgraph.ir.graph import Graph, arguments
from qatgraph.ir.meta import record
from qatgraph.operators import DEQUANTIZE
from qatgraph.planning.plan import Plan
from qatgraph.reference import Array

Step = Callable[[Array], Array]
FLOAT_LIMIT = 1e-6  # of the largest value of the region; integers have to be equal


@dataclass(frozen=True)
class RegionTap:
    """What the engine read and wrote at one region, for one batch.

    ``border`` is the float tensor in front of the quantize and ``integers`` what it became (for a table: the
    indices and the looked-up integers); ``out`` the float result, bias included. There is no border behind a kernel
    that writes integers.
    """

    node: str
    border: Array | None
    integers: Array
    out: Array


@dataclass
class RegionParity:
    """``float_rel``: largest difference over the largest value; ``steps`` and ``off``: of the quantize in front."""

    node: str
    elements: int = 0
    float_rel: float = 0.0
    integers: int = 0
    steps: int = 0
    off: int = 0
    misfit: str = ""

    @property
    def failure(self) -> str:
        if self.misfit:
            return self.misfit
        if not self.float_rel <= FLOAT_LIMIT:
            return f"float outputs differ by {self.float_rel:.3g} of the largest value (limit {FLOAT_LIMIT:g})"
        return f"{self.off} of {self.integers} integers differ, by up to {self.steps} steps" if self.off else ""

    def compare_integers(self, have: Array, want: Array) -> None:
        if self._fits(have, want, "integers"):
            steps = np.abs(want.astype(np.int64) - have.astype(np.int64))
            self.integers += steps.size
            self.steps = max(self.steps, int(steps.max(initial=0)))
            self.off += int((steps > 0).sum())

    def compare_floats(self, have: Array, want: Array) -> None:
        if self._fits(have, want, "outputs"):
            self.elements += want.size
            top = float(np.abs(want).max(initial=0.0)) or 1.0
            difference = float(np.abs(want - have).max(initial=0.0)) / top
            self.float_rel = max(self.float_rel, difference if np.isfinite(difference) else float("inf"))

    def _fits(self, have: Array, want: Array, what: str) -> bool:
        if have.shape != want.shape:
            self.misfit = f"{what} of shape {list(have.shape)}, where the reference has {list(want.shape)}"
        return not self.misfit


def write_integers(plan: Plan) -> set[str]:
    """The nodes whose kernel writes integers: their float result is nowhere, and asking for it changes the kernel."""
    return {p.node for q in plan.quantizers for p in q.ports if p.role == "out"}


def without_reference(plan: Plan) -> list[str]:
    """The int8 nodes that have no region of their own to compare: of a kind that the integer reference does not
    know (a user's operation), or written as integers. What torch makes of them stands in for the reference."""
    kinds, hidden = {f.name: f.kind for f in plan.nodes}, write_integers(plan)
    return [p.node for p in plan.predictions if p.int8 and (p.node in hidden or kinds[p.node] not in REFERENCES)]


def compare_regions(qdq: Graph, taps: Iterable[RegionTap]) -> dict[str, RegionParity]:
    """Compare every tap with the reference computed from ``qdq``'s own constants (not from the file)."""
    nodes = {record(n).name: n for n in qdq.nodes}
    found: dict[str, RegionParity] = {}
    for tap in taps:
        region = found.setdefault(tap.node, RegionParity(tap.node))
        integers, result = REFERENCES[record(nodes[tap.node]).kind](qdq, nodes[tap.node])
        if tap.border is not None:
            region.compare_integers(tap.integers, integers(tap.border))
        if not region.misfit:
            region.compare_floats(tap.out, result(tap.integers))
    return found


def _linear(qdq: Graph, node: torch.fx.Node) -> tuple[Step, Step]:
    """What the quantize in front makes of the border, and what the linear makes of those integers."""
    roles = dict(arguments(node))
    x_scale, x_zero = (_constant(qdq, n) for n in roles["x"].args[1:3])
    weight, w_scale = (_constant(qdq, n) for n in roles["weight"].args[:2])
    scale, zero = (_constant(qdq, n) for n in roles["x"].args[0].args[1:3])
    bias = _bias(qdq, roles.get("bias"), x_scale * w_scale)
    return (
        lambda border: reference.quantize(border, scale, zero),
        lambda q: reference.linear(q, x_scale, int(x_zero), weight, w_scale, bias),
    )


def _bias(qdq: Graph, node: torch.fx.Node | None, unit: Array) -> Array | None:
    """An int32 bias as it is, since an engine adds it to the accumulator; as the float that it stands for if it
    counts in other units than the accumulator."""
    if node is None:
        return None
    if node.target is not DEQUANTIZE:
        return _constant(qdq, node)
    value, scale, zero = (_constant(qdq, n) for n in node.args[:3])  # type: ignore[arg-type]
    return value if np.array_equal(scale, unit) else reference.dequantize(value, scale, zero, axis=0)


def _lookup(qdq: Graph, node: torch.fx.Node) -> tuple[Step, Step]:
    """What the table holds at the indices, and what the dequantize makes of it."""
    table = _constant(qdq, node.args[0])  # type: ignore[arg-type]
    rows = next(iter(node.users))
    scale, zero = (_constant(qdq, n) for n in rows.args[1:3])  # type: ignore[arg-type]
    return lambda indices: table[indices], lambda q: reference.dequantize(q, scale, zero)


REFERENCES = {"linear": _linear, "embedding": _lookup}


def _constant(qdq: Graph, node: torch.fx.Node) -> Array:
    tensor = qdq.parameter(node)
    assert tensor is not None, f"{node} is not a constant"
    return tensor.detach().cpu().numpy()
