"""Some thirty wrong passes (``tests/mutants.py``), each caught and named; and what ``changes_grid`` promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.rewriting.contracts import check_parameters, fingerprints
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.passes import GraphPass, Numerics, RewritePass, changes_grid, same, within
from qatgraph.rewriting.pattern import Any as AnyValue
from qatgraph.rewriting.pattern import Match, Op
from tests.models import floats
from tests.mutants import (
    FUNCTION,
    MADE,
    Change,
    args_of,
    baked_constant,
    by_hand,
    captured,
    does_not_run,
    dropped_bias,
    nothing,
    replaced,
    used_before_defined,
)  # fmt: skip


def run(one: GraphPass, graph: Graph | None = None) -> Graph:
    graph = graph or captured()
    return PassManager([one], leaves=graph.stage).run(graph)


def caught(one: GraphPass) -> PassError:
    with pytest.raises(PassError) as found:
        run(one)
    return found.value


# ---------------------------------------------------------------- each mutant is caught


@pytest.mark.parametrize("numerics", [same, within(1e-9), changes_grid(1e-9, "weight", "bias")], ids=str)
@pytest.mark.parametrize("mutant", FUNCTION)
def test_qg207_a_pass_that_changes_the_function(mutant: str, numerics: Numerics) -> None:
    change, first = FUNCTION[mutant]
    error = caught(by_hand(change, numerics))
    assert (error.code, error.where) == ("QG207", f"the first value that differs is '{first}'")
    assert error.what.startswith(f"'by-hand' declares its numerics as {numerics}, but the output '")
    assert error.why.startswith("largest difference ")
    assert error.todo


@pytest.mark.parametrize("mutant", [m for m in FUNCTION if m != "another operator"])
def test_the_error_carries_the_change_as_a_unified_diff(mutant: str) -> None:
    diff = caught(by_hand(FUNCTION[mutant][0])).diff.splitlines()
    assert diff[:2] == ["--- before by-hand", "+++ after by-hand"]
    assert any(line.startswith("-  ") for line in diff)
    assert any(line.startswith("+  ") for line in diff)


@pytest.mark.parametrize(
    ("sizes", "code", "where"),
    [
        ("fixed", "QG207", "the first value that differs is 'Net:add'"),
        ("moving", "QG206", "on inputs in another order, and of other sizes where they move"),
    ],
)
def test_a_constant_baked_from_the_example_is_caught_by_the_second_probe(sizes: str, code: str, where: str) -> None:
    graph = captured(sizes)
    unchecked = PassManager([by_hand(baked_constant)], leaves=graph.stage, checked=False).run(graph)
    for a, b in zip(unchecked(floats(4, 8)), graph(floats(4, 8)), strict=True):
        assert torch.equal(a, b), "on the example it is right"
    with pytest.raises(PassError) as found:
        run(by_hand(baked_constant), graph)
    assert (found.value.code, found.value.where) == (code, where)
    assert "baked" in found.value.diff


@pytest.mark.parametrize("numerics", [same, within(1e-9)], ids=str)
@pytest.mark.parametrize("mutant", MADE)
def test_a_pass_that_leaves_a_graph_that_is_not_well_made(mutant: str, numerics: Numerics) -> None:
    change, code, what, where = MADE[mutant]
    error = caught(by_hand(change, numerics))
    assert (error.code, what in error.what) == (code, True), str(error)
    assert error.where.startswith(where)
    assert error.why
    assert "by-hand" in error.what
    assert error.todo


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return functional.relu(y, inplace=True)


def test_qg211_a_pass_that_claims_falsely_what_it_ensures() -> None:
    graph = qg.capture(InPlace(), floats(2, 4))
    with pytest.raises(PassError) as found:
        run(by_hand(nothing, ensures=("functional",)), graph)
    assert (found.value.code, found.value.what) == (
        "QG211", "'by-hand' ensures that the graph is functional, but it is not",
    )  # fmt: skip
    assert "writes into its input" in found.value.where


X = AnyValue("x")


def rewriting(pattern: Op, change: Callable[[Match, Edit], object], budget: int = 50) -> GraphPass:
    @dataclass(frozen=True)
    class ByRule(RewritePass):
        name = "by-hand"

        def rewrite(self, match: Match, edit: Edit) -> None:
            change(match, edit)

    made: type[ByRule] = type("ByRule", (ByRule,), {"pattern": pattern, "budget": budget, "__module__": __name__})
    return made()


BY_RULE: dict[str, tuple[Op, Callable[[Match, Edit], object], str, str]] = {
    "an edit beyond the match": (
        Op("tanh", X, name="tanh"), lambda m, edit: edit.bypass(m["x"], m["x"].args[0]), "QG208", "Net:relu",
    ),
    "a group beyond the match": (
        Op("tanh", X, name="tanh"), lambda m, edit: edit.group("pair", m["tanh"], m["x"]), "QG208", "Net:relu",
    ),
    "an endless rewrite": (
        Op("tanh", X, name="tanh"),
        lambda m, edit: edit.replace(m["tanh"], edit.call("tanh", m["x"], at=m["tanh"])), "QG204", "by-hand",
    ),
    "a name that the pattern does not bind": (Op("tanh", X), lambda m, edit: m["tanh"], "QG206", "by-hand"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", BY_RULE)
def test_a_rewrite_that_goes_wrong(mutant: str) -> None:
    pattern, change, code, where = BY_RULE[mutant]
    error = caught(rewriting(pattern, change))
    assert (error.code, error.where) == (code, where)
    assert "by-hand" in error.what
    assert error.todo


def test_a_broken_rewrite_shows_what_it_did_before_it_was_stopped() -> None:
    def change(match: Match, edit: Edit) -> None:
        edit.replace(match["tanh"], edit.call("erf", match["x"], at=match["tanh"]))
        edit.erase(match["x"])

    error = caught(rewriting(Op("tanh", X, name="tanh"), change))
    assert error.code == "QG208"
    lines = error.diff.splitlines()
    assert "-  Net:tanh = tanh(Net:relu) : float32[batch, 8]" in lines
    assert "+  Net:erf = erf(Net:relu) : float32[batch, 8]" in lines


# ---------------------------------------------------------------- no false alarm


def renamed(graph: Graph, edit: Edit) -> None:
    edit.rename_kind(graph.node("Net:add"), "residual_add")


def reshaped(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "Net:flatten", args_of(graph, "Net:flatten")[0], 1, 2)


def otherwise_written(graph: Graph, edit: Edit) -> None:
    """``x - y`` becomes ``x + (-1) y``, bit for bit."""
    sub = graph.node("Net:sub")
    edit.replace(sub, edit.call("add", *sub.args, at=sub, alpha=-1))


@pytest.mark.parametrize("numerics", [same, within(1e-9), changes_grid(1e-9)], ids=str)
@pytest.mark.parametrize("change", [nothing, renamed, otherwise_written])
def test_a_pass_that_keeps_its_word_is_let_through(change: Change, numerics: Numerics) -> None:
    after = run(by_hand(change, numerics))
    assert (str(after) == str(captured())) is (change is nothing), "else nothing was checked"
    for a, b in zip(after(floats(3, 8)), captured()(floats(3, 8)), strict=True):
        assert torch.equal(a, b)


class Counter(nn.Module):
    """Writes a buffer each time that it runs, draws random numbers, and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y: Tensor = self.fc(x.to(torch.float64).to(torch.float32) + torch.rand(4))
        return y + self.count


