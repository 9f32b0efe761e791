"""The work of passes and plan grows with the graph, not with its square: counted in calls, which no load disturbs.

``benchmarks/bench_passes.py`` measures the seconds.
"""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx
import pytest

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.planning.constraints import Constraint
from qatgraph.planning.facts import NodeFact
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, Pass, PlanningPass
from tests.models import Case
from tests.zoo.decoders import causal, text

ROOT = Path(__file__).parents[1]
OURS = (*(ROOT / p for p in ("qatgraph", "passes", "backends", "tests")), Path(networkx.__file__).parent)
TARGETS = ("ort-cpu", str(ROOT / "examples" / "targets" / "toy_npu.toml"))
SIZES = (1, 2, 4)
FEW = 100  # calls on the largest graph that are not worth a word
RATIO = 2.2


@cache
def llama(layers: int) -> Graph:
    return Case(lambda: causal("Llama", num_hidden_layers=layers), text).capture()


def calls(layers: int, target: str, passes: Iterable[Pass]) -> Counter[str]:
    """How often each function of ours and of networkx is called, or resumed, from the captured graph to its plan."""
    graph = llama(layers)
    profile = cProfile.Profile()
    profile.enable()
    str(qg.plan(graph, target, passes=tuple(passes)))
    profile.disable()
    found: Counter[str] = Counter()
    for (file, _, name), (_, count, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        path = Path(file)
        if any(path.is_relative_to(o) for o in OURS):
            found[f"{path.name}: {name}"] += count
    return found


def growing(target: str, *passes: Pass) -> list[str]:
    """The functions whose calls more than ``RATIO``-fold where the layers that are added double."""
    _, small, middle, large = (calls(n, target, passes) for n in (SIZES[0], *SIZES))  # the first call fills caches
    return sorted(n for n in large if large[n] > FEW and large[n] - middle[n] > RATIO * (middle[n] - small[n]))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: Path(t).stem)
def test_a_graph_twice_as_large_takes_twice_the_work(target: str) -> None:
    assert growing(target) == []


def looks_at(one: object, other: object) -> bool:
    return one is other


@dataclass(frozen=True)
class EachWithEach(PlanningPass):
    name = "each-with-each"

    def state(self, graph: Graph, context: Any) -> Iterable[Constraint]:
        facts: tuple[NodeFact, ...] = context.facts
        assert sum(looks_at(a, b) for a in facts for b in facts) == len(facts)
        return []


@dataclass(frozen=True)
class LooksFromTheStart(GraphPass):
    name = "looks-from-the-start"

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            assert next(n for n in graph.nodes if looks_at(n, node)) is node


@pytest.mark.parametrize("planted", [EachWithEach(), LooksFromTheStart()], ids=str)
def test_a_pass_that_looks_at_each_node_for_each_node_is_seen(planted: Pass) -> None:
    assert "test_speed.py: looks_at" in growing(TARGETS[0], planted)
