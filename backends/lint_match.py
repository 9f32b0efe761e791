"""The row of the target's table that an operation of a file comes nearest to."""

from __future__ import annotations

from qatgraph.backends import lint_conditions
from qatgraph.backends.lint_conditions import wants_of
from qatgraph.backends.lint_rule import Match
from qatgraph.backends.onnx_facts import Operation
from qatgraph.backends.onnx_file import MOVES
from qatgraph.ops import keeps_grid
from qatgraph.planning.predict import Wants, candidates
from qatgraph.planning.target import Row, Target

WRITTEN = ("inside", "before")  # rows of what the lowering writes into a neighbour; here each node stands for itself


def match(target: Target, operation: Operation) -> Match:
    """The int8 row that the operation comes nearest to, by the conditions that it does not meet."""
    fact, wants = operation.fact, wants_of(operation)
    floats = next((r for r, why in candidates(target, fact, wants) if not why and r.placement != "int8"), None)
    rows = [
        (r, why) for r, why in candidates(target, fact, Wants()) if r.placement == "int8" and r.needs not in WRITTEN
    ]
    fitting = [r for r, why in rows if not why]
    if not fitting:
        known = bool(target.rows(fact.kind)) and (
            fact.parameter("weight") is not None or not rows or not rows[0][0].weight
        )
        return Match(None, floats=floats, blocked=rows[0][1] if rows else "", certain=known)
    best = min(fitting, key=lambda r: _distance(_misfits(r, operation)))
    certain = operation.quantized or operation.weight is None  # of weights alone the table says nothing
    if best.moves:  # nor how far the engine moves a pair along a chain
        behind = operation.result
        chained = any(p.moved for p in operation.ports) or any(r.op_type in MOVES for r in behind.floats)
        certain = not chained and all(b.direct for b in behind.quantizes)
    return Match(best, tuple(_misfits(best, operation)), floats, certain=certain)


def _misfits(row: Row, operation: Operation) -> list[tuple[str, str]]:
    return [(rule.id, what) for rule in lint_conditions.RULES if (what := rule.function(row, operation))]


def _distance(misfits: list[tuple[str, str]]) -> tuple[int, bool]:
    """The fewest first, and among them one that ``--fix`` repairs."""
    return len(misfits), not any(r.fixable for r in lint_conditions.RULES if r.id in dict(misfits))


def in_kernel(target: Target, operation: Operation) -> bool:
    """Whether a row takes the operation into the kernel in front."""
    return any(r.needs == "inside" for r in target.rows(operation.fact.kind))


def moves(operation: Operation) -> bool:
    return keeps_grid(operation.fact.kind)
