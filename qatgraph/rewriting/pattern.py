"""Declarative patterns over operation kinds, rooted at the last operation.

``Op("add", Op("linear", Any("x"), Const("w"), name="fc"), Any("skip"))`` matches an add of a linear and
anything. Operands of commuting kinds are tried in both orders; a name that occurs twice must mean one node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any as Anything

from torch import fx

from qatgraph.ir.meta import has_record, record
from qatgraph.ops import BY_NAME


class Pattern:
    """Base of all patterns."""


@dataclass(frozen=True)
class Any(Pattern):
    """Any node."""

    name: str


@dataclass(frozen=True)
class Const(Pattern):
    """A parameter or buffer."""

    name: str


@dataclass(frozen=True)
class Number(Pattern):
    """A literal number, to six digits; ``None`` is any number."""

    value: float | None


@dataclass(frozen=True, init=False)
class Op(Pattern):
    """An operation of one kind. Fewer operands than the node has leave the rest free."""

    kind: str
    operands: tuple[Pattern, ...]
    name: str

    def __init__(self, kind: str, *operands: Pattern, name: str = "") -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "operands", operands)
        object.__setattr__(self, "name", name)


@dataclass(frozen=True)
class Refusal:
    """Why a match was not rewritten: ``node`` is the root of the match."""

    node: str
    reason: str


@dataclass
class Match:
    """One occurrence. ``match["x"]`` is the node bound to a name; ``match.root`` the last operation."""

    root: fx.Node
    bound: dict[str, fx.Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Node:
        return self.bound[name]

    def refuse(self, reason: str) -> Refusal:
        return Refusal(record(self.root).name, reason)


def match(pattern: Pattern, root: fx.Node) -> Match | None:
    """The first way in which the pattern matches at ``root``; deterministic."""
    for bound in _bindings(pattern, root, {}):
        return Match(root, bound)
    return None


def _bindings(pattern: Pattern, value: Anything, bound: dict[str, fx.Node]) -> Iterator[dict[str, fx.Node]]:
    if isinstance(pattern, Number):
        number = isinstance(value, (int, float))
        if number and (pattern.value is None or math.isclose(value, pattern.value, rel_tol=1e-6)):
            yield bound
        return
    if not isinstance(value, fx.Node):
        return
    if isinstance(pattern, Op):
        if not has_record(value) or record(value).kind != pattern.kind:
            return
        for operands in _orders(pattern, value):
            yield from _all(pattern.operands, operands, _bind(bound, pattern.name, value))
    elif isinstance(pattern, Any) or (isinstance(pattern, Const) and value.op == "get_attr"):
        extended = _bind(bound, pattern.name, value)
        if extended is not None:
            yield extended


def _orders(pattern: Op, node: fx.Node) -> list[tuple[Anything, ...]]:
    have = node.args[: len(pattern.operands)]
    if len(have) < len(pattern.operands):
        return []
    known = BY_NAME.get(pattern.kind)
    swap = known is not None and known.commutes and len(have) == 2
    return [have, have[::-1]] if swap else [have]


def _all(
    patterns: tuple[Pattern, ...], values: tuple[Anything, ...], bound: dict[str, fx.Node] | None
) -> Iterator[dict[str, fx.Node]]:
    if bound is None:
        return
    if not patterns:
        yield bound
        return
    for step in _bindings(patterns[0], values[0], bound):
        yield from _all(patterns[1:], values[1:], step)


def _bind(bound: dict[str, fx.Node], name: str, node: fx.Node) -> dict[str, fx.Node] | None:
    if not name:
        return bound
    if name in bound:
        return bound if bound[name] is node else None
    return {**bound, name: node}
