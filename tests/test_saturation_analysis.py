"""Where a model would saturate without VNNI and what each cure costs: against slow counts, and an emulated CPU."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import qatgraph as qg
from qatgraph import fidelity, reference
from qatgraph import saturation as analysis
from qatgraph.backends import emulation, ort_cpu
from qatgraph.cli import app
from qatgraph.conversion import convert
from qatgraph.errors import PlanError
from qatgraph.ir.graph import Graph
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.proof import feed_of
from qatgraph.regions import Region
from qatgraph.saturation import CURES, EXACT, NOTHING, PAIR_SAFE, RULES, SEVEN_BITS, Layer, Saturation, analyse
from qatgraph.specs import ScaleRule
from tests.full_range import made
from tests.models import floats

JOB = Path(__file__).parent / "jobs" / "tiny.toml"


@cache
def found() -> Saturation:
    one = made("ort-cpu")
    return analyse(ort_cpu, one.qat, one.model, [one.batch], one.batch)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No files are lowered."""
    monkeypatch.setattr(analysis, "_times", lambda *args: dict.fromkeys(CURES, 1.0))


def layers(result: Saturation) -> dict[str, Layer]:
    return {r.node: r for r in result.layers}


def full_range() -> Graph:
    prepared = Graph.prepared(made("ort-cpu").qat)
    with analysis._scales(prepared, ScaleRule.FREE, list(layers(found()))):
        return convert(prepared)


def test_every_product_that_adds_in_pairs_is_there_with_its_order_of_k() -> None:
    plan = made("ort-cpu").plan
    assert list(layers(found())) == [p.node for p in plan.predictions if p.in_pairs]
    sizes = {n.partition(":")[0]: (r.kernel, r.k, len(r.pairs)) for n, r in layers(found()).items()}
    assert sizes == {
        "first": ("QLinearConv", 27, 8),
        "grouped": ("QLinearConv", 36, 8),
        "up": ("QGemm", 200, 16),
        "down": ("QGemm", 16, 5),
    }


def test_the_counts_are_those_of_the_integers_that_each_layer_reads() -> None:
    """The first layer again, from the input: one pair at a time, and one wrong output at a time."""
    one, qdq = made("ort-cpu"), full_range()
    region = Region.of(qdq, qdq.node("first:conv2d"))
    (grid,), (weight, _) = region.grids, region.weight
    x = reference.quantize(one.batch.numpy(), grid.scale, grid.zero_point)
    rows = reference.k_rows(weight).astype(int)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=int(grid.zero_point))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3)).transpose(0, 2, 3, 4, 5, 1)
    inputs = np.pad(seen.reshape(-1, 27).astype(int), [(0, 0), (0, 1)])
    filters = np.pad(rows, [(0, 0), (0, 1)])
    terms = (inputs[:, None] * filters[None]).reshape(len(inputs), 8, 14, 2).sum(-1)
    wrong = terms > 32767
    layer = layers(found())["first:conv2d"]
    assert np.allclose(layer.pairs, wrong.mean((0, 2)))
    assert np.allclose(layer.outputs, wrong.any(-1).mean(0))
    assert layer.outputs.max() > 0.01
    assert layer.worst_pairs.tolist() == reference.worst_pairs(rows).tolist()


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-vnni"])
def test_the_full_range_is_analysed_whatever_scales_the_plan_has(target: str) -> None:
    """The plan of one target has pair-safe scales, that of the other free ones."""
    one, want = made(target), layers(found())
    have = layers(analyse(ort_cpu, one.qat, one.model, [one.batch], one.batch))
    assert all((have[n].worst_pairs == r.worst_pairs).all() for n, r in want.items())
    assert all(have[n].errors == r.errors for n, r in want.items())
    assert all(r.possible == 1 for r in have.values())


@pytest.mark.parametrize("cure", RULES)
def test_each_cure_is_a_rule_of_scales_and_the_model_is_left_as_it_is(cure: str) -> None:
    one = made("ort-cpu")
    before = copy.deepcopy({n: getattr(m, "spec", None) for n, m in one.qat.named_modules()})
    prepared = Graph.prepared(one.qat)
    with analysis._scales(prepared, RULES[cure], list(layers(found()))):
        qdq = convert(prepared)
    assert {n: getattr(m, "spec", None) for n, m in one.qat.named_modules()} == before
    weights = [Region.of(qdq, qdq.node(n)).weight[0] for n in layers(found())]
    pair = max(reference.worst_pair(reference.k_rows(w)) for w in weights)
    top = max(int(np.abs(w.astype(int)).max()) for w in weights)
    assert {PAIR_SAFE: pair <= 128, SEVEN_BITS: top == 63 and pair <= 126, EXACT: pair > 128 and top == 127}[cure]


