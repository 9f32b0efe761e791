"""Runs a pipeline over a copy of a graph and holds each pass to its word."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qatgraph.errors import PassError, QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.ir.properties import held
from qatgraph.ir.stages import Stage, verify_structure
from qatgraph.rewriting.contracts import (
    Answers,
    Prints,
    check_constants,
    check_numerics,
    check_parameters,
    check_properties,
    check_signature,
    fingerprints,
)
from qatgraph.rewriting.edit import Allowance, Edit
from qatgraph.rewriting.evidence import Evidence
from qatgraph.rewriting.passes import GraphPass, Pass, RewritePass
from qatgraph.rewriting.pattern import NearMiss, Refusal
from qatgraph.rewriting.pipeline import Pipeline


@dataclass(frozen=True)
class PassReport:
    """What one pass did; ``modified`` is computed from the graphs before and after, not claimed.

    ``seconds`` is the time of the pass, ``checking`` that of the checks behind it.
    """

    name: str
    modified: bool
    seconds: float
    checking: float
    changes: int = 0
    refused: tuple[Refusal, ...] = ()
    missed: tuple[NearMiss, ...] = ()
    before: str = ""
    after: str = ""

    def diff(self) -> str:
        """The change as a unified diff of the two texts."""
        return text_diff(self.name, self.before, self.after)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "modified": self.modified,
            "changes": self.changes,
            "milliseconds": self.seconds * 1e3,
            "checking_milliseconds": self.checking * 1e3,
            "refused": [vars(r) for r in self.refused],
            "missed": [vars(m) for m in self.missed],
            "diff": self.diff(),
        }


@dataclass
class PassManager:
    """``PassManager(passes).run(graph)`` returns a new graph at stage ``leaves``; ``reports`` tell the rest.

    Structure is verified after each pass. ``checked`` also runs the graph before and after each pass that changed it.
    ``allowance`` limits the rewrites (bisection); ``watch`` is called with each report as it is made. ``evidence`` is
    for the passes that need data.
    """

    passes: Iterable[Pass]
    leaves: Stage = Stage.CANONICAL
    checked: bool = True
    allowance: Allowance = field(default_factory=Allowance)
    watch: Callable[[PassReport], None] = lambda report: None
    reports: list[PassReport] = field(default_factory=list)
    evidence: Evidence | None = None

    def run(self, graph: Graph) -> Graph:
        pipeline = Pipeline(tuple(self.passes))
        pipeline.check_stage(graph.stage)
        pipeline.check_order(held(graph))
        if self.evidence is None or not self.evidence.batches:
            pipeline.check_data()
        verify_structure(graph.module, graph.stage, "what came before")
        graph = graph.clone()
        state = _State.of(graph, fingerprints(graph, deep=self.checked))
        for one in pipeline.graph_passes():
            report, state = self._run_one(one, graph, state)
            self.reports.append(report)
            self.watch(report)
        graph.set_info(stage=self.leaves)
        verify_structure(graph.module, self.leaves, "the pipeline")
        return graph.clone()  # takes over only what the graph reads: a folded weight's source goes

    def _run_one(self, one: GraphPass, graph: Graph, before: _State) -> tuple[PassReport, _State]:
        start = time.perf_counter()
        edit = Edit(graph, one.name, self.allowance, self.evidence)
        try:
            self._apply(one, graph, edit)
            graph.set_info(stage=one.leaves or graph.stage)
            seconds = time.perf_counter() - start
            verify_structure(graph.module, graph.stage, one.name)
            form = _Form.of(graph)
            modified = form != before.form
            if modified:
                with self._failing(one):
                    graph.module.recompile()
            answers = self._check(one, before, graph, modified)
        except PassError as error:
            error.after = error.after or _text(graph)
            error.diff = error.diff or text_diff(one.name, before.form.text, error.after)
            raise
        report = PassReport(
            one.name,
            modified,
            seconds,
            time.perf_counter() - start - seconds,
            edit.changes,
            tuple(edit.refused),
            tuple(sorted(edit.missed, key=lambda m: -m.matched / m.total)),
            before.form.text,
            form.text,
        )
        prints = fingerprints(graph, deep=self.checked, known=before.prints)
        return report, _State(graph.clone() if modified else before.graph, form, prints, answers)

    def _apply(self, one: GraphPass, graph: Graph, edit: Edit) -> None:
        if not isinstance(one, RewritePass):  # counts as one rewrite
            if not self.allowance.left():
                return
            self.allowance.spend(one.name, "")
        with self._failing(one):
            one.apply(graph, edit)
            _drop_unread(graph)

    @contextmanager
    def _failing(self, one: GraphPass) -> Iterator[None]:
        """What goes wrong inside is the fault of the pass."""
        try:
            yield
        except QatgraphError:
            raise
        except Exception as error:
            ran = ", ".join(r.name for r in self.reports) or "none"
            raise PassError(
                "QG206",
                f"the pass '{one.name}' failed",
                where=one.name,
                why=f"{type(error).__name__}: {error}",
                todo=f"mend the pass (passes before it: {ran})",
            ) from error

    def _check(self, one: GraphPass, before: _State, after: Graph, modified: bool) -> Answers:
        check_parameters(one, before.prints, after, deep=self.checked)
        check_signature(one, before.graph, after)
        check_properties(one, before.graph, after, done=not self.allowance.stopped)
        if not (self.checked and modified):
            return before.answers
        check_constants(one, before.graph, after)
        return check_numerics(one, before.graph, after, before.answers)


@dataclass(frozen=True)
class _Form:
    """What tells whether a pass changed a graph: its text, the hash of its structure, and the modules that it calls."""

    text: str
    structure: str
    modules: tuple[torch.nn.Module, ...]  # they compare by identity

    @classmethod
    def of(cls, graph: Graph) -> _Form:
        called = graph.module.graph.find_nodes(op="call_module")
        modules = tuple(graph.module.get_submodule(str(node.target)) for node in called)
        return cls(str(graph), graph.structural_hash(), modules)


@dataclass(frozen=True)
class _State:
    """Before a pass: a copy of the graph, what it and its parameters looked like, and what it gave for the probes."""

    graph: Graph
    form: _Form
    prints: Prints
    answers: Answers

    @classmethod
    def of(cls, graph: Graph, prints: Prints) -> _State:
        return cls(graph.clone(), _Form.of(graph), prints, {})


def text_diff(name: str, before: str, after: str) -> str:
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, f"before {name}", f"after {name}", n=2))


def _text(graph: Graph) -> str:
    """The text of a graph that may be broken."""
    try:
        return str(graph)
    except Exception as error:
        return f"(cannot be printed: {error})\n"


def _drop_unread(graph: Graph) -> None:
    for node in graph.module.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.module.graph.erase_node(node)
