"""The example of two passes of one's own: short, on the public names alone, and at work."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.ir.meta import record
from qatgraph.rewriting.passes import Pass, PlanningPass, RewritePass
from qatgraph.rewriting.registry import parse_passes
from tests.models import captured, floats

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_pass.py"


def faults(source: str) -> list[str]:
    """What makes a file of passes too long or too knowing, as sentences."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            size = (node.end_lineno or 0) - first + 1
            found += [f"'{node.name}' has {size} lines"] if size > 20 else []
        elif isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if a.name != "qatgraph"]
        elif isinstance(node, ast.ImportFrom) and node.module != "dataclasses":
            found.append(f"imports from {node.module}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qg":
            found += [] if node.attr in qg.__all__ else [f"qg.{node.attr} is not public"]
    return found


def test_the_example_is_short_and_uses_only_public_names() -> None:
    assert faults(EXAMPLE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from torch import fx",
        "from qatgraph.rewriting.edit import Edit",
        "import qatgraph as qg\nqg.rewriting",
        "class Long:\n" + "    x = 1\n" * 20,
    ],
)
def test_a_planted_fault_is_seen(source: str) -> None:
    assert len(faults(source)) == 1


@pytest.fixture(scope="module")
def passes() -> list[Pass]:
    return parse_passes([str(EXAMPLE)])


def test_the_file_defines_a_rewrite_and_a_planning_pass(passes: list[Pass]) -> None:
    rewrite, planning = passes
    assert isinstance(rewrite, RewritePass)
    assert isinstance(planning, PlanningPass)
    assert [p.name for p in passes] == ["merge-factors", "pin-first-linear"]


class Scaled(nn.Module):
    """A scale and a temperature in front of a linear; the scaled input is an output, too, if it is ``shown``."""

    def __init__(self, shown: bool = False) -> None:
        super().__init__()
        self.fc, self.shown = nn.Linear(4, 4), shown

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scaled = x * 0.3
        y: Tensor = self.fc(scaled * 0.7)
        return (y, scaled) if self.shown else (y,)


@pytest.mark.parametrize(
    ("shown", "names", "refused"),
    [
        (False, ["Scaled:mul#2", "fc:linear"], []),
        (True, ["Scaled:mul", "Scaled:mul#2", "fc:linear"], ["the first product is read elsewhere"]),
    ],
)
def test_the_rewrite_merges_two_factors(passes: list[Pass], shown: bool, names: list[str], refused: list[str]) -> None:
    model = Scaled(shown)
    graph = qg.capture(model, floats(2, 4))
    assert len(graph.nodes) == len(qg.canonicalize(graph).nodes) == 3, "no built-in pass does it already"
    manager = qg.PassManager(passes[:1], leaves=graph.stage)
    after = manager.run(graph)
    assert [record(n).name for n in after.nodes] == names
    assert [r.reason for r in manager.reports[0].refused] == refused
    assert torch.allclose(after(floats(2, 4))[0], model(floats(2, 4))[0], atol=1e-6)


def test_the_planning_pass_pins_the_first_linear(passes: list[Pass]) -> None:
    graph = captured("mlp")
    plain, plan = qg.plan(graph), qg.plan(graph, passes=passes)
    assert plain.int8_nodes() == ["up:linear", "down:linear"]
    assert plan.int8_nodes() == ["down:linear"]
    prediction = plan.prediction("up:linear")
    assert prediction is not None
    assert (prediction.pinned, prediction.int8) == (True, False)
    decision = next(d for d in plan.decisions if d.subject == "up:linear")
    assert (str(decision.author), decision.why) == ("pass pin-first-linear", "'up:linear' reads the raw input")


def test_the_plan_fits_the_graph_that_both_passes_saw(passes: list[Pass]) -> None:
    graph = qg.capture(Scaled(), floats(2, 4))
    plan = qg.plan(graph, passes=passes)
    assert qg.prepare(graph, plan, passes=passes) is not None
    with pytest.raises(qg.QatgraphError, match="QG307"):
        qg.prepare(graph, plan)
