"""The solver: constraints from rows, recipe and passes in any order, one placement and one set of grids out.

Every node starts at the best row that fits it alone. Rounds then demote, all at once, the nodes whose neighbours
or shared grids do not fit, until nothing changes. A demotion only ever takes int8 away from the neighbours, so no
demotion enables a better row elsewhere (a test checks this for each table): the result is free of order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qatgraph.errors import PlanError
from qatgraph.ops import keeps_grid
from qatgraph.planning.constraints import RECIPE_NAMED, Constraint, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.predict import Wants, candidates, weight_options
from qatgraph.planning.target import Row, Target
from qatgraph.specs import QuantSpec

ABSENT_WHY = {
    "constant": "'{}' depends on no input of the model: it is computed once, in float, and no kernel is left of it",
    "state": "'{}' only gives a state of the model its next value: the file keeps the old one, and no kernel is left",
}


@dataclass
class Choice:
    """The state of one node: its rows best first, those that are out with the reason, and the one chosen."""

    fact: NodeFact
    wants: Wants
    rows: list[tuple[Row, str]]
    held: Constraint | None = None  # the float constraint that holds the node
    int8s: list[Constraint] = field(default_factory=list)  # who wants it in int8
    asked: list[Constraint] = field(default_factory=list)  # who wants a grid or a form of bias
    out: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Row | None:
        return next((r for r, why in self.rows if not why and r.id not in self.out), None)

    @property
    def int8(self) -> bool:
        return self.row is not None and self.row.placement == "int8"

    def demote(self, why: str) -> None:
        assert self.row is not None
        self.out[self.row.id] = why


@dataclass
class Grid:
    """One quantizer to be: a value (or the shared class of values), its options and the ports that read or write it."""

    values: tuple[str, ...]
    options: tuple[QuantSpec, ...]
    ports: tuple[Port, ...]


@dataclass
class Solution:
    choices: dict[str, Choice]
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
    readers = _readers(facts)
    pending: Iterable[str] = choices
    while True:
        failing = {n: why for n in pending if choices[n].int8 and (why := _context(choices[n], choices))}
        failing = failing or _conflicts(choices)
        if not failing:
            break
        for name, why in failing.items():
            choices[name].demote(why)
        pending = _affected(failing, readers, choices)
    for choice in choices.values():
        _keep_or_refuse(choice, target)
    grids, unshared = _share(_grids(choices), [c for c in ordered if c.kind == "share"], choices)
    return Solution(choices, grids, unshared)


def _start(fact: NodeFact, target: Target, constraints: list[Constraint]) -> Choice:
    floats = [c for c in constraints if c.kind == "float"]
    int8s = [c for c in constraints if c.kind == "int8"]
    held = floats[0] if floats and not (int8s and int8s[0].strength > floats[0].strength) else None
    if held and int8s and int8s[0].strength == held.strength:
        raise _conflict(fact, held, int8s[0])
    wants = Wants(
        weight=next((c.specs for c in constraints if c.kind == "want" and c.specs), ()),
        bias=next((c.form for c in constraints if c.kind == "want" and c.form), None),
        float_only=held is not None,
    )
    asked = [c for c in constraints if c.kind == "want"]
    return Choice(fact, wants, [] if fact.absent else candidates(target, fact, wants), held, int8s, asked)


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


def _context(choice: Choice, choices: dict[str, Choice]) -> str:
    """Why the neighbours do not fit the chosen row; empty if they do."""
    assert choice.row is not None
    if choice.row.needs != "inputs-int8":
        return ""
    for role, value in choice.fact.inputs:
        if not _written_int8(value, choices):
            return f"its input {role}, '{value}', is not int8"
    return ""


def _readers(facts: tuple[NodeFact, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fact in facts:
        for _, value in fact.inputs:
            found.setdefault(value, []).append(fact.name)
    return found


def _affected(demoted: Iterable[str], readers: dict[str, list[str]], choices: dict[str, Choice]) -> set[str]:
    """The nodes whose context a demotion changes: what reads the result, also behind what only moves elements."""
    found, pending = set(demoted), list(demoted)
    while pending:
        for reader in readers.get(pending.pop(), ()):
            if reader not in found and keeps_grid(choices[reader].fact.kind):
                pending.append(reader)
            found.add(reader)
    return found


def _written_int8(value: str, choices: dict[str, Choice]) -> bool:
    producer = choices.get(value)
    if producer is None:
        return False
    if producer.int8:
        return bool(producer.row and producer.row.out)
    moved = producer.fact.inputs if keeps_grid(producer.fact.kind) else ()
    return bool(moved) and _written_int8(moved[0][1], choices)


def port_options(choice: Choice) -> list[tuple[str, Port, tuple[QuantSpec, ...]]]:
    """(value, port, grids by preference) of everything that an int8 node reads or writes."""
    row, fact = choice.row, choice.fact
    assert row is not None
    found = [(value, Port(fact.name, role), row.x) for role, value in fact.inputs if row.x]
    weight = fact.parameter("weight")
    if weight is not None and row.weight:
        found.append((weight.storage, Port(fact.name, "weight"), weight_options(row, choice.wants)))
    if row.out:
        found.append((fact.name, Port(fact.name, "out"), row.out))
    return found


def meet(a: tuple[QuantSpec, ...], b: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    """The grids that both lists take, in the order of the first."""
    return tuple(m for one in a for other in b if (m := one.meet(other)) is not None)


def _conflicts(choices: dict[str, Choice]) -> dict[str, str]:
    """The nodes whose grid of a value contradicts that of an earlier node."""
    options: dict[str, tuple[tuple[QuantSpec, ...], str]] = {}
    failing: dict[str, str] = {}
    for name, choice in choices.items():
        if not choice.int8:
            continue
        own: dict[str, tuple[tuple[QuantSpec, ...], str]] = {}
        for value, port, specs in port_options(choice):
            have, first = own.get(value) or options.get(value) or (specs, str(port))
            common = meet(have, specs)
            if not common:
                failing[name] = f"its grid of '{value}' ({specs[0]}) contradicts that of '{first}' ({have[0]})"
                break
            own[value] = (common, first)
        else:
            options |= own
    return failing


def value_at(port: Port, choices: dict[str, Choice]) -> str:
    """The value that a port reads or writes."""
    choice = choices.get(port.node)
    if choice is None or port.role == "out":
        return port.node
    parameter = choice.fact.parameter(port.role)
    return parameter.storage if parameter else next(v for role, v in choice.fact.inputs if role == port.role)


def _grids(choices: dict[str, Choice]) -> list[Grid]:
    grids: dict[str, Grid] = {}
    for choice in choices.values():
        if not choice.int8:
            continue
        for value, port, specs in port_options(choice):
            grid = grids.setdefault(value, Grid((value,), specs, ()))
            grid.options = meet(grid.options, specs)
            grid.ports = (*grid.ports, port)
    return list(grids.values())


def _share(
    grids: list[Grid], shares: list[Constraint], choices: dict[str, Choice]
) -> tuple[list[Grid], list[tuple[Constraint, str]]]:
    """Merge the grids of values that shall share one; a value without a quantizer only passes the wish on."""
    group: dict[str, str] = {}

    def root(value: str) -> str:
        while group.get(value, value) != value:
            value = group[value]
        return value

    for constraint in shares:
        roots = sorted({root(value_at(p, choices)) for p in constraint.ports})
        group.update(dict.fromkeys(roots, roots[0]))
    merged: dict[str, Grid] = {}
    unshared: list[tuple[Constraint, str]] = []
    for grid in grids:
        key = root(grid.values[0])
        have = merged.get(key)
        if have is None:
            merged[key] = grid
            continue
        common = meet(have.options, grid.options)
        if not common:
            why = f"'{have.values[0]}' is {have.options[0]}, '{grid.values[0]}' is {grid.options[0]}"
            unshared += [(c, why) for c in shares if root(value_at(c.ports[0], choices)) == key]
            merged[grid.values[0] + "/own"] = grid
            continue
        merged[key] = Grid(have.values + grid.values, common, have.ports + grid.ports)
    return list(merged.values()), unshared
