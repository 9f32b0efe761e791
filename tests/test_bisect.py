"""Which rewrite is to blame: planted faults are found, exactly, in few runs; and where there is nothing to find."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.rewriting.bisect import Culprit, bisect, numbers_differ
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, RewritePass, within
from qatgraph.rewriting.pattern import Any as AnyValue
from qatgraph.rewriting.pattern import Match, Number, Op, Refusal
from qatgraph.rewriting.pipeline import Pipeline
from qatgraph.rewriting.registry import make_pass
from tests.models import captured, floats

LENGTH = 16
X = AnyValue("x")


class Chain(nn.Module):
    """``LENGTH`` products, each behind a tanh."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.length):
            x = torch.tanh(x) * (1.0 + i / 16)
        return x


@dataclass(frozen=True)
class Double(RewritePass):
    """``x * a`` becomes ``(x * a/2) + (x * a/2)``; the ``wrong``-th of them becomes another number."""

    name = "double"
    numerics = within(1e-6)
    pattern = Op("mul", X, Number(None, "a"), name="mul", where={"other": lambda a: a < 100})
    wrong: int = -1
    fails: int = -1

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("done") if record(match["mul"]).history else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        number = round((match["a"] - 1.0) * 16)
        if number == self.fails:
            raise ZeroDivisionError("one over none")
        factor = match["a"] + (0.25 if number == self.wrong else 0.0)
        half = edit.call("mul", match["x"], factor / 2, at=match["mul"])
        edit.replace(match["mul"], edit.call("add", half, half, at=match["mul"]))


@dataclass(frozen=True)
class Swap(RewritePass):
    """``tanh`` becomes ``-tanh(-x)``, which is the same."""

    name = "swap"
    numerics = within(1e-6)
    pattern = Op("tanh", X, name="tanh")

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("done") if record(match["tanh"]).history else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        minus = edit.call("mul", match["x"], -1.0, at=match["tanh"])
        tanh = edit.call("tanh", minus, at=match["tanh"])
        edit.replace(match["tanh"], edit.call("mul", tanh, -1.0, at=match["tanh"]))


def chain(length: int = LENGTH) -> Graph:
    return qg.capture(Chain(length), floats(2, 4))


def pipeline(*passes: Any) -> Pipeline:
    return Pipeline(passes)


# ---------------------------------------------------------------- the rewrite that changes the numbers


@pytest.mark.parametrize("wrong", [0, 1, 7, LENGTH - 1])
@pytest.mark.parametrize("before", [0, 1])
def test_the_pass_and_the_exact_rewrite_are_found(wrong: int, before: int) -> None:
    found = bisect(chain(), pipeline(*[Swap()] * before, Double(wrong=wrong), Swap() if not before else Double()))
    node = "Chain:mul" if wrong == 0 else f"Chain:mul#{wrong + 1}"
    assert (found.pass_name, found.rewrite, found.node) == ("double", wrong + 1, node)
    assert found.rewrites >= 2 * LENGTH
    assert found.error == ""


def test_the_culprit_shows_its_rewrite_and_no_other() -> None:
    found = bisect(chain(), pipeline(Double(wrong=7)))
    removed = [line for line in found.diff.splitlines() if line.startswith("-  Chain:mul")]
    assert len(removed) == 1
    assert removed[0].startswith("-  Chain:mul#8 = mul(")
    first, second = str(found).splitlines()[:2]
    assert first == "'double': rewrite 8, at 'Chain:mul#8' (of 16 rewrites in the pipeline)"
    assert second == "--- before double"


def test_a_pass_that_is_no_pattern_counts_as_one_rewrite() -> None:
    @dataclass(frozen=True)
    class Whole(GraphPass):
        name = "whole"

        def apply(self, graph: Graph, edit: Edit) -> None:
            graph.node("Chain:mul#2").update_arg(1, 3.0)

    found = bisect(chain(), pipeline(make_pass("remove-no-ops"), Whole(), Double()))
    assert (found.pass_name, found.rewrite, found.node) == ("whole", 1, "")
    assert str(found).startswith("'whole': the pass as a whole (of ")
    assert "+  Chain:mul#2 = mul(Chain:tanh#2, 3.0)" in found.diff


# ---------------------------------------------------------------- passes that raise


def test_a_rewrite_that_raises_is_found_with_its_error() -> None:
    found = bisect(chain(), pipeline(Swap(), Double(fails=5)))
    assert (found.pass_name, found.rewrite, found.node) == ("double", 6, "Chain:mul#6")
    assert "QG206: the pass 'double' failed" in found.error
    assert "ZeroDivisionError: one over none" in str(found)


@dataclass(frozen=True)
class Picky(Swap):
    name = "picky"

    def check(self, match: Match) -> Refusal | None:
        raise LookupError("no such thing")


@dataclass(frozen=True)
class Claims(Swap):
    name = "claims"
    ensures = ("functional",)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(torch.tanh(x), inplace=True)


def test_a_pass_that_raises_outside_of_its_rewrites_is_found_as_a_whole() -> None:
    found = bisect(chain(), pipeline(Swap(), Picky(), Double()))
    assert (found.pass_name, found.rewrite, found.node) == ("picky", 0, "")
    assert "LookupError: no such thing" in found.error


