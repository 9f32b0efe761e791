"""The job minilm without training: all that the plan promised, on a real sentence encoder and in its real file."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.backends.ort_cpu import audit, session
from qatgraph.ir.graph import Graph
from qatgraph.job import load_job
from qatgraph.kernels import owner
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.proof import feed_of
from qatgraph.runner import Setup, run_job, set_up

pytestmark = pytest.mark.slow

JOB = Path(__file__).parent.parent / "examples" / "jobs" / "minilm.toml"
QUERY = "encoder.encoder.layer.0.attention.self.query:linear"
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    report: Json
    file: bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    report, folder = run_job(JOB, tmp_path_factory.mktemp("build") / "minilm", train=False)
    return Run(report.as_json(), (folder / "minilm.onnx").read_bytes())


@pytest.fixture(scope="module")
def setup() -> Setup:
    return set_up(load_job(JOB), JOB, 0)


def linears(model: nn.Module) -> set[str]:
    """What must become int8, from the user's own model."""
    return {f"{name}:linear" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ---------------------------------------------------------------- the report


def kernels_are_those_planned(report: Json) -> None:
    kernels = report["kernels"]
    assert kernels["planned"] == kernels["realized"] == 36
    assert kernels["mismatches"] == kernels["unnamed_int8"] == []
    assert kernels["int8_tables"] == 1


def pinned_nodes_run_in_float(report: Json) -> None:
    pinned = report["kernels"]["pinned"]
    assert (pinned["LayerNormalization"], pinned["Attention"]) == (13, 6)


def regions_equal_the_reference(report: Json) -> None:
    parity = report["parity"]
    assert parity["regions"] == 36 + report["kernels"]["int8_tables"]
    assert parity["elements"] > 1_000_000
    assert parity["float_max_rel"] <= 1e-6
    assert parity["max_steps"] <= 1
    assert parity["off_by_one_share"] <= 1e-4


def nothing_overflows_without_vnni(report: Json) -> None:
    overflow = report["overflow"]
    assert overflow["products"] == 36
    assert overflow["worst_pair"] <= 128
    assert overflow["smallest_weight"] >= -127
    assert overflow["unsafe"] == []
    assert overflow["same_on_haswell"] is True or str(overflow["same_on_haswell"]).startswith("NOT RUN: ")
    assert report["fidelity"]["same_under_x64quantprecision"] is True


def the_engine_stays_close_to_float(report: Json) -> None:
    for stage in ("ptq", "engine"):
        mean = report["fidelity"][stage]["cosine_mean"]
        assert 0.993 <= mean <= 1.0, f"the cosine of {stage} to the float model is {mean:.5f}"
    assert report["fidelity"]["samples"] == 256


def the_file_is_small(report: Json) -> None:
    assert 20e6 < report["files"]["onnx"]["bytes"] <= 24e6


def every_check_passed(report: Json) -> None:
    assert report["ok"] is True
    assert report["failures"] == []


FAULTS: list[tuple[Callable[[Json], None], str, Any]] = [
    (kernels_are_those_planned, "kernels.realized", 35),
    (kernels_are_those_planned, "kernels.mismatches", ["a node"]),
    (pinned_nodes_run_in_float, "kernels.pinned.Attention", 5),
    (regions_equal_the_reference, "parity.regions", 36),
    (regions_equal_the_reference, "parity.float_max_rel", 2e-6),
    (regions_equal_the_reference, "parity.max_steps", 2),
    (regions_equal_the_reference, "parity.off_by_one_share", 2e-4),
    (nothing_overflows_without_vnni, "overflow.worst_pair", 129),
    (nothing_overflows_without_vnni, "overflow.same_on_haswell", False),
    (nothing_overflows_without_vnni, "fidelity.same_under_x64quantprecision", False),
    (the_engine_stays_close_to_float, "fidelity.engine.cosine_mean", 0.9929),
    (the_engine_stays_close_to_float, "fidelity.ptq.cosine_mean", float("nan")),
    (the_file_is_small, "files.onnx.bytes", 24_000_001),
    (every_check_passed, "failures", ["one"]),
]


@pytest.mark.parametrize(("check", "at", "value"), FAULTS, ids=[f"{f.__name__}-{at}" for f, at, _ in FAULTS])
def test_the_report_keeps_every_promise_and_a_planted_fault_breaks_it(
    run: Run, check: Callable[[Json], None], at: str, value: Any
) -> None:
    check(run.report)
    worse = copy.deepcopy(run.report)
    *path, last = at.split(".")
    section = worse
    for part in path:
        section = section[part]
    assert last in section
    section[last] = value
    with pytest.raises(AssertionError):
        check(worse)


# ---------------------------------------------------------------- the file itself


def test_the_engine_runs_exactly_the_users_linears_in_int8(run: Run, setup: Setup) -> None:
    kernels = {owner(n.name): n.kernel for n in audit(run.file) if n.int8}
    table = "encoder.embeddings.word_embeddings:embedding"
    assert kernels.pop(table) == "Gather"
    assert set(kernels) == linears(setup.model)
    assert set(kernels.values()) == {"MatMulIntegerToFloat"}


def test_dimensions_bear_the_users_names(run: Run) -> None:
    graph = onnx.load_from_string(run.file).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.output]
    }
    moving = ["batch", "length"]
    assert shapes == {"input_ids": moving, "attention_mask": moving, "embedding": ["batch", 384]}


