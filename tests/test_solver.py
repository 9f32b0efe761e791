"""The solver on small synthetic graphs: free of order, and every demotion with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.planning.build import PlanningContext, build_plan
from qatgraph.planning.constraints import RECIPE_GLOB, RECIPE_NAMED, Author, Constraint, Port, pin
from qatgraph.planning.facts import NodeFact, ParameterFact
from qatgraph.planning.plan import Plan, Quantizer
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.solver import Solution, solve
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize
from qatgraph.specs import QuantSpec, ScaleRule
from tests.models import captured, floats
from tests.nets import S8, U8, clashing, net, op

TOY = load_target(str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml"))
ORT = load_target("ort-cpu")
TABLES = {"ort-cpu": ORT, "toy-npu": TOY}


def plan_of(facts: tuple[NodeFact, ...], table: Target, constraints: Sequence[Constraint] = ()) -> Plan:
    return build_plan(PlanningContext(table, Recipe(), facts), constraints, {})


def share(*values: str, by: str = "share-test") -> Constraint:
    ports = tuple(Port(v, "out") for v in values)
    return Constraint("share", ports, Author("pass", by), f"{' and '.join(values)} hold the same numbers")


def derive(node: str, by: str = "derive-test") -> Constraint:
    ports = (Port(node, "bias"), Port(node, "x"), Port(node, "weight"))
    return Constraint("derive", ports, Author("pass", by), f"'{node}' adds its bias to the accumulator")


def reason(solution: Solution, node: str) -> str:
    return " ".join(solution.choices[node].out.values())


# free of order


NET = net(
    op("lookup", "embedding", "ids", storage="table"),
    op("norm", "layer_norm", "lookup"),
    op("turned", "transpose", "norm"),
    op("again", "reshape", "turned"),
    op("a", "linear", "norm", bias=True),
    op("b", "linear", "turned", bias=True),
    op("c", "linear", "again", bias=True),
    op("mid", "gelu", "a"),
    op("sum", "residual_add", "a", "b"),
    op("head", "linear", "sum", storage="table"),
)
PER_TENSOR = QuantSpec.parse("s8 symmetric per-tensor pair-safe")
PER_CHANNEL = QuantSpec.parse("s8 symmetric per-channel(0) pair-safe")


def wish(kind: str, node: str, role: str, by: str, strength: int = RECIPE_GLOB, *specs: QuantSpec) -> Constraint:
    return Constraint(kind, (Port(node, role),), Author("pass", by), f"{by} on {node}", specs, "", strength)


POOL = [
    pin("norm", by="pin-a", why="first"),
    pin("norm", by="pin-b", why="second"),
    wish("int8", "c", "out", "glob"),
    wish("float", "c", "out", "glob-float", RECIPE_GLOB - 1),
    wish("float", "b", "out", "some", RECIPE_GLOB),
    wish("int8", "b", "out", "named", RECIPE_NAMED),
    wish("want", "a", "weight", "grid-a", RECIPE_GLOB, PER_CHANNEL),
    wish("want", "a", "weight", "grid-b", RECIPE_NAMED, PER_TENSOR),
    share("norm", "turned"),
    share("turned", "again", by="share-b"),
    derive("a"),
    derive("b", by="derive-b"),
    derive("c"),
]


def settled(constraints: Sequence[Constraint], table: Target) -> list[object]:
    """What the solver decides: rows, reasons, and grids with their ports."""
    solution = solve(NET, table, constraints)
    rows = {n: (c.row.id if c.row else "", c.out, c.held) for n, c in solution.choices.items()}
    return [rows, sorted((sorted(g.values), g.options, sorted(map(str, g.ports))) for g in solution.grids)]


@pytest.mark.parametrize("name", TABLES)
def test_the_solution_is_free_of_order(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.permutations(POOL))
    def check(constraints: list[Constraint]) -> None:
        assert settled(constraints, TABLES[name]) == settled(POOL, TABLES[name])

    check()


@pytest.mark.parametrize("name", TABLES)
def test_the_hash_of_the_plan_is_free_of_order(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.permutations(POOL))
    def check(constraints: list[Constraint]) -> None:
        assert plan_of(NET, TABLES[name], constraints).hash() == plan_of(NET, TABLES[name], POOL).hash()

    check()


def test_two_wishes_of_one_author_are_free_of_order() -> None:
    wishes = [wish("want", "a", "weight", "one", RECIPE_GLOB, spec) for spec in (PER_TENSOR, PER_CHANNEL)]
    assert settled(wishes, ORT) == settled(wishes[::-1], ORT)


def test_a_constraint_less_is_seen() -> None:
    assert all(
        settled(POOL[:i] + POOL[i + 1 :], ORT) != settled(POOL, ORT)
        for i, c in enumerate(POOL)
        if c.author.id in ("named", "pin-a", "grid-b")
    )


# sharing


def quantizers(plan: Plan, value: str) -> list[Quantizer]:
    return [q for q in plan.quantizers if value in q.values]


def test_a_value_with_three_readers_has_one_quantizer() -> None:
    plan = qg.plan(captured("encoder"))
    readers = [f"layer.0.attention.{n}:linear.x" for n in ("query", "key", "value")]
    (found,) = quantizers(plan, "Encoder:residual_add")
    assert [str(p) for p in found.ports] == readers
    assert found.name == readers[0]
    decision = next(d for d in plan.decisions if d.subject == found.name)
    assert all(r in decision.why for r in readers)


class BothSides(nn.Module):
    """One linear over the rows of a square and one over its columns: [batch, 16, 16] -> two of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows(x), self.columns(x.transpose(1, 2).reshape(-1, 16, 16))


