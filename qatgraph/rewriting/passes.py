"""Base classes of passes. A pass is a small frozen dataclass; its fields are its options."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import fx

from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.pattern import Match, Pattern, Refusal


@dataclass(frozen=True)
class Numerics:
    """What a rewrite may do to results; checked on the example inputs.

    ``same``: bit-equal. ``within(eps)``: relative to the largest value, in float64.
    """

    kind: str
    eps: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "same" else f"within({self.eps:g})"


same = Numerics("same")


def within(eps: float) -> Numerics:
    return Numerics("within", eps)


@dataclass(frozen=True)
class Pass:
    """What every pass has: a name with its verb first, and text that round-trips its options."""

    name: ClassVar[str]

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class GraphPass(Pass, ABC):
    """A pass that changes the graph. ``stage`` is what it takes and leaves."""

    stage: ClassVar[Stage] = Stage.CAPTURED
    numerics: ClassVar[Numerics] = same

    @abstractmethod
    def apply(self, graph: Graph, edit: Edit) -> list[Refusal]:
        """Change ``graph`` through ``edit``; return what was refused and why."""


@dataclass(frozen=True)
class RewritePass(GraphPass):
    """Rewrite each occurrence of a pattern, to a fixed point.

    A pattern may match again what the pass has made; the budget turns an endless rewrite into an error.
    """

    pattern: ClassVar[Pattern]
    budget: ClassVar[int] = 10_000

    def check(self, match: Match) -> Refusal | None:
        """Return ``match.refuse(reason)`` to leave an occurrence as it is."""
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define rewrite()")

    def apply(self, graph: Graph, edit: Edit) -> list[Refusal]:
        from qatgraph.rewriting.pattern import match

        done: set[tuple[fx.Node, ...]] = set()  # an occurrence whose nodes only changed their record matches again
        for _ in range(self.budget):
            refusals: list[Refusal] = []
            for node in graph.nodes:
                found = match(self.pattern, node)
                if found is None or (key := (node, *found.bound.values())) in done:
                    continue
                refusal = self.check(found)
                if refusal is not None:
                    refusals.append(refusal)
                    continue
                done.add(key)
                self.rewrite(found, edit)
                break
            else:
                if done:
                    graph.module.graph.eliminate_dead_code()  # the inner operations of what was replaced
                return refusals
        raise PassError(
            "QG204",
            f"'{self.name}' did not come to an end after {self.budget} rewrites",
            where=self.name,
            why="its result matches its own pattern",
            todo="make the rewrite produce something that the pattern does not match",
        )


@dataclass(frozen=True)
class PlanningPass(Pass):
    """States constraints for the plan; never touches the graph (see ``qatgraph.planning``)."""

    def state(self, graph: Graph, context: Any) -> Iterable[Any]:
        """Constraints, each with an author. ``context`` holds ``target`` and ``recipe``."""
        raise NotImplementedError(f"{type(self).__name__} must define state()")


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """``name{a=1,b='x'}`` -> ``("name", {"a": 1, "b": "x"})``."""
    name, brace, rest = text.strip().partition("{")
    if not brace:
        return name, {}
    try:
        call = ast.parse(f"f({rest.removesuffix('}')})", mode="eval").body
        if not rest.endswith("}") or not isinstance(call, ast.Call):
            raise ValueError("missing }")
        if call.args:
            raise ValueError("an option has no name")
        return name, {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError) as error:
        raise PassError(
            "QG202",
            f"cannot read the pass options '{text}'",
            where=name,
            why=str(error),
            todo="write them like name{option=value,other='text'}",
        ) from error
