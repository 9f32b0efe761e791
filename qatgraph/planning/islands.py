"""Which int8 nodes pay for their borders: the cheapest cut between int8 and float.

What is won by a node in int8, and what a quantize or dequantize costs between a node that is int8 and one that is not,
are capacities of one network; its minimum cut is the cheapest placement, for all nodes at once. So an island may be
left in float whole or in part, and a slow int8 kernel stays where it saves two borders. Of several cheapest cuts the
one with most int8 nodes is taken. The cut only takes int8 away, and the more of it is taken away by others, the less
it leaves (such costs are submodular): the plan stays free of order.

Only what grows with the batch is weighed: what a call costs by itself does not matter on a large one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx

from qatgraph.planning.choices import Choice, port_of
from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.planning.cost import Cost
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.partitions import Borders, borders_of, reads_floats, sizes_of
from qatgraph.planning.solver import Solution, solve
from qatgraph.planning.target import Target

DOUBT = 2  # what int8 wins is counted so often: estimates are wrong, and in doubt a node stays int8
WEAKEST = 0  # any line of a recipe that asks for int8 is stronger
WIN, LOSS = "win", "loss"


def settle(facts: tuple[NodeFact, ...], target: Target, constraints: Iterable[Constraint]) -> Solution:
    """The solver's placement, without the int8 nodes that do not pay for their borders on a target that has costs."""
    stated = list(constraints)
    while True:
        solution = solve(facts, target, stated)
        losing = [] if target.cost is None else list(_losing(solution, target.cost, facts, target.name))
        if not losing:
            return solution
        stated += losing


def _losing(solution: Solution, cost: Cost, facts: tuple[NodeFact, ...], target: str) -> Iterator[Constraint]:
    borders, size = borders_of(solution.choices, solution.readers), sizes_of(facts)
    network = _network(solution, borders, size, cost)
    left = _left(network)
    out = [n for n, c in solution.choices.items() if c.int8 and ("node", n) in left]
    network.remove_nodes_from([WIN, LOSS])
    linked = network.subgraph([k for k in network if k in left]).to_undirected()
    author = Author("partition", target)
    for part in nx.connected_components(linked):
        names = [n for n in out if ("node", n) in part]
        won = sum(_won(solution.choices[n], cost) for n in names) / 1e6
        paid = _paid(set(names), borders, solution, size, cost) / 1e6
        saves = f"8-bit kernels save {won:.2g} us" if won > 0 else f"8-bit kernels are slower by {-won:.2g} us"
        for name in names:
            fact = solution.choices[name].fact
            many = f" of the {len(names)} operations around it" if len(names) > 1 else ""
            costs = f"their quantizes and dequantizes cost {paid:.2g} us"
            why = f"left in float: {saves}{many}, {costs} (estimates, example batch)"
            yield Constraint("float", (Port(fact.name, "out"),), author, why, strength=WEAKEST)


def _left(network: nx.DiGraph[Any]) -> set[Any]:
    """The keys on the side of float. Cut as integers, with which it does the same work in each process."""
    keys = list(network)
    number = {k: i for i, k in enumerate(keys)}
    _, (_, left) = nx.minimum_cut(nx.relabel_nodes(network, number), number[WIN], number[LOSS])
    return {keys[i] for i in left}


def _won(choice: Choice, cost: Cost) -> float:
    """Picoseconds that int8 saves at a node, without its borders; 0 of a table, which is int8 for its size."""
    row, fact = choice.row, choice.fact
    assert row is not None
    if not (row.x or row.out or choice.inside):
        return 0.0
    return cost.kernel(fact, int8=False) - (cost.kernel(fact, int8=True) if row.kernel else 0.0)


def _paid(names: set[str], borders: Borders, solution: Solution, size: dict[str, int], cost: Cost) -> float:
    """Picoseconds of the borders that go if these nodes are float, less those that come."""

    def total(gone: set[str]) -> float:
        reads = {v: [n for n in ns if n not in gone] for v, ns in borders.reads.items()}
        writes = {v: n for v, n in borders.writes.items() if n not in gone}
        found = sum(cost.quantize * size[v] for v, ns in reads.items() if ns and v not in writes)
        for v in writes:
            lost = set(reads.get(v, ())) != set(borders.reads.get(v, ()))
            if lost or reads_floats(v, borders, solution.choices, solution.readers):
                found += cost.dequantize * size[v]
        return found

    return total(set()) - total(names)


def _network(solution: Solution, borders: Borders, size: dict[str, int], cost: Cost) -> nx.DiGraph[Any]:
    """An edge from a to b costs its capacity if a is int8 and b is not; without one it may not be."""
    choices, readers = solution.choices, solution.readers
    network: nx.DiGraph[Any] = nx.DiGraph()
    network.add_nodes_from([WIN, LOSS])

    def edge(a: Any, b: Any, picoseconds: float) -> None:
        have = network.get_edge_data(a, b, {"capacity": 0})["capacity"]
        network.add_edge(a, b, capacity=have + round(picoseconds))

    for name, choice in choices.items():
        if not choice.int8:
            continue
        won = _won(choice, cost)
        network.add_node(("node", name))
        if choice.int8s:
            network.add_edge(WIN, ("node", name))
        elif won > 0:
            edge(WIN, ("node", name), DOUBT * won)
        else:
            edge(("node", name), LOSS, -won)
        for a, b in _bound(choice, solution):
            network.add_edge(("node", a), ("node", b))
    for value, names in borders.reads.items():
        for name in names:
            network.add_edge(("node", name), ("quantize", value))
        writer = borders.writes.get(value)
        edge(("quantize", value), LOSS if writer is None else ("node", writer), cost.quantize * size[value])
    for value, writer in borders.writes.items():
        if _can_write_floats(choices[writer]):
            continue
        price = cost.dequantize * size[value]
        if reads_floats(value, borders, choices, readers):
            edge(("node", writer), LOSS, price)
        else:
            edge(("node", writer), ("dequantize", value), price)
            for name in borders.reads.get(value, ()):
                network.add_edge(("dequantize", value), ("node", name))
    return network


def _can_write_floats(choice: Choice) -> bool:
    """Whether another int8 row takes the node where its readers take floats."""
    others = [r for r, why in choice.rows if not why and r.id not in choice.out and r is not choice.row]
    return any(r.placement == "int8" and not r.out for r in others)


def _bound(choice: Choice, solution: Solution) -> Iterator[tuple[str, str]]:
    """(a, b): a may only be int8 if b is."""
    choices, readers, name = solution.choices, solution.readers, choice.fact.name
    assert choice.row is not None
    needs = choice.row.needs
    if needs in ("inside", "before"):  # both run in one kernel, or none does
        other = choice.fact.inputs[0][1] if needs == "inside" else readers[name][0]
        yield from ((name, other), (other, name))
    if needs in ("inputs-int8", "between-int8"):
        for role, value in choice.fact.inputs:
            source, _ = port_of(choice, role, value, choices)
            writer = next((n for n in [source] if n in choices and choices[n].int8), None)
            if writer is not None:
                yield name, writer
    if needs in ("readers-int8", "between-int8") and not _can_write_floats(choice):
        for reader in readers.get(name, ()):
            if choices[reader].int8:
                yield name, reader
