"""Parity: each quantized region by itself, on the integers that the engine saw, against the integer reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from qatgraph import reference
from qatgraph.ir.graph import Graph, arguments
from qatgraph.ir.meta import record
from qatgraph.operators import DEQUANTIZE
from qatgraph.reference import Array

FLOAT_LIMIT = 1e-6  # of the largest value of the region
STEP_LIMIT = 1
SHARE_LIMIT = 1e-4


@dataclass(frozen=True)
class RegionTap:
    """What the engine read and wrote at one region, for one batch.

    ``border`` is the float tensor in front of the quantize and ``integers`` what it became (for a table: the
    indices and the looked-up integers); ``out`` the float result, bias included.
    """

    node: str
    border: Array
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

    @property
    def failure(self) -> str:
        if not self.float_rel <= FLOAT_LIMIT:
            return f"float outputs differ by {self.float_rel:.3g} of the largest value (limit {FLOAT_LIMIT:g})"
        if self.steps > STEP_LIMIT or self.off > SHARE_LIMIT * self.integers:
            return f"{self.off} of {self.integers} integers differ, by up to {self.steps} steps"
        return ""


def compare_regions(qdq: Graph, taps: Iterable[RegionTap]) -> dict[str, RegionParity]:
    """Compare every tap with the reference computed from ``qdq``'s own constants (not from the file)."""
    nodes = {record(n).name: n for n in qdq.nodes}
    found: dict[str, RegionParity] = {}
    for tap in taps:
        region = found.setdefault(tap.node, RegionParity(tap.node))
        node = nodes[tap.node]
        if record(node).kind == "embedding":
            integers, out = _lookup(qdq, node, tap)
        else:
            integers, out = _linear(qdq, node, tap)
        steps = np.abs(integers.astype(np.int64) - tap.integers.astype(np.int64))
        region.integers += steps.size
        region.steps = max(region.steps, int(steps.max(initial=0)))
        region.off += int((steps > 0).sum())
        region.elements += out.size
        top = float(np.abs(out).max(initial=0.0)) or 1.0
        same_shape = out.shape == tap.out.shape
        difference = float(np.abs(out - tap.out).max(initial=0.0)) / top if same_shape else float("inf")
        region.float_rel = max(region.float_rel, difference if np.isfinite(difference) else float("inf"))
    return found


def _linear(qdq: Graph, node: torch.fx.Node, tap: RegionTap) -> tuple[Array, Array]:
    roles = dict(arguments(node))
    quantize = roles["x"].args[0]
    x_scale, x_zero = (_constant(qdq, n) for n in roles["x"].args[1:3])
    weight, w_scale = (_constant(qdq, n) for n in roles["weight"].args[:2])
    bias = roles.get("bias")
    value = None
    if bias is not None:
        value = _constant(qdq, bias.args[0] if bias.target is DEQUANTIZE else bias)
    scale, zero = (_constant(qdq, n) for n in quantize.args[1:3])
    integers = reference.quantize(tap.border, scale, zero)
    return integers, reference.linear(tap.integers, x_scale, int(x_zero), weight, w_scale, value)


def _lookup(qdq: Graph, node: torch.fx.Node, tap: RegionTap) -> tuple[Array, Array]:
    table = _constant(qdq, node.args[0])  # type: ignore[arg-type]
    rows = next(iter(node.users))
    scale, zero = (_constant(qdq, n) for n in rows.args[1:3])  # type: ignore[arg-type]
    return table[tap.border], reference.dequantize(tap.integers, scale, zero)


def _constant(qdq: Graph, node: torch.fx.Node) -> Array:
    tensor = qdq.parameter(node)
    assert tensor is not None, f"{node} is not a constant"
    return tensor.detach().cpu().numpy()
