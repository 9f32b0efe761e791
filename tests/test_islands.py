"""Int8 nodes that do not pay for their borders are left in float: the cheapest placement of all, free of order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.planning import islands
from qatgraph.planning.build import PlanningContext, build_plan
from qatgraph.planning.constraints import pin
from qatgraph.planning.cost import Cost, Rates
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.islands import DOUBT, settle
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import Row, Target, load_target
from tests.nets import U8, net, op

SIZE = 4 * 5 * 16  # elements of every value of ``tests.nets``
FAST = Rates(element=0, linear=0, conv=0, depthwise=0, matmul=0)
SLOW = Rates(element=100, linear=1, conv=1, depthwise=1, matmul=1)


def table(cost: Cost | None) -> Target:
    """Linears that read integers and write floats, and adds and GELUs between integers."""
    rows = []
    for kind, out, needs in (("linear", (), ""), ("add", (U8,), "between-int8"), ("gelu", (U8,), "")):
        grids = {"x": (U8,), "out": out}
        rows.append(Row(id=f"{kind}.int8", op=kind, placement="int8", kernel="K", why="{shape}", needs=needs, **grids))  # type: ignore[arg-type]
        rows.append(Row(id=f"{kind}.float", op=kind, placement="engine-float", kernel="F", why="{shape}"))
    return Target(name="priced", description="of this test", row=tuple(rows), cost=cost)


def priced(quantize: float, dequantize: float = 0.0) -> Target:
    cost = Cost(
        source="the test", node=0, quantize=quantize, dequantize=dequantize, float_kernels=SLOW, int8_kernels=FAST
    )
    return table(cost)


def node(name: str, kind: str, *sources: str, macs: int = 0) -> NodeFact:
    return replace(op(name, kind, *sources), x_bytes=SIZE * 4, macs=macs)


def linear(name: str, source: str, width: int) -> NodeFact:
    return node(name, "linear", source, macs=SIZE * width)


def kept(facts: Sequence[NodeFact], target: Target, forced: Sequence[str] = ()) -> set[str]:
    pins = [pin(n, by="force", why="the test says so") for n in forced]
    return {n for n, c in settle(tuple(facts), target, pins).choices.items() if c.int8}


def test_a_linear_pays_from_the_width_on_that_its_quantize_costs() -> None:
    """Of one input element, int8 wins ``width`` picoseconds, counted twice in doubt, and the quantize costs 40."""
    narrow, even, wide = (net(linear("a", "x", 40 // DOUBT + d)) for d in (-1, 0, 1))
    assert [kept(facts, priced(40)) for facts in (narrow, even, wide)] == [set(), {"a"}, {"a"}]


def test_readers_of_one_quantize_pay_for_it_together() -> None:
    facts = net(linear("q", "x", 8), linear("k", "x", 8), linear("v", "x", 8))
    assert kept(facts, priced(40)) == {"q", "k", "v"}
    assert kept(facts, priced(40), forced=["q"]) == set()


def test_the_decision_says_what_was_weighed_and_the_row_is_a_lost_alternative() -> None:
    facts = net(linear("a", "x", 10))
    plan = build_plan(PlanningContext(priced(40), Recipe(), facts), [], {})
    (decision,) = plan.decisions
    assert (decision.author.kind, decision.choice) == ("partition", "engine-float as F")
    assert decision.why == (
        "left in float: 8-bit kernels save 0.0032 us, their quantizes and dequantizes cost 0.013 us "
        "(estimates, example batch)"
    )
    (lost,) = decision.lost
    assert lost.choice == "int8 as K"
    assert lost.us == pytest.approx(0.0128)


def test_a_recipe_line_that_wants_int8_wins() -> None:
    facts = net(linear("a", "x", 1), linear("b", "x2", 1))
    for select, want in (("a", {"a"}), ("*", {"a", "b"})):
        recipe = Recipe(override=(Override(select=select, place="int8"),))
        plan = build_plan(PlanningContext(priced(40), recipe, facts), [], {})
        assert set(plan.int8_nodes()) == want


def test_without_costs_nothing_is_weighed() -> None:
    facts = net(linear("a", "x", 1))
    plan = build_plan(PlanningContext(table(None), Recipe(), facts), [], {})
    assert plan.int8_nodes() == ["a"]
    (island,) = plan.partitions
    assert (island.quantizes, island.boundary_bytes, island.boundary_us) == (("x",), SIZE * 5, None)
    assert plan.placements[0].us is None


def test_a_slow_int8_kernel_stays_between_integers_where_it_saves_borders() -> None:
    """gelu -> add -> linear: the int8 add is slower, but in float it would need a dequantize and a quantize."""
    slow = Cost(
        source="the test", node=0, quantize=100, dequantize=100, float_kernels=SLOW,
        int8_kernels=FAST.model_copy(update={"element": 150.0}),
    )  # fmt: skip
    facts = net(node("g", "gelu", "x", macs=SIZE * 100), node("s", "add", "g", "g"), linear("a", "s", 200))
    assert kept(facts, table(slow)) == {"g", "s", "a"}
    cheap = slow.model_copy(update={"quantize": 1.0, "dequantize": 1.0})
    assert kept(facts, table(cheap)) == {"g", "a"}


# ---------------------------------------------------------------- the cheapest of all, and free of order


@st.composite
def priced_nets(draw: st.DrawFn) -> tuple[tuple[NodeFact, ...], Target]:
    values, facts = ["x"], []
    for i in range(draw(st.integers(1, 5))):
        kind, width = draw(st.sampled_from(["linear", "gelu", "add"])), draw(st.integers(1, 60))
        sources = [draw(st.sampled_from(values)) for _ in range(2 if kind == "add" else 1)]
        facts.append(node(f"n{i}", kind, *sources, macs=SIZE * width if kind == "linear" else 0))
        values.append(f"n{i}")
    return net(*facts), priced(draw(st.integers(0, 80)), draw(st.integers(0, 80)))


def price(facts: Sequence[NodeFact], target: Target, int8: set[str]) -> float:
    """Of a placement, counted from its definition, in picoseconds an element; the plan's own rows are not asked."""
    cost = target.cost
    assert cost is not None
    total = sum(DOUBT * cost.kernel(f, int8=False) / SIZE for f in facts if f.name not in int8)
    values = {v for f in facts for _, v in f.inputs}
    writes = {f.name for f in facts if f.kind != "linear" and f.name in int8}
    for value in values:
        readers = [f for f in facts if value in [v for _, v in f.inputs]]
        total += cost.quantize * (value not in writes and any(f.name in int8 for f in readers))
    for fact in facts:
        floats = "output" in fact.readers or any(
            f.name not in int8 for f in facts if fact.name in [v for _, v in f.inputs]
        )
        total += cost.dequantize * (fact.name in writes and floats)
    return total


