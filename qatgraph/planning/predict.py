"""Which row fits a node in its context. Solver and prediction share this matcher; the audit on the engine is
the independent check. Imports no engine."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.facts import NodeFact
from qatgraph.planning.target import Row, Target
from qatgraph.specs import QuantSpec

UNASKED = "nobody asks"


@dataclass(frozen=True)
class Wants:
    """What recipe lines and passes ask of one node; ``float_only`` and ``int8_only`` exclude each other."""

    x: tuple[QuantSpec, ...] = ()
    weight: tuple[QuantSpec, ...] = ()
    bias: str | None = None
    float_only: bool = False


def bias_of(row: Row, fact: NodeFact, wants: Wants) -> str | None:
    """The form in which this row writes the node's bias, ``None`` if it cannot."""
    if any(role == "bias" for role, _ in fact.inputs):
        return None  # it is computed
    if fact.parameter("bias") is None:
        return "none" if "none" in row.bias else None
    forms: list[str] = [f for f in row.bias if f != "none"]
    if wants.bias is not None:
        forms = [f for f in forms if f == wants.bias]
    return forms[0] if forms else None


def blocked(row: Row, fact: NodeFact, wants: Wants) -> str:
    """Why the row does not fit the node, as a sentence; empty if it fits."""
    if wants.float_only and row.placement == "int8":
        return "the node is kept in float"
    if row.rank and fact.rank not in row.rank:
        return f"the row is for rank {' or '.join(map(str, row.rank))}, the input is {fact.words()['shape']}"
    if row.dynamic is not None and row.dynamic != fact.dynamic:
        need = "a dynamic" if row.dynamic else "a fully static"
        return f"the row is for {need} shape, the input is {fact.words()['shape']}"
    if row.reads and len(fact.inputs) != row.reads:
        return f"the row is for {row.reads} activations, the node reads {len(fact.inputs)}"
    if row.batched and not fact.batched:
        return f"the row is for batches, the input is {fact.words()['shape']}"
    if row.depthwise is not None and row.depthwise != fact.depthwise:
        return f"the row is for {'one filter' if row.depthwise else 'several filters'} a channel"
    if fact.terms < row.least_terms:
        return f"the row is for sums of {row.least_terms} products or more, here they are of {fact.terms}"
    if row.beyond is not None and row.beyond != fact.beyond:
        return "its last window reaches beyond the padding, where the engine's kernel does other than torch"
    behind = ((k, fact.behind if k in row.fuses_after else fact.readers) for k in row.not_read_by)
    reader = next((kind for kind, read in behind if kind in read), None)
    if reader is not None:
        return f"a {reader} reads the result, and the engine makes of the two what the row does not promise"
    if row.on_request and not (wants.x if row.dynamic_x else wants.weight):
        return f"{UNASKED} for {_list(row.x) if row.dynamic_x else _list(row.weight)}"
    if row.placement == "int8" and wants.x and not x_options(row, wants):
        return f"the row takes {f'x as {_list(row.x)}' if row.x else 'x in float'}, asked is {_list(wants.x)}"
    if row.placement != "int8":  # rows that say what the engine does with a form that somebody asked for
        if row.bias and wants.bias is None:
            return f"{UNASKED} for a bias as {' or '.join(row.bias)}"
        if row.weight and not wants.weight:
            return f"{UNASKED} for a weight as {_list(row.weight)}"
    if row.bias and bias_of(row, fact, wants) is None:
        if any(role == "bias" for role, _ in fact.inputs):
            return "the bias is computed, and no row writes that"
        if fact.parameter("bias") is None:
            return "the row is for a node with a bias"
        if row.bias == ("none",):
            return "the row is for a node without a bias"
        return f"the row takes a bias as {' or '.join(row.bias)}, asked is {wants.bias}"
    if row.weight:
        weight = fact.parameter("weight")
        if weight is None:
            return "the weight is not a constant"
        options = weight_options(row, wants)
        if not options:
            return f"the row takes a weight as {_list(row.weight)}, asked is {_list(wants.weight)}"
        axis = next((s.axis for s in options if s.axis is not None and s.axis >= len(weight.shape)), None)
        if axis is not None:
            return f"the row has scales along axis {axis}, the weight is {fact.words()['weight']}"
    elif wants.weight and row.placement == "int8":
        return f"the row has no weight grid, asked is {_list(wants.weight)}"
    return ""


def x_options(row: Row, wants: Wants) -> tuple[QuantSpec, ...]:
    """The grids of activations that both the row and the wants take, best first."""
    return _common(row.x, wants.x)


def weight_options(row: Row, wants: Wants) -> tuple[QuantSpec, ...]:
    """The weight grids that both the row and the wants take, best first."""
    return _common(row.weight, wants.weight)


def _common(have: tuple[QuantSpec, ...], wanted: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    if not wanted:
        return have
    return tuple(m for one in have for want in wanted if (m := one.meet(want)) is not None)


def candidates(target: Target, fact: NodeFact, wants: Wants) -> list[tuple[Row, str]]:
    """Every row of the node's kind, best first, with the sentence that blocks it."""
    return [(row, blocked(row, fact, wants)) for row in target.rows(fact.kind)]


def _list(specs: tuple[QuantSpec, ...]) -> str:
    return " or ".join(str(s) for s in specs)
