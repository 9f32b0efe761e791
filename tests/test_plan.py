"""The plan as a value: its text, its hash, its reasons, and two targets side by side."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatgraph as qg
from qatgraph.errors import PlanError, TargetError
from qatgraph.planning.constraints import Author, Port
from qatgraph.planning.plan import VERSION, Plan
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import load_target
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from qatgraph.quantizers.grids import weight_scale
from qatgraph.specs import DType, QuantSpec, ScaleRule, Scheme
from tests.models import ZOO, captured, floats

TOY = str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml")


@cache
def plan(model: str = "encoder", target: str = "ort-cpu") -> Plan:
    return qg.plan(captured(model), target)


PLANS = [pytest.param(m, t, id=f"{m}-{Path(t).stem}") for m in ("encoder", "mlp", "tied") for t in ("ort-cpu", TOY)]

# text


@pytest.mark.parametrize(("model", "target"), PLANS)
def test_json_round_trip(model: str, target: str) -> None:
    made = plan(model, target)
    text = made.to_json()
    read = Plan.from_json(text)
    assert read == made
    assert read.to_json() == text
    assert read.hash() == made.hash()
    assert text.endswith("}\n")
    assert json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text


def test_another_capture_of_the_same_model_gives_the_same_bytes() -> None:
    again = qg.plan(ZOO["encoder"].capture())
    assert again.to_json() == plan().to_json()


def test_a_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json(), encoding="utf-8")
    assert Plan.load(path) == plan()


def test_the_plan_holds_no_path_of_this_machine() -> None:
    assert str(Path(__file__).parents[1]) not in plan().to_json()


def other(value: Any) -> Any:
    """A value of the same type that is not this one."""
    match value:
        case bool():
            return not value
        case Enum():
            return next(v for v in type(value) if v is not value)
        case str():
            return value + "'"
        case int() | float():
            return value + 1
        case None:
            return 1
        case tuple():
            return (*value[:-1], other(value[-1])) if value else ("other",)
        case dict():
            return {**value, "other": "x"}
        case _:
            first = fields(value)[0].name
            return replace(value, **{first: other(getattr(value, first))})


def variants(made: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with one thing changed: each field of the plan and each field of each record that it holds."""

    def changed(name: str, value: Any) -> Plan:
        changes: dict[str, Any] = {name: value}
        return replace(made, **changes)

    for f in fields(made):
        value = getattr(made, f.name)
        yield f.name, changed(f.name, other(value))
        if isinstance(value, tuple) and value:  # no output of this plan is integers
            for inner in fields(value[0]):
                first = replace(value[0], **{inner.name: other(getattr(value[0], inner.name))})
                yield f"{f.name}.{inner.name}", changed(f.name, (first, *value[1:]))


def unhashed(made: Plan, ignored: str = "") -> list[str]:
    """Changes that the hash does not see, if it is taken without the field ``ignored``."""

    def digest(one: Plan) -> str:
        return (replace(one, **{ignored: getattr(made, ignored)}) if ignored else one).hash()

    return [name for name, one in variants(made) if digest(one) == digest(made)]


def test_the_hash_sees_every_change() -> None:
    assert len(list(variants(plan()))) > 40
    assert unhashed(plan()) == []


def test_a_hash_without_the_predictions_is_seen() -> None:
    assert unhashed(plan(), ignored="predictions")[:2] == ["predictions", "predictions.node"]


def test_another_recipe_or_weight_or_target_gives_another_hash() -> None:
    line = Override(select="layer.0.mlp.up:linear", place="float")
    other_weights = ZOO["encoder"].model()
    with torch.no_grad():
        next(other_weights.parameters()).add_(1.0)
    graph = qg.capture(other_weights, ZOO["encoder"].inputs(0), ZOO["encoder"].dynamic)
    table = load_target("ort-cpu")
    plans = [
        plan(),
        plan("encoder", TOY),
        qg.plan(captured("encoder"), recipe=Recipe(override=(line,))),
        qg.plan(captured("encoder"), recipe=Recipe(observer="minmax")),
        qg.plan(captured("encoder"), table.model_copy(update={"opset": 22})),
        qg.plan(graph),
    ]
    assert len({p.hash() for p in plans}) == len(plans)


