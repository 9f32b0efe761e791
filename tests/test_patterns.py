"""Patterns: every form of them, what a match binds, and near misses. Their laws are in ``test_pattern_laws``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.ir.meta import has_record, record
from qatgraph.rewriting import matcher
from qatgraph.rewriting.matcher import match, match_or_miss
from qatgraph.rewriting.pattern import Alt, Const, Group, Moved, NearMiss, Number, Op, Opt, Pattern
from qatgraph.rewriting.pattern import Any as AnyValue
from tests.models import floats

X, Y, W, B = AnyValue("x"), AnyValue("y"), Const("w"), Const("b")
LINEAR = Op("linear", X, W, Opt(B), name="linear")


class Parts(nn.Module):
    """A model that is one function over an input, two weights and a bias."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("three", torch.tensor(3.0))
        self.w, self.v, self.b = (nn.Parameter(floats(*s, seed=1)) for s in ((4, 4), (4, 4), (4,)))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def of(function: Callable[..., Any]) -> qg.Graph:
    return qg.capture(Parts(function), floats(2, 4))


def roots(pattern: Pattern, graph: qg.Graph) -> list[str]:
    return [record(n).name.removeprefix("Parts:") for n in graph.nodes if match(pattern, n) is not None]


def bound(pattern: Pattern, graph: qg.Graph) -> dict[str, Any]:
    """What the only match binds; nodes by name."""
    (found,) = [m for n in graph.nodes if (m := match(pattern, n)) is not None]
    return {k: label(v) if isinstance(v, torch.fx.Node) else v for k, v in found.bound.items()}


def label(node: torch.fx.Node) -> str:
    return record(node).name.removeprefix("Parts:") if has_record(node) else str(node.target)


def linear(m: Any, x: Tensor, bias: bool = True) -> Tensor:
    return functional.linear(x, m.w, m.b if bias else None)


# ---------------------------------------------------------------- each form of a pattern

