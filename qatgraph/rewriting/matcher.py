"""Matching: deterministic, total, and able to say what almost matched.

Operands of a commuting kind are tried as written, then swapped; alternatives in the order in which they stand. The
first way that fits is the match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any as Anything

import torch
from torch import fx

from qatgraph.ir.meta import has_record, record
from qatgraph.ops import BY_NAME, REFINED, keeps_grid
from qatgraph.rewriting.pattern import Alt, Const, Group, Match, Moved, NearMiss, Number, Op, Opt, Pattern

_ABSENT = object()


@dataclass(frozen=True)
class State:
    """A partial match; ``count`` is how many elements of the pattern it holds."""

    bound: dict[str, Anything] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    count: int = 0

    def bind(self, name: str, value: Anything) -> State | None:
        if not name:
            return replace(self, count=self.count + 1)
        if name in self.bound and self.bound[name] is not value and self.bound[name] != value:
            return None
        return replace(self, bound={**self.bound, name: value}, count=self.count + 1)

    def with_node(self, node: fx.Node) -> State:
        return self if node in self.nodes else replace(self, nodes=(*self.nodes, node))


@dataclass
class Trail:
    """The attempt that got furthest: how far, at which value, and why it stopped."""

    count: int = -1
    at: str = ""
    why: str = ""

    def stop(self, state: State, value: Anything, why: str) -> None:
        if state.count > self.count:
            self.count, self.at, self.why = state.count, _label(value), why


def match(pattern: Pattern, root: fx.Node) -> Match | None:
    """The first way in which the pattern matches at ``root``."""
    found = next(_match(pattern, root, State(), Trail()), None)
    return None if found is None else Match(root, found.bound, found.nodes)


def match_or_miss(pattern: Pattern, root: fx.Node) -> Match | NearMiss:
    """The match at ``root``, or what stood in its way."""
    trail = Trail()
    found = next(_match(pattern, root, State(), trail), None)
    if found is not None:
        return Match(root, found.bound, found.nodes)
    return NearMiss(_name(root), trail.count, pattern.elements(), trail.at, trail.why)


def _match(pattern: Pattern, value: Anything, state: State, trail: Trail) -> Iterator[State]:
    pattern = pattern.resolve()
    if isinstance(pattern, Opt):
        if value is _ABSENT or value is None:
            yield replace(state, count=state.count + pattern.elements())
        else:
            yield from _match(pattern.inner, value, state, trail)
    elif isinstance(pattern, Alt):
        for option in pattern.options:
            yield from _match(option, value, state, trail)
    elif isinstance(pattern, Moved):
        yield from _moved(pattern, value, state, trail)
    elif value is _ABSENT:
        trail.stop(state, value, "an operand is missing")
    elif isinstance(pattern, Group):
        yield from _group(pattern, value, state, trail)
    elif isinstance(pattern, Op):
        yield from _operation(pattern, value, state, trail)
    else:
        yield from _leaf(pattern, value, state, trail)


def _leaf(pattern: Pattern, value: Anything, state: State, trail: Trail) -> Iterator[State]:
    if isinstance(pattern, Number):
        number = _number(value)
        if number is None:
            trail.stop(state, value, f"{_label(value)} is not a number")
            return
        if pattern.value is not None and not math.isclose(number, pattern.value, rel_tol=1e-6):
            trail.stop(state, value, f"{number:g} stands where {pattern.value:g} is wanted")
            return
        value = number
    elif not isinstance(value, fx.Node):
        trail.stop(state, value, f"{value!r} stands where a tensor is wanted")
        return
    elif isinstance(pattern, Const) and value.op != "get_attr":
        trail.stop(state, value, f"{_label(value)} is not a constant")
        return
    found = state.bind(pattern.name, value)
    if found is None:
        trail.stop(state, value, f"{_label(value)} is not the value that '{pattern.name}' is elsewhere")
        return
    yield found


def _operation(pattern: Op, node: Anything, state: State, trail: Trail) -> Iterator[State]:
    if not isinstance(node, fx.Node) or not has_record(node):
        trail.stop(state, node, f"{_label(node)} stands where {_kinds(pattern)} is wanted")
        return
    if record(node).kind not in pattern.kinds:
        trail.stop(state, node, f"{_label(node)} is no {_kinds(pattern)}")
        return
    bound = state.bind(pattern.name, node)
    if bound is None:
        trail.stop(state, node, f"{_label(node)} is not the operation that '{pattern.name}' is elsewhere")
        return
    bound = bound.with_node(node)
    for name, wanted in pattern.where.items():
        have = attribute(node, name)
        if not (wanted(have) if callable(wanted) else _equal(have, wanted)):
            shown = "has another" if callable(wanted) else f"wants {wanted!r} as"
            trail.stop(bound, node, f"{_label(node)} {shown} '{name}' (it is {have!r})")
            return
        bound = replace(bound, count=bound.count + 1)
    for order in _orders(pattern, node):
        for found in _operands(pattern.operands, order, bound, trail):
            if pattern.users is None:
                yield found
            elif len(node.users) == pattern.users:
                yield replace(found, count=found.count + 1)
            else:
                trail.stop(found, node, f"{_label(node)} has {len(node.users)} users")


def _operands(
    patterns: tuple[Pattern, ...], values: tuple[Anything, ...], state: State, trail: Trail
) -> Iterator[State]:
    if not patterns:
        yield state
        return
    for step in _match(patterns[0], values[0], state, trail):
        yield from _operands(patterns[1:], values[1:], step, trail)


def _orders(pattern: Op, node: fx.Node) -> list[tuple[Anything, ...]]:
    wanted, given = len(pattern.operands), operands(node)
    have = tuple(given[:wanted]) + (_ABSENT,) * (wanted - len(given))
    kind = record(node).kind
    known = BY_NAME.get(REFINED.get(kind, kind))
    scaled = attribute(node, "alpha") not in (None, 1)  # ``x + alpha * y`` does not commute
    return [have, have[::-1]] if known is not None and known.commutes and wanted == 2 and not scaled else [have]


def _moved(pattern: Moved, value: Anything, state: State, trail: Trail) -> Iterator[State]:
    yield from _match(pattern.inner, value, state, trail)
    if isinstance(value, fx.Node) and has_record(value) and keeps_grid(record(value).kind):
        yield from _moved(pattern, value.args[0], state.with_node(value), trail)


def _group(pattern: Group, root: Anything, state: State, trail: Trail) -> Iterator[State]:
    for first in _match(pattern.roots[0], root, state, trail):
        yield from _others(pattern.roots[1:], root, first, trail)


def _others(roots: tuple[Op, ...], root: fx.Node, state: State, trail: Trail) -> Iterator[State]:
    if not roots:
        yield state
        return
    trail.stop(state, root, f"no further {_kinds(roots[0])} reads what the match binds")
    for node in _candidates(roots[0], state):
        for step in _match(roots[0], node, state, trail):
            yield from _others(roots[1:], root, step, trail)


def _candidates(root: Op, state: State) -> list[fx.Node]:
    """Where a further root of a group may be: the value of its name, or a reader of what is bound."""
    known = state.bound.get(root.name)
    if isinstance(known, fx.Node):
        return [known]
    near = {user for value in state.bound.values() if isinstance(value, fx.Node) for user in value.users}
    # fx nodes compare by order of execution
    return [node for node in sorted(near) if node not in state.nodes and has_record(node)]


def operands(node: fx.Node) -> list[Anything]:
    """The tensors and numbers that an operation works on, without its attributes; a list of tensors is spread out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(node.args)
    found: list[Anything] = []
    for argument in schema.arguments:
        if argument.kwarg_only or not is_operand(argument):
            continue
        value = attribute(node, argument.name)
        found += value if isinstance(value, (list, tuple)) else [value]
    return found