def test_one_grid_through_transpose_and_reshape() -> None:
    torch.manual_seed(0)
    graph = qg.capture(BothSides(), floats(3, 16, 16), {"x": {0: "batch"}})
    plan = qg.plan(graph)
    activations = [q for q in plan.quantizers if q.observer]
    assert len(activations) == 1
    assert {str(p) for p in activations[0].ports} == {"rows:linear.x", "columns:linear.x"}
    assert len(activations[0].values) == 2
    why = next(d.why for d in plan.decisions if d.subject == activations[0].name)
    assert "only moves the elements" in why
    qat = qg.prepare(graph, plan)
    assert sum(isinstance(m, ActivationFakeQuantize) for m in qat.modules()) == 1
    alone = build_plan(PlanningContext(ORT, Recipe(), plan.nodes), [], {})
    assert sum(bool(q.observer) for q in alone.quantizers) == 2  # without the pass that states the wish


def three_readers(values: Sequence[str]) -> tuple[NodeFact, ...]:
    return net(*(op(f"r{i}", "linear", v) for i, v in enumerate(values)))


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_three_values_of_one_wish_share_one_grid(order: tuple[str, ...]) -> None:
    """As the inputs of a concatenation do."""
    solution = solve(three_readers("abc"), ORT, [share(*order)])
    grids = [g for g in solution.grids if set(g.values) & set("abc")]
    assert [sorted(g.values) for g in grids] == [["a", "b", "c"]]


def test_two_inputs_of_one_node_can_share() -> None:
    """The ports of a wish may be inputs, too: then the values that they read share."""
    facts = net(op("a", "linear", "x"), op("b", "linear", "y"), op("sum", "residual_add", "a", "b"))
    wishes = Constraint("share", (Port("sum", "x"), Port("sum", "y")), Author("pass", "test"), "one adder, one grid")
    solution = solve(facts, TOY, [wishes])
    assert [sorted(g.values) for g in solution.grids if "a" in g.values] == [["a", "b"]]


def test_a_wish_to_share_that_cannot_be_kept_is_in_lost() -> None:
    facts = net(op("norm", "layer_norm", "x"), op("turned", "transpose", "norm"), op("a", "linear", "norm"))
    facts = net(*facts, op("b", "gelu", "turned"))
    table = clashing("linear", "gelu")
    plan = plan_of(facts, table, [share("norm", "turned")])
    assert [str(q.spec) for q in plan.quantizers] == [str(U8), str(S8)]
    assert solve(facts, table, [share("norm", "turned")]).unshared
    lost = [a for d in plan.decisions for a in d.lost if a.author.id == "share-test"]
    assert lost
    assert str(U8) in lost[0].why_lost
    assert str(S8) in lost[0].why_lost


