"""The linter for QDQ files of any tool: what is wrong, slow or at risk in them on ONNX Runtime, and what to do."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from qatgraph.backends import lint_conditions, lint_grids, lint_match, lint_structure, ort_cpu
from qatgraph.backends.lint_products import Product, products, unexplained
from qatgraph.backends.lint_rule import SEVERITIES, Engine, Finding, Rule, Subject
from qatgraph.backends.onnx_facts import Reader
from qatgraph.backends.onnx_file import CONVERSIONS, OnnxFile
from qatgraph.errors import LowerError
from qatgraph.kernels import KernelNode
from qatgraph.planning.target import load_target

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (*lint_conditions.RULES, *lint_grids.RULES, *lint_structure.RULES), key=lambda r: SEVERITIES.index(r.severity)
    )
)
OURS = re.compile(r"(?:fused )?(n\d+)(?!\d)")  # the engine puts parts of its own in front of and behind a name


@dataclass(frozen=True)
class Lint:
    """``kernels`` are the nodes that the engine runs, under their names in the file; empty if it refuses the file."""

    findings: tuple[Finding, ...]
    kernels: tuple[KernelNode, ...]
    products: tuple[Product, ...]

    @cached_property
    def unexplained(self) -> tuple[str, ...]:
        """The products of dequantized operands that run in float while no finding says why: a gap in the rules."""
        return unexplained(self.products, self.findings)

    def work(self, rule: str) -> float:
        """The share of the multiplications that run in float, or in a file that the engine refuses, where it holds."""
        nodes = {f.node for f in self.findings if f.rule == rule}
        return sum(p.work for p in self.products if p.node in nodes and p.runs == "float")

    @cached_property
    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        found = Counter(f.severity for f in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "findings": [f.as_json() for f in self.findings],
            "kernels": [asdict(k) for k in self.kernels],
            "products": [asdict(p) for p in self.products],
            "unexplained": list(self.unexplained),
        }


def lint(model: Any) -> Lint:
    """Every finding of a QDQ model (``onnx.ModelProto``), the worst first: by severity, then the rules by the
    multiplications that they keep in float, then in the order of the file."""
    file = OnnxFile(model)
    operations, target, engine = Reader(file).operations, load_target("ort-cpu"), ask_engine(file)
    matches = {o.label: lint_match.match(target, o) for o in operations}
    subject = Subject(file, operations, matches, engine, target)
    order = {label: i for i, label in enumerate(file.labels.values())}
    held = list(lint_structure.conditions(subject))
    findings = []
    for rule in RULES:
        hits = [h for r, h in held if r == rule.id] if rule.condition else list(rule.function(subject))
        findings += [rule.finding(h) for h in sorted(hits, key=lambda h: order.get(h.node, -1))]
    kernels = tuple(k for kernels in engine.kernels.values() for k in kernels)
    found = Lint(tuple(findings), kernels, products(subject))
    heavy = {r.id: found.work(r.id) for r in RULES}
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), -heavy[f.rule]))
    return replace(found, findings=tuple(findings))


def ask_engine(file: OnnxFile) -> Engine:
    """What ONNX Runtime runs of the file, by label: each node gets a name of its own before."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    labels = {f"n{i}": file.labels.get(n.output[0] if n.output else "", "") for i, n in enumerate(model.graph.node)}
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    named = bytes(model.SerializeToString())
    try:
        graph = ort_cpu.optimized_graph(named)
    except LowerError as error:
        return Engine({}, refuses=error.why)
    kernels: dict[str, list[KernelNode]] = {}
    fused = []
    writers = {o: n.name for n in model.graph.node for o in n.output}
    for node, seen in zip(graph.node, ort_cpu.kernel_nodes(model.graph, graph), strict=True):
        own = OURS.match(node.name)
        label = labels.get(own[1] if own else writers.get(node.output[0], ""), "")
        if not label or node.op_type in CONVERSIONS or (not own and node.op_type in ort_cpu.PLUMBING):
            continue
        kernels.setdefault(label, []).append(KernelNode(label, node.op_type, seen.int8, seen.moves))
        fused += [] if own else [(node.op_type, label)]
    return Engine({k: tuple(v) for k, v in kernels.items()}, tuple(fused))
