"""Convex partitions: groups of one placement that no path leaves and enters again, and what stands at their borders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from qatgraph.planning.choices import Choice, Choices, Readers, tail, takes_integers
from qatgraph.planning.cost import Cost
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.grids import port_options
from qatgraph.planning.plan import Partition
from qatgraph.planning.solver import Solution

Edge = tuple[str, str]
GONE = "dropout"  # no node of it is left when the engine runs


@dataclass(frozen=True)
class Borders:
    """Where integers are read and written.

    ``reads``: of each value, the int8 nodes that read it as integers; ``writes``: of each value that a kernel writes as
    integers, the node of the kernel.
    """

    reads: dict[str, tuple[str, ...]]
    writes: dict[str, str]

    def quantizes(self) -> list[str]:
        """The values in front of whose readers a quantize stands, one for all of them."""
        return [v for v in self.reads if v not in self.writes]

    def dequantizes(self, choices: Choices, readers: Readers) -> list[str]:
        """The values behind whose kernel a dequantize stands, for what reads floats; so behind rows of a table."""
        tables = [n for n, c in choices.items() if c.int8 and looks_up(c)]
        return [*(v for v in self.writes if reads_floats(v, self, choices, readers)), *tables]


def looks_up(choice: Choice) -> bool:
    """Whether the kernel picks integers of a constant, which become floats behind it."""
    row = choice.row
    return row is not None and bool(row.weight) and not (row.x or row.out or row.on_request)


def reads_floats(value: str, borders: Borders, choices: Choices, readers: Readers) -> bool:
    """Whether something reads the value as floats: a float operation, or whoever runs the model."""
    choice = choices[value]
    return ("output" in choice.fact.readers and choice.border is None) or any(
        not (choices[n].inside or (choices[n].int8 and takes_integers(choices[n])))
        and not (choices[n].fact.kind == GONE and not reads_floats(n, borders, choices, readers))
        for n in readers.get(value, ())
    )


def _source(value: str, writes: dict[str, str], choices: Choices) -> str:
    """The value that a kernel writes as integers in front of a dropout, or itself."""
    found = value
    while found not in writes and found in choices and choices[found].fact.kind == GONE:
        found = choices[found].fact.inputs[0][1]
    return found if found in writes else value


def borders_of(choices: Choices, readers: Readers) -> Borders:
    reads: dict[str, tuple[str, ...]] = {}
    writes: dict[str, str] = {}
    for name, choice in choices.items():
        if choice.row is None or not choice.int8 or choice.inside:
            continue
        for value, port, _ in port_options(choice, choices, readers):
            if port.role == "out":
                writes[tail(choice, choices, readers)] = name
            elif port.role != "weight" and not choice.row.dynamic_x:
                reads[value] = (*reads.get(value, ()), name)
    through: dict[str, tuple[str, ...]] = {}
    for value, names in reads.items():
        source = _source(value, writes, choices)
        through[source] = (*through.get(source, ()), *names)
    return Borders(through, writes)


def sizes_of(facts: Iterable[NodeFact]) -> dict[str, int]:
    """Elements of every value on the example batch."""
    found: dict[str, int] = {}
    for fact in facts:
        for i, (_, value) in enumerate(fact.inputs):
            found.setdefault(value, (fact.bytes if i else fact.x_bytes) // 4)
        found[fact.name] = fact.bytes // 4
    return found


def convex_groups(edges: Sequence[Edge], ties: Iterable[Edge], placement: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Convex groups of nodes of one placement that edges or ties join, in the order of ``placement``, which is one of
    the data flow.

    ``ties`` are pairs that belong together without an edge: two readers of one quantize. A node lies as deep as a path
    to it has changed placement at most, and a group is connected within one depth. Along a path the depth never falls,
    and it rises where the path leaves a placement, so no path leaves a group and comes back. Groups may stay apart that
    could be one: to find those takes a search for paths around, which grows with the square of the graph.
    """
    before: dict[str, list[str]] = {name: [] for name in placement}
    for a, b in edges:
        before[b].append(a)
    depth: dict[str, int] = {}
    for name in placement:
        depth[name] = max((depth[a] + (placement[a] != placement[name]) for a in before[name]), default=0)
    view: nx.Graph[str] = nx.Graph()
    view.add_nodes_from(placement)
    joined = (p for p in [*edges, *ties] if placement[p[0]] == placement[p[1]] and depth[p[0]] == depth[p[1]])
    view.add_edges_from(joined)
    rank = {name: i for i, name in enumerate(placement)}
    return sorted(
        (tuple(sorted(c, key=rank.__getitem__)) for c in nx.connected_components(view)), key=lambda g: rank[g[0]]
    )


def partitions_of(
    facts: Sequence[NodeFact],
    solution: Solution,
    placement: Mapping[str, str],
    borders: Borders,
    size: Mapping[str, int],
    cost: Cost | None,
) -> tuple[Partition, ...]:
    """Every node in one partition; each quantize and dequantize belongs to the int8 partition that needs it first."""
    edges = [(value, f.name) for f in facts for _, value in f.inputs if value in placement]
    quantized = borders.quantizes()
    ties = [(borders.reads[v][0], other) for v in quantized for other in borders.reads[v][1:]]
    groups = convex_groups(edges, ties, placement)
    number = {n: i for i, names in enumerate(groups) for n in names}
    front: list[list[str]] = [[] for _ in groups]
    behind: list[list[str]] = [[] for _ in groups]
    for value in quantized:
        front[number[borders.reads[value][0]]].append(value)
    for value in borders.dequantizes(solution.choices, solution.readers):
        behind[number[borders.writes.get(value, value)]].append(value)
    found = []
    for i, names in enumerate(groups):
        moved = [[size[v] for v in side] for side in (front[i], behind[i])]
        us = cost.border_us(*moved) if cost is not None else None
        bytes_ = sum(map(sum, moved)) * 5  # four bytes on one side, one on the other
        found.append(Partition(i, placement[names[0]], names, tuple(front[i]), tuple(behind[i]), bytes_, us))
    return tuple(found)