def broken(**changes: Any) -> str:
    data = json.loads(plan().to_json())
    return json.dumps({k: v for k, v in {**data, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("not a plan", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ("{}", "version"),
        (broken(version=VERSION + 1), f"version {VERSION + 1}, this is version {VERSION}"),
        (broken(version=None), "version"),
        (broken(quantizers=None), "quantizers"),
        (broken(nodes="all"), "nodes"),
        (broken(quantizers=[{"name": "q"}]), "spec"),
    ],
)
def test_what_is_not_a_plan(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert caught.value.code == "QG304"
    assert caught.value.where == str(path)
    assert why in caught.value.why
    assert caught.value.todo
    assert Plan.from_json(broken()) == plan()  # what is broken above is a plan when left alone


def test_files_that_are_not_text_or_not_there(tmp_path: Path) -> None:
    binary = tmp_path / "model.onnx"
    binary.write_bytes(bytes(range(256)))
    for path in (binary, tmp_path / "absent.json", tmp_path):
        with pytest.raises(PlanError) as caught:
            Plan.load(path)
        assert caught.value.code == "QG304"


# reasons


def empty_words(made: Plan) -> list[str]:
    """Decisions without an author, a rule, or a sentence that names something about their own subject."""
    facts = {f.name: f for f in made.nodes}
    quantizers = {q.name: q for q in made.quantizers}
    found = []
    for d in made.decisions:
        names = {d.subject}
        if d.subject in facts:
            names |= {facts[d.subject].words()["shape"], facts[d.subject].words()["weight"]}
        else:
            names |= {*quantizers[d.subject].values, *(p.node for p in quantizers[d.subject].ports)}
        if not d.author.kind or not d.author.id:
            found.append(f"{d.subject}: no author")
        if not d.rule:
            found.append(f"{d.subject}: no rule")
        if not any(n in d.why for n in names):
            found.append(f"{d.subject}: its reason names nothing about it")
        if "{" in d.why or any(not a.why_lost or "{" in a.why_lost for a in d.lost):
            found.append(f"{d.subject}: an empty or unfilled reason")
    return found


@pytest.mark.parametrize(("model", "target"), PLANS)
def test_every_decision_has_its_author_its_rule_and_its_reason(model: str, target: str) -> None:
    made = plan(model, target)
    assert empty_words(made) == []
    subjects = [d.subject for d in made.decisions]
    assert len(subjects) == len(set(subjects))
    assert set(subjects) == {f.name for f in made.nodes} | {q.name for q in made.quantizers}


def test_a_recipe_line_is_a_reason_too() -> None:
    line = Override(select="*:linear", place="float", why="'{name}' stays as it is")
    made = qg.plan(captured("mlp"), recipe=Recipe(override=(line,)))
    whys = {d.why for d in made.decisions if d.author.kind == "recipe"}
    assert whys == {"'{name}' stays as it is"}  # the user's words, not a form to be filled


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"why": ""}, "its reason names nothing about it"),
        ({"why": "because it is so"}, "its reason names nothing about it"),
        ({"rule": ""}, "no rule"),
        ({"author": Author("row", "")}, "no author"),
    ],
)
def test_a_decision_without_reason_is_seen(change: dict[str, Any], complaint: str) -> None:
    made = plan()
    for i in (0, len(made.decisions) - 1):
        poor = replace(made.decisions[i], **change)
        changed = replace(made, decisions=(*made.decisions[:i], poor, *made.decisions[i + 1 :]))
        assert empty_words(changed) == [f"{poor.subject}: {complaint}"]