@pytest.mark.parametrize("numerics", [same, within(1e-9)], ids=str)
def test_state_chance_and_casts_are_no_fault_of_a_pass(numerics: Numerics) -> None:
    graph = qg.capture(Counter(), floats(2, 4))

    assert {"copy_", "rand", "cast"} <= {record(n).kind for n in graph.nodes}
    run(by_hand(lambda g, edit: edit.rename_kind(g.node("Counter:add#3"), "residual_add"), numerics), graph)
    assert float(graph.module.get_buffer("count")) == 0.0, "the checks ran on a copy"


def another_module(graph: Graph, edit: Edit) -> None:
    first, second = graph.module.graph.find_nodes(op="call_module")
    second.target = first.target


def test_a_call_of_another_module_which_no_text_shows_is_a_change() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.1))
    still, other = by_hand(nothing), by_hand(another_module)
    type(other).name = "by-the-other-hand"
    manager = PassManager([still, other, still])
    manager.run(qg.canonicalize(qg.capture(model, floats(2, 4))))
    assert [r.modified for r in manager.reports] == [False, True, False]
    assert manager.reports[1].diff() == ""


@pytest.mark.parametrize("numerics", [same, within(1e-9)], ids=str)
@pytest.mark.parametrize(
    ("fault", "code", "what"),
    [
        (does_not_run, "QG206", "the graph does not run before 'by-hand'"),
        (used_before_defined, "QG203", "the graph is not a valid 'captured' graph after 'what came before'"),
    ],
)
def test_a_graph_that_was_broken_before_is_no_fault_of_the_pass(
    fault: Change, code: str, what: str, numerics: Numerics
) -> None:
    graph = captured()
    fault(graph, Edit(graph, "somebody"))
    with pytest.raises(PassError) as found:
        run(by_hand(renamed if fault is used_before_defined else reshaped, numerics), graph)
    assert (found.value.code, found.value.what) == (code, what)


