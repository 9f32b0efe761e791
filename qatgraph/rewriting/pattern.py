"""Declarative patterns over operation kinds, rooted at the last operation.

``Op("add", Op("linear", Any("x"), Const("w"), name="fc"), Any("skip"))`` matches an add of a linear and anything.
A name that occurs twice means one value. A pattern is a value: it prints, compares, and is checked when the pass
that holds it is defined. ``matcher.py`` does the matching.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any as Anything

from torch import fx

from qatgraph.ir.meta import record

Attributes = Mapping[str, Anything]  # argument of the operator's schema -> a value, or a predicate on it


class Pattern:
    """Base of all patterns."""

    name: str

    def parts(self) -> tuple[Pattern, ...]:
        """The patterns directly inside."""
        return ()

    def resolve(self) -> Pattern:
        """The pattern to match: itself, unless it is written in another form (PyTorch code)."""
        return self

    def elements(self) -> int:
        """How many elements a full match has: "matched 7 of 8" counts these."""
        return 1 + sum(p.elements() for p in self.parts())


@dataclass(frozen=True)
class Any(Pattern):
    """Any value; a name binds it."""

    name: str = ""


@dataclass(frozen=True)
class Const(Pattern):
    """A parameter or buffer."""

    name: str = ""


@dataclass(frozen=True)
class Number(Pattern):
    """A literal number (or a constant of one element), to six digits; ``None`` is any. A name binds the number."""

    value: float | None = None
    name: str = ""


@dataclass(frozen=True)
class _Around(Pattern):
    """A pattern that holds one other, and counts as much."""

    inner: Pattern

    def parts(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def elements(self) -> int:
        return self.inner.elements()


@dataclass(frozen=True)
class Opt(_Around):
    """An operand that may be absent (or ``None``): the bias of a linear."""


@dataclass(frozen=True, init=False)
class Alt(Pattern):
    """The first of several patterns that matches."""

    options: tuple[Pattern, ...]

    def __init__(self, *options: Pattern) -> None:
        object.__setattr__(self, "options", options)

    def parts(self) -> tuple[Pattern, ...]:
        return self.options

    def elements(self) -> int:
        return max(p.elements() for p in self.options)


@dataclass(frozen=True)
class Moved(_Around):
    """``inner`` behind any number (also none) of operations that only move elements: reshape, transpose, slice …"""


@dataclass(frozen=True, init=False)
class Op(Pattern):
    """An operation of one kind (or of several, joined by ``|``). Fewer operands than the node has leave the rest free.

    ``where`` holds attributes by the names of the operator's schema: ``{"dim": -1}``, or a predicate on the value.
    What is not named may have any value: an ``add`` may scale its second operand unless ``where={"alpha": 1}``.
    ``users`` is how many operations may read the result (a pass that takes an operation away wants 1).
    """

    kind: str
    operands: tuple[Pattern, ...]
    name: str
    where: Attributes
    users: int | None

    def __init__(
        self, kind: str, *operands: Pattern, name: str = "", where: Attributes | None = None, users: int | None = None
    ) -> None:
        for key, value in (("kind", kind), ("operands", operands), ("name", name), ("users", users)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "where", dict(where or {}))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.kind.split("|"))

    def parts(self) -> tuple[Pattern, ...]:
        return self.operands

    def elements(self) -> int:
        return super().elements() + len(self.where) + (self.users is not None)

    def __hash__(self) -> int:
        return hash((self.kind, self.operands, self.name, self.users, tuple(self.where)))


@dataclass(frozen=True, init=False)
class Group(Pattern):
    """Several outputs: operations that share values by name, as three linears that read one ``x``.

    The first is the root; each further one is looked for, in order of execution, among the readers of what is bound.
    """

    roots: tuple[Op, ...]

    def __init__(self, *roots: Op) -> None:
        object.__setattr__(self, "roots", roots)

    def parts(self) -> tuple[Pattern, ...]:
        return self.roots

    def elements(self) -> int:
        return sum(p.elements() for p in self.roots)


def roots_of(pattern: Pattern) -> tuple[Op, ...]:
    """The operations that a match may end in (of a group: in its first)."""
    pattern = pattern.resolve()
    if isinstance(pattern, Op):
        return (pattern,)
    if isinstance(pattern, Group):
        return roots_of(pattern.roots[0])
    if isinstance(pattern, Alt):
        return tuple(root for option in pattern.options for root in roots_of(option))
    return ()


def walk(pattern: Pattern) -> Iterator[Pattern]:
    yield pattern
    for part in pattern.parts():
        yield from walk(part)


@dataclass(frozen=True)
class Refusal:
    """Why a match was not rewritten: ``node`` is the root of the match, or where the reason lies."""

    node: str
    reason: str


@dataclass(frozen=True)
class NearMiss:
    """What almost matched: ``root`` would have been the last operation; it stopped at the value ``at``."""

    root: str
    matched: int
    total: int
    at: str
    why: str

    @property
    def near(self) -> bool:
        """At least half of the pattern was there."""
        return 2 * self.matched >= self.total and self.matched > 1

    def __str__(self) -> str:
        return f"'{self.root}': matched {self.matched} of {self.total}; {self.why}"


@dataclass
class Match:
    """One occurrence. ``match["x"]`` is the node (or number) bound to a name; ``match.root`` the last operation.

    ``nodes`` are all operations that the pattern matched, named or not; the rewrite may change these only.
    """

    root: fx.Node
    bound: dict[str, Anything] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Anything:
        return self.bound[name]

    def __contains__(self, name: str) -> bool:
        return name in self.bound

    def refuse(self, reason: str) -> Refusal:
        return Refusal(record(self.root).name, reason)