def allowed(facts: Sequence[NodeFact], target: Target, int8: set[str]) -> bool:
    """Whether the solver alone takes this placement as it is."""
    rest = [f.name for f in facts if f.name not in int8]
    return kept(facts, target.model_copy(update={"cost": None}), rest) == int8


def placements(facts: Sequence[NodeFact]) -> list[set[str]]:
    names = [f.name for f in facts]
    return [{n for n, b in zip(names, bits, strict=True) if b} for bits in product((0, 1), repeat=len(names))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(priced_nets())
def test_no_placement_is_cheaper(drawn: tuple[tuple[NodeFact, ...], Target]) -> None:
    facts, target = drawn
    have = kept(facts, target)
    best = min(price(facts, target, s) for s in placements(facts) if allowed(facts, target, s))
    assert price(facts, target, have) == pytest.approx(best)


def improved(facts: Sequence[NodeFact], target: Target) -> list[str]:
    """The nodes that became int8 because another was forced to float."""
    base = kept(facts, target)
    return [n for f in facts for n in kept(facts, target, [f.name]) - base]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(priced_nets())
def test_taking_int8_away_never_gives_it_to_another(drawn: tuple[tuple[NodeFact, ...], Target]) -> None:
    assert improved(*drawn) == []


def test_an_island_weighed_as_a_whole_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """a pays for itself and b does not; who looks at both at once drops both, and b's pin would bring a back."""
    facts, target = net(linear("a", "x", 60), node("b", "gelu", "a")), priced(40, 400)
    assert kept(facts, target) == {"a"}
    whole = islands._network

    def tied(*args: object) -> object:
        network = whole(*args)  # type: ignore[arg-type]
        names = [k for k in network if k[0] == "node"]
        network.add_edges_from((a, b) for a in names for b in names if a != b)
        return network

    monkeypatch.setattr(islands, "_network", tied)
    assert kept(facts, target) == set()
    assert improved(facts, target) == ["a"]


def test_the_built_in_tables_have_costs_with_their_source() -> None:
    for name in ("ort-cpu", "ort-cpu-vnni"):
        cost = load_target(name).cost
        assert cost is not None
        assert "bench_costs.py" in cost.source