# conflicts of grids


@pytest.mark.parametrize("kinds", [("linear", "gelu"), ("gelu", "linear")])
def test_the_later_of_two_that_disagree_goes_to_float_with_the_reason(kinds: tuple[str, str]) -> None:
    first, later = kinds
    facts = net(op("a", first, "x"), op("b", later, "x"))
    table = clashing(first, later)
    plan = plan_of(facts, table)
    assert [p.placement for p in plan.placements] == ["int8", "engine-float"]
    decision = next(d for d in plan.decisions if d.subject == "b")
    lost = next(a for a in decision.lost if a.author.id == f"{later}.int8")
    assert all(word in lost.why_lost for word in ("'x'", "'a.x'", str(U8), str(S8)))
    assert [q.name for q in plan.quantizers] == ["a.x"]
    prediction = plan.prediction("b")
    assert prediction is not None
    assert lost.why_lost in prediction.remedy


def test_a_node_that_is_out_itself_puts_nobody_out() -> None:
    """b loses its weight to a; c disagrees only with b, so c stays."""
    weights = (PER_CHANNEL, PER_TENSOR, PER_CHANNEL)
    grids = (U8, S8, U8)
    rows = []
    for kind, x, weight in zip(("linear", "embedding", "addmm"), grids, weights, strict=True):
        row = Row(id=f"{kind}.int8", op=kind, placement="int8", kernel="K", x=(x,), weight=(weight,), why="{shape}")
        rows += [row, Row(id=f"{kind}.float", op=kind, placement="engine-float", kernel="F", why="{shape}")]
    table = Target(name="t", description="t", row=tuple(rows))
    other = replace(op("c", "linear", "v"), kind="addmm")
    facts = net(op("a", "linear", "u", storage="w"), op("b", "embedding", "v", storage="w"), other)
    solution = solve(facts, table, [])
    assert {n: c.int8 for n, c in solution.choices.items()} == {"a": True, "b": False, "c": True}


def test_a_table_of_embeddings_and_a_head_settle_on_the_grid_that_both_take() -> None:
    plan = qg.plan(captured("tied"), recipe=Recipe(override=(Override(select="embedding:embedding", place="int8"),)))
    weights = [q for q in plan.quantizers if any(p.role == "weight" for p in q.ports)]
    assert len(weights) == 1
    assert weights[0].spec == QuantSpec.parse("s8 symmetric per-tensor pair-safe")
    assert {str(p) for p in weights[0].ports} == {"embedding:embedding.weight", "head:linear.weight"}
    decision = next(d for d in plan.decisions if d.subject == weights[0].name)
    lost = [a for a in decision.lost if a.choice == str(PER_CHANNEL)]
    assert len(lost) == 1
    assert "linear." in lost[0].author.id
    assert lost[0].why_lost
    alone = qg.plan(captured("tied"))
    assert [str(q.spec) for q in alone.quantizers if "weight" in q.name] == [str(PER_CHANNEL)]  # the table is pinned


def test_a_head_that_insists_on_channels_loses_its_table_or_its_int8_with_the_reason() -> None:
    lines = (Override(select="embedding:embedding", place="int8"), Override(select="head:linear", weight=PER_CHANNEL))
    plan = qg.plan(captured("tied"), recipe=Recipe(override=lines))
    decision = next(d for d in plan.decisions if d.subject == "head:linear")
    assert plan.int8_nodes() == ["embedding:embedding"]
    assert any("embedding:embedding.weight" in a.why_lost for a in decision.lost)


# the accumulator's bias


def unjustified(plan: Plan) -> list[str]:
    """Biases on an integer grid that no placement wants, and placements that want one and have none."""
    derived = {q.ports[0].node for q in plan.quantizers if q.spec.scale is ScaleRule.DERIVED}
    wanted = {p.node for p in plan.placements if p.placement == "int8" and p.bias == "int32"}
    return sorted(derived ^ wanted)


