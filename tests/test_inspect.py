"""show, explain, diff, passes and targets as a user runs them; the plan is read where torch cannot be imported."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import qatgraph as qg
from qatgraph.planning.explain import diff, explain, module_tree
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import load_target
from tests.models import captured
from tests.test_prediction import ENGINES, python_without

TOY = str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml")
HEAVY = ("torch", *ENGINES)
CLI = "from qatgraph.cli import main; main()"
QUERY = "layer.0.attention.query"


@cache
def plans() -> dict[str, Plan]:
    line = Override(select=f"{QUERY}:linear", place="float", why="the test holds it")
    graph = captured("encoder")
    return {
        "ort": qg.plan(graph),
        "toy": qg.plan(graph, TOY),
        "held": qg.plan(graph, recipe=Recipe(name="held", override=(line,))),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans")
    for name, plan in plans().items():
        (path / f"{name}.json").write_text(plan.to_json(), encoding="utf-8")
    (path / "not.json").write_text("{}", encoding="utf-8")
    (path / "model.onnx").write_bytes(bytes(range(256)))
    return path


def qatgraph(
    *args: str, folder: Path | None = None, without: Sequence[str] = HEAVY
) -> subprocess.CompletedProcess[str]:
    """The command line, with the files of ``folder`` named by their bare names."""
    full = [str(folder / a) if folder is not None and (folder / a).is_file() else a for a in args]
    return python_without(without, CLI, *full, COLUMNS="200")


def answer(*args: str, folder: Path | None = None) -> str:
    done = qatgraph(*args, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def as_json(*args: str, folder: Path | None = None) -> Any:
    return json.loads(answer(*args, "--json", folder=folder))


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="qatgraph")
    assert script.value == "qatgraph.cli:main"


def test_where_torch_is_blocked_it_is_really_blocked() -> None:
    """The passes are torch code: that command must fail here, or the tests of this file show nothing."""
    done = qatgraph("passes")
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr


# show


def test_show(folder: Path) -> None:
    text = answer("show", "ort.json", folder=folder)
    assert f"plan for ort-cpu, recipe int8 ({plans()['ort'].hash()[:12]})" in text
    assert "int8    6 linear as MatMulIntegerToFloat" in text
    assert "pinned  2 embedding, 2 layer_norm, 1 attention" in text
    for word in ("attention", "query", ":linear  int8 MatMulIntegerToFloat", ":layer_norm  pinned LayerNormalization"):
        assert word in text


def test_show_as_json(folder: Path) -> None:
    for name, plan in plans().items():
        shown = as_json("show", f"{name}.json", folder=folder)
        assert shown["target"] == plan.target
        assert shown["counts"] == plan.counts()
        assert sum(shown["counts"].values()) == len(plan.nodes)
        assert shown["modules"] == module_tree(plan)
    leaf = as_json("show", "toy.json", folder=folder)["modules"]["layer"]["0"]["attention"]["query"]
    assert leaf == {":linear": "int8 MAC"}


def leaves(tree: dict[str, Any]) -> int:
    return sum(leaves(v) if isinstance(v, dict) else 1 for v in tree.values())


def test_every_planned_operation_is_a_leaf() -> None:
    for plan in plans().values():
        assert leaves(module_tree(plan)) == len(plan.predictions)
    less = replace(plans()["ort"], predictions=plans()["ort"].predictions[1:])
    assert leaves(module_tree(less)) == len(plans()["ort"].predictions) - 1


# explain


@pytest.mark.parametrize("name", [QUERY, f"{QUERY}:linear"])
def test_explain_a_module_or_its_node(folder: Path, name: str) -> None:
    text = answer("explain", "ort.json", name, folder=folder)
    assert text.startswith(f"{QUERY}:linear")
    for word in (
        "int8 as MatMulIntegerToFloat",
        "decided by row linear.matmul-row-bias",
        "[batch, length, 32]",
        f"{QUERY}:linear.x: u8 affine per-tensor",
        f"{QUERY}:linear.weight: s8 symmetric per-channel(0) pair-safe",
        "lost: s8 symmetric per-tensor pair-safe",
        "kernel predicted: MatMulIntegerToFloat",
    ):
        assert word in text


def test_explain_names_the_line_of_the_user_and_not_of_torch(folder: Path) -> None:
    """The linear is called in models.py; torch's own linear.py is the same for every linear."""
    assert as_json("explain", "ort.json", QUERY, folder=folder)["source"].startswith("models.py:")
    assert as_json("explain", "ort.json", "Encoder:residual_add", folder=folder)["source"].startswith("models.py:")