def test_names_are_unique_and_the_users(run: Run, setup: Setup) -> None:
    names = [n.name for n in onnx.load_from_string(run.file).graph.node]
    assert len(set(names)) == len(names) > 200
    modules = {name for name, _ in setup.model.named_modules() if name} | {type(setup.model).__name__}
    assert {n.split(":")[0] for n in names} <= modules
    assert {name.split(":")[0] for name in linears(setup.model)} <= {n.split(":")[0] for n in names}


@pytest.mark.parametrize("shape", [(1, 3), (3, 40), (2, 512)])
def test_batch_and_length_really_move(run: Run, setup: Setup, shape: tuple[int, int]) -> None:
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    have = torch.from_numpy(session(run.file).run(None, feed_of(setup.graph, batch))[0])
    with torch.no_grad():
        want = setup.model(**batch)
    assert have.shape == want.shape == (shape[0], 384)
    assert float(torch.cosine_similarity(have, want).min()) > 0.9
    assert float(torch.cosine_similarity(have, want.flip(1)).max()) < 0.5


def test_a_linear_pinned_by_a_recipe_runs_in_float(run: Run, setup: Setup, tmp_path: Path) -> None:
    recipe = Recipe(override=(Override(select=QUERY, place="float", why="a test"),))
    plan = qg.plan(setup.graph, recipe=recipe)
    assert len(plan.int8_nodes()) == 35 + 1
    assert QUERY not in plan.int8_nodes()
    qat = qg.prepare(setup.graph, plan)
    qg.calibrate(qat, setup.data.calibrate[:1], progress=False)
    file = qg.lower(qat, tmp_path / "pinned.onnx").read_bytes()
    kernels = {n.name: n.kernel for n in audit(file)}
    assert kernels[f"{QUERY}/MatMul"] in ("MatMul", "Gemm", "FusedMatMul")
    assert {owner(n.name) for n in audit(run.file) if n.int8} - {owner(n.name) for n in audit(file) if n.int8} == {
        QUERY
    }


# ---------------------------------------------------------------- the user's model


def digest(tensor: Tensor | None) -> str:
    return "" if tensor is None else hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def state(model: nn.Module) -> Json:
    """Everything that is the user's."""
    return {
        "values": {n: digest(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "modes": {n: m.training for n, m in model.named_modules()},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: digest(p.grad) for n, p in model.named_parameters()},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
    }


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}


@pytest.fixture(scope="module")
def touched() -> tuple[nn.Module, Json, Json, Graph]:
    """A model in every unusual state, its state before and after capture, and the graph."""
    own = set_up(load_job(JOB), JOB, 0)
    model = own.model.train()
    model.get_submodule("encoder.embeddings").eval()
    model.get_parameter("encoder.embeddings.word_embeddings.weight").requires_grad_(False)
    model.get_submodule("encoder.encoder").register_forward_hook(lambda module, args, out: None)
    model(**own.data.calibrate[0]).square().sum().backward()
    before = state(model)
    graph = qg.capture(model, own.data.calibrate[0], load_job(JOB).shapes())
    return model, before, state(model), graph


def test_capture_leaves_the_users_model_untouched(touched: tuple[nn.Module, Json, Json, Graph]) -> None:
    model, before, after, graph = touched
    assert after == before
    assert "encoder.embeddings.position_ids" in before["values"]
    assert "encoder.embeddings.position_ids" not in model.state_dict()  # a non-persistent buffer
    assert set(before["modes"].values()) == set(before["trainable"].values()) == {True, False}
    assert len(set(before["gradients"].values())) > 50
    assert storages(graph.module)
    assert not storages(graph.module) & storages(model)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": lambda m: m.get_parameter("encoder.encoder.layer.0.output.dense.bias").data.add_(1e-3),
    "a buffer": lambda m: m.get_buffer("encoder.embeddings.position_ids").add_(1),
    "a mode": lambda m: m.get_submodule("encoder.embeddings").train(),
    "requires_grad": lambda m: m.get_parameter("encoder.embeddings.word_embeddings.weight").requires_grad_(True),
    "a gradient": lambda m: m.zero_grad(),
    "a hook": lambda m: m.register_forward_hook(lambda module, args, out: None),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_the_comparison_sees_every_change(touched: tuple[nn.Module, Json, Json, Graph], change: str) -> None:
    model = touched[0]
    before = state(model)
    CHANGES[change](model)
    assert state(model) != before