@pytest.mark.parametrize("rows", [2, 30_000])
def test_a_write_to_one_row_of_a_large_table_is_seen_and_nan_in_it_is_not(rows: int) -> None:
    graph = qg.capture(nn.Embedding(rows, 384), torch.zeros(1, 2, dtype=torch.int64))
    table = graph.module.get_parameter("weight")
    before = fingerprints(graph, deep=True)
    check_parameters(by_hand(nothing), before, graph, deep=True)
    table.data[rows * 2 // 5] = float("nan")
    with pytest.raises(PassError, match="QG207"):
        check_parameters(by_hand(nothing), before, graph, deep=True)
    check_parameters(by_hand(nothing), fingerprints(graph, deep=True), graph, deep=True)


# ---------------------------------------------------------------- changes_grid


def balanced(factor: float, *, bias: bool = True, back: bool = True) -> Change:
    """Scale what a LayerNorm gives, and undo it in the linear that reads it (as smoothing does)."""

    def change(graph: Graph, edit: Edit) -> None:
        norm = graph.node("norm:layer_norm")
        x, shape, weight, shift, eps = norm.args[:5]
        at = graph.nodes[0]
        for path in ("norm.weight", "norm.bias") if bias else ("norm.weight",):
            scaled = edit.parameter(f"{path}/scaled", graph.module.get_parameter(path) * factor, at=at)
            weight, shift = (scaled, shift) if path == "norm.weight" else (weight, scaled)
        replaced(graph, edit, "norm:layer_norm", x, shape, weight, shift, eps)
        if back:
            relu = graph.node("Net:relu")
            undone = edit.call("mul", relu, 1 / factor, at=relu.next)
            relu.replace_all_uses_with(undone, delete_user_cb=lambda user: user is not undone)

    return change


GRIDS: dict[str, tuple[Change, Numerics, str]] = {
    "as declared": (balanced(4.0), changes_grid(1e-12, "weight", "bias"), ""),
    "as declared, of one kind": (balanced(4.0), changes_grid(1e-12, "layer_norm.weight", "layer_norm.bias"), ""),
    "nothing declared": (balanced(4.0), changes_grid(1e-12), "the weight of 'norm:layer_norm'"),
    "the bias not declared": (balanced(4.0), changes_grid(1e-12, "weight"), "the bias of 'norm:layer_norm'"),
    "of another kind": (balanced(4.0), changes_grid(1e-12, "linear.weight", "bias"), "the weight of 'norm:layer_norm'"),
    "a constant comes": (dropped_bias, changes_grid(1.0, "weight"), "the bias of 'fc:linear'"),
    "not undone": (balanced(4.0, back=False), changes_grid(1e-12, "weight", "bias"), "the first value that differs"),
    "the bias forgotten": (balanced(4.0, bias=False), changes_grid(1e-12, "weight"), "the first value that differs"),
    "within says nothing of constants": (balanced(4.0), within(1e-12), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", GRIDS)
def test_changes_grid_lets_only_the_declared_constants_change(case: str) -> None:
    change, numerics, where = GRIDS[case]
    if not where:
        assert "norm.weight/scaled" in str(run(by_hand(change, numerics)))
        return
    error = caught(by_hand(change, numerics))
    assert error.code == "QG207"
    assert error.where.startswith(where)
    assert "changes-grid" in error.what
    assert error.diff


def test_numerics_print_as_they_are_written() -> None:
    assert [str(n) for n in (same, within(1e-6), changes_grid(1e-6, "weight", "conv2d.bias"))] == [
        "same", "within(1e-06)", "changes-grid(1e-06, weight, conv2d.bias)",
    ]  # fmt: skip
