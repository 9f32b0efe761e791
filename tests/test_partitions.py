"""Partitions are convex, and what stands at their borders is what the engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.kernels import KernelNode, compare_borders
from qatgraph.planning.partitions import Edge, convex_groups
from tests.lowered import lower
from tests.models import MODELS, Case, captured, floats

Drawn = tuple[list[Edge], dict[str, str]]


@st.composite
def dags(draw: st.DrawFn) -> Drawn:
    """Edges from earlier to later nodes of two or three placements."""
    count = draw(st.integers(1, 12))
    names = [f"n{i}" for i in range(count)]
    pairs = [(a, b) for i, b in enumerate(names) for a in names[:i]]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    placement = {n: draw(st.sampled_from(["int8", "engine-float", "host"])) for n in names}
    return edges, placement


def leaves_and_comes_back(edges: list[Edge], groups: list[tuple[str, ...]]) -> bool:
    """By its definition, path by path, on the graph of the nodes: another way than the product's."""
    graph = nx.DiGraph(edges)
    for group in groups:
        inside = set(group)
        for name in inside & set(graph):
            outside = {n for n in graph.successors(name) if n not in inside}
            behind = outside.union(*(nx.descendants(graph, n) for n in outside))
            if behind & inside:
                return True
    return False


def is_convex(edges: Iterable[Edge], groups: Sequence[Sequence[str]]) -> bool:
    """Whether no path leaves a group and comes back: the graph of the groups has no cycle."""
    number = {n: i for i, names in enumerate(groups) for n in names}
    view: nx.DiGraph[int] = nx.DiGraph((number[a], number[b]) for a, b in edges if number[a] != number[b])
    return bool(nx.is_directed_acyclic_graph(view))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(dags())
def test_groups_are_convex_of_one_placement_and_hold_every_node_once(drawn: Drawn) -> None:
    edges, placement = drawn
    groups = convex_groups(edges, [], placement)
    assert sorted(n for g in groups for n in g) == sorted(placement)
    assert all(len({placement[n] for n in g}) == 1 for g in groups)
    assert is_convex(edges, groups)
    assert not leaves_and_comes_back(edges, groups)


DIAMOND = [("a", "f"), ("f", "b"), ("a", "b")]


def test_connected_groups_that_a_float_path_leaves_and_enters_are_seen() -> None:
    """What was done before: connected nodes of one placement."""
    assert not is_convex(DIAMOND, [("a", "b"), ("f",)])
    assert leaves_and_comes_back(DIAMOND, [("a", "b"), ("f",)])
    assert convex_groups(DIAMOND, [], {"a": "int8", "f": "engine-float", "b": "int8"}) == [("a",), ("f",), ("b",)]


def test_a_tie_joins_readers_of_one_quantize_where_that_is_convex() -> None:
    placement = {"q": "int8", "k": "int8"}
    assert convex_groups([], [], placement) == [("q",), ("k",)]
    assert convex_groups([], [("q", "k")], placement) == [("q", "k")]


@pytest.mark.parametrize("model", MODELS)
def test_the_partitions_of_a_plan_are_convex(model: str) -> None:
    plan = qg.plan(captured(model))
    names = {f.name for f in plan.nodes}
    edges = [(value, f.name) for f in plan.nodes for _, value in f.inputs if value in names]
    assert is_convex(edges, [p.nodes for p in plan.partitions])
    values = [v for p in plan.partitions for v in p.quantizes]
    assert len(values) == len(set(values)), "a quantize that several read is counted once"


@pytest.mark.parametrize("model", ["mlp", "encoder", "images", "cnn", "llama", "clip", "written"])
def test_the_engine_runs_so_many_quantizes_and_dequantizes_as_the_plan_says(model: str) -> None:
    found = lower(MODELS[model])
    realized = ort_cpu.audit(found.file)
    assert compare_borders(found.plan, realized) == ""
    for kernel in ("QuantizeLinear", "DequantizeLinear"):
        more = [*realized, KernelNode("planted", kernel, False)]
        assert f"{kernel} at its borders" in compare_borders(found.plan, more)
    island = next(p for p in found.plan.partitions if p.quantizes)
    poorer = replace(island, quantizes=island.quantizes[1:])
    parts = tuple(poorer if p is island else p for p in found.plan.partitions)
    assert compare_borders(replace(found.plan, partitions=parts), realized) != ""


def test_a_partition_is_as_large_as_a_chain() -> None:
    chain = [f"n{i}" for i in range(50)]
    assert convex_groups(list(pairwise(chain)), [], dict.fromkeys(chain, "int8")) == [tuple(chain)]


def test_integers_pass_a_dropout_which_is_gone_when_the_engine_runs() -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 10))
    found = lower(Case(lambda: nn.Sequential(*layers).eval(), lambda seed: floats(2, 3, 8, 8, seed=seed)))
    assert [v for p in found.plan.partitions for v in p.quantizes + p.dequantizes] == ["input_1"]
    assert compare_borders(found.plan, ort_cpu.audit(found.file)) == ""
