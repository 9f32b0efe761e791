"""What holds for every registered pass, over a zoo of tiny models; and a planted pass that breaks each law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Batch, Graph
from qatgraph.ir.stages import verify_structure
from qatgraph.passes import BUILTIN, CANONICALIZE, ON_REQUEST, PLANNING
from qatgraph.planning.build import PlanningContext
from qatgraph.planning.facts import facts_of
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.target import load_target
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager, PassReport
from qatgraph.rewriting.matcher import match
from qatgraph.rewriting.passes import GraphPass, Pass, PlanningPass, parse_options, same, within
from qatgraph.rewriting.pattern import Any as AnyValue
from qatgraph.rewriting.pattern import Op
from qatgraph.rewriting.registry import make_pass
from tests.models import MODELS, canonical, captured, evidence

HEADINGS = ("What:", "Why:", "Before and after:", "Refuses:", "Numerics:")


GRAPH_PASSES = (*CANONICALIZE, *ON_REQUEST)


def run(one: GraphPass, graph: Graph) -> tuple[Graph, PassReport]:
    manager = PassManager([one], leaves=graph.stage, evidence=evidence(graph))
    return manager.run(graph), manager.reports[0]


@dataclass(frozen=True)
class Ran:
    """One run of a pass: what was there before, and what came out."""

    one: GraphPass
    graph: Graph
    before: tuple[object, ...]
    after: Graph
    report: PassReport


def ran(one: GraphPass, graph: Graph) -> Ran:
    before = state(graph)
    return Ran(one, graph, before, *run(one, graph))


def state(graph: Graph) -> tuple[object, ...]:
    examples = [t.tolist() for t in pytree.tree_leaves((graph.info.args, graph.info.kwargs))]
    modules = [(name, module.training) for name, module in graph.module.named_modules()]
    return str(graph), graph.info.stage, graph.structural_hash(), graph.weights_hash(), examples, modules


# ---------------------------------------------------------------- laws of passes that change the graph


def verifies_after(r: Ran, batch: Batch) -> None:
    verify_structure(r.after.module, r.graph.stage, r.one.name)


def a_second_run_changes_nothing(r: Ran, batch: Batch) -> None:
    if r.report.modified:  # else the second run is the first
        twice, report = run(r.one, r.after)
        assert str(twice) == str(r.after)
        assert not report.modified


def modified_tells_the_truth(r: Ran, batch: Batch) -> None:
    assert r.report.modified == (str(r.after) != str(r.graph))
    if not r.report.modified:
        hashes = [(g.structural_hash(), g.weights_hash()) for g in (r.graph, r.after)]
        assert hashes[0] == hashes[1]


def declared_numerics_hold(r: Ran, batch: Batch) -> None:
    """On inputs that the pass has not seen; float32 adds its own rounding to a declared eps."""
    results = (pytree.tree_leaves(graph.run(batch)) for graph in (r.graph, r.after))
    for a, b in zip(*results, strict=True):
        if r.one.numerics == same:
            assert torch.equal(a, b)
        else:
            assert float((a - b).detach().abs().max()) <= (r.one.numerics.eps + 2e-6) * float(a.detach().abs().max())


def the_input_graph_is_untouched(r: Ran, batch: Batch) -> None:
    assert state(r.graph) == r.before


Law = Callable[[Ran, Batch], None]
GRAPH_LAWS: tuple[Law, ...] = (
    verifies_after,
    a_second_run_changes_nothing,
    modified_tells_the_truth,
    declared_numerics_hold,
    the_input_graph_is_untouched,
)


@cache
def ran_on(name: str, model: str, stage: Callable[[str], Graph]) -> Ran:
    one = make_pass(name)
    assert isinstance(one, GraphPass)
    graph = functional(model) if one.requires and stage is captured else stage(model)
    return ran(one, graph)


@cache
def functional(model: str) -> Graph:
    """The captured graph as passes may require it."""
    one = make_pass("functionalize-in-place")
    assert isinstance(one, GraphPass)
    return run(one, captured(model))[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", GRAPH_PASSES)
@pytest.mark.parametrize("law", GRAPH_LAWS)
@pytest.mark.parametrize("stage", [captured, canonical])
def test_graph_pass(law: Law, name: str, model: str, stage: Callable[[str], Graph]) -> None:
    law(ran_on(name, model, stage), MODELS[model].inputs(1))


def test_every_pass_changes_some_model_of_the_zoo() -> None:
    """Else the laws would say nothing about it: in its place in the pipeline, or behind it if it is on request."""
    busy: set[str] = set()
    for model in MODELS:
        passes = [p for p in map(make_pass, GRAPH_PASSES) if isinstance(p, GraphPass)]
        manager = PassManager(passes, evidence=evidence(captured(model)))
        manager.run(captured(model))
        busy |= {r.name for r in manager.reports if r.modified}
    assert busy == set(GRAPH_PASSES)


@pytest.mark.parametrize("model", MODELS)
def test_canonical_is_canonical(model: str) -> None:
    """So that a plan for a graph that was canonicalized by hand fits the graph that was not."""
    once = canonical(model)
    twice = qg.canonicalize(once)
    assert str(twice) == str(once)
    assert twice.structural_hash() == once.structural_hash()
    assert twice.weights_hash() == once.weights_hash()


# ---------------------------------------------------------------- laws of all passes


def the_docstring_has_its_headings(one: Pass) -> None:
    lines = [line.strip() for line in (type(one).__doc__ or "").splitlines()]
    found = [h for line in lines for h in HEADINGS if line.startswith(h)]
    assert found == list(HEADINGS)
    assert type(one).summary().endswith(".")


def option_text_round_trips(one: Pass) -> None:
    name, options = parse_options(str(one))
    assert name == one.name
    assert type(one)(**options) == one


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("law", [the_docstring_has_its_headings, option_text_round_trips])
def test_pass(law: Callable[[Pass], None], name: str) -> None:
    law(make_pass(name))


def test_every_builtin_pass_is_in_one_list() -> None:
    assert sorted(BUILTIN) == sorted([*CANONICALIZE, *ON_REQUEST, *PLANNING])
    assert all(isinstance(make_pass(n), GraphPass) for n in GRAPH_PASSES)
    assert all(isinstance(make_pass(n), PlanningPass) for n in PLANNING)


# ---------------------------------------------------------------- laws of passes that plan


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PLANNING)
def test_a_planning_pass_leaves_the_graph_alone(name: str, model: str) -> None:
    """Its other law, that its place among the others does not matter, is held in ``test_plan_order.py``."""
    one, graph = make_pass(name), canonical(model)
    assert isinstance(one, PlanningPass)
    context = PlanningContext(load_target("ort-cpu"), Recipe(), facts_of(graph))
    before = state(graph)
    first, second = (list(one.state(graph, context)) for _ in range(2))
    assert state(graph) == before
    assert first == second


# ---------------------------------------------------------------- planted passes, each of which breaks a law


@dataclass(frozen=True)
class Planted(GraphPass):
    """Whatever a fault needs."""

    name = "planted"


def linear(graph: Graph) -> Any:
    return next(n for n in graph.nodes if match(Op("linear", AnyValue("x")), n) is not None)


class Unstructured(Planted):
    def apply(self, graph: Graph, edit: Edit) -> None:
        linear(graph).target = torch.nn.functional.linear


class Growing(Planted):
    def apply(self, graph: Graph, edit: Edit) -> None:
        node = linear(graph)
        new = edit.call("mul", node, 1.0, at=node.next)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class Overfitted(Planted):
    """Right on the example inputs, wrong on all others."""

    def apply(self, graph: Graph, edit: Edit) -> None:
        with torch.no_grad():
            value = graph.module(*graph.info.args, **graph.info.kwargs)
        output = graph.module.graph.output_node()
        output.args = ([edit.constant("baked", value, at=output)],)


class Nearly(Planted):
    numerics = within(1e-12)

    def apply(self, graph: Graph, edit: Edit) -> None:
        node = linear(graph)
        new = edit.call("mul", node, 1.001, at=node.next)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class InPlace(Planted):
    def apply(self, graph: Graph, edit: Edit) -> None:
        with torch.no_grad():
            next(graph.module.parameters()).add_(1)


@pytest.mark.parametrize(
    ("law", "fault"),
    [
        (verifies_after, Unstructured),
        (a_second_run_changes_nothing, Growing),
        (modified_tells_the_truth, InPlace),
        (declared_numerics_hold, Overfitted),
        (declared_numerics_hold, Nearly),
        (the_input_graph_is_untouched, InPlace),
    ],
)
def test_a_law_is_broken_by(law: Law, fault: type[Planted]) -> None:
    with pytest.raises((AssertionError, PassError)):
        law(ran(fault(), MODELS["mlp"].capture()), MODELS["mlp"].inputs(1))


@dataclass(frozen=True)
class Undocumented(PlanningPass):
    """What: nothing. Why: no other heading stands here."""

    name = "undocumented"


@dataclass(frozen=True)
class Unprintable(PlanningPass):
    name = "unprintable"
    option: Any = object


def test_a_law_of_all_passes_is_broken_by() -> None:
    with pytest.raises(AssertionError):
        the_docstring_has_its_headings(Undocumented())
    with pytest.raises(PassError):
        option_text_round_trips(Unprintable(option=int))
