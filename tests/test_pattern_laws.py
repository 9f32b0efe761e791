"""Laws of matching: deterministic, complete, linear, with one rule for overlaps; and what is refused at definition."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.meta import has_record, record
from qatgraph.operators import QUANTIZE
from qatgraph.ops import kind_of_target
from qatgraph.passes.fold_gelu import FoldGelu
from qatgraph.passes.fuse_attention import FuseAttention
from qatgraph.passes.fuse_linear_activation import FuseLinearActivation
from qatgraph.rewriting import matcher
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.matcher import attribute, is_operand, match, match_or_miss
from qatgraph.rewriting.passes import RewritePass, same, within
from qatgraph.rewriting.pattern import Alt, Const, Group, Match, Moved, NearMiss, Number, Op, Opt, Pattern, Refusal
from qatgraph.rewriting.pattern import Any as AnyValue
from tests.models import ZOO, canonical, captured, floats

X, Y = AnyValue("x"), AnyValue("y")
PATTERNS: dict[str, Pattern] = {
    "gelu": FoldGelu.pattern,
    "attention": FuseAttention.pattern,
    "activation": FuseLinearActivation.pattern,
    "residual": Op("add|residual_add", X, Moved(Op("linear", Y, Const("w"), Opt(Const("b")))), name="out"),
    "two sums": Op("add|residual_add", Op("add|residual_add|mul", X, Y), AnyValue("z")),
}

# ---------------------------------------------------------------- deterministic


def found(pattern: Pattern, graph: qg.Graph) -> dict[str, Any]:
    """By root: what it binds, or the near miss; nodes by name."""
    return {record(n).name: told(match_or_miss(pattern, n)) for n in graph.nodes}


def told(result: Match | NearMiss) -> Any:
    if isinstance(result, NearMiss):
        return str(result)
    nodes = sorted(record(n).name for n in result.nodes)
    return nodes, {k: label(v) if isinstance(v, fx.Node) else v for k, v in result.bound.items()}


def label(node: fx.Node) -> str:
    return record(node).name if has_record(node) else str(node.target)


def shuffled(graph: qg.Graph, seed: int) -> qg.Graph:
    """The same graph with its nodes in another order that defines before it uses."""
    twin, choice = graph.clone(), random.Random(seed)
    nodes = [n for n in twin.module.graph.nodes if n.op not in ("placeholder", "output")]
    waiting = {n: {i for i in n.all_input_nodes if i.op != "placeholder"} for n in nodes}
    last = max(n for n in twin.module.graph.nodes if n.op == "placeholder")
    while waiting:
        node = choice.choice([n for n, needs in waiting.items() if not needs & waiting.keys()])
        last.append(node)
        last = node
        del waiting[node]
    twin.module.graph.lint()
    return twin


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_in_the_same_way_each_time_and_in_any_order_of_nodes(pattern: str, model: str) -> None:
    want = found(PATTERNS[pattern], captured(model))
    assert found(PATTERNS[pattern], captured(model)) == want
    for seed in range(3):
        assert found(PATTERNS[pattern], shuffled(captured(model), seed)) == want


def test_the_orders_really_differ_and_so_do_the_results_of_different_patterns() -> None:
    graph = captured("encoder")
    orders = [[record(n).name for n in g.nodes] for g in (graph, *(shuffled(graph, seed) for seed in range(3)))]
    assert all(orders.count(order) == 1 for order in orders)
    assert len({str(found(pattern, graph)) for pattern in PATTERNS.values()}) == len(PATTERNS)


# ---------------------------------------------------------------- complete: a pattern read off a graph matches there


def read(node: Any, depth: int, choice: random.Random, names: dict[fx.Node, str]) -> Pattern:
    """A pattern of a random part of what ``node`` computes; shared values get one name."""
    if not isinstance(node, fx.Node):
        return Opt(X) if node is None else Number(float(node))
    name = names.setdefault(node, f"v{len(names)}")
    if node.op == "get_attr" and choice.random() < 0.5:
        return Const(name)
    if not has_record(node) or depth == 0 or choice.random() < 0.2:
        return AnyValue(name)
    operands = [read(o, depth - 1, choice, names) for o in matcher.operands(node)]
    schema = getattr(node.target, "_schema", None)
    given = [a.name for a in schema.arguments if not is_operand(a) or a.kwarg_only] if schema is not None else []
    where = {a: attribute(node, a) for a in given if choice.random() < 0.5 and not held_by_nodes(attribute(node, a))}
    users = len(node.users) if choice.random() < 0.5 else None
    return Op(record(node).kind, *operands, name=name, where=where, users=users)


def held_by_nodes(value: Any) -> bool:
    seen: list[fx.Node] = []
    fx.map_arg(value, seen.append)
    return bool(seen)


CASES = st.tuples(st.sampled_from(list(ZOO)), st.sampled_from([captured, canonical]), st.integers(0, 10**6))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=CASES, depth=st.integers(1, 5))
def test_a_pattern_that_is_read_off_a_graph_matches_there(case: tuple[str, Any, int], depth: int) -> None:
    model, stage, seed = case
    choice, graph = random.Random(seed), stage(model)
    root = choice.choice(graph.nodes)
    names: dict[fx.Node, str] = {}
    pattern = read(root, depth, choice, names)
    if not isinstance(pattern, Op):
        pattern = Op(record(root).kind, name="v0")
    here = match(pattern, root)
    assert here is not None
    assert here.root is root
    assert all(here[name] is node for node, name in names.items() if name in here)
    total = pattern.elements()
    elsewhere = [m for n in graph.nodes if isinstance(m := match_or_miss(pattern, n), NearMiss)]
    assert all(m.matched < total == m.total for m in elsewhere)


def test_a_pattern_that_is_read_off_wrongly_does_not_match() -> None:
    root = captured("mlp").node("up:linear")
    patterns = (read(root, 1, random.Random(seed), {}) for seed in range(20))
    pattern = next(p for p in patterns if isinstance(p, Op))
    assert match(pattern, root) is not None
    for wrong in (
        Op("gelu", *pattern.operands),
        Op("linear", Const(), *pattern.operands[1:]),
        Op("linear", *pattern.operands, users=len(root.users) + 1),
    ):
        assert match(wrong, root) is None


# ---------------------------------------------------------------- linear


class Chain(nn.Module):
    """``length`` blocks of everything that the patterns look for."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = x * 0.5 + y * 0.5 * (1.0 + torch.erf(y / 2**0.5))
        return x


