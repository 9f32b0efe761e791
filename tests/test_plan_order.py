"""One plan for any order: of the planning passes, of what they state, and of the nodes of the graph.

The plan is compared without ``hashes["graph"]``. That hash keeps the order of the nodes: it vouches for names like
``:add#2``, which are given in that order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.aliases import writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.ir.stages import verify_structure
from qatgraph.ir.topology import dataflow_order
from qatgraph.passes import PLANNING
from qatgraph.planning.build import PlanningContext, build_plan
from qatgraph.planning.constraints import Constraint
from qatgraph.planning.facts import facts_of
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.target import load_target
from qatgraph.rewriting.passes import PlanningPass
from qatgraph.rewriting.registry import make_pass
from tests.models import MODELS, canonical, floats
from tests.nets import clashing

TARGETS = {
    "ort-cpu": load_target("ort-cpu"),
    "toy-npu": load_target("examples/targets/toy_npu.toml"),
    "clashing": clashing("linear", "residual_add", "mul", "gelu"),  # somebody has to give way, and always the same
}
CASES = [(model, target) for model in MODELS for target in TARGETS]
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32)


def planning(names: Iterable[str] = PLANNING) -> list[PlanningPass]:
    return [p for p in map(make_pass, names) if isinstance(p, PlanningPass)]


def stated(context: PlanningContext, graph: Graph, passes: Iterable[PlanningPass]) -> list[Constraint]:
    return [c for one in passes for c in one.state(graph, context)]


def plan_hash(
    graph: Graph,
    target: str,
    passes: Iterable[PlanningPass] | None = None,
    arrange: Callable[[list[Constraint]], object] = lambda constraints: None,
) -> str:
    """Of the plan of a canonical graph; ``arrange`` puts the constraints into another order."""
    context = PlanningContext(TARGETS[target], Recipe(), facts_of(graph))
    constraints = stated(context, graph, planning() if passes is None else passes)
    arrange(constraints)
    return build_plan(context, constraints, {}).hash()


# ---------------------------------------------------------------- of the passes, and of what they state


@EXAMPLES
@given(case=st.sampled_from(CASES), order=st.permutations(PLANNING))
def test_the_plan_is_the_same_for_any_order_of_the_passes(case: tuple[str, str], order: Sequence[str]) -> None:
    model, target = case
    assert plan_hash(canonical(model), target, planning(order)) == plan_hash(canonical(model), target)


@EXAMPLES
@given(case=st.sampled_from(CASES), seed=SEEDS)
def test_the_plan_is_the_same_for_any_order_of_the_constraints(case: tuple[str, str], seed: int) -> None:
    model, target = case
    shuffled = plan_hash(canonical(model), target, arrange=random.Random(seed).shuffle)
    assert shuffled == plan_hash(canonical(model), target)


@dataclass(frozen=True)
class PinIfFirst(PlanningPass):
    """Looks at who came before it, which no pass may."""

    name = "pin-if-first"
    before: Any = None

    def state(self, graph: Graph, context: Any) -> Iterable[Constraint]:
        return [] if self.before else [qg.pin("up:linear", by=self.name, why="it came first")]


@dataclass(frozen=True)
class TakeATurn(PinIfFirst):
    name = "take-a-turn"

    def state(self, graph: Graph, context: Any) -> Iterable[Constraint]:
        self.before.append(self.name)
        return []


def test_a_pass_that_looks_at_the_others_is_seen() -> None:
    first: list[str] = []
    second: list[str] = []
    orders = [PinIfFirst(first), TakeATurn(first)], [TakeATurn(second), PinIfFirst(second)]
    assert len({plan_hash(canonical("mlp"), "ort-cpu", order) for order in orders}) == 2


# ---------------------------------------------------------------- of the nodes


def reordered(graph: Graph, seed: int) -> Graph:
    """The same graph in another legal order: every node after its inputs, writes where they were, inputs first."""
    twin, choice = graph.clone(), random.Random(seed)
    nodes = [n for n in twin.module.graph.nodes if n.op not in ("placeholder", "output")]
    before: dict[fx.Node, set[fx.Node]] = {n: set(n.all_input_nodes) & set(nodes) for n in nodes}
    for i, write in enumerate(nodes):
        if writes(write):
            before[write] |= set(nodes[:i])
            for later in nodes[i + 1 :]:
                before[later].add(write)
    end = twin.module.graph.output_node()
    while before:
        node = choice.choice([n for n, waiting in before.items() if not waiting])
        end.prepend(node)
        del before[node]
        for waiting in before.values():
            waiting.discard(node)
    twin.module.recompile()
    return twin


def order_of(graph: Graph) -> tuple[str, ...]:
    return tuple(n.name for n in graph.module.graph.nodes)


@EXAMPLES
@given(case=st.sampled_from(CASES), seed=SEEDS)
def test_the_plan_is_the_same_for_any_order_of_the_nodes(case: tuple[str, str], seed: int) -> None:
    model, target = case
    assert plan_hash(reordered(canonical(model), seed), target) == plan_hash(canonical(model), target)


@pytest.mark.parametrize("model", MODELS)
def test_a_reordered_graph_is_the_same_graph_and_the_whole_road_to_its_plan_the_same(model: str) -> None:
    graph, batch = canonical(model), MODELS[model].inputs(1)
    twin = next(t for t in (reordered(graph, seed) for seed in range(50)) if order_of(t) != order_of(graph))
    verify_structure(twin.module, twin.stage, "the test")
    for a, b in zip(*(pytree.tree_leaves(g.run(batch)) for g in (graph, twin)), strict=True):
        assert torch.equal(a, b)
    plans = [qg.plan(g) for g in (graph, twin)]
    hashes = [{k: v for k, v in plan.hashes.items() if k != "graph"} for plan in plans]
    assert replace(plans[0], hashes=hashes[0]).to_json() == replace(plans[1], hashes=hashes[1]).to_json()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_is_laid_over_any_order_of_the_nodes(model: str, target: str) -> None:
    """A quantizer that several nodes read stands in front of the one that runs first, wherever the plan names it."""
    for seed in range(3):
        twin = reordered(canonical(model), seed)
        qat, batch = qg.prepare(twin, qg.plan(twin, TARGETS[target])), MODELS[model].inputs(1)
        for a, b in zip(*(pytree.tree_leaves(g.run(batch)) for g in (twin, Graph.of(qat))), strict=True):
            assert torch.equal(a, b)


def test_on_the_clashing_target_nodes_give_way() -> None:
    context = PlanningContext(TARGETS["clashing"], Recipe(), facts_of(canonical("encoder")))
    plan = build_plan(context, [], {})
    assert any("contradicts" in prediction.remedy for prediction in plan.predictions)


def test_a_hundred_seeds_give_a_hundred_orders_of_execution() -> None:
    orders = {tuple(record(n).name for n in reordered(canonical("llama"), seed).nodes) for seed in range(100)}
    assert len(orders) == 100


def test_a_planner_that_follows_the_order_of_execution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical("encoder")
    monkeypatch.setattr("qatgraph.ir.topology.dataflow_order", lambda nodes: list(nodes.nodes))
    assert len({plan_hash(reordered(graph, seed), "ort-cpu") for seed in range(5)}) > 1


class Counter(nn.Module):
    """Two branches, and a buffer that counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x) + self.calls
        self.calls.add_(1)
        z: torch.Tensor = y + self.b(x) * self.calls
        return z


def test_the_order_of_the_data_flow_holds_every_node_once_after_its_inputs() -> None:
    graph = qg.canonicalize(qg.capture(Counter(), floats(2, 4)))
    assert any(writes(n) for n in graph.nodes), "a node that the output does not need"
    want = [n.name for n in dataflow_order(graph.module.graph)]
    assert sorted(want) == sorted(n.name for n in graph.module.graph.nodes)
    for seed in range(20):
        twin = reordered(graph, seed)
        place = {n: i for i, n in enumerate(dataflow_order(twin.module.graph))}
        assert all(place[source] < place[n] for n in place for source in n.all_input_nodes)
        assert [n.name for n in place] == want


def test_an_order_that_is_not_legal_is_seen() -> None:
    twin = reordered(canonical("mlp"), 0)
    twin.node("down:linear").append(twin.node("up:linear"))
    with pytest.raises(PassError) as found:
        verify_structure(twin.module, twin.stage, "the test")
    assert found.value.code == "QG203"
