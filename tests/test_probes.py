"""Each graph is run once: its answers are what the next pass is held against, and blame falls where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.rewriting import contracts
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.passes import GraphPass, Numerics, same, within
from qatgraph.rewriting.probes import Runner, Values
from tests.models import floats
from tests.mutants import FUNCTION, by_hand, captured

KINDS = (same, within(1e-9))


def right(name: str, numerics: Numerics) -> GraphPass:
    """Changes the text of the graph, and nothing that it computes."""

    def group(graph: Graph, edit: Edit) -> None:
        edit.group(name, graph.nodes[-1])

    return by_hand(group, numerics, name=name)


@pytest.mark.parametrize("last", KINDS, ids=str)
@pytest.mark.parametrize("first", KINDS, ids=str)
@pytest.mark.parametrize("mutant", ["wrong axis", "wrong scale"])
def test_a_wrong_pass_behind_right_ones_is_caught_with_the_first_value_that_differs(
    mutant: str, first: Numerics, last: Numerics
) -> None:
    change, where = FUNCTION[mutant]
    manager = PassManager([right("a", first), right("b", last), by_hand(change, last), right("c", first)])
    with pytest.raises(PassError) as found:
        manager.run(captured())
    assert [r.modified for r in manager.reports] == [True, True]
    assert (found.value.code, found.value.where) == ("QG207", f"the first value that differs is '{where}'")
    assert found.value.what.startswith(f"'by-hand' declares its numerics as {last}")


@pytest.mark.parametrize(
    ("numerics", "runs"), [(same, 2 + 3 * 2), (within(1e-9), 2 + 3 * (1 + 2))], ids=["same", "within"]
)
def test_each_graph_is_run_once_on_each_probe(numerics: Numerics, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two probes; in float64, one run more in the types of the model."""
    seen: list[Any] = []
    run = Runner.__call__

    def counted(runner: Runner, leaves: list[Any], *, noted: bool = False) -> Values:
        seen.append(leaves)
        return run(runner, leaves, noted=noted)

    monkeypatch.setattr(Runner, "__call__", counted)
    PassManager([right(name, numerics) for name in "abc"], leaves=captured().stage).run(captured())
    assert len(seen) == runs


class Counter(nn.Module):
    """Gives its buffer away, which the next call writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.calls: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        return x + self.calls, self.calls


def count(numerics: Numerics) -> None:
    graph = qg.capture(Counter(), floats(2, 4))
    PassManager([right(name, numerics) for name in "abc"], leaves=graph.stage).run(graph)


@pytest.mark.parametrize("numerics", KINDS, ids=str)
def test_an_answer_outlives_the_buffer_that_it_was(numerics: Numerics) -> None:
    count(numerics)


@pytest.mark.parametrize("numerics", KINDS, ids=str)
def test_an_answer_that_is_the_buffer_itself_is_seen(numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "_kept", lambda output: output)
    with pytest.raises(PassError) as found:
        count(numerics)
    assert found.value.code == "QG207"
