"""Passes that clean up: each with what it matches, what it refuses, before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.properties import held
from tests.models import BATCH, captured, floats
from tests.rewritten import Function, X, after, kinds, lines, of, rewritten

# ---------------------------------------------------------------- functionalize-in-place


class Addends(nn.Module):
    """``x`` with another thing written into it."""

    def __init__(self, other: Tensor) -> None:
        super().__init__()
        self.register_buffer("other", other)
        self.other: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).add_(self.other)


IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "relu_": (lambda x: torch.relu_(x * 2), ["mul", "relu"]),
    "add_": (lambda x: (x * 2).add_(1.0, alpha=3), ["mul", "add"]),
    "hardtanh_": (lambda x: functional.relu6(x * 2, inplace=True), ["mul", "relu6"]),
    "masked_fill_": (lambda x: (x * 2).masked_fill_(x > 0, 0.0), ["mul", "gt", "masked_fill"]),
    "zero_": (lambda x: (x * 2).zero_(), ["mul", "zero"]),
    "one after another": (lambda x: (x * 2).mul_(3).relu_(), ["mul", "mul", "relu"]),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_write_becomes_a_computation(name: str) -> None:
    function, want = IN_PLACE[name]
    before = of(function)
    graph, refused = rewritten("functionalize-in-place", before)
    assert "functional" not in held(before)
    assert "functional" in held(graph)
    assert kinds(graph) == want
    assert refused == {}
    assert torch.equal(graph(X), function(X))


def test_an_operation_of_another_library_is_no_form_of_atens() -> None:
    """``cleaninglib.relu_`` need not compute what ``aten.relu`` does."""
    torch.library.custom_op("cleaninglib::relu_", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()")
    before = of(lambda x: (x * 2).relu_())
    before.node("Function:relu_").target = torch.ops.cleaninglib.relu_.default
    with pytest.raises(PassError, match=r"QG211[\s\S]*'Function:relu_' writes into its input"):
        rewritten("functionalize-in-place", before)
    before.node("Function:relu_").target = torch.ops.aten.relu_.default
    assert kinds(rewritten("functionalize-in-place", before)[0]) == ["mul", "relu"]


def read_before_and_after(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    before = y.exp()
    y.relu_()
    return before, y.exp()


def test_who_reads_before_a_write_reads_the_old_value() -> None:
    graph, _ = rewritten("functionalize-in-place", of(read_before_and_after))
    assert [line.partition(" = ")[2] for line in lines(graph)] == [
        "mul(x, 2)", "exp(Function:mul)", "relu(Function:mul)", "exp(Function:relu)",
    ]  # fmt: skip
    assert all(map(torch.equal, graph(X), read_before_and_after(X)))


def test_a_write_does_not_change_the_type() -> None:
    """``float32 += float64`` stays float32; computed anew it would be float64."""
    model = Addends(torch.ones(4, dtype=torch.float64))
    graph, _ = rewritten("functionalize-in-place", qg.capture(model, X))
    assert kinds(graph) == ["mul", "add", "cast"]
    assert graph(X).dtype == torch.float32
    assert torch.equal(graph(X), model(X))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps


def test_the_new_value_of_a_buffer_stays_a_write() -> None:
    graph, _ = rewritten("functionalize-in-place", qg.capture(Counter(), X))
    assert "functional" in held(graph)
    assert torch.equal(graph(X), X)
    assert torch.equal(graph(X), 2 * X)


def test_a_buffer_that_the_model_writes_is_no_constant() -> None:
    graph = after(qg.capture(Counter(), torch.ones(())), "functionalize-in-place", "fold-constants")
    assert kinds(graph) == ["add", "mul", "copy_"]
    assert [float(graph(torch.ones(()))) for _ in range(3)] == [1.0, 2.0, 3.0]


# ---------------------------------------------------------------- remove-no-ops


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: torch.relu(x).to(torch.float32).float(),
    "slice": lambda x: torch.relu(x)[:, :],
    "expand": lambda x: torch.relu(x).expand(2, 4),
    "reshape": lambda x: torch.relu(x).reshape(2, 4).view(-1, 4),
    "clone": lambda x: torch.relu(x).clone().contiguous(),
    "detach": lambda x: torch.relu(x).detach(),
    "dead": lambda x: (torch.tanh(x), torch.relu(x))[1],
    "padding of nothing": lambda x: functional.pad(torch.relu(x), (0, 0, 0, 0)),
    "dropout of nothing": lambda x: functional.dropout(torch.relu(x), 0.0, training=True),
    "of a constant": lambda x: torch.relu(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]).float() * 0.0,
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_changes_nothing_goes(name: str) -> None:
    before = of(NO_OPS[name])
    after, _ = rewritten("remove-no-ops", before)
    assert len(after.nodes) < len(before.nodes)
    assert set(kinds(after)) <= {"relu", "mul", "add"}
    assert torch.equal(after(X), before(X))


REAL_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "another type": lambda x: torch.relu(x).double(),
    "half of it": lambda x: torch.relu(x)[:, :2],
    "every second": lambda x: torch.relu(x)[:, ::2],
    "broadcast": lambda x: torch.relu(x).expand(3, 2, 4),
    "another shape": lambda x: torch.relu(x).reshape(4, 2),
    "a product": lambda x: torch.relu(x) * 2,
    "a sum": lambda x: torch.relu(x) + 1,
    "a product with another type": lambda x: (torch.relu(x) > 0) * 1.0,
    "padding": lambda x: functional.pad(torch.relu(x), (0, 1)),
    "a square transposed": lambda x: torch.relu(x @ x.t()).transpose(0, 1),
}


@pytest.mark.parametrize("name", REAL_OPS)
def test_what_changes_something_stays(name: str) -> None:
    before = of(REAL_OPS[name])
    after, _ = rewritten("remove-no-ops", before)
    assert lines(after) == [line for line in lines(before) if "assert_tensor_metadata" not in line]


def test_a_copy_that_somebody_writes_is_no_no_op() -> None:
    """``x.clone().relu_()``: without the copy, the write would go into the caller's tensor."""
    example, x = floats(2, 4), floats(2, 4)
    after = qg.canonicalize(of(lambda x: x.clone().relu_(), example))
    assert torch.equal(after(x), torch.relu(X))
    assert torch.equal(x, X)
    assert torch.equal(example, X)


