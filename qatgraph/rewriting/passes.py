"""Base classes of passes. A pass is a small frozen dataclass; its fields are its options."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import fx

from qatgraph.errors import PassError, nearest
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.ir.properties import PROPERTIES
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.check_pattern import check_pattern
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import match_or_miss
from qatgraph.rewriting.pattern import Match, NearMiss, Pattern, Refusal, roots_of


@dataclass(frozen=True)
class Numerics:
    """What a rewrite may do to results; checked on probe inputs.

    ``same``: bit-equal. ``within(eps)``: relative to the largest value, in float64. ``changes_grid(eps, roles)``: the
    same, and of the constants that an operation reads, only those at these roles get other values: ``"weight"``, or
    of one kind alone ``"layer_norm.weight"``.
    """

    kind: str
    eps: float = 0.0
    roles: tuple[str, ...] = ()

    def __str__(self) -> str:
        inside = ", ".join([f"{self.eps:g}", *self.roles])
        return self.kind if self.kind == "same" else f"{self.kind}({inside})"


same = Numerics("same")


def within(eps: float) -> Numerics:
    return Numerics("within", eps)


def changes_grid(eps: float, *roles: str) -> Numerics:
    return Numerics("changes-grid", eps, roles)


@dataclass(frozen=True)
class Pass:
    """What every pass has: a name with its verb first, and text that round-trips its options.

    ``file`` is the file of passes that it was read from, which stands in front of its name.
    """

    name: ClassVar[str]
    file: ClassVar[str] = ""

    def __str__(self) -> str:
        name = f"{self.file}:{self.name}" if self.file else self.name
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{name}{{{','.join(options)}}}" if options else name

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]


def _check_declarations(cls: Any) -> None:
    """Refuse what a pass cannot declare, when its class is defined."""
    for verb in ("requires", "ensures"):
        unknown = next((name for name in getattr(cls, verb) if name not in PROPERTIES), None)
        if unknown is not None:
            near = nearest(unknown, PROPERTIES)
            raise PassError(
                "QG211",
                f"'{cls.__name__}' {verb} '{unknown}', which is no property of graphs",
                where=f"{cls.__name__}.{verb}",
                why=f"did you mean {near}?" if near else "no property bears this name",
                todo=f"use {', '.join(PROPERTIES)}",
            )
    if not isinstance(cls.numerics, Numerics):
        raise PassError(
            "QG207",
            f"'{cls.__name__}' declares its numerics as {cls.numerics!r}",
            where=f"{cls.__name__}.numerics",
            why="that cannot be checked",
            todo="write same, within(eps) or changes_grid(eps, 'weight')",
        )


@dataclass(frozen=True)
class GraphPass(Pass, ABC):
    """A pass that changes the graph.

    ``stage`` is what it takes, ``leaves`` what it makes of it (the same by default). ``requires`` and ``ensures`` name
    properties of graphs (``qatgraph.ir.properties``): a pipeline that does not ensure what a pass requires is refused
    before it runs.
    ``needs_data``: it looks at calibration data and a plan, ``edit.evidence``.
    """

    stage: ClassVar[Stage] = Stage.CAPTURED
    leaves: ClassVar[Stage | None] = None
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    numerics: ClassVar[Numerics] = same
    needs_data: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _check_declarations(cls)

    @abstractmethod
    def apply(self, graph: Graph, edit: Edit) -> None:
        """Change ``graph`` through ``edit``; ``edit.refuse(node, why)`` says what was left alone and why."""


@dataclass(frozen=True)
class RewritePass(GraphPass):
    """Rewrite each occurrence of a pattern, to a fixed point.

    Roots are visited in order of execution, again and again until a sweep rewrites nothing; where two matches overlap,
    the one whose root comes first is rewritten, and the other is matched against what that left. ``budget`` turns an
    endless rewrite into an error.
    """

    pattern: ClassVar[Pattern]
    budget: ClassVar[int] = 10_000

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "pattern" in cls.__dict__:
            check_pattern(cls.pattern, cls.__name__)

    def check(self, match: Match) -> Refusal | None:
        """Return ``match.refuse(reason)`` to leave an occurrence as it is."""
        return None

    @abstractmethod
    def rewrite(self, match: Match, edit: Edit) -> None:
        """Change the operations of the match, and no others."""

    def apply(self, graph: Graph, edit: Edit) -> None:
        pattern = self.pattern.resolve()
        kinds = {kind for root in roots_of(pattern) for kind in root.kinds}
        done: set[tuple[fx.Node, ...]] = set()  # an occurrence whose nodes only changed their record matches again
        before = -1
        while before < len(done) and edit.allowance.left():
            before = len(done)
            edit.refused.clear()
            edit.missed.clear()
            self._sweep([n for n in graph.nodes if record(n).kind in kinds], pattern, edit, done)
        if done:
            graph.module.graph.eliminate_dead_code()

    def _sweep(self, nodes: list[fx.Node], pattern: Pattern, edit: Edit, done: set[tuple[fx.Node, ...]]) -> None:
        for node in nodes:
            if node._erased or not node.users:
                continue
            if not edit.allowance.left():
                return
            found = match_or_miss(pattern, node)
            if isinstance(found, NearMiss):
                edit.missed.append(found)
            elif found.nodes in done:
                continue
            elif (refusal := self._checked(found)) is not None:
                edit.refused.append(refusal)
            else:
                edit.allowance.spend(self.name, record(node).name)
                done.add(found.nodes)
                self._rewrite_one(found, edit)
                if len(done) > self.budget:
                    raise self._endless()

    def _checked(self, found: Match) -> Refusal | None:
        refusal = self.check(found)
        if refusal is None or isinstance(refusal, Refusal):
            return refusal
        raise PassError(
            "QG206",
            f"the check of '{self.name}' returns {refusal!r}",
            where=f"{type(self).__name__}.check",
            why="that is neither None, to rewrite, nor a refusal with its reason",
            todo="return match.refuse(reason), or nothing",
        )

    def _rewrite_one(self, found: Match, edit: Edit) -> None:
        with edit.within(found.nodes):
            self.rewrite(found, edit)
        for node in sorted(found.nodes, reverse=True):
            if not node._erased and not node.users:
                node.graph.erase_node(node)  # so that users are counted without what is dead

    def _endless(self) -> PassError:
        return PassError(
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
        if not rest.endswith("}"):
            raise ValueError("it does not end in }")
        call = ast.parse(f"f({rest.removesuffix('}')})", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("what stands in braces is no list of options")
        names = [k.arg for k in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            raise ValueError("an option is given twice" if len(set(names)) < len(names) else "an option has no name")
        return name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise PassError(
            "QG202",
            f"cannot read the pass options '{text}'",
            where=name,
            why=str(error),
            todo="write them like name{option=value,other='text'}",
        ) from error