@dataclass(frozen=True)
class Unreadable(RewritePass):
    name = "unreadable"
    pattern = qg.Code(lambda x: x, ((2, 4),))

    def rewrite(self, match: Match, edit: Edit) -> None:
        raise AssertionError("it matches nothing")


def test_a_pass_that_fails_before_any_rewrite_is_found_as_a_whole() -> None:
    found = bisect(chain(), pipeline(Swap(), Unreadable(), Double()))
    assert (found.pass_name, found.rewrite, found.node) == ("unreadable", 0, "")
    assert "QG209" in found.error


def test_a_pass_that_claims_falsely_what_it_ensures_is_found() -> None:
    found = bisect(qg.capture(InPlace(), floats(2, 4)), pipeline(Claims()))
    assert (found.pass_name, found.rewrite) == ("claims", 0)
    assert "QG211" in found.error


def test_a_pass_that_has_not_done_all_yet_is_not_to_blame_for_what_it_ensures() -> None:
    """With fewer rewrites than it wants, ``functionalize-in-place`` leaves writes behind: that is no error."""
    graph = qg.capture(InPlace(), floats(2, 4))
    found = bisect(graph, pipeline(make_pass("functionalize-in-place"), Wrong()))
    assert found.pass_name == "wrong"


@dataclass(frozen=True)
class Wrong(RewritePass):
    """``tanh`` becomes ``erf``."""

    name = "wrong"
    pattern = Op("tanh", X, name="tanh")

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["tanh"], edit.call("erf", match["x"], at=match["tanh"]))


# ---------------------------------------------------------------- the predicate


def test_a_predicate_of_ones_own_decides() -> None:
    """Here a graph is bad as soon as 7 of its products have a factor below 1."""

    def bad(after: Graph) -> bool:
        factors: list[Any] = [n.args[1] for n in after.nodes if record(n).kind == "mul"]
        return len([factor for factor in factors if factor < 1.0]) >= 7

    found = bisect(chain(), pipeline(Double()), bad)
    assert (found.pass_name, found.rewrite) == ("double", 7)


def test_an_error_of_the_predicate_counts_as_bad() -> None:
    def bad(after: Graph) -> bool:
        return after.node("Chain:mul#4") is None  # raises once this node is replaced

    found = bisect(chain(), pipeline(Double()), bad)
    assert (found.rewrite, found.node) == (4, "Chain:mul#4")
    assert found.error.startswith("PassError: QG217")


@pytest.mark.parametrize(("eps", "differs"), [(0.5, False), (1e-6, True)])
def test_numbers_differ_by_more_than_eps(eps: float, differs: bool) -> None:
    graph, after = chain(), chain()
    after.node("Chain:mul#16").update_arg(1, (1.0 + 15 / 16) * 1.001)
    after.module.recompile()
    assert numbers_differ(graph, eps)(after) is differs


# ---------------------------------------------------------------- nothing to find


def never(after: Graph) -> bool:
    return False


def always(after: Graph) -> bool:
    return True


def broken(after: Graph) -> bool:
    raise ValueError("my mistake")


class Moody:
    """Bad on the first call only."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, after: Graph) -> bool:
        self.calls += 1
        return self.calls == 1


NOTHING: dict[str, tuple[Callable[[Graph], bool], str, str]] = {
    "good in the end": (never, "the predicate does not hold after the whole pipeline", "nothing is to blame"),
    "bad from the start": (always, "the predicate holds before the first rewrite", "the fault is in the model"),
    "the predicate fails": (broken, "the predicate holds before the first rewrite", "ValueError: my mistake"),
    "the predicate is moody": (Moody(), "the predicate gives two answers for one graph", "something else"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_qg214_there_is_nothing_to_find(case: str) -> None:
    bad, what, why = NOTHING[case]
    with pytest.raises(PassError) as caught:
        bisect(chain(), pipeline(Double()), bad)
    error = caught.value
    assert (error.code, error.what) == ("QG214", what)
    assert why in error.why
    assert error.todo


def test_qg213_a_pipeline_in_a_wrong_order_is_no_culprit() -> None:
    with pytest.raises(PassError, match="QG213"):
        bisect(qg.capture(InPlace(), floats(2, 4)), Pipeline.parse("fold-layer-norm"), always)


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_number_of_runs_grows_with_the_logarithm(length: int, share: float) -> None:
    runs = [0]
    wanted = round(share * (length - 1)) + 1

    def bad(after: Graph) -> bool:
        runs[0] += 1
        return sum(record(n).kind == "add" for n in after.nodes) >= wanted

    found = bisect(chain(length), pipeline(Double()), bad)
    assert (found.rewrite, found.rewrites) == (wanted, length)
    assert runs[0] <= math.ceil(math.log2(length)) + 3


def test_the_graph_stays_as_it_was() -> None:
    graph = captured("mlp")
    text = str(graph)
    with pytest.raises(PassError, match="QG214"):
        bisect(graph, Pipeline.parse("canonicalize"))
    assert str(graph) == text


def test_a_culprit_is_a_value() -> None:
    culprit = Culprit("fold-gelu", 2, "act:mul", 7, "")
    assert str(culprit) == "'fold-gelu': rewrite 2, at 'act:mul' (of 7 rewrites in the pipeline)"
    assert str(replace(culprit, rewrite=0, node="", error="KeyError: x")) == (
        "'fold-gelu': the pass as a whole (of 7 rewrites in the pipeline)\nKeyError: x"
    )