FORMS: dict[str, tuple[Pattern, Callable[[Any, Tensor], Any], list[str]]] = {
    "Opt, there": (LINEAR, lambda m, x: linear(m, x), ["linear"]),
    "Opt, absent": (LINEAR, lambda m, x: linear(m, x, bias=False), ["linear"]),
    "Opt, of another form": (LINEAR, lambda m, x: functional.linear(x, m.w, torch.relu(m.b)), []),
    "Alt, first": (Op("relu", Alt(Op("tanh", X), Op("erf", X))), lambda m, x: x.tanh().relu(), ["relu"]),
    "Alt, second": (Op("relu", Alt(Op("tanh", X), Op("erf", X))), lambda m, x: x.erf().relu(), ["relu"]),
    "Alt, neither": (Op("relu", Alt(Op("tanh", X), Op("erf", X))), lambda m, x: x.exp().relu(), []),
    "Alt at the root": (Alt(Op("tanh", X), Op("relu", X)), lambda m, x: x.tanh().exp().relu(), ["tanh", "relu"]),
    "Alt of an absent operand": (
        Op("linear", X, W, Alt(Opt(B), Y)), lambda m, x: linear(m, x, bias=False), ["linear"],
    ),
    "Moved, by nothing": (Op("relu", Moved(LINEAR)), lambda m, x: linear(m, x).relu(), ["relu"]),
    "Moved, twice": (Op("relu", Moved(LINEAR)), lambda m, x: linear(m, x).view(4, 2).t().relu(), ["relu"]),
    "Moved, by arithmetic": (Op("relu", Moved(LINEAR)), lambda m, x: (linear(m, x) * 2).relu(), []),
    "several kinds": (Op("relu|tanh", X), lambda m, x: x.tanh().relu().exp(), ["tanh", "relu"]),
    "where, a value": (Op("softmax", X, where={"dim": -1}), lambda m, x: x.softmax(-1), ["softmax"]),
    "where, another value": (Op("softmax", X, where={"dim": -1}), lambda m, x: x.softmax(0), []),
    "where, a list": (Op("mean", X, where={"dim": (-1,)}), lambda m, x: x.mean([-1]), ["mean"]),
    "where, a float to six digits": (
        Op("layer_norm", X, where={"eps": 1e-5}), lambda m, x: functional.layer_norm(x, (4,), eps=1.00000001e-5),
        ["layer_norm"],
    ),
    "where, a default": (Op("gelu", X, where={"approximate": "none"}), lambda m, x: functional.gelu(x), ["gelu"]),
    "where, a predicate": (
        Op("softmax", X, where={"dim": lambda d: d < 0}), lambda m, x: x.softmax(0).softmax(-1), ["softmax#2"],
    ),
    "users, as many": (Op("tanh", X, users=2), lambda m, x: x.tanh().relu() + x.tanh().exp(), []),
    "users, shared": (
        Op("tanh", X, users=2), lambda m, x: (lambda y: y.relu() + y.exp())(x.tanh()), ["tanh"],
    ),
    "operands out of a list": (
        Op("cat", Op("relu", X), Op("tanh", X), Op("exp", X)),
        lambda m, x: torch.cat([x.relu(), x.tanh(), x.exp()], -1), ["cat"],
    ),
    "operands out of a list, in another order": (
        Op("cat", Op("tanh", X), Op("relu", X)), lambda m, x: torch.cat([x.relu(), x.tanh()], -1), [],
    ),
    "more operands than the list has": (Op("cat", X, X, X), lambda m, x: torch.cat([x, x], -1), []),
    "fewer operands than there are": (Op("cat", X), lambda m, x: torch.cat([x, x.relu()], -1), ["cat"]),
    "operands that commute, swapped": (
        Op("mul", Op("tanh", X), Op("relu", X)), lambda m, x: x.relu() * x.tanh(), ["mul"],
    ),
    "operands that do not commute, swapped": (
        Op("sub", Op("tanh", X), Op("relu", X)), lambda m, x: x.relu() - x.tanh(), [],
    ),
    "a repeated name, one value": (Op("mul", Op("relu", X), X), lambda m, x: x.relu() * x, ["mul"]),
    "a repeated name, two values": (Op("mul", Op("relu", X), X), lambda m, x: x.relu() * x.tanh(), []),
    "a repeated operation": (
        Op("mul", Op("tanh", X, name="t"), Op("tanh", X, name="t")), lambda m, x: x.tanh() * x.tanh(), [],
    ),
    "a number from a constant": (Op("mul", X, Number(3.0)), lambda m, x: x * m.three, ["mul"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_pattern_matches_where_it_should(form: str) -> None:
    pattern, function, found = FORMS[form]
    assert roots(pattern, of(function)) == found


def test_names_bind_nodes_and_numbers() -> None:
    pattern = Op("add", Op("mul", LINEAR, Number(None, "scale"), name="mul"), Number(name="shift"))
    names = bound(pattern, of(lambda m, x: 1.5 + 2.0 * linear(m, x)))
    assert names == {"mul": "mul", "linear": "linear", "x": "x", "w": "w", "b": "b", "scale": 2.0, "shift": 1.5}


def test_one_name_is_one_number() -> None:
    pattern = Op("add", Op("mul", X, Number(name="n")), Number(name="n"))
    assert roots(pattern, of(lambda m, x: x * 2.0 + 2.0)) == ["add"]
    assert roots(pattern, of(lambda m, x: x * 2.0 + 3.0)) == []


def test_an_absent_operand_binds_nothing_and_what_was_moved_is_of_the_match() -> None:
    graph = of(lambda m, x: linear(m, x, bias=False).view(4, 2).t().relu())
    found = match(Op("relu", Moved(LINEAR)), graph.nodes[-1])
    assert found is not None
    assert "b" not in found
    assert sorted(record(n).kind for n in found.nodes) == ["linear", "relu", "reshape", "transpose"]


def test_a_match_holds_each_operation_once() -> None:
    graph = of(lambda m, x: (lambda y: y * y)(x.tanh()))
    found = match(Op("mul", Op("tanh", X, name="t"), Op("tanh", X, name="t")), graph.nodes[-1])
    assert found is not None
    assert sorted(map(label, found.nodes)) == ["mul", "tanh"]


PAIR = Group(Op("linear", X, Const("w"), name="one"), Op("linear", X, Const("v"), name="two"))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (
            lambda m, x: x @ m.v + functional.linear(x, m.w) + functional.linear(x, m.v),
            {"one": "linear", "two": "linear#2"},
        ),
        (lambda m, x: functional.linear(x, m.w) + functional.linear(x.relu(), m.v), {}),
    ],
)  # fmt: skip
def test_a_group_finds_its_further_roots_among_the_readers(function: Callable[..., Any], found: dict[str, str]) -> None:
    graph = of(function)
    first = match(PAIR, graph.node("Parts:linear"))
    assert ({} if first is None else {n: label(first[n]) for n in ("one", "two")}) == found


def test_a_root_of_a_group_may_be_an_operand_of_another() -> None:
    both = Group(Op("relu", Op("tanh", X, name="t")), Op("tanh", X, name="t"))
    assert roots(both, of(lambda m, x: (x.tanh().relu(), x.tanh()))) == ["relu"]


# ---------------------------------------------------------------- near misses

DEEP = Op(
    "add", Op("relu", Op("layer_norm", LINEAR, name="norm", where={"eps": 1e-5}, users=1)), Number(2.0), name="out",
    where={"alpha": 1},
)  # fmt: skip
BENT = Op("gelu", Op("linear", X, W), where={"approximate": lambda a: a == "tanh"})


def norm(m: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(x, (4,), eps=eps)


MISSES: dict[str, tuple[Pattern, Callable[[Any, Tensor], Any], str]] = {
    "users": (
        DEEP, lambda m, x: (lambda n: n.relu() + 2.0 + n.exp())(norm(m, linear(m, x))),
        "'add': matched 9 of 11; 'layer_norm' has 2 users",
    ),
    "a number": (
        DEEP, lambda m, x: norm(m, linear(m, x)).relu() + 3.0, "'add': matched 10 of 11; 3 stands where 2 is wanted",
    ),
    "no number": (
        DEEP, lambda m, x: norm(m, linear(m, x)).relu() + x, "'add': matched 10 of 11; 'x' is not a number",
    ),
    "an attribute": (
        DEEP, lambda m, x: norm(m, linear(m, x), 1e-3).relu() + 2.0,
        "'add': matched 4 of 11; 'layer_norm' wants 1e-05 as 'eps' (it is 0.001)",
    ),
    "an attribute, by predicate": (
        BENT, lambda m, x: functional.gelu(linear(m, x)),
        "'gelu': matched 1 of 5; 'gelu' has another 'approximate' (it is 'none')",
    ),
    "another kind": (
        DEEP, lambda m, x: norm(m, x.exp()).relu() + 2.0, "'add': matched 5 of 11; 'exp' is no linear",
    ),
    "several other kinds": (
        Op("exp", Op("relu|tanh", X)), lambda m, x: x.erf().exp(), "'exp': matched 1 of 3; 'erf' is no relu or tanh",
    ),
    "no operation": (
        Op("exp", Op("relu|tanh", X)), lambda m, x: x.exp(),
        "'exp': matched 1 of 3; 'x' stands where relu or tanh is wanted",
    ),
    "no constant": (
        Op("mul", Op("relu", X), W), lambda m, x: x.relu() * x, "'mul': matched 3 of 4; 'x' is not a constant",
    ),
    "another value": (
        Op("mul", Op("relu", X), X), lambda m, x: x.relu() * m.b,
        "'mul': matched 3 of 4; 'b' is not the value that 'x' is elsewhere",
    ),
    "another operation": (
        Op("mul", Op("tanh", X, name="t"), Op("tanh", Y, name="t")), lambda m, x: x.tanh() * (x + 1).tanh(),
        "'mul': matched 3 of 5; 'tanh#2' is not the operation that 't' is elsewhere",
    ),
    "an operand too few": (
        Op("cat", X, X, X), lambda m, x: torch.cat([x, x], -1), "'cat': matched 3 of 4; an operand is missing",
    ),
    "an absent tensor": (
        Op("linear", X, W, B), lambda m, x: linear(m, x, bias=False),
        "'linear': matched 3 of 4; None stands where a tensor is wanted",
    ),
    "a number for a tensor": (
        Op("mul", Op("relu", X), Y), lambda m, x: x.relu() * 2.0,
        "'mul': matched 3 of 4; 2.0 stands where a tensor is wanted",
    ),
    "the best of several ways": (
        Op("relu", Alt(Op("tanh", Number(1.0)), Op("exp", Op("tanh", Op("erf", X))))),
        lambda m, x: x.tanh().exp().relu(),
        "'relu': matched 3 of 5; 'x' stands where erf is wanted",
    ),
    "a group without its second": (
        PAIR, lambda m, x: functional.linear(x, m.w),
        "'linear': matched 3 of 6; no further linear reads what the match binds",
    ),
}  # fmt: skip


def missed(stop: str) -> NearMiss:
    pattern, function, sentence = MISSES[stop]
    root = sentence.split("'")[1]
    found = match_or_miss(pattern, of(function).node(f"Parts:{root}"))
    assert isinstance(found, NearMiss)
    return found


@pytest.mark.parametrize("stop", MISSES)
def test_a_near_miss_says_how_far_it_came_and_why(stop: str) -> None:
    assert str(missed(stop)).replace("Parts:", "") == MISSES[stop][2]


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        ("users", "'Parts:layer_norm'"),
        ("a number", "3.0"),
        ("another kind", "'Parts:exp'"),
        ("another value", "'b'"),
        ("an operand too few", "nothing"),
        ("a group without its second", "'Parts:linear'"),
    ],
)
def test_a_near_miss_says_at_which_value(stop: str, at: str) -> None:
    assert missed(stop).at == at


def test_each_reason_of_the_matcher_has_its_near_miss_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    stop = matcher.Trail.stop

    def stop_and_note(trail: matcher.Trail, state: matcher.State, value: Any, why: str) -> None:
        seen.add(sys._getframe(1).f_lineno)
        stop(trail, state, value, why)

    monkeypatch.setattr(matcher.Trail, "stop", stop_and_note)
    for case in MISSES:
        missed(case)
    source = inspect.getsource(matcher).splitlines()
    assert seen == {number for number, line in enumerate(source, 1) if "trail.stop(" in line}


def test_near_is_half_of_the_pattern() -> None:
    counts = [(3, 6), (2, 6), (1, 2), (2, 2)]
    assert [NearMiss("a:add", matched, total, "", "").near for matched, total in counts] == [True, False, False, True]
