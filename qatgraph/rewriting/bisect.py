"""Which rewrite is to blame? Binary search over how many of a pipeline's rewrites may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.properties import held
from qatgraph.rewriting.contracts import outputs_differ
from qatgraph.rewriting.edit import Allowance
from qatgraph.rewriting.evidence import Evidence
from qatgraph.rewriting.manager import PassManager, text_diff
from qatgraph.rewriting.pipeline import Pipeline

Predicate = Callable[[Graph], bool]


@dataclass(frozen=True)
class Culprit:
    """The first rewrite with which the predicate holds: the pass, its how-manieth rewrite, the node, and the change.

    ``rewrite`` is 0 where the pass fails outside of its rewrites; ``node`` is empty where a pass counts as one rewrite.
    """

    pass_name: str
    rewrite: int
    node: str
    rewrites: int
    diff: str
    error: str = ""

    def __str__(self) -> str:
        where = f"rewrite {self.rewrite}, at '{self.node}'" if self.node else "the pass as a whole"
        of = f"(of {self.rewrites} rewrites in the pipeline)"
        return "\n".join(filter(None, [f"'{self.pass_name}': {where} {of}", self.error, self.diff]))


def bisect(graph: Graph, pipeline: Pipeline, bad: Predicate | None = None, evidence: Evidence | None = None) -> Culprit:
    """The first pass, and within it the first rewrite, with which ``bad(graph after)`` holds.

    By default, a graph is bad if its outputs differ from those of ``graph``. Passes run unchecked. An error of a pass,
    or of the predicate, counts as bad. As with any bisection, one change from good to bad is assumed. Source of the
    method: LLVM's ``-opt-bisect-limit``.

    Raises:
        PassError: QG213 this order or graph is refused, QG214 bad already without any rewrite, or good with all.
    """
    pipeline.check_stage(graph.stage)
    pipeline.check_order(held(graph))
    search = _Search(graph, pipeline, bad or numbers_differ(graph), evidence)
    whole = search.run(None)
    if not whole.bad:
        raise _nothing_to_find("the predicate does not hold after the whole pipeline", "nothing is to blame")
    good = search.run(0)
    if good.failed:
        return good.outside(whole.count)
    if good.bad:
        why = f"the predicate itself fails: {good.error}" if good.error else "the fault is in the model or capture"
        raise _nothing_to_find("the predicate holds before the first rewrite", why)
    first_bad = search.run(whole.count)
    if not first_bad.bad and not whole.failed:
        raise _nothing_to_find("the predicate gives two answers for one graph", "it depends on something else")
    if not first_bad.bad:
        return whole.outside(whole.count)
    while first_bad.count - good.count > 1:
        middle = search.run((good.count + first_bad.count) // 2)
        good, first_bad = (good, middle) if middle.bad else (middle, first_bad)
    return first_bad.culprit(good, whole.count)


def numbers_differ(graph: Graph, eps: float = 1e-5) -> Predicate:
    """The predicate that an output differs by more than ``eps`` of its largest value on a probe, in float64."""
    return lambda after: outputs_differ(graph, after, eps)


@dataclass(frozen=True)
class _Run:
    """The pipeline with so many rewrites: was it bad, which pass failed (none if the predicate decided), and why."""

    spent: tuple[tuple[str, str], ...]
    bad: bool
    text: str = ""
    failed: str = ""
    error: str = ""
    diff: str = ""

    @property
    def count(self) -> int:
        return len(self.spent)

    def outside(self, total: int) -> Culprit:
        """The pass failed, but not in one of its rewrites."""
        return Culprit(self.failed, 0, "", total, self.diff, self.error)

    def culprit(self, good: _Run, total: int) -> Culprit:
        name, node = self.spent[-1]
        number = sum(1 for author, _ in self.spent if author == name)
        diff = self.diff if self.failed else text_diff(name, good.text, self.text)
        return Culprit(name, number, node, total, diff, self.error)


@dataclass
class _Search:
    graph: Graph
    pipeline: Pipeline
    predicate: Predicate
    evidence: Evidence | None

    def run(self, limit: int | None) -> _Run:
        allowance = Allowance(limit)
        manager = PassManager(
            self.pipeline.steps, self.graph.stage, checked=False, allowance=allowance, evidence=self.evidence
        )
        try:
            after = manager.run(self.graph)
        except Exception as error:
            failed = [*(p.name for p in self.pipeline.graph_passes()), "the pipeline"][len(manager.reports)]
            return _Run(tuple(allowance.spent), True, "", failed, _sentence(error), getattr(error, "diff", ""))
        try:
            return _Run(tuple(allowance.spent), bool(self.predicate(after)), str(after))
        except Exception as error:
            return _Run(tuple(allowance.spent), True, str(after), "", _sentence(error))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _nothing_to_find(what: str, why: str) -> PassError:
    todo = "check the predicate, or bisect another pipeline"
    return PassError("QG214", what, where="bisect", why=why, todo=todo)
