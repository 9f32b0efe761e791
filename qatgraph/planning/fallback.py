"""What runs in float although it might be int8, and what that costs. Estimates, on the example batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qatgraph.planning.plan import Plan

SHOWN = 5


@dataclass(frozen=True)
class Fallback:
    """An operation in float that the target has an int8 row for, or that is made of products.

    ``us``: its estimated time; ``extra_us``: how much of it the best int8 row that lost would have saved, the quantizes
    in front of it paid; ``None`` where the target has no costs, or no int8 row.
    """

    node: str
    kind: str
    macs: int
    us: float | None
    extra_us: float | None
    why: str
    remedy: str

    def text(self) -> str:
        cost = f"about {self.us:.3g} us" if self.us is not None else f"{self.macs:,} multiply-accumulates"
        extra = f", int8 would save {self.extra_us:.3g} us" if self.extra_us is not None and self.extra_us > 0 else ""
        return f"'{self.node}' ({self.kind}, {cost}{extra})"


@dataclass(frozen=True)
class Work:
    """How much each operation does in float: ``unit`` says what the numbers count."""

    unit: str
    amounts: dict[str, float]

    def of(self, node: str) -> float:
        return self.amounts.get(node, 0.0)

    def share(self, nodes: Iterable[str]) -> float:
        whole = sum(self.amounts.values())
        return sum(self.of(n) for n in nodes) / whole if whole else 0.0


def work_of(plan: Plan) -> Work:
    """Estimated float time, or multiply-accumulates where the target has no costs."""
    timed = {p.node: p.float_us for p in plan.placements if p.float_us is not None}
    if timed:
        return Work("estimated float time", timed)
    return Work("multiply-accumulates", {f.name: float(f.macs) for f in plan.nodes if not f.absent})


def fallbacks(plan: Plan) -> list[Fallback]:
    """Every fallback, the most expensive first."""
    facts = {f.name: f for f in plan.nodes}
    decisions = {d.subject: d for d in plan.decisions}
    predictions = {p.node: p for p in plan.predictions}
    found = []
    for placement in plan.placements:
        fact, decision = facts[placement.node], decisions[placement.node]
        prediction = predictions.get(placement.node)
        int8 = [a for a in decision.lost if a.choice.startswith("int8")]
        if placement.placement == "int8" or fact.absent or not (int8 or fact.macs):
            continue
        best = min((a.us for a in int8 if a.us is not None), default=None)
        extra = placement.us - best if placement.us is not None and best is not None else None
        why = prediction.blocked_by if prediction else decision.why
        remedy = prediction.remedy if prediction else ""
        found.append(Fallback(fact.name, fact.kind, fact.macs, placement.us, extra, why, remedy))
    return sorted(found, key=lambda f: (-(f.us or 0.0), -f.macs))


def fallback_report(plan: Plan) -> dict[str, Any]:
    """What falls back and what stands at the borders, as data."""
    found, work = fallbacks(plan), work_of(plan)
    islands = [p for p in plan.partitions if p.placement == "int8"]
    timed = [p.boundary_us for p in islands if p.boundary_us is not None]
    return {
        "share": work.share(f.node for f in found),
        "work": work.unit,
        "operations": len(found),
        "first": [f.text() for f in found if f.us != 0][:SHOWN],  # a view costs nothing
        "int8_partitions": len(islands),
        "quantizes": sum(len(p.quantizes) for p in islands),
        "dequantizes": sum(len(p.dequantizes) for p in islands),
        "boundary_bytes": sum(p.boundary_bytes for p in islands),
        **({"boundary_us": sum(timed)} if timed else {}),
        "how": "estimates from the target's costs, on the example batch; counts of borders are exact",
    }


def fallback_lines(plan: Plan) -> list[str]:
    """The same in a few lines."""
    found = fallback_report(plan)
    cost = f", about {found['boundary_us']:.3g} us" if "boundary_us" in found else ""
    borders = f"{_many(found['quantizes'], 'quantize')} and {_many(found['dequantizes'], 'dequantize')}"
    moved = f"{found['boundary_bytes'] / 1024:.0f} KiB on the example batch{cost}"
    lines = [f"  borders {_many(found['int8_partitions'], 'int8 partition')}; {borders} move {moved}"]
    if found["first"]:
        lines.append(f"  falls back: {found['share']:.0%} of the work ({found['work']}), first")
        lines += [f"    {text}" for text in found["first"]]
    return lines


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