def unpredicted(made: Plan, table: qg.Target) -> list[str]:
    """Nodes of a kind that the table knows without exactly one prediction that agrees with their placement.

    Of what only moves elements nothing is predicted where it moves floats; a kind that has only int8 rows has no kernel
    to predict in float.
    """
    int8 = set(made.int8_nodes())
    rows = {f.name: table.rows(f.kind) for f in made.nodes}
    wanted = [n for n, known in rows.items() if known and (n in int8 or not all(r.moves for r in known))]
    have = [p.node for p in made.predictions]
    agree = {p.node for p in made.predictions if p.int8 == (p.node in int8)}
    agree -= {p.node for p in made.predictions if not p.kernel and any(r.placement != "int8" for r in rows[p.node])}
    return sorted(n for n in wanted if have.count(n) != 1 or n not in agree)


@pytest.mark.parametrize(("model", "target"), PLANS)
def test_every_planned_node_has_its_prediction(model: str, target: str) -> None:
    made = plan(model, target)
    assert unpredicted(made, load_target(target)) == []
    assert {p.node for p in made.placements} == {f.name for f in made.nodes}
    for p in made.predictions:
        assert p.int8 or p.blocked_by
        assert p.row or p.blocked_by


def test_a_prediction_that_is_missing_or_disagrees_is_seen() -> None:
    made, table = plan(), load_target("ort-cpu")
    first, *rest = made.predictions
    assert unpredicted(replace(made, predictions=tuple(rest)), table) == [first.node]
    turned = replace(first, int8=not first.int8)
    assert unpredicted(replace(made, predictions=(turned, *rest)), table) == [first.node]


@pytest.mark.parametrize(("model", "target"), PLANS)
def test_partitions_cover_every_node_once(model: str, target: str) -> None:
    made = plan(model, target)
    assert sorted(n for p in made.partitions for n in p.nodes) == sorted(f.name for f in made.nodes)
    for partition in made.partitions:
        assert {made.placement(n).placement for n in partition.nodes} == {partition.placement}
        assert {made.placement(n).partition for n in partition.nodes} == {partition.index}
        assert (partition.boundary_bytes == 0) == (partition.placement != "int8")


def test_a_partition_that_reads_the_input_of_the_model_has_a_border() -> None:
    graph = qg.capture(nn.Sequential(nn.Linear(32, 16)), floats(4, 32), {"input": {0: "batch"}})
    (partition,) = qg.plan(graph).partitions
    assert partition.boundary_bytes == 4 * 32 * 5  # float32 is read, one byte is written


def test_only_what_crosses_the_border_costs() -> None:
    """up -> gelu -> down is one island on the toy NPU: what lies between them stays there."""
    made = plan("mlp", TOY)
    island = next(p for p in made.partitions if p.placement == "int8")
    assert island.nodes[:3] == ("up:linear", "gelu:gelu", "down:linear")
    size = {f.name: f.bytes for f in made.nodes}
    entry, leaving = size["norm:layer_norm"], size["down:linear"]
    assert island.boundary_bytes == (entry + leaving) * 5 // 4


# the model stays, and another model is refused


def test_planning_leaves_the_graph_as_it_is() -> None:
    graph = ZOO["encoder"].capture()
    before = str(graph), graph.weights_hash()
    qg.plan(graph)
    qg.plan(graph, TOY, Recipe(override=(Override(select="*:linear", place="float"),)))
    assert (str(graph), graph.weights_hash()) == before
    assert str(qg.canonicalize(graph)) != before[0]  # planning did work on another form


@pytest.mark.parametrize("model", ["mlp", "gpt2"])
def test_a_plan_for_another_model(model: str) -> None:
    with pytest.raises(PlanError) as caught:
        qg.prepare(captured(model), plan("encoder"))
    assert caught.value.code == "QG307"
    assert "another model" in caught.value.what
    assert "qatgraph plan" in caught.value.todo