def test_explain_says_who_held_it_and_what_lost(folder: Path) -> None:
    text = answer("explain", "held.json", QUERY, folder=folder)
    assert f"decided by recipe held (override 1, '{QUERY}:linear')" in text
    assert "because the test holds it" in text
    assert "lost: int8 as MatMulIntegerToFloat (row linear.matmul-row-bias): the node is kept in float" in text
    pinned = answer("explain", "ort.json", "layer.0.norm", folder=folder)
    assert "decided by pass pin-layer-norm" in pinned
    assert "not int8 because its variance squares the outliers of [batch, length, 32]" in pinned


@pytest.mark.parametrize(
    ("file", "quantizer", "words"),
    [
        ("ort.json", f"{QUERY}:linear.x", ["u8 affine per-tensor", "'Encoder:residual_add'"]),
        ("ort.json", "layer.0.mlp.down:linear.weight", ["s8 symmetric per-channel(0) pair-safe", "mlp.down.weight"]),
        ("toy.json", f"{QUERY}:linear.bias", ["s32 symmetric per-tensor derived", "pass derive-bias", "s_x * s_w"]),
        ("toy.json", "layer.0.mlp.gelu:gelu.x", ["s8 symmetric per-tensor power-of-two", "layer.0.mlp.up:linear.out"]),
    ],
)
def test_explain_a_quantizer(folder: Path, file: str, quantizer: str, words: list[str]) -> None:
    text = answer("explain", file, quantizer, folder=folder)
    assert f"  {quantizer}: {words[0]}" in text
    assert all(w in text for w in words)


def test_explain_as_json(folder: Path) -> None:
    found = as_json("explain", "toy.json", "layer.0:residual_add", folder=folder)
    assert found["name"] == "layer.0:residual_add"
    assert found["kernel"] == "host"
    assert "is not int8" in found["remedy"]
    (decision,) = found["decisions"]
    assert (decision["choice"], decision["rule"]) == ("host as host", "residual_add.host")
    assert decision["lost"][0]["author"]["id"] == "residual_add.s8"
    assert found == json.loads(json.dumps(explain(plans()["toy"], "layer.0:residual_add").as_json()))


def test_every_subject_of_a_plan_can_be_explained() -> None:
    for plan in plans().values():
        for decision in plan.decisions:
            found = explain(plan, decision.subject)
            assert decision in found.decisions
            assert decision.why in found.text()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layer.0.attention.qeury", f"did you mean '{QUERY}"),
        (f"{QUERY}:lineer", f"did you mean '{QUERY}:linear'?"),
        ("zzzz", "no name is close"),
    ],
)
def test_explain_an_unknown_name(folder: Path, name: str, hint: str) -> None:
    done = qatgraph("explain", "ort.json", name, folder=folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"QG306: the plan has no name '{name}'")
    assert hint in done.stderr
    assert "qatgraph show" in done.stderr


def test_a_module_of_several_operations_lists_them() -> None:
    plan = plans()["ort"]
    twin = replace(plan.predictions[3], node=f"{QUERY}:linear#2")
    with pytest.raises(qg.QatgraphError) as caught:
        explain(replace(plan, predictions=(*plan.predictions, twin)), QUERY)
    assert caught.value.code == "QG306"
    assert f"it holds {QUERY}:linear, {QUERY}:linear#2" in caught.value.why


