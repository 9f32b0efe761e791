"""Refuses a pattern that can match nothing, when the pass that holds it is defined."""

from __future__ import annotations

import math
from typing import Any

import torch

from qatgraph.errors import PassError, nearest
from qatgraph.ops import BY_NAME, REFINED
from qatgraph.rewriting.matcher import is_operand
from qatgraph.rewriting.pattern import Alt, Group, Number, Op, Opt, Pattern
from qatgraph.rewriting.pattern import Any as AnyValue

WITHOUT_SCHEMA = ("getitem", "sym_size", "dropout", "fake_quantize")  # Python functions, and modules of our own


def check_pattern(pattern: Pattern, owner: str) -> None:
    """Raise PassError QG209, naming the pass and the element at fault.

    What is written as code is left to its first use: its operations exist, since they are captured.
    """
    _check_parts(pattern, owner)
    _check_names(pattern, owner)
    if not _ends_in_operations(pattern):
        raise _nothing(owner, pattern, "it ends in no operation", "put an Op, or an Alt or Group of Ops, at the root")


def _check_parts(pattern: Pattern, owner: str) -> None:
    if not isinstance(pattern, Pattern):
        raise _nothing(owner, pattern, "it is no pattern", "write Any(name), Const(name), Number(value) or an Op")
    if isinstance(pattern, (Alt, Group)) and not pattern.parts():
        raise _nothing(owner, pattern, "it has no options", "give it at least one pattern")
    for part in pattern.parts():
        _check_parts(part, owner)
    if isinstance(pattern, Op):
        _check_op(pattern, owner)


def _check_names(pattern: Pattern, owner: str) -> dict[str, Pattern]:
    """What each name stands for in every match: one value. An option, which a match may leave out, decides nothing."""
    own = getattr(pattern, "name", "")
    found = {own: pattern} if own else {}
    for part in pattern.parts():
        inner = _check_names(part, owner)
        for name, other in {} if isinstance(pattern, (Alt, Opt)) else inner.items():
            if name == own or not _may_be_one(found.get(name, other), other):
                raise _nothing(owner, pattern, f"'{name}' cannot be all that bears this name", "name each by itself")
            found[name] = other if isinstance(found.get(name), AnyValue) else found.get(name, other)
    return found


def _may_be_one(one: Pattern, other: Pattern) -> bool:
    if isinstance(one, Op) and isinstance(other, Op):
        bases = [{REFINED.get(kind, kind) for kind in op.kinds} for op in (one, other)]
        return bool(bases[0] & bases[1])
    if isinstance(one, Number) and isinstance(other, Number):
        return None in (one.value, other.value) or one.value == other.value
    kinds = {type(one), type(other)}
    return len(kinds) == 1 or (AnyValue in kinds and Number not in kinds)


def _ends_in_operations(pattern: Pattern) -> bool:
    if isinstance(pattern, Alt):
        return all(map(_ends_in_operations, pattern.options))
    if isinstance(pattern, Group):
        return all(isinstance(root, Op) for root in pattern.roots)
    return isinstance(pattern, Op) or _is_code(pattern)


def _is_code(pattern: Pattern) -> bool:
    return type(pattern).resolve is not Pattern.resolve


def _check_op(op: Op, owner: str) -> None:
    if op.users is not None and op.users < 1:
        raise _nothing(owner, op, f"it wants {op.users} users", "a result that nobody reads is gone: want 1, or more")
    overloads = {kind: _overloads(kind) for kind in op.kinds}
    unknown = next((kind for kind, found in overloads.items() if not found), None)
    if unknown is not None:
        near = nearest(unknown, [*BY_NAME, *REFINED])
        why = f"there is no operation of the kind '{unknown}'"
        raise _nothing(owner, op, why, f"did you mean {near}?" if near else "print a graph to see its kinds")
    schemas = [o._schema for found in overloads.values() for o in found if hasattr(o, "_schema")]
    most = max(map(_most_operands, schemas), default=math.inf)
    if len(op.operands) > most:
        raise _nothing(owner, op, f"'{op.kind}' has at most {most} operands", f"leave {len(op.operands) - most} out")
    names = {a.name for s in schemas for a in s.arguments}
    for name in op.where:
        if names and name not in names:
            todo = f"use one of {', '.join(sorted(names))}"
            raise _nothing(owner, op, f"'{op.kind}' has no attribute '{name}'", todo)


def _most_operands(schema: Any) -> float:
    """How many operands an overload can have; a list of tensors is spread out, so it has no end."""
    found = [a for a in schema.arguments if not a.kwarg_only and is_operand(a)]
    return math.inf if any("[]" in str(a.type) or "List" in str(a.type) for a in found) else len(found)


def _overloads(kind: str) -> list[Any]:
    """The overloads of a kind: of the table, of ATen, or of a registered library (``mylib.swish``)."""
    known = BY_NAME.get(REFINED.get(kind, kind))
    if known is not None:
        return [overload for target in known.targets for overload in _packet(target.rpartition(".")[0])]
    for stem in (kind, f"aten.{kind}", f"aten._{kind}"):
        if "." in stem and (found := _packet(stem)):
            return found
    return [kind] if kind in WITHOUT_SCHEMA else []


def _packet(stem: str) -> list[Any]:
    namespace, _, name = stem.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def _nothing(owner: str, pattern: object, why: str, todo: str) -> PassError:
    return PassError("QG209", f"the pattern of '{owner}' can match nothing", where=repr(pattern), why=why, todo=todo)
