"""One node on its way to a placement, and what its neighbours let it be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qatgraph.ops import keeps_grid
from qatgraph.planning.constraints import Constraint, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.predict import Wants
from qatgraph.planning.target import Row


@dataclass
class Choice:
    """The state of one node: its rows best first, those that are out with the reason, and the one chosen."""

    fact: NodeFact
    wants: Wants
    rows: list[tuple[Row, str]]
    held: Constraint | None = None  # the float constraint that holds the node
    int8s: list[Constraint] = field(default_factory=list)  # who wants it in int8
    asked: list[Constraint] = field(default_factory=list)  # who wants a grid or a form of bias
    border: Constraint | None = None  # who wants the output that it is as integers
    out: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Row | None:
        return next((r for r, why in self.rows if not why and r.id not in self.out), None)

    @property
    def int8(self) -> bool:
        return self.row is not None and self.row.placement == "int8"

    @property
    def inside(self) -> bool:
        """Whether the kernel of the node in front, or of that behind, does it too."""
        return self.row is not None and self.row.needs in ("inside", "before")

    def demote(self, why: str) -> None:
        assert self.row is not None
        self.out[self.row.id] = why


Choices = dict[str, Choice]
Readers = dict[str, list[str]]


def context(choice: Choice, choices: Choices, readers: Readers) -> str:
    """Why the neighbours do not fit the chosen row; empty if they do."""
    assert choice.row is not None
    fact, needs = choice.fact, choice.row.needs
    if needs == "inside":
        return "" if _head(choice, choices) else f"'{fact.inputs[0][1]}' has no kernel that does it too"
    if needs == "before":
        taken = _takes_padding(choice, choices, readers)
        return "" if taken else "no kernel behind, which alone reads it, does it too"
    if needs in ("inputs-int8", "between-int8"):
        for role, value in fact.inputs:
            if not written_int8(value, choices):
                return f"its input {role}, '{value}', is not int8"
    if needs in ("readers-int8", "between-int8"):
        end = tail(choice, choices, readers)
        return "" if _read_int8(end, choices, readers) else f"'{end}' is not read as int8 alone"
    return ""


def _head(choice: Choice, choices: Choices) -> Choice | None:
    """The int8 node in front whose kernel takes this one in."""
    fact = choice.fact
    head = choices.get(fact.inputs[0][1]) if fact.inputs else None
    if head is None or not head.int8 or head.row is None or fact.kind not in head.row.fuses_after:
        return None
    joined = fact.region and fact.region == head.fact.region and fact.low == 0.0
    return head if joined else None


def tail(choice: Choice, choices: Choices, readers: Readers) -> str:
    """The name of the value that the node's kernel writes: of an activation inside it, or its own."""
    inside = (r for r in readers.get(choice.fact.name, ()) if choices[r].inside)
    found = next((r for r in inside if _head(choices[r], choices) is choice), None)
    return found or choice.fact.name


def _takes_padding(choice: Choice, choices: Choices, readers: Readers) -> bool:
    """Whether the one node behind has a kernel that pads with zeros by itself."""
    fact, behind = choice.fact, readers.get(choice.fact.name, [])
    if len(behind) != 1 or "output" in fact.readers or not fact.zeros:
        return False
    reader = choices[behind[0]]
    takes = reader.int8 and reader.row is not None and fact.kind in reader.row.fuses_before
    return takes and reader.fact.inputs[0] == ("x", fact.name)


def port_of(choice: Choice, role: str, value: str, choices: Choices) -> tuple[str, Port]:
    """The value that the kernel of an int8 node reads at this role, and the port: those of what it takes in."""
    source = choices.get(value)
    if source is not None and source.int8 and source.row is not None and source.row.needs == "before":
        return source.fact.inputs[0][1], Port(value, "x")
    return value, Port(choice.fact.name, role)


def readers_of(facts: tuple[NodeFact, ...]) -> Readers:
    found: Readers = {}
    for fact in facts:
        for _, value in fact.inputs:
            found.setdefault(value, []).append(fact.name)
    return found


def affected(demoted: Iterable[str], readers: Readers, choices: Choices) -> set[str]:
    """The nodes whose context a demotion changes: what reads the result or wrote an input, also behind what only
    moves elements or is a part of another kernel."""
    found = set(demoted)
    for forward in (True, False):
        pending = list(demoted)
        while pending:
            name = pending.pop()
            behind = readers.get(name, ())
            for other in behind if forward else (v for _, v in choices[name].fact.inputs if v in choices):
                if other not in found and (keeps_grid(choices[other].fact.kind) or choices[other].inside):
                    pending.append(other)
                found.add(other)
    return found


def written_int8(value: str, choices: Choices) -> bool:
    """Whether a kernel writes the value as integers, or it is made of such by what only moves elements."""
    producer = choices.get(value)
    if producer is None:
        return False
    if producer.int8:
        assert producer.row is not None
        head = _head(producer, choices) if producer.inside else producer
        return head is not None and head.row is not None and bool(head.row.out)
    moved = producer.fact.inputs if keeps_grid(producer.fact.kind) else ()
    return bool(moved) and written_int8(moved[0][1], choices)


def _read_int8(value: str, choices: Choices, readers: Readers) -> bool:
    """Whether all that read the value take integers, and somebody does: also the caller of the model, if asked to."""
    names, choice = readers.get(value, ()), choices[value]
    returned = "output" in choice.fact.readers
    if (returned and choice.border is None) or not (names or returned):
        return False
    return all(
        takes_integers(choices[n])
        if choices[n].int8
        else keeps_grid(choices[n].fact.kind) and _read_int8(n, choices, readers)
        for n in names
    )


def takes_integers(choice: Choice) -> bool:
    """Whether an int8 node reads integers, not floats that its kernel rounds by itself."""
    row = choice.row
    return row is not None and ((bool(row.x) and not row.dynamic_x) or row.needs == "before")