# diff


def test_diff(folder: Path) -> None:
    text = answer("diff", "ort.json", "held.json", folder=folder)
    assert f"{QUERY}:linear" in text
    assert "engine-float as MatMul" in text
    assert "absent" in text
    assert "0 decisions differ" in answer("diff", "ort.json", "ort.json", folder=folder)


def test_diff_as_json(folder: Path) -> None:
    assert as_json("diff", "ort.json", "ort.json", folder=folder) == []
    found = {d["subject"]: d for d in as_json("diff", "ort.json", "toy.json", folder=folder)}
    gelu = found["layer.0.mlp.gelu:gelu"]
    assert gelu["before"].startswith("engine-float as ")
    assert gelu["after"] == "int8 as LUT"
    assert "256 entries" in gelu["why"]
    assert found[f"{QUERY}:linear.bias"]["before"] == "absent"
    there_and_back = as_json("diff", "toy.json", "ort.json", folder=folder)
    assert {(d["subject"], d["after"], d["before"]) for d in there_and_back} == {
        (d["subject"], d["before"], d["after"]) for d in found.values()
    }


def test_plans_that_decide_differently_are_told_apart() -> None:
    """Also where the placement is the same: another observer, another form of the bias."""
    graph = captured("encoder")
    select = f"{QUERY}:linear"
    for line in (Override(select=select, observer="minmax"), Override(select=select, bias="vector")):
        changed = qg.plan(graph, recipe=Recipe(override=(line,)))
        assert changed.hash() != plans()["ort"].hash()
        assert any(d.subject.startswith(select) for d in diff(plans()["ort"], changed))


# passes and targets


def test_passes() -> None:
    done = qatgraph("passes", "--json", without=ENGINES)
    assert done.returncode == 0, done.stderr
    rows = {r["name"]: r for r in json.loads(done.stdout)}
    assert rows["pin-layer-norm"]["kind"] == "planning"
    assert rows["fold-gelu"]["kind"] == "rewrite"
    assert all(r["summary"].endswith(".") for r in rows.values())
    text = qatgraph("passes", without=ENGINES).stdout
    assert all(name in text for name in rows)


def test_targets() -> None:
    assert [t["name"] for t in as_json("targets")] == ["openvino-cpu", "ort-cpu", "ort-cpu-vnni"]
    assert "ort-cpu" in answer("targets")
    for name, table in (("ort-cpu", load_target("ort-cpu")), (TOY, load_target(TOY))):
        text = answer("targets", name)
        assert all(r.id in text and r.kernel.partition("|")[0] in text for r in table.row)
        assert f"planning passes: {table.pipeline}" in text
        assert as_json("targets", name) == table.model_dump(mode="json")


def test_an_unknown_target() -> None:
    done = qatgraph("targets", "ort-cpp")
    assert done.returncode == 1
    assert done.stderr.startswith("QG401: there is no target 'ort-cpp'")
    assert "did you mean 'ort-cpu'?" in done.stderr


# exit codes


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("show", "absent.json"), 1, "QG304: cannot read"),
        (("show", "not.json"), 1, "QG304: this is not a plan"),
        (("show", "model.onnx"), 1, "QG304"),
        (("explain", "model.onnx", "x"), 1, "QG304"),
        (("diff", "ort.json", "not.json"), 1, "QG304"),
        (("show",), 2, "Missing argument"),
        (("show", "ort.json", "--jsno"), 2, "--json"),
        (("explain", "ort.json"), 2, "Missing argument"),
        (("shwo", "ort.json"), 2, "shwo"),
    ],
)
def test_a_refusal_is_a_sentence_and_not_zero(folder: Path, args: tuple[str, ...], code: int, words: str) -> None:
    done = qatgraph(*args, folder=folder)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["show", "explain", "diff", "passes", "targets"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: qatgraph {command}" in answer(command, "--help")
