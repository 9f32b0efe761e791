"""Budgets: what may fall back to float, and what must not. A plan that misses one is refused; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import qatgraph as qg
from qatgraph.cli import app
from qatgraph.errors import PlanError
from qatgraph.planning.budget import Budget
from qatgraph.planning.explain import explain, partition_text, totals
from qatgraph.planning.fallback import fallback_report, fallbacks, work_of
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe, load_recipe
from tests.models import captured

TINY = Path(__file__).parent / "jobs" / "tiny.toml"
TOY = str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml")
QUERY = "layer.0.attention.query:linear"
HELD = Recipe(name="held", override=(Override(select=QUERY, place="float", why="the test holds it"),))


def plan(recipe: Recipe = HELD, target: str = "ort-cpu") -> Plan:
    return qg.plan(captured("encoder"), target, recipe)


def refused(budget: dict[str, Any], target: str = "ort-cpu") -> PlanError:
    with pytest.raises(PlanError) as found:
        plan(HELD.model_copy(update={"budget": Budget.model_validate(budget)}), target)
    return found.value


def test_a_required_kind_that_is_not_int8_is_named_with_its_reason() -> None:
    error = refused({"require": ["linear"]})
    assert error.code == "QG310"
    assert f"'{QUERY}' is not int8" in error.what
    assert QUERY in error.where
    assert "the test holds it" in error.why


def test_a_required_kind_that_is_int8_changes_nothing_in_the_plan() -> None:
    budget = Budget(require=("linear",), max_fallback=1.0)
    assert plan(Recipe(budget=budget)).to_json() == plan(Recipe()).to_json()


def test_a_kind_that_the_model_does_not_have_is_refused() -> None:
    error = refused({"require": ["lineer"]})
    assert error.code == "QG311"
    assert "'linear'" in error.why


@pytest.mark.parametrize(("target", "unit"), [("ort-cpu", "estimated float time"), (TOY, "multiply-accumulates")])
def test_the_share_is_that_of_the_fallbacks_and_the_budget_is_held_to_it(target: str, unit: str) -> None:
    made = plan(target=target)
    work, found = work_of(made), fallbacks(made)
    assert work.unit == unit
    assert QUERY in [f.node for f in found]
    share = sum(work.of(f.node) for f in found) / sum(work.amounts.values())
    assert 0 < share < 1
    enough = Budget(max_fallback=share)
    plan(HELD.model_copy(update={"budget": enough}), target)
    error = refused({"max_fallback": share * 0.99}, target)
    assert error.code == "QG310"
    assert f"{share:.1%} of the work ({unit})" in error.what
    assert error.where.startswith(f"'{found[0].node}'"), "the most expensive first"


def test_multiply_accumulates_are_those_of_the_example_batch() -> None:
    macs = {f.name: (f.macs, f.shape, f.bytes) for f in plan().nodes if f.macs}
    work, _, size = macs[QUERY]
    assert work == size // 4 * 32, "a dot product of 32 for every element of the result"
    assert {f.kind for f in plan().nodes if f.macs} == {"linear", "attention"}
    images = {f.kind: f.macs * 4 // f.bytes for f in qg.plan(captured("cnn")).nodes if f.macs}
    assert images["conv2d"] > 1


@pytest.mark.parametrize("share", ["10 %x", "1.5", "-1%", "150%", "nan"])
def test_what_is_no_share_is_refused(share: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'[budget]\nmax_fallback = "{share}"\n', encoding="utf-8")
    with pytest.raises(PlanError, match="is no share"):
        load_recipe(str(file))
    done = cli("plan", TINY, "--max-fallback", share)
    assert done.exit_code == 2
    assert "is no share" in " ".join(done.output.split())


def test_a_recipe_file_states_a_budget(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[budget]\nmax_fallback = "10%"\nrequire = ["linear"]\n', encoding="utf-8")
    recipe = load_recipe(str(file))
    assert recipe.budget == Budget(max_fallback=0.1, require=("linear",))
    assert recipe.hash() == Recipe().hash(), "a budget decides nothing"


def cli(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_refuses_and_writes_nothing(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(command, TINY, "--output", out, "--require", "gelu")
    assert done.exit_code != 0
    assert isinstance(done.exception, PlanError)
    assert done.exception.code == "QG311"
    assert list(tmp_path.iterdir()) == []


def test_the_command_passes_within_its_budget(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = cli("plan", TINY, "--output", out, "--require", "linear", "--max-fallback", "100%")
    assert done.exit_code == 0, done.output
    assert Plan.load(out).int8_nodes()


def test_what_the_fallback_costs_is_in_totals_and_explained() -> None:
    made = plan()
    report = fallback_report(made)
    assert report["operations"] == len(fallbacks(made))
    assert report["quantizes"] == sum(len(p.quantizes) for p in made.partitions)
    assert f"falls back: {report['share']:.0%} of the work" in "\n".join(totals(made))
    text = explain(made, QUERY).text()
    assert "the node is kept in float; it would take about " in text
    assert "takes about " in text
    island = next(p for p in made.partitions if p.quantizes)
    assert partition_text(island).startswith(f"partition {island.index}, int8, ")
    assert partition_text(island) in explain(made, island.nodes[0]).text()
    assert " us" not in "\n".join(totals(plan(target=TOY))), "no estimate without costs"