def test_finer_scales_have_smaller_errors_and_saturation_larger_ones() -> None:
    """Over the layers: in one of few weights, a coarser grid may lie better by chance."""
    e = {cure: found().error(cure) for cure in CURES}
    assert e[EXACT] < e[PAIR_SAFE] < e[SEVEN_BITS] < e[NOTHING]
    assert found().fidelity[EXACT]["cosine_min"] > found().fidelity[NOTHING]["cosine_min"] + 1e-4
    assert set(found().milliseconds) == set(CURES)
    assert min(found().milliseconds.values()) > 0


def test_the_worst_layer_and_channel_are_named() -> None:
    worst = found().worst
    assert worst.outputs.mean() == max(r.outputs.mean() for r in found().layers)
    assert worst.outputs[worst.worst_channel] == worst.outputs.max()
    assert f"'{worst.node}', channel {worst.worst_channel}" in found().summary()[1]


@pytest.mark.usefixtures("untimed")
def test_what_is_planted_in_one_channel_is_found_in_that_channel() -> None:
    one = made("ort-cpu")
    qat = copy.deepcopy(one.qat)
    weight = qat.get_parameter("up.weight").data
    weight[:] = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0) * 0.1  # no pair of one sign
    weight[11] = 0.1
    result = layers(analyse(ort_cpu, qat, one.model, [one.batch], one.batch))["up:linear"]
    assert (result.possible, result.worst_channel) == (1 / 16, 11)
    assert result.outputs[11] > 0
    assert np.delete(result.outputs, 11).sum() == np.delete(result.pairs, 11).sum() == 0


@pytest.mark.parametrize("vnni", [True, False])
def test_the_summary_says_whether_this_machine_saturates(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "has_vnni", lambda: vnni)
    assert ("nothing saturates" in found().summary()[-1]) is vnni


def test_a_plan_without_such_a_product_is_refused() -> None:
    one = made("ort-cpu")
    recipe = Recipe(override=(Override(select="*", place="float", why="nothing is int8"),))
    graph = qg.capture(one.model, one.batch)
    qat = qg.prepare(graph, qg.plan(graph, recipe=recipe)).eval()
    qg.calibrate(qat, [one.batch], progress=False)
    with pytest.raises(PlanError) as caught:
        analyse(ort_cpu, qat, one.model, [one.batch], one.batch)
    assert (caught.value.code, bool(caught.value.todo)) == ("QG309", True)


def test_the_command_prints_the_same_as_tables_and_as_json() -> None:
    asked: dict[str, Any] = json.loads(CliRunner().invoke(app, ["saturation", str(JOB), "--json"]).stdout)
    assert set(asked["cures"]) == set(CURES)
    assert len(asked["summary"]) == 4
    done = CliRunner().invoke(app, ["saturation", str(JOB)])
    assert done.exit_code == 0
    assert all(r["node"] in done.stdout and r["kernel"][:4] in done.stdout for r in asked["layers"])
    assert all(f"{cure}: {CURES[cure]}" in done.stdout for cure in CURES)
    assert asked["summary"][0] in done.stdout


def test_the_computed_wrong_outputs_are_those_of_a_cpu_without_vnni() -> None:
    """The whole file on an emulated Haswell has the distance from the float model that the analysis computed."""
    if not emulation.available():
        pytest.skip("NOT RUN: qemu-x86_64 is not installed")
    one = made("ort-cpu")
    there = emulation.run_on("Haswell", ort_cpu.lower(full_range(), one.plan), feed_of(Graph.of(one.qat), one.batch))
    with torch.no_grad():
        wanted = one.model(one.batch)
    have = fidelity.cosine([torch.from_numpy(there[0])], [wanted])["cosine_min"]
    far = {cure: abs(have - scores["cosine_min"]) for cure, scores in found().fidelity.items()}
    assert far[NOTHING] < 1e-4 < far[EXACT]


@pytest.mark.usefixtures("untimed")
def test_without_data_that_reaches_the_pairs_nothing_is_observed() -> None:
    """The static worst case stays, the observed one is nil: small integers cannot fill 16 bits."""
    one = made("ort-cpu")
    small = floats(2, 3, 9, 9, seed=1).abs() * 0.01
    result = layers(analyse(ort_cpu, one.qat, one.model, [small], one.batch))["first:conv2d"]
    assert result.possible == 1
    assert result.outputs.sum() == result.pairs.sum() == 0
    assert result.errors[NOTHING] == result.errors[EXACT]