def test_a_plan_for_a_model_of_another_size_or_name() -> None:
    def graph(width: int, name: str) -> qg.Graph:
        return qg.capture(nn.Sequential(OrderedDict({name: nn.Linear(8, width)})), floats(2, 8))

    made = qg.plan(graph(4, "a"))
    qg.prepare(graph(4, "a"), made)
    for other_graph in (graph(5, "a"), graph(4, "b")):
        with pytest.raises(PlanError, match="QG307"):
            qg.prepare(other_graph, made)


# two targets


def test_the_toy_differs_where_its_table_says_so() -> None:
    ort, toy = plan("encoder"), plan("encoder", TOY)
    assert (ort.target, ort.backend, toy.target, toy.backend) == ("ort-cpu", "ort_cpu", "toy-npu", "")
    assert ort.nodes == toy.nodes
    assert {q.spec.dtype for q in ort.quantizers} == {DType.U8, DType.S8}
    assert {q.spec.dtype for q in toy.quantizers} == {DType.S8, DType.S32}
    power = QuantSpec.parse("s8 symmetric per-tensor power-of-two")
    assert {q.spec for q in toy.quantizers if q.spec.dtype is DType.S8} == {power}
    for fact in toy.nodes:
        here, there = ort.placement(fact.name).placement, toy.placement(fact.name).placement
        match fact.kind:
            case "linear":
                assert (here, there) == ("int8", "int8")
                assert toy.placement(fact.name).bias == "int32"
                assert ort.placement(fact.name).bias == "row"
                assert toy.quantizer_at(Port(fact.name, "out"))
                assert not ort.quantizer_at(Port(fact.name, "out"))
                bias = toy.quantizer_at(Port(fact.name, "bias"))
                assert bias is not None
                assert (bias.spec.dtype, bias.spec.scale) == (DType.S32, ScaleRule.DERIVED)
                assert not ort.quantizer_at(Port(fact.name, "bias"))
            case "gelu":
                assert (here, there) == ("engine-float", "int8")
            case "layer_norm" | "attention" | "residual_add" | "embedding":
                assert (here, there) == ("engine-float", "host")
    kernels = {p.kernel for p in toy.predictions}
    assert kernels == {"MAC", "LUT", "host"}


def crooked(qat: nn.Module) -> list[str]:
    """Calibrated scales of activations and weights that are not exact powers of two."""
    found = []
    parameters = dict(qat.named_parameters())
    for name, module in qat.named_modules():
        if isinstance(module, ActivationFakeQuantize):
            scale = module.scale
        elif isinstance(module, WeightFakeQuantize):
            weight = next(p for n, p in parameters.items() if n.endswith(name.partition(".%3A")[0] + ".weight"))
            scale = weight_scale(weight, module.spec)
        else:
            continue
        if not bool((torch.frexp(scale).mantissa == 0.5).all()):
            found.append(name)
    return found


def calibrated(target: str) -> nn.Module:
    case = ZOO["encoder"]
    graph = case.capture()
    qat = qg.prepare(graph, qg.plan(graph, target))
    qg.calibrate(qat, [case.inputs(i) for i in range(3)], progress=False)
    return qat


def test_calibrated_scales_of_the_toy_are_powers_of_two_and_it_cannot_be_lowered(tmp_path: Path) -> None:
    qat = calibrated(TOY)
    modules = [m for m in qat.modules() if isinstance(m, ActivationFakeQuantize)]
    assert len(modules) >= 10
    assert all(m.on and m.zero_point == 0 and m.spec.scheme is Scheme.SYMMETRIC for m in modules)
    assert crooked(qat) == []
    with pytest.raises(TargetError) as caught:
        qg.lower(qat, tmp_path / "toy.bin")
    error = caught.value
    assert error.code == "QG403"
    assert "'toy-npu' can be planned for, but not lowered to" in error.what
    assert "names no backend" in error.why
    for word in ("lower(graph, plan)", "load", "audit", "backend = "):
        assert word in error.todo
    assert list(tmp_path.iterdir()) == []


def test_scales_that_are_no_powers_of_two_are_seen() -> None:
    assert len(crooked(calibrated("ort-cpu"))) >= 8