def is_operand(argument: Anything) -> bool:
    """Whether an argument of a schema is a tensor, tensors, or a number that may stand for one."""
    return "Tensor" in str(argument.type) or str(argument.type) == "number"


def attribute(node: fx.Node, name: str) -> Anything:
    """The argument of the operator's schema with this name, or its default; ``None`` if there is none."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, argument.default_value)
    return node.kwargs.get(name)


def _equal(have: Anything, wanted: Anything) -> bool:
    if isinstance(have, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return len(have) == len(wanted) and all(map(_equal, have, wanted))
    if isinstance(wanted, float) and isinstance(have, (int, float)):
        return math.isclose(have, wanted, rel_tol=1e-6)
    return bool(have == wanted)


def _number(value: Anything) -> float | None:
    """A literal, or a constant tensor of one element."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        owner: Anything = value.graph.owning_module
        for part in str(value.target).split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, torch.Tensor) and owner.numel() == 1 and not isinstance(owner, torch.nn.Parameter):
            return float(owner)
    return None


def _label(value: Anything) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, fx.Node):
        return f"'{_name(value)}'"
    return repr(value)


def _name(node: fx.Node) -> str:
    return record(node).name if has_record(node) else str(node.target)


def _kinds(pattern: Op) -> str:
    return " or ".join(pattern.kinds)
