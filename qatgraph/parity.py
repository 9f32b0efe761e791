"""Parity: each quantized region by itself, on the integers that the engine saw, against the integer reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.planning.plan import Plan, Prediction
from qatgraph.reference import Array, EngineQuantize
from qatgraph.regions import ONNX, RESULTS, Region

FLOAT_LIMIT = 1e-6  # of the largest value of the region; integers have to be equal


@dataclass(frozen=True)
class RegionTap:
    """What the engine read and wrote at one region, for one batch.

    Of each activation that it reads, ``borders`` holds the float tensor in front of the quantize and ``integers`` what
    it became (for a table: the indices and the looked-up integers; a kernel that reads floats has them in both places).
    There is no border behind a kernel that writes integers, or where the model takes them. ``out`` is the result:
    float, bias included, or the integers that the kernel writes.
    """

    node: str
    borders: tuple[Array | None, ...]
    integers: tuple[Array, ...]
    out: Array


@dataclass
class RegionParity:
    """``float_rel``: of a float result, the largest difference over the largest value. ``steps`` and ``off``: of the
    integers in front; ``out_steps`` and ``out_off``: of those that the kernel writes, which may differ by ``allowed``.
    ``beyond``: the float sums that are farther off than float32 can be. ``first``: the first value that is beyond that.
    """

    node: str
    allowed: int = 0
    elements: int = 0
    float_rel: float = 0.0
    beyond: int = 0
    integers: int = 0
    steps: int = 0
    off: int = 0
    out_steps: int = 0
    out_off: int = 0
    first: str = ""
    misfit: str = ""

    @property
    def failure(self) -> str:
        if self.misfit:
            return self.misfit
        if not self.float_rel <= FLOAT_LIMIT:
            return f"float outputs differ by {self.float_rel:.3g} of the largest value (limit {FLOAT_LIMIT:g})"
        if self.beyond:
            return (
                f"{self.beyond} of {self.elements} float sums are farther off than float32 is in any order; "
                f"first {self.first}"
            )
        if self.off:
            return f"{self.off} of {self.integers} integers differ, by up to {self.steps} steps; first {self.first}"
        if self.out_steps > self.allowed:
            return (
                f"{self.out_off} of {self.elements} integers that it writes differ, by up to {self.out_steps} steps "
                f"(its row allows {self.allowed}); first {self.first}"
            )
        return ""

    def compare_inputs(self, have: Array, least: Array, largest: Array) -> None:
        if self._fits(have, least, "integers"):
            steps = np.minimum(_steps(have, least), _steps(have, largest)) * ((have < least) | (have > largest))
            self.integers += steps.size
            self.steps = max(self.steps, int(steps.max(initial=0)))
            self.off += int((steps > 0).sum())
            self.first = self.first or _first(have, np.where(have < least, least, largest), steps > 0)

    def compare_result(self, have: Array, want: Array, slack: Array | None = None) -> None:
        """``slack``: how far each float may be off, where the kernel adds floats."""
        if not self._fits(have, want, "outputs"):
            return
        self.elements += want.size
        if want.dtype.kind in "iu":
            steps = _steps(have, want)
            self.out_steps = max(self.out_steps, int(steps.max(initial=0)))
            self.out_off += int((steps > 0).sum())
            self.first = self.first or _first(have, want, steps > self.allowed)
            return
        if slack is not None:
            wrong = ~(np.abs(have.astype(np.float64) - want) <= slack)
            self.beyond += int(wrong.sum())
            self.first = self.first or _first(have, want, wrong)
            return
        top = float(np.abs(want).max(initial=0.0)) or 1.0
        difference = float(np.abs(want - have).max(initial=0.0)) / top
        self.float_rel = max(self.float_rel, difference if np.isfinite(difference) else float("inf"))

    def compare_moved(self, have: Array, read: Sequence[Array]) -> None:
        """What only moves integers writes none that it did not read."""
        new = ~np.isin(have, np.concatenate([part.reshape(-1) for part in read]))
        if new.any():
            self.misfit = (
                f"{int(new.sum())} of {new.size} integers are none that it read, and its row says it moves them"
            )

    def _fits(self, have: Array, want: Array, what: str) -> bool:
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            self.misfit = (
                f"{what} are {have.dtype} of shape {list(have.shape)}, "
                f"where the reference has {want.dtype} of {list(want.shape)}"
            )
        return not self.misfit


def _first(have: Array, want: Array, beyond: Array) -> str:
    """The first value that is beyond what is allowed, and where it stands; empty if none is."""
    if not beyond.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(beyond)[0])
    return f"at {list(at)}: {have[at]}, where the reference has {want[at]}"


def _steps(have: Array, want: Array) -> Array:
    return np.abs(want.astype(np.int64) - have.astype(np.int64))


def write_integers(plan: Plan) -> set[str]:
    """The nodes whose kernel writes integers: their float result is nowhere, and asking for it changes the kernel."""
    return {p.node for q in plan.quantizers for p in q.ports if p.role == "out"}


def has_region(prediction: Prediction, kind: str) -> bool:
    """Whether the oracle knows what the kernel of a node computes."""
    return prediction.int8 and bool(prediction.kernel) and prediction.requant != "" and kind in RESULTS


def without_reference(plan: Plan) -> list[str]:
    """The int8 nodes that have no region of their own to compare, since the oracle does not know what they compute: a
    user's operation, or a row that does not say. What torch makes of them stands in for the reference.

    What only moves integers needs none: those behind it have to be equal.
    """
    kinds = {f.name: f.kind for f in plan.nodes}
    computes = (p for p in plan.predictions if p.int8 and p.kernel and p.requant != "moved")
    return [p.node for p in computes if not has_region(p, kinds[p.node])]


def compare_regions(
    qdq: Graph, taps: Iterable[RegionTap], *, without_vnni: bool = False, quantize: EngineQuantize = ONNX
) -> dict[str, RegionParity]:
    """Compare every tap with the reference computed from ``qdq``'s own constants (not from the file).

    ``without_vnni``: the taps are of x86 with AVX2 and no VNNI, where pair sums saturate. ``quantize``: how the engine
    makes integers of floats.
    """
    nodes = {record(n).name: n for n in qdq.nodes}
    allowed = {p.node: p.deviation for p in qdq.info.plan.predictions}
    movers = {p.node for p in qdq.info.plan.predictions if p.requant == "moved"}
    found: dict[str, RegionParity] = {}
    for tap in taps:
        parity = found.setdefault(tap.node, RegionParity(tap.node, allowed[tap.node]))
        region = Region.of(qdq, nodes[tap.node], without_vnni=without_vnni, quantize=quantize)
        steps = region.quantize_steps()
        for border, integers, step in zip(tap.borders, tap.integers, steps, strict=not region.reads_floats):
            if border is not None and not parity.misfit:
                parity.compare_inputs(integers, *step(border))
        if not parity.misfit:
            parity.compare_result(tap.out, region.result()(*tap.integers), region.slack(*tap.integers))
        if tap.node in movers and not parity.misfit:
            parity.compare_moved(tap.out, tap.integers)
    return found