def test_what_is_written_through_a_view_is_seen() -> None:
    def half(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, :2].relu_()
        return y

    assert torch.equal(qg.canonicalize(of(half))(X), half(X))


RELAID: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: torch.relu(x).t().contiguous().view(-1),
    "clone": lambda x: torch.relu(x).t().clone(memory_format=torch.contiguous_format).view(2, 4),
    "a read of the layout": lambda x: torch.relu(x).t().contiguous().as_strided((2, 2), (2, 1)),
}


@pytest.mark.parametrize("name", RELAID)
def test_a_view_does_not_need_the_copy_before_it(name: str) -> None:
    """``view`` refuses some layouts that the copy had put in order: as ``reshape`` it takes all."""
    graph, _ = rewritten("remove-no-ops", of(RELAID[name]))
    assert torch.equal(graph(X), RELAID[name](X))
    assert ("as_strided" in kinds(graph)) == ("contiguous" in kinds(graph))


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.pooler(y)
        return y


def test_an_unused_module_goes_with_its_parameters() -> None:
    after, _ = rewritten("remove-no-ops", qg.capture(Pooler(), X))
    assert lines(after) == ["fc:linear = linear(x, 'fc.weight', 'fc.bias')"]
    assert sorted(after.module.state_dict()) == ["fc.bias", "fc.weight"]


def test_a_size_that_moves_is_compared_by_its_name() -> None:
    graph = qg.capture(Function(lambda x: torch.relu(x).reshape(x.shape[0], 4)), X, {"x": BATCH})
    assert kinds(rewritten("remove-no-ops", graph)[0]) == ["relu"]


# ---------------------------------------------------------------- restore-dropout


def test_dropout_becomes_a_module_at_the_users_path() -> None:
    before = captured("mlp")
    after, refused = rewritten("restore-dropout", before)
    assert "dropout:dropout = dropout(down:linear, 0.1, False)" in lines(before)
    assert "dropout:dropout = dropout(down:linear)" in lines(after)
    (module,) = [m for m in after.module.modules() if isinstance(m, nn.Dropout)]
    assert (module.p, module.training, refused) == (0.1, False, {})
    assert after.module.get_submodule("dropout") is not None


class TwoDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.drop(x), self.drop(x)


def test_two_uses_of_one_dropout_are_two_masks() -> None:
    graph = qg.capture(TwoDrops(), torch.ones(64, 64))
    after, _ = rewritten("restore-dropout", graph)
    after.module.train()
    a, b = after(torch.ones(64, 64))
    assert not torch.equal(a, b)