def calls(pattern: Pattern, length: int, monkeypatch: pytest.MonkeyPatch) -> int:
    graph, count, inner = qg.capture(Chain(length), floats(2, 4)), [0], matcher._match

    def counted(*args: Any) -> Iterator[matcher.State]:
        count[0] += 1
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(matcher, "_match", counted)
        for node in graph.nodes:
            match_or_miss(pattern, node)
    return count[0]


LINEAR = {**PATTERNS, "a group": Group(Op("mul", X, Y), Op("linear", X, Const("w")))}


@pytest.mark.parametrize("pattern", LINEAR)
def test_twice_the_graph_costs_twice_the_work(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (calls(LINEAR[pattern], length, monkeypatch) for length in (8, 16))
    assert 0 < two <= 2.2 * one


@dataclass(frozen=True)
class Backwards(Pattern):
    """A pattern that looks at everything before a node: what the test above must see."""

    name: str = ""

    def resolve(self) -> Pattern:
        return Alt(Op("mul|add|div|linear|erf", Backwards()), AnyValue())


def test_work_that_grows_with_the_square_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Op("add", Backwards(), Number(1.25))
    one, two = (calls(deep, length, monkeypatch) for length in (8, 16))
    assert two > 2.2 * one


# ---------------------------------------------------------------- overlaps


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2.0 * 3.0 * 5.0


@dataclass(frozen=True)
class MergeProducts(RewritePass):
    """``x * a * b`` becomes ``x * (a b)``, twice at most."""

    name = "merge-products"
    numerics = within(1e-12)
    pattern = Op("mul", Op("mul", X, Number(name="a")), Number(name="b"), name="out")
    largest: float = 6.0

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("too large") if match["a"] * match["b"] > self.largest else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["out"], edit.call("mul", match["x"], match["a"] * match["b"], at=match["out"]))


def numbers(graph: qg.Graph) -> list[Any]:
    return [n.args[1] for n in graph.nodes if record(n).kind == "mul"]


def test_of_two_matches_that_overlap_the_one_with_the_earlier_root_is_rewritten() -> None:
    """``2 * 3`` and ``3 * 5`` share a product: the first is merged, and the other is matched against what that left."""
    graph = qg.capture(Products(), floats(2, 4))
    manager = PassManager([MergeProducts()], leaves=graph.stage)
    assert numbers(manager.run(graph)) == [6.0, 5.0]
    assert [r.reason for r in manager.reports[0].refused] == ["too large"]
    assert numbers(PassManager([MergeProducts(largest=30.0)], leaves=graph.stage).run(graph)) == [30.0]


# ---------------------------------------------------------------- refused when the class of the pass is defined


def define(pattern: Any) -> None:
    @dataclass(frozen=True)
    class Mine(RewritePass):
        name = "mine"
        numerics = same

        def rewrite(self, match: Match, edit: Edit) -> None:
            raise AssertionError

    type("Mine", (Mine,), {"pattern": pattern, "__module__": __name__})


