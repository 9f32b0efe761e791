"""Pipelines: passes in order, as a value whose text round-trips."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qatgraph.errors import PassError, nearest
from qatgraph.ir.properties import PROPERTIES
from qatgraph.ir.stages import FLOAT, Stage
from qatgraph.rewriting.passes import GraphPass, Pass
from qatgraph.rewriting.registry import parse_passes, pipeline_named

_TEXT = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# commas part the steps, but not within braces; a brace that is never closed takes the rest, and the pass refuses it
_STEP = re.compile(rf"(?:[^,{{]|\{{(?:{_TEXT}|[^}}'\"])*\}}|\{{.*)+")


@dataclass(frozen=True)
class Pipeline:
    """``Pipeline.parse("canonicalize,my.py")``: passes with options, files of passes, and pipelines, which expand."""

    steps: tuple[Pass, ...]

    def __post_init__(self) -> None:
        known: dict[str, type[Pass]] = {}
        for step in self.steps:
            cls = type(step)
            if not isinstance(step, Pass):
                raise _no_pass(step)
            if not isinstance(getattr(step, "name", None), str):
                raise _unnamed(step)
            if known.setdefault(step.name, cls) is not cls:
                raise _two(known[step.name], cls)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read what ``str`` writes, and the names of pipelines and files of passes.

        Raises:
            PassError: QG201 no such pass or file, QG202 options that it does not take, QG205 a file without passes.
        """
        steps: list[Pass] = []
        for word in filter(None, (w.strip() for w in _STEP.findall(text))):
            steps += parse_passes(pipeline_named(word) or (word,))
        return cls(tuple(steps))

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.steps)

    def graph_passes(self) -> list[GraphPass]:
        """The passes that change the graph, without those that plan."""
        return [step for step in self.steps if isinstance(step, GraphPass)]

    def index(self, name: str) -> int:
        names = [step.name for step in self.steps]
        if name not in names:
            near = nearest(name, names)
            why = f"did you mean {near}?" if near else "no step bears this name"
            raise _no_step(f"'{name}'", str(self), why, "name one of its steps")
        return names.index(name)

    def insert(self, *passes: Pass, before: str = "", after: str = "") -> Pipeline:
        """With further steps before or after the first of a name; at the end when neither is given."""
        if before and after:
            what = f"before '{before}' and after '{after}' at once"
            raise _no_step(what, str(self), "one place is wanted", "give before or after")
        at = self.index(before) if before else self.index(after) + 1 if after else len(self.steps)
        return Pipeline((*self.steps[:at], *passes, *self.steps[at:]))

    def remove(self, name: str) -> Pipeline:
        at = self.index(name)
        return Pipeline((*self.steps[:at], *self.steps[at + 1 :]))

    def replace(self, name: str, *passes: Pass) -> Pipeline:
        at = self.index(name)
        return Pipeline((*self.steps[:at], *passes, *self.steps[at + 1 :]))

    def move(self, name: str, *, before: str = "", after: str = "") -> Pipeline:
        return self.remove(name).insert(self.steps[self.index(name)], before=before, after=after)

    def check_stage(self, stage: Stage) -> None:
        """Refuse a pass that takes another kind of graph: one with quantizers, or one without.

        Raises:
            PassError: QG213, naming the pass and both stages.
        """
        for step in self.graph_passes():
            if step.stage is not stage and not {step.stage, stage} <= FLOAT:
                raise PassError(
                    "QG213",
                    f"'{step.name}' takes a graph at the stage {step.stage}, and gets one at {stage}",
                    where=f"'{step.name}' in the pipeline",
                    why="no step before it leads from one stage to the other",
                    todo="take the step out, or run it on a graph of its stage",
                )
            stage = step.leaves or stage

    def check_order(self, have: Iterable[str] = ()) -> None:
        """Refuse an order in which a pass comes before what it requires.

        Raises:
            PassError: QG213, naming the pass and the one that ensures what is missing.
        """
        held = set(have)
        for step in self.graph_passes():
            missing = [name for name in step.requires if name not in held]
            if missing:
                raise _too_early(step, missing[0], self.graph_passes())
            held |= set(step.ensures)

    def check_data(self) -> None:
        """Refuse a pass that looks at calibration data, where there is none.

        Raises:
            PassError: QG218, naming the pass.
        """
        step = next((s for s in self.graph_passes() if s.needs_data), None)
        if step is not None:
            raise PassError(
                "QG218",
                f"'{step.name}' looks at calibration data, and there is none here",
                where=f"'{step.name}' in the pipeline",
                why="it searches what it does by the error on real inputs",
                todo="give it to canonicalize(graph, passes, data=batches), and plan and prepare what that returns; on "
                "the command line, name a job",
            )


def _no_pass(step: object) -> PassError:
    what, why = f"{step!r} is no pass", f"it is a {type(step).__name__}"
    todo = "give instances, or a text to Pipeline.parse"
    return PassError("QG205", what, where="pipeline", why=why, todo=todo)


def _unnamed(step: object) -> PassError:
    cls = type(step).__name__
    why = "reports, pipelines and errors call a pass by its name"
    todo = f"write name = 'verb-noun' in the body of {cls}"
    return PassError("QG205", f"the pass '{cls}' has no name", where="pipeline", why=why, todo=todo)


def _two(one: type[Pass], other: type[Pass]) -> PassError:
    places = (cls.file or f"{cls.__module__}.{cls.__qualname__}" for cls in (one, other))
    return PassError(
        "QG215",
        f"two passes of the pipeline have the name '{one.name}'",
        where="pipeline",
        why=f"one comes from {' and one from '.join(places)}",
        todo="rename one of them, or put it in the place of the other with Pipeline.replace",
    )


def _no_step(what: str, where: str, why: str, todo: str) -> PassError:
    return PassError("QG212", f"the pipeline has no step {what}", where=where, why=why, todo=todo)


def _too_early(step: GraphPass, missing: str, steps: list[GraphPass]) -> PassError:
    later = next((s.name for s in steps if missing in s.ensures), "")
    what = (PROPERTIES[missing].__doc__ or "").splitlines()[0].rstrip(".")
    return PassError(
        "QG213",
        f"'{step.name}' requires that the graph is {missing}, which nothing before it ensures",
        where=f"'{step.name}' in the pipeline",
        why=f"{missing}: {what[0].lower()}{what[1:]}",
        todo=f"put '{later}' before it" if later else f"put a pass before it that ensures '{missing}'",
    )
