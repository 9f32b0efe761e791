"""The grids of a placement: one for each value, or for several that share it, with all that read or write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qatgraph.planning.choices import Choice, Choices, Readers, port_of, tail
from qatgraph.planning.constraints import Constraint, Port
from qatgraph.planning.predict import weight_options, x_options
from qatgraph.specs import QuantSpec, ScaleRule


@dataclass
class Grid:
    """One quantizer to be: a value (or the shared class of values), its options and the ports that read or write it."""

    values: tuple[str, ...]
    options: tuple[QuantSpec, ...]
    ports: tuple[Port, ...]


def port_options(choice: Choice, choices: Choices, readers: Readers) -> list[tuple[str, Port, tuple[QuantSpec, ...]]]:
    """(value, port, grids by preference) of everything that an int8 node reads or writes."""
    row, fact = choice.row, choice.fact
    assert row is not None
    specs = x_options(row, choice.wants)
    found = [(*port_of(choice, role, value, choices), specs) for role, value in fact.inputs if specs]
    weight = fact.parameter("weight")
    if weight is not None and row.weight:
        found.append((weight.storage, Port(fact.name, "weight"), weight_options(row, choice.wants)))
    if row.out:
        end = tail(choice, choices, readers)
        found.append((end, Port(end, "out"), row.out))
    return found


def meet(a: tuple[QuantSpec, ...], b: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    """The grids that both lists take, in the order of the first."""
    return tuple(m for one in a for other in b if (m := one.meet(other)) is not None)


def conflicts(choices: Choices, readers: Readers) -> dict[str, str]:
    """The nodes whose grid of a value contradicts that of an earlier node."""
    root = _moved(choices, readers)
    options: dict[str, tuple[tuple[QuantSpec, ...], str]] = {}
    failing: dict[str, str] = {}
    for name, choice in choices.items():
        if not choice.int8:
            continue
        own: dict[str, tuple[tuple[QuantSpec, ...], str]] = {}
        for value, port, specs in port_options(choice, choices, readers):
            key = _key(root(value), specs)
            have, first = own.get(key) or options.get(key) or (specs, str(port))
            common = meet(have, specs)
            if not common:
                failing[name] = f"its grid of '{value}' ({specs[0]}) contradicts that of '{first}' ({have[0]})"
                break
            own[key] = (common, first)
        else:
            options |= own
    return failing


def _key(value: str, specs: tuple[QuantSpec, ...]) -> str:
    """A value has one grid for all who want a fixed one; who finds its grid at run time reads it in float."""
    return f"{value}/dynamic" if is_dynamic(specs) else value


def is_dynamic(specs: tuple[QuantSpec, ...]) -> bool:
    return any(s.scale is ScaleRule.DYNAMIC for s in specs)


def _moved(choices: Choices, readers: Readers) -> Callable[[str], str]:
    """One name for all values that lie on one grid because integers are only moved from one to the other."""
    groups = Groups()
    for choice in choices.values():
        if choice.int8 and choice.row is not None and choice.row.moves:
            groups.join(*(v for _, v in choice.fact.inputs), tail(choice, choices, readers))
    return groups.root


class Groups:
    """Disjoint sets of names; each is known by its first name in the order of the alphabet."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while self._parent.get(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, *names: str) -> None:
        roots = sorted({self.root(n) for n in names})
        self._parent.update(dict.fromkeys(roots, roots[0]))


def value_at(port: Port, choices: Choices) -> str:
    """The value that a port reads or writes."""
    choice = choices.get(port.node)
    if choice is None or port.role == "out":
        return port.node
    parameter = choice.fact.parameter(port.role)
    return parameter.storage if parameter else next(v for role, v in choice.fact.inputs if role == port.role)


def grids_of(choices: Choices, readers: Readers) -> list[Grid]:
    """One grid for each value that an int8 node reads or writes, and for values between which integers only move."""
    root = _moved(choices, readers)
    grids: dict[str, Grid] = {}
    for choice in choices.values():
        if not choice.int8:
            continue
        for value, port, specs in port_options(choice, choices, readers):
            grid = grids.setdefault(_key(root(value), specs), Grid((value,), specs, ()))
            grid.options = meet(grid.options, specs)
            grid.values = tuple(dict.fromkeys((*grid.values, value)))
            grid.ports = (*grid.ports, port)
    return list(grids.values())


def share(
    grids: list[Grid], shares: list[Constraint], choices: Choices
) -> tuple[list[Grid], list[tuple[Constraint, str]]]:
    """Merge the grids of values that shall share one; a value without a quantizer only passes the wish on."""
    groups = Groups()
    for grid in grids:
        groups.join(*grid.values)
    for constraint in shares:
        groups.join(*(value_at(p, choices) for p in constraint.ports))
    merged: dict[str, Grid] = {}
    unshared: list[tuple[Constraint, str]] = []
    for grid in grids:
        key = _key(groups.root(grid.values[0]), grid.options)
        have = merged.get(key)
        if have is None:
            merged[key] = grid
            continue
        common = meet(have.options, grid.options)
        if not common or all(g.options[0].scale is ScaleRule.FIXED for g in (have, grid)):
            why = f"'{have.values[0]}' is {have.options[0]}, '{grid.values[0]}' is {grid.options[0]}"
            unshared += [(c, why) for c in shares if groups.root(value_at(c.ports[0], choices)) == key]
            merged[grid.values[0] + "/own"] = grid
            continue
        merged[key] = Grid(have.values + grid.values, common, have.ports + grid.ports)
    return list(merged.values()), unshared
