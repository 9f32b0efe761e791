"""Questions that people ask of a plan: what is where, why, and what differs. Text only; no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from qatgraph.errors import PlanError, nearest
from qatgraph.planning.fallback import fallback_lines
from qatgraph.planning.plan import Decision, Partition, Placement, Plan


def plan_text(plan: Plan) -> str:
    """What is int8, what is pinned, what falls back, and why."""
    lines = [f"plan for {plan.target}, recipe {plan.recipe} ({plan.hash()[:12]})", *totals(plan), ""]
    why = {d.subject: d for d in plan.decisions}
    for prediction in plan.predictions:
        decision = why[prediction.node]
        lines.append(f"{prediction.node}\n    {decision.choice}, by {decision.author}: {decision.why}")
        if prediction.remedy:
            lines.append(f"    to make it int8: {prediction.remedy}")
    return "\n".join(lines) + "\n"


def totals(plan: Plan) -> list[str]:
    """A few lines that sum a plan up."""
    int8 = Counter(
        f"{kind(plan, p.node)} as {p.kernel.split('|')[0] or 'a part of another kernel'}"
        for p in plan.predictions
        if p.int8
    )
    pinned = Counter(kind(plan, p.node) for p in plan.predictions if p.pinned)
    rest = Counter(kind(plan, p.node) for p in plan.predictions if not p.int8 and not p.pinned)
    grids = Counter(str(q.spec) for q in plan.quantizers)
    return [
        f"  int8    {_counted(int8)}",
        f"  pinned  {_counted(pinned)}",
        f"  float   {_counted(rest)}",
        f"  grids   {_counted(grids)}",
        *fallback_lines(plan),
    ]


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counter.items(), key=lambda i: (-i[1], i[0]))) or "none"


def kind(plan: Plan, name: str) -> str:
    return next((f.kind for f in plan.nodes if f.name == name), "")


def module_tree(plan: Plan) -> dict[str, Any]:
    """Nested modules: ``{"query": {":linear": "int8 …"}}``; leaves are the planned operations."""
    tree: dict[str, Any] = {}
    placements = {p.node: p.placement for p in plan.placements}
    for prediction in plan.predictions:
        path, _, operation = prediction.node.rpartition(":")
        level = tree
        for part in path.split("."):
            level = level.setdefault(part, {})
        mark = "pinned" if prediction.pinned else placements[prediction.node]
        level[":" + operation] = f"{mark} {prediction.kernel.split('|')[0]}".strip()
    return tree


def partition_text(partition: Partition) -> str:
    """``partition 3, int8, 4 nodes; borders: 1 quantize, 0 dequantizes, 10 KiB, about 3.2 us``."""
    text = f"partition {partition.index}, {partition.placement}, {_many(partition.nodes, 'node')}"
    if partition.placement != "int8":
        return text
    cost = f", about {partition.boundary_us:.3g} us" if partition.boundary_us is not None else ""
    borders = f"{_many(partition.quantizes, 'quantize')}, {_many(partition.dequantizes, 'dequantize')}"
    return f"{text}; borders: {borders}, {partition.boundary_bytes / 1024:.0f} KiB{cost}"


def _many(values: tuple[str, ...], what: str) -> str:
    return f"{len(values)} {what}{'s' if len(values) != 1 else ''}"


@dataclass(frozen=True)
class Explanation:
    """Everything that was decided about one name."""

    name: str
    decisions: tuple[Decision, ...]
    kernel: str
    blocked_by: str
    remedy: str
    shape: str
    source: str
    placement: Placement | None = None
    partition: Partition | None = None

    def text(self) -> str:
        lines = [self.name + (f"  {self.shape}" if self.shape else "") + (f"  ({self.source})" if self.source else "")]
        for decision in self.decisions:
            lines.append(f"  {decision.subject}: {decision.choice}")
            lines.append(f"    decided by {decision.author}")
            lines.append(f"    because {decision.why}")
            for other in decision.lost:
                cost = f"; it would take about {other.us:.3g} us" if other.us is not None else ""
                lines.append(f"    lost: {other.choice} ({other.author}): {other.why_lost}{cost}")
        if self.placement is not None and self.placement.us is not None:
            lines.append(
                f"  takes about {self.placement.us:.3g} us on the example batch, {self.placement.float_us:.3g} in float"
            )
        if self.partition is not None:
            lines.append(f"  {partition_text(self.partition)}")
        if self.kernel:
            lines.append(f"  kernel predicted: {self.kernel.replace('|', ' or ')}")
        if self.blocked_by:
            lines.append(f"  not int8 because {self.blocked_by}")
        if self.remedy:
            lines.append(f"  to change it: {self.remedy}")
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(plan: Plan, name: str) -> Explanation:
    """The chain of decisions for a node, a quantizer, or a module that holds exactly one planned operation.

    Raises:
        PlanError: QG306 the plan has no such name.
    """
    node = _resolve(plan, name)
    subjects = {node, *(q.name for q in plan.quantizers if any(p.node == node for p in q.ports))}
    decisions = tuple(d for d in plan.decisions if d.subject in subjects or d.subject == name)
    prediction = plan.prediction(node)
    fact = next((f for f in plan.nodes if f.name == node), None)
    placement = next((p for p in plan.placements if p.node == node), None)
    return Explanation(
        name=node,
        decisions=decisions,
        kernel=prediction.kernel if prediction else "",
        blocked_by=prediction.blocked_by if prediction else "",
        remedy=prediction.remedy if prediction else "",
        shape="x".join(map(str, fact.shape)) if fact else "",
        source=fact.source if fact else "",
        placement=placement,
        partition=plan.partitions[placement.partition] if placement else None,
    )


def _resolve(plan: Plan, name: str) -> str:
    subjects = {d.subject for d in plan.decisions}
    if name in subjects:
        return next((q.ports[0].node for q in plan.quantizers if q.name == name), name)
    inside = [p.node for p in plan.predictions if p.node.rpartition(":")[0] == name]
    if len(inside) == 1:
        return inside[0]
    near = nearest(name, subjects)
    raise PlanError(
        "QG306",
        f"the plan has no name '{name}'",
        where="explain",
        why=f"it holds {', '.join(inside)}" if inside else (f"did you mean {near}?" if near else "no name is close"),
        todo="list the names with `qatgraph show plan.json`",
    )


@dataclass(frozen=True)
class Difference:
    subject: str
    before: str
    after: str
    why: str


def diff(a: Plan, b: Plan) -> list[Difference]:
    """What two plans decide differently, in the order of the first, then what only the second has."""

    def choice(plan: Plan, decision: Decision | None) -> str:
        if decision is None:
            return "absent"
        bias = next((p.bias for p in plan.placements if p.node == decision.subject), "")
        observer = next((q.observer for q in plan.quantizers if q.name == decision.subject), "")
        return (
            decision.choice
            + (f", bias {bias}" if bias not in ("", "none") else "")
            + (f", {observer}" if observer else "")
        )

    first = {d.subject: d for d in a.decisions}
    second = {d.subject: d for d in b.decisions}
    found = []
    for subject in [*first, *(s for s in second if s not in first)]:
        old, new = first.get(subject), second.get(subject)
        before, after = choice(a, old), choice(b, new)
        if before != after:
            found.append(Difference(subject, before, after, new.why if new else f"not in the plan for {b.target}"))
    return found