def test_dropout_that_runs_in_eval_too_is_left_alone() -> None:
    before = of(lambda x: functional.dropout(x, 0.5, training=True))
    after, refused = rewritten("restore-dropout", before)
    assert lines(after) == lines(before)
    assert list(refused) == ["Function:dropout"]


# ---------------------------------------------------------------- fold-constants


class Shifted(nn.Module):
    """A parameter, a buffer, and constants of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(floats(4))
        self.register_buffer("table", floats(4, seed=1))
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight * 2) + (self.table * 2 + torch.arange(4))


def test_what_depends_on_buffers_alone_is_computed_and_parameters_are_not() -> None:
    before = qg.capture(Shifted(), X)
    graph, refused = rewritten("fold-constants", before)
    assert kinds(graph) == ["mul", "mul", "add"]
    assert refused == {}
    (name,) = (n for n, _ in graph.module.named_buffers())
    assert torch.equal(graph.module.get_buffer(name), Shifted().table * 2 + torch.arange(4))
    assert torch.equal(graph(X), before(X))
    graph(X).sum().backward()
    assert graph.module.get_parameter("weight").grad is not None


def test_a_result_that_something_else_needs_too_is_kept_once() -> None:
    graph, _ = rewritten("fold-constants", of(lambda x: (x + torch.arange(4) * 2, torch.arange(4) * 2 + 1)))
    assert kinds(graph) == ["add"]
    assert len(list(graph.module.buffers())) == 2


FIXED_NOT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "random numbers": (lambda x: x + torch.rand(4), "rand"),
    "memory that nobody wrote": (lambda x: x + torch.empty(4).fill_(1.0), "empty"),
    "a size that moves": (lambda x: x + torch.arange(x.shape[0])[:, None], "arange"),
}


@pytest.mark.parametrize("name", FIXED_NOT)
def test_what_is_not_fixed_is_computed_each_time(name: str) -> None:
    function, kind = FIXED_NOT[name]
    graph = after(qg.capture(Function(function), X, {"x": BATCH}), "functionalize-in-place", "fold-constants")
    assert kind in kinds(graph)
    assert graph(floats(3, 4)).shape == (3, 4)


def test_a_large_result_is_refused() -> None:
    def wide(x: Tensor) -> Tensor:
        return x + torch.arange(4) * 2

    assert kinds(rewritten("fold-constants{max_bytes=32}", of(wide))[0]) == ["add"]
    graph, refused = rewritten("fold-constants{max_bytes=31}", of(wide))
    assert kinds(graph) == ["arange", "mul", "add"]
    assert refused == {"Function:mul": "it has 32 bytes"}


# ---------------------------------------------------------------- merge-equal-operations


EQUAL: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "twice": (lambda x: x.mean(-1) * x.mean(-1), ["mean", "mul"]),
    "whole chains": (lambda x: (x * 2).exp() + (x * 2).exp(), ["mul", "exp", "add"]),
    "other arguments": (lambda x: x.mean(-1).sum() * x.mean(0).sum(), ["mean", "sum", "mean", "sum", "mul"]),
    "another type of number": (lambda x: (x.long() * 2, x.long() * 2.0), ["cast", "mul", "mul"]),
    "another option": (lambda x: (torch.add(x, x, alpha=2), torch.add(x, x)), ["add", "add"]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_operations_are_computed_once(name: str) -> None:
    function, want = EQUAL[name]
    graph = after(of(function), "remove-no-ops", "merge-equal-operations")
    assert kinds(graph) == want
    for have, right in zip(pytree.tree_leaves(graph(X)), pytree.tree_leaves(function(X)), strict=True):
        assert have.dtype == right.dtype
        assert torch.equal(have, right)


def test_random_numbers_are_drawn_twice() -> None:
    graph, _ = rewritten("merge-equal-operations", of(lambda x: torch.rand_like(x) - torch.rand_like(x)))
    assert kinds(graph) == ["rand_like", "rand_like", "sub"]


def test_modules_have_a_state_and_stay_two() -> None:
    graph = after(
        of(lambda x: functional.dropout(x, 0.5, False) + functional.dropout(x, 0.5, False)), "restore-dropout"
    )
    assert kinds(rewritten("merge-equal-operations", graph)[0]) == ["dropout", "dropout", "add"]