@pytest.mark.parametrize(
    ("model", "table", "count"), [("mlp", ORT, 2), ("encoder", ORT, 0), ("encoder", TOY, 6), ("tied", TOY, 0)]
)
def test_a_bias_is_derived_where_the_row_wants_int32(model: str, table: Target, count: int) -> None:
    plan = qg.plan(captured(model), table)
    derived = [q for q in plan.quantizers if q.spec.scale is ScaleRule.DERIVED]
    assert len(derived) == count
    assert unjustified(plan) == []
    for one in derived:
        n = one.ports[0].node
        sources = tuple(plan.quantizer_at(Port(n, role)) for role in ("x", "weight"))
        assert one.derived_from == tuple(q.name for q in sources if q is not None)
        assert one.spec.granularity is max((q.spec.granularity for q in sources if q), key=lambda g: g == "per-channel")


def test_a_bias_without_its_row_is_seen() -> None:
    plan = qg.plan(captured("mlp"))
    wrong = tuple(replace(p, bias="row") if p.node == "up:linear" else p for p in plan.placements)
    assert unjustified(replace(plan, placements=wrong)) == ["up:linear"]


# neighbours


def test_a_sum_stays_on_the_device_only_with_both_operands() -> None:
    two = net(op("a", "linear", "x"), op("b", "linear", "x"), op("sum", "residual_add", "a", "b"))
    assert solve(two, TOY, []).choices["sum"].int8
    host = net(op("a", "linear", "x"), op("norm", "layer_norm", "x"), op("sum", "residual_add", "a", "norm"))
    solution = solve(host, TOY, [])
    assert not solution.choices["sum"].int8
    assert reason(solution, "sum") == "its input y, 'norm', is not int8"
    plan = plan_of(host, TOY)
    decision = next(d for d in plan.decisions if d.subject == "sum")
    assert (decision.choice, decision.rule) == ("host as host", "residual_add.host")
    assert decision.lost[0].why_lost == "its input y, 'norm', is not int8"
    assert plan.quantizer_at(Port("sum", "x")) is None


def test_one_operand_that_goes_takes_the_chain_with_it() -> None:
    chain = net(
        op("a", "linear", "x"),
        op("g", "gelu", "a"),
        op("s", "residual_add", "g", "a"),
        op("t", "residual_add", "s", "g"),
    )
    assert all(c.int8 for c in solve(chain, TOY, []).choices.values())
    solution = solve(chain, TOY, [pin("a", by="test", why="held")])
    assert {n: c.int8 for n, c in solution.choices.items()} == dict.fromkeys("agst", False)
    assert reason(solution, "t") == "its input x, 's', is not int8"


def test_an_operand_is_followed_through_what_only_moves_elements() -> None:
    facts = net(
        op("a", "linear", "x"),
        op("r", "reshape", "a"),
        op("t", "transpose", "r"),
        op("sum", "residual_add", "t", "a"),
    )
    assert solve(facts, TOY, []).choices["sum"].int8
    broken = net(*facts[:2], replace(facts[2], kind="cumsum"), facts[3])
    assert not solve(broken, TOY, []).choices["sum"].int8


def test_a_moved_parameter_is_an_operand_on_the_host() -> None:
    """``x + self.position.expand(...)``: the expand has no input but a parameter."""
    parameter = ParameterFact("x", "position", "position", (1, 5, 16), 320)
    moved = replace(op("moved", "expand"), parameters=(parameter,))
    facts = net(op("a", "linear", "x"), moved, op("sum", "residual_add", "a", "moved"))
    solution = solve(facts, TOY, [])
    assert not solution.choices["sum"].int8
    assert "'moved', is not int8" in reason(solution, "sum")


def test_in_a_real_model_the_residuals_of_the_host_are_demoted() -> None:
    plan = qg.plan(captured("encoder"), TOY)
    sums = [f.name for f in plan.nodes if f.kind == "residual_add"]
    assert len(sums) == 3
    for name in sums:
        decision = next(d for d in plan.decisions if d.subject == name)
        assert plan.placement(name).placement == "host"
        assert any("is not int8" in a.why_lost for a in decision.lost)
