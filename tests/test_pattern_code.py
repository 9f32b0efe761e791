"""Patterns written as PyTorch code: equal to the pattern written by hand, exact, usable in a pass, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.matcher import match, match_or_miss
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Alt, Const, Group, Match, NearMiss, Number, Op, Pattern
from qatgraph.rewriting.pattern import Any as AnyValue
from tests.models import ZOO, canonical, floats

X, Y, W, B = AnyValue("x"), AnyValue("y"), Const("w"), Const("b")
LINEAR = Op("linear", X, W, B)
VECTOR, MATRIX = qg.Weight(4), qg.Weight(4, 4)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return torch.relu(y), torch.exp(y)


CODES: dict[str, tuple[qg.Code, Pattern]] = {
    "a linear and its activation": (
        qg.Code(lambda x, w, b: functional.gelu(functional.linear(x, w, b)), ((2, 4), MATRIX, VECTOR)),
        Op("gelu", LINEAR, name="out", where={"approximate": "none"}),
    ),
    "a layer norm of any size and eps": (
        qg.Code(
            lambda x, w, b: functional.layer_norm(x, (4,), w, b), ((2, 4), VECTOR, VECTOR), ("normalized_shape", "eps")
        ),
        Op("layer_norm", X, W, B, name="out"),
    ),
    "numbers": (
        qg.Code(lambda x, y: x * 0.5 + y, ((2, 4), (2, 4))),
        Op("add|residual_add", Op("mul", X, Number(0.5)), Y, name="out", where={"alpha": 1}),
    ),
    "a constant of one element": (
        qg.Code(lambda x: x * torch.tensor(0.5), ((2, 4),)),
        Op("mul", X, Number(0.5), name="out"),
    ),
    "an embedding, by an example of indices": (
        qg.Code(lambda i, w: functional.embedding(i, w), (torch.zeros(2, 3, dtype=torch.int64), MATRIX)),
        Op(
            "embedding", W, AnyValue("i"), name="out",
            where={"padding_idx": -1, "scale_grad_by_freq": False, "sparse": False},
        ),
    ),
    "a value that is read twice": (
        qg.Code(lambda x: torch.tanh(x) * torch.tanh(x), ((2, 4),)),
        Op("mul", Op("tanh", X, name="%tanh"), Op("tanh", X, name="%tanh"), name="out"),
    ),
    "several outputs": (
        qg.Code(split, ([2, 4],)),
        Group(Op("relu", Op("tanh", X, name="%tanh"), name="out"), Op("exp", Op("tanh", X, name="%tanh"), name="out1")),
    ),
    "an output that another reads": (
        qg.Code(lambda x: (torch.relu(torch.tanh(x)), torch.tanh(x)), ((2, 4),)),
        Group(Op("relu", Op("tanh", X, name="out1"), name="out"), Op("tanh", X, name="out1")),
    ),
    "an operand that is left out": (
        qg.Code(lambda x, w: functional.linear(x, w), ((2, 4), MATRIX)),
        Op("linear", X, W, name="out", where={"bias": None}),
    ),
    "a free number": (
        qg.Code(lambda x: functional.leaky_relu(x, 0.2), ((2, 4),), ("negative_slope",)),
        Op("leaky_relu", X, Number(), name="out"),
    ),
    "a list": (
        qg.Code(lambda x, y: torch.cat([x, y], -1), ((2, 4), (2, 4))), Op("cat", X, Y, name="out", where={"dim": -1}),
    ),
    "names that a module has, too": (
        qg.Code(lambda function, order, weights: functional.linear(order, weights, function), (VECTOR, (2, 4), MATRIX)),
        Op("linear", AnyValue("order"), Const("weights"), Const("function"), name="out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_code_is_the_pattern_that_one_writes_by_hand(code: str) -> None:
    written, by_hand = CODES[code]
    assert written.resolve() == by_hand
    assert written.elements() == by_hand.elements()


def results(pattern: Pattern, graph: Graph) -> list[Any]:
    found = [match_or_miss(pattern, n) for n in graph.nodes]
    return [str(f) if isinstance(f, NearMiss) else (f.bound, f.nodes) for f in found]


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("code", CODES)
def test_code_matches_in_models_what_the_pattern_by_hand_matches(code: str, model: str) -> None:
    written, by_hand = CODES[code]
    assert results(written, canonical(model)) == results(by_hand, canonical(model))


def test_the_codes_find_something_in_the_models() -> None:
    """Else the comparison above would say nothing."""
    count = {
        name: sum(match(c, n) is not None for m in ZOO for n in canonical(m).nodes) for name, (c, _) in CODES.items()
    }
    found = {name for name in CODES if count[name]}
    assert {"a linear and its activation", "a layer norm of any size and eps", "numbers"} <= found


# ---------------------------------------------------------------- exact


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(floats(4, 4)), nn.Parameter(floats(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


EXACT: dict[str, tuple[str, Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "a default": (
        "a linear and its activation",
        lambda m, x: functional.gelu(functional.linear(x, m.w, m.b)),
        lambda m, x: functional.gelu(functional.linear(x, m.w, m.b), approximate="tanh"),
    ),
    "an absent operand": (
        "an operand that is left out",
        lambda m, x: functional.linear(x, m.w),
        lambda m, x: functional.linear(x, m.w, m.b),
    ),
    "a keyword": ("numbers", lambda m, x: x * 0.5 + m.b, lambda m, x: torch.add(x * 0.5, m.b, alpha=2)),
    "a shared value": (
        "a value that is read twice",
        lambda m, x: (lambda y: y * y)(x.tanh()),
        lambda m, x: x.tanh() * (x + 1).tanh(),
    ),
    "a list": ("a list", lambda m, x: torch.cat([x, x + 1], -1), lambda m, x: torch.cat([x, x + 1], 0)),
}


@pytest.mark.parametrize("what", EXACT)
def test_code_matches_what_it_says_and_nothing_like_it(what: str) -> None:
    code, same_thing, other = EXACT[what]
    for function, wanted in ((same_thing, 1), (other, 0)):
        graph = qg.capture(Function(function), floats(2, 4))
        assert sum(match(CODES[code][0], n) is not None for n in graph.nodes) == wanted


@pytest.mark.parametrize(("free", "wanted"), [((), 0), (("dim",), 1)])
def test_a_free_attribute_may_differ(free: tuple[str, ...], wanted: int) -> None:
    code = qg.Code(lambda x, y: torch.cat([x, y], -1), ((2, 4), (2, 4)), free)
    graph = qg.capture(Function(lambda m, x: torch.cat([x, x + 1], 0)), floats(2, 4))
    assert sum(match(code, n) is not None for n in graph.nodes) == wanted


# ---------------------------------------------------------------- at work


def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.relu(functional.linear(x, w, b))


@dataclass(frozen=True)
class ReluAsMaximum(RewritePass):
    """``relu(linear)`` becomes ``clamp(linear, 0)``."""

    name = "relu-as-maximum"
    numerics = same
    pattern = Op("tanh", Alt(qg.Code(fused, ((2, 4), MATRIX, VECTOR)), qg.Code(torch.relu_, ((2, 4),))))

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group("fused", *sorted(match.nodes))


def test_code_stands_within_other_patterns() -> None:
    graph = qg.capture(Function(lambda m, x: fused(x, m.w, m.b).tanh()), floats(2, 4))
    found = match(ReluAsMaximum.pattern, graph.nodes[-1])
    assert found is not None
    assert [record(n).kind for n in sorted(found.nodes)] == ["linear", "relu", "tanh"]
    assert isinstance(found["w"], fx.Node)


@dataclass(frozen=True)
class Grouped(RewritePass):
    """Group a linear and its relu, which the pattern writes as code."""

    name = "grouped"
    numerics = same
    pattern = qg.Code(fused, ((2, 4), MATRIX, VECTOR))

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group("fused", *sorted(match.nodes))


def test_a_pass_may_hold_code_as_its_pattern() -> None:
    graph = qg.capture(Function(lambda m, x: fused(x, m.w, m.b)), floats(2, 4))
    after = PassManager([Grouped()], leaves=graph.stage).run(graph)
    assert {record(n).region for n in after.nodes} == {"Function:linear+fused"}


# ---------------------------------------------------------------- errors


def raises(x: Tensor) -> Tensor:
    raise ValueError("not today")


ERRORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "too few shapes": (fused, ((2, 4),), "it takes 3 arguments, 1 shapes are given"),
    "no shape": (lambda x: x.relu(), (4.0,), "the input of 'x' is 4.0, which is no shape"),
    "no result": (lambda x: x, ((2, 4),), "its result is not computed"),
    "a number as result": (lambda x: (x.relu(), 3), ((2, 4),), "its result is not computed"),
    "an argument without use": (lambda x, y: x.relu(), ((2, 4), (2, 4)), "its result does not depend on 'y'"),
    "a weight without use": (lambda x, w: x.relu(), ((2, 4), MATRIX), "its result does not depend on 'w'"),
    "a constant of several elements": (
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), ((2, 4),), "it holds a constant of several elements",
    ),
    "shapes that do not fit": (fused, ((2, 5), MATRIX, VECTOR), "reduction dim"),
    "a branch on values": (lambda x: x.relu() if x.sum() > 0 else x.exp(), ((2, 4),), ""),
    "an exception": (raises, ((2, 4),), "not today"),
    "a function without a signature": (torch.relu, ((2, 4),), "its arguments cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ERRORS)
def test_qg209_code_that_describes_no_pattern(fault: str) -> None:
    function, inputs, why = ERRORS[fault]
    with pytest.raises(PassError) as caught:
        qg.Code(function, inputs).resolve()
    error = caught.value
    assert (error.code, error.what) == ("QG209", "the pattern written as code can match nothing")
    assert why in error.why
    assert error.why
    assert error.todo
    assert error.where == f"Code({function.__qualname__})"