VALUE: Any = X
NAME: Any = "x"
REFUSED: dict[str, tuple[Any, str, str]] = {
    "an unknown kind": (Op("relu", Op("linaer", X)), "there is no operation of the kind 'linaer'", "Op(kind='linaer'"),
    "one unknown kind of two": (Op("relu|reluu", X), "there is no operation of the kind 'reluu'", "Op(kind='relu|re"),
    "no root": (X, "it ends in no operation", "Any(name='x')"),
    "an optional root": (Opt(Op("relu", X)), "it ends in no operation", "Opt("),
    "a root that is an operation only sometimes": (Alt(Op("relu", X), X), "it ends in no operation", "Alt("),
    "too many operands": (Op("relu", X, Y), "'relu' has at most 1 operands", "Op(kind='relu'"),
    "an attribute for an operand": (Op("softmax", X, Number(-1)), "'softmax' has at most 1 operands", "Op(kind='so"),
    "an unknown attribute": (Op("softmax", X, where={"axis": -1}), "'softmax' has no attribute 'axis'", "Op(kind='so"),
    "an Alt of nothing": (Op("relu", Alt()), "it has no options", "Alt(options=())"),
    "a Group of nothing": (Group(), "it has no options", "Group(roots=())"),
    "a Group of values": (Group(Op("relu", X), VALUE), "it ends in no operation", "Group("),
    "one name for an operation and a weight": (
        Op("add", Op("relu", X, name="y"), Const("y")), "'y' cannot be all that bears this name", "Op(kind='add'"),
    "one name for a value and a number": (
        Op("add", X, Number(name="x")), "'x' cannot be all that bears this name", "Op(kind='add'"),
    "one name for two numbers": (
        Op("clamp", X, Number(0.0, "n"), Number(6.0, "n")), "'n' cannot be all that bears this name", "Op(kind='cl"),
    "one name for two kinds": (
        Op("add", Op("relu", X, name="y"), Op("tanh", X, name="y")), "'y' cannot be all that bears this name", "Op("),
    "an operation that reads itself": (Op("relu", X, name="x"), "'x' cannot be all that bears this name", "Op("),
    "a result that nobody reads": (Op("relu", X, users=0), "it wants 0 users", "Op(kind='relu'"),
    "a name for a pattern": (Op("relu", NAME), "it is no pattern", "'x'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_qg209_a_pattern_that_can_match_nothing_is_refused_with_its_class(fault: str) -> None:
    pattern, why, element = REFUSED[fault]
    with pytest.raises(PassError) as caught:
        define(pattern)
    error = caught.value
    assert (error.code, error.what, error.why) == ("QG209", "the pattern of 'Mine' can match nothing", why)
    assert error.where.startswith(element)
    assert error.todo


FINE: list[Pattern] = [
    *PATTERNS.values(),
    Op("cat", X, Y, X, Y),
    Op("linear", X, Y, Opt(X), where={"bias": None}),
    Op("residual_add", X, Y, where={"alpha": 1}),
    Op("getitem", X, where={"anything": 0}),
    Op(kind_of_target(str(QUANTIZE)), X),
    Alt(Op("relu", X), Group(Op("tanh", X))),
    Op("add", Alt(Op("relu", X, name="y"), Op("tanh", X, name="y")), Number()),
    Op("add", Op("relu", X, name="y"), Op("relu|tanh", X, name="y")),
    Op("add", X, Op("relu", Y, name="x")),
    Group(Op("relu", X), Op("tanh", X)),
]


@pytest.mark.parametrize("pattern", FINE, ids=str)
def test_a_pattern_that_can_match_is_let_through(pattern: Pattern) -> None:
    define(pattern)


DECLARED: dict[str, tuple[dict[str, Any], str, str]] = {
    "requires": ({"requires": ("functonal",)}, "QG211", "'Mine' requires 'functonal', which is no property of graphs"),
    "ensures": ({"ensures": ("pure",)}, "QG211", "'Mine' ensures 'pure', which is no property of graphs"),
    "numerics": ({"numerics": "same"}, "QG207", "'Mine' declares its numerics as 'same'"),
}


@pytest.mark.parametrize("fault", DECLARED)
def test_a_declaration_that_cannot_be_checked_is_refused_with_its_class(fault: str) -> None:
    declared, code, what = DECLARED[fault]
    with pytest.raises(PassError) as caught:
        type("Mine", (MergeProducts,), {**declared, "__module__": __name__})
    assert (caught.value.code, caught.value.what) == (code, what)
    assert caught.value.todo
