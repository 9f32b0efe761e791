"""The solver: constraints from rows, recipe and passes in any order, one placement and one set of grids out.

Every node starts at the best row that fits it alone. Rounds then demote, all at once, the nodes whose neighbours
or shared grids do not fit, until nothing changes. A demotion only ever takes int8 away from the neighbours, so no
demotion enables a better row elsewhere (a test checks this for each table): the result is free of order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qatgraph.errors import PlanError
from qatgraph.ops import keeps_grid
from qatgraph.planning.choices import Choice, Choices, Readers, affected, context, readers_of, written_int8
from qatgraph.planning.constraints import RECIPE_NAMED, Constraint
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.grids import Grid, conflicts, grids_of, share
from qatgraph.planning.predict import Wants, candidates
from qatgraph.planning.target import Target
from qatgraph.specs import QuantSpec

ABSENT_WHY = {
    "constant": "'{}' depends on no input of the model: it is computed once, in float, and no kernel is left of it",
    "state": "'{}' only gives a state of the model its next value: the file keeps the old one, and no kernel is left",
}


@dataclass
class Solution:
    choices: Choices
    readers: Readers
    grids: list[Grid]
    unshared: list[tuple[Constraint, str]]


def solve(facts: tuple[NodeFact, ...], target: Target, constraints: Iterable[Constraint]) -> Solution:
    """Settle placements and grids.

    Raises:
        PlanError: QG305 two hard constraints contradict each other; both authors and the node are named.
    """
    ordered = sorted(constraints, key=Constraint.order)
    of_node: dict[str, list[Constraint]] = {f.name: [] for f in facts}
    for constraint in ordered:
        of_node.setdefault(constraint.ports[0].node, []).append(constraint)
    choices = {f.name: _start(f, target, of_node[f.name]) for f in facts}
    readers = readers_of(facts)
    pending: Iterable[str] = choices
    while True:
        failing = {n: why for n in pending if choices[n].int8 and (why := context(choices[n], choices, readers))}
        failing = failing or conflicts(choices, readers)
        if not failing:
            break
        for name, why in failing.items():
            choices[name].demote(why)
        pending = affected(failing, readers, choices)
    for choice in choices.values():
        _keep_or_refuse(choice, target)
        _write_or_refuse(choice, choices, target)
    grids, unshared = share(grids_of(choices, readers), [c for c in ordered if c.kind == "share"], choices)
    return Solution(choices, readers, grids, unshared)


def _start(fact: NodeFact, target: Target, constraints: list[Constraint]) -> Choice:
    floats = [c for c in constraints if c.kind == "float"]
    int8s = [c for c in constraints if c.kind == "int8"]
    held = floats[0] if floats and not (int8s and int8s[0].strength > floats[0].strength) else None
    if held and int8s and int8s[0].strength == held.strength:
        raise _conflict(fact, held, int8s[0])
    wants = Wants(
        x=_grids(constraints, "x"),
        weight=_grids(constraints, "weight"),
        bias=next((c.form for c in constraints if c.kind == "want" and c.form), None),
        float_only=held is not None,
    )
    asked = [c for c in constraints if c.kind == "want"]
    border = next((c for c in constraints if c.kind == "integers"), None)
    return Choice(
        fact, wants, [] if fact.absent else candidates(target, fact, wants), held, int8s, asked, border=border
    )


def _grids(constraints: list[Constraint], role: str) -> tuple[QuantSpec, ...]:
    """The grids that the strongest wish for this port names."""
    return next((c.specs for c in constraints if c.kind == "want" and c.specs and c.ports[0].role == role), ())


def _keep_or_refuse(choice: Choice, target: Target) -> None:
    """A line that names a node and wants it in int8 is never dropped in silence."""
    demanded = next((c for c in choice.int8s if c.strength == RECIPE_NAMED), None)
    if demanded is None or choice.int8:
        return
    rows = [(r, why or choice.out.get(r.id, "")) for r, why in choice.rows if r.placement == "int8"]
    raise PlanError(
        "QG305",
        f"'{choice.fact.name}' cannot be int8 on {target.name}",
        where=str(demanded.author),
        why="; ".join(f"{r.id}: {why}" for r, why in rows) or _no_row(choice.fact),
        todo="remove the line, or choose another target",
    )


def _write_or_refuse(choice: Choice, choices: Choices, target: Target) -> None:
    """An output that shall be integers has a kernel that writes them."""
    if choice.border is None or (choice.int8 and written_int8(choice.fact.name, choices)):
        return
    raise PlanError(
        "QG312",
        f"the output '{choice.fact.outputs[0]}' cannot be integers on {target.name}",
        where=str(choice.border.author),
        why=_no_writer(choice, choices),
        todo="leave it out, and it is float; or let the operation in front of it fit a row that writes integers",
    )


def _no_writer(choice: Choice, choices: Choices) -> str:
    """Why no kernel writes the value as integers: the rows that would, of the operation that computes it."""
    fact = choice.fact
    if choice.held is not None:
        return f"'{fact.name}': {choice.held.why}"
    rows = [(r, why or choice.out.get(r.id, "")) for r, why in choice.rows if r.placement == "int8"]
    reasons = [f"{r.id}: {why}" for r, why in rows if r.out and why]
    source = fact.inputs[0][1] if fact.inputs else ""
    if source in choices and (keeps_grid(fact.kind) or any(r.needs == "inside" for r, _ in rows)):
        return _no_writer(choices[source], choices)
    return f"'{fact.name}': " + ("; ".join(reasons) or _no_row(fact))


def _no_row(fact: NodeFact) -> str:
    return ABSENT_WHY[fact.absent].format(fact.name) if fact.absent else "it has no int8 row"


def _conflict(fact: NodeFact, a: Constraint, b: Constraint) -> PlanError:
    return PlanError(
        "QG305",
        f"two constraints contradict each other on '{fact.name}'",
        where=f"{a.author} wants {a.kind}; {b.author} wants {b.kind}",
        why="both are of the same strength",
        todo="remove one of them",
    )
