"""Runs a job: capture, plan, prepare, calibrate, train, lower, verify, measure, report."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from qatgraph import api, fidelity
from qatgraph.errors import JobError, PlanError
from qatgraph.ir.graph import Batch, Graph
from qatgraph.job import MANIFEST, Job, JobData, load_job, make, output_folder, write_json
from qatgraph.latency import measure
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import load_recipe
from qatgraph.proof import model_run, score
from qatgraph.report.machine import check_cpu, isa, versions
from qatgraph.report.report import Report
from qatgraph.rewriting.passes import Pass
from qatgraph.rewriting.registry import parse_passes
from qatgraph.saturation import Saturation, analyse
from qatgraph.training.loop import Schedule, distill

Say = Callable[[str], None]
# what verify and replay read
MANIFEST_KEYS = frozenset({"job", "train", "passes", "data", "isa", "threads", "versions", "hashes"})


@dataclass
class Setup:
    """One model of a job with its data, captured."""

    model: torch.nn.Module
    data: JobData
    graph: Graph


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch (0: as they are); then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_up(job: Job, path: Path, seed: int) -> Setup:
    """Call the factories and capture the model on the first samples of the first calibration batch."""
    torch.manual_seed(seed)
    model = make(path, job.model, "model", seed, job.model_options)
    data: JobData = make(path, job.data, "data", seed, job.data_options)
    if not data.calibrate:
        raise JobError("QG806", "the data factory gives no calibration batch", where=job.data, todo="give at least one")
    if not data.evaluate:
        raise JobError("QG806", "the data factory gives no evaluation batch", where=job.data, todo="give at least one")
    shapes = job.shapes()
    graph = api.capture(model, _first_samples(data.calibrate[0], shapes), shapes, output_names=job.outputs or None)
    return Setup(model, data, graph)


def _first_samples(batch: Batch, shapes: dict[str, dict[int, Any]]) -> Batch:
    """Two samples, if all that the batch holds moves along its first axis and under one name: every check of a pass
    runs the model on them."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, torch.Tensor)]
    names = {axes[0].__name__ if 0 in axes else "" for axes in shapes.values()}
    if len(names) != 1 or "" in names or len(shapes) != len(tensors):
        return batch
    first: Batch = tree_map_only(torch.Tensor, lambda t: t[:2], batch)
    return first


def canonicalize(job: Job, path: Path, setup: Setup, passes: Sequence[Pass]) -> Graph:
    """The canonical graph after the user's passes, which may look at the calibration data."""
    target, recipe = _beside(path, job.target), _beside(path, job.recipe)
    return api.canonicalize(setup.graph, passes, data=setup.data.calibrate, target=target, recipe=recipe)


def make_plan(
    job: Job, path: Path, canonical: Graph, passes: Sequence[Pass] = (), budget: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a canonical graph; of the passes, those that plan are asked. ``budget`` changes the recipe's.

    Raises:
        PlanError: QG310 the plan misses the budget.
    """
    recipe = load_recipe(_beside(path, job.recipe))
    recipe = recipe.model_copy(update={"budget": recipe.budget.model_copy(update=budget or {})})
    return api.decide(canonical, _beside(path, job.target), recipe, passes)


def _beside(path: Path, name: str) -> str:
    """TOML files that a job names lie beside it; ``--target FILE`` has been made absolute."""
    return str(path.parent / name) if name.endswith(".toml") else name


def run_job(
    path: Path,
    output: Path | None = None,
    *,
    target: str | None = None,
    train: bool = True,
    passes: Sequence[str] = (),
    plan: Plan | None = None,
    budget: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> tuple[Report, Path]:
    """Run a job and write its folder; the folder appears whole or not at all.

    Returns:
        The report and the folder: the ``.onnx``, ``plan.json``, ``manifest.json``, ``report.md``, ``report.json``
        and ``qat.safetensors`` (the trained state).
    """
    job = load_job(path)
    if target is not None:
        job = job.model_copy(update={"target": target})
    extra = parse_passes(passes)
    folder = output or Path("build") / job.name
    with threads(job.threads), output_folder(folder) as scratch:
        start = time.perf_counter()
        results = [_one_seed(job, path, seed, scratch, train, extra, plan, budget, say) for seed in job.seeds]
        report = _mean_over_seeds([r for r, _ in results], job.seeds)
        report.job = job.name
        report.check()
        say(f"done in {time.perf_counter() - start:.0f} s")
        (scratch / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (scratch / "report.json").write_text(report.to_json(), encoding="utf-8")
        write_json(scratch / MANIFEST, _manifest(job, path, scratch, results[0][1], train, passes))
    return report, folder


def _one_seed(
    job: Job,
    path: Path,
    seed: int,
    scratch: Path,
    train: bool,
    passes: Sequence[Pass],
    plan: Plan | None,
    budget: Mapping[str, Any] | None,
    say: Say,
) -> tuple[Report, dict[str, Any]]:
    label = f"seed {seed}: " if len(job.seeds) > 1 else ""
    say(f"{label}load model and data")
    setup = set_up(job, path, seed)
    data = setup.data
    clock = time.perf_counter()
    canonical = canonicalize(job, path, setup, passes)
    planned = plan or make_plan(job, path, canonical, passes, budget)
    api.load_backend(planned)  # a target without one is refused before the work, and a CPU that cannot verify it
    check_cpu(planned.requires, f"target '{planned.target}'")
    qat = api.prepare(canonical, planned)
    stages = time.perf_counter() - clock
    say(f"{label}plan: {len(planned.int8_nodes())} int8 operations ({planned.hash()[:12]})")
    for finding in api.calibrate(qat, data.calibrate):
        say(f"{label}note: {finding}")
    if job.correct_biases:
        api.correct_biases(qat, data.calibrate)
    wanted = fidelity.outputs(model_run(setup.model), data.evaluate)
    ptq = score(fidelity.outputs(model_run(qat), data.evaluate), wanted, data.labels)
    say(f"{label}after calibration: {_words(ptq)}")
    losses: list[float] = []
    if train:
        losses = distill(qat, setup.model, data.train, Schedule(seed=seed, **job.training.model_dump()))
    clock = time.perf_counter()
    first = seed == job.seeds[0]
    file = scratch / (f"{job.name}.onnx" if first else f".{job.name}.{seed}.onnx")
    api.lower(qat, file)
    stages += time.perf_counter() - clock
    say(f"{label}lowered: {file.stat().st_size / 1e6:.1f} MB; verify")
    report = api.verify(qat, file, data.evaluate, float_model=setup.model, labels=data.labels)
    report.fidelity = {"ptq": ptq, **report.fidelity}
    report.fidelity["how"] = "first output against the float model, every evaluation sample; float64 cosine by row"
    if losses:
        report.fidelity["loss"] = {"first": losses[0], "last_20_mean": statistics.fmean(losses[-20:])}
    report.files["stages_seconds"] = stages
    if first:
        save_state(qat, scratch / "qat.safetensors")
        (scratch / "plan.json").write_text(planned.to_json(), encoding="utf-8")
        report.latency = measure(setup.model, setup.graph, file, data.latency, planned.backend)
    else:
        file.unlink()
    return report, data.facts


def _words(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in values.items())


def saturation(
    path: Path, *, target: str | None = None, passes: Sequence[str] = (), say: Say = lambda line: None
) -> Saturation:
    """Where the job's model would saturate without VNNI, and what each cure costs: calibrated, not trained."""
    job = load_job(path)
    if target is not None:
        job = job.model_copy(update={"target": target})
    extra = parse_passes(passes)
    with threads(job.threads):
        say("load model and data")
        setup = set_up(job, path, job.seeds[0])
        canonical = canonicalize(job, path, setup, extra)
        plan = make_plan(job, path, canonical, extra)
        backend = api.load_backend(plan)
        qat = api.prepare(canonical, plan).eval()
        say("calibrate")
        api.calibrate(qat, setup.data.calibrate, progress=False)
        data = setup.data
        return analyse(backend, qat, setup.model, data.evaluate, data.latency, data.labels, say=say)


def save_state(qat: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(qat, str(path))


def load_state(qat: torch.nn.Module, path: Path) -> None:
    """Put a trained state into a freshly prepared model.

    Raises:
        PlanError: QG308 the state does not fit.
    """
    from safetensors.torch import load_model

    try:
        load_model(qat, str(path))
    except (OSError, RuntimeError) as error:
        raise PlanError(
            "QG308", "the trained state does not fit the plan", where=path.name, why=str(error).splitlines()[0],
            todo="run the job again",
        ) from error  # fmt: skip


def _mean_over_seeds(reports: Sequence[Report], seeds: Sequence[int]) -> Report:
    """The first seed's report; with several seeds, fidelity is the mean and every seed's numbers stand beside it."""
    first = reports[0]
    if len(reports) == 1:
        return first
    for other in reports[1:]:
        first.failures += other.failures
    each = {str(s): r.fidelity for s, r in zip(seeds, reports, strict=True)}
    mean: dict[str, Any] = dict(first.fidelity)
    for stage in ("float", "ptq", "qat", "engine"):
        mean[stage] = {k: statistics.fmean(e[stage][k] for e in each.values()) for k in each[str(seeds[0])][stage]}
    keep = ("float", "ptq", "qat", "engine")
    first.fidelity = {**mean, "by_seed": {s: {k: e[k] for k in keep} for s, e in each.items()}}
    return first


def _manifest(
    job: Job, path: Path, scratch: Path, facts: dict[str, Any], train: bool, passes: Sequence[str]
) -> dict[str, Any]:
    onnx, plan = scratch / f"{job.name}.onnx", Plan.load(scratch / "plan.json")
    target = Path(job.target).name  # given on the command line it is a path of this machine; replay takes the plan
    return {
        "job": job.model_copy(update={"target": target}).model_dump(mode="json"),
        "job_file": path.name,
        "train": train,
        "passes": list(passes),
        "data": facts,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "session_options": api.load_backend(plan).SESSION,
        "versions": versions(),
        "hashes": {
            "onnx": sha256(onnx),
            "plan": plan.hash(),
            "target": plan.hashes["target"],
            "state": sha256(scratch / "qat.safetensors"),
        },
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_folder(path: Path, folder: Path | None = None) -> Report:
    """Prove the artifact of an earlier run again, in a new process.

    Raises:
        JobError: QG807 the folder does not hold a run of this job, or a file was changed since.
        PlanError: QG307 the model of the job is another one.
    """
    job = load_job(path)
    folder = folder or Path("build") / job.name
    manifest = read_manifest(folder)
    onnx = folder / f"{job.name}.onnx"
    if not onnx.is_file() or sha256(onnx) != manifest["hashes"]["onnx"]:
        raise JobError(
            "QG807",
            f"'{onnx.name}' is not the file that the run wrote",
            where=str(folder),
            why="it is missing, or its hash differs from manifest.json",
            todo="run the job again",
        )
    plan = _plan_of_run(folder, manifest)
    with threads(manifest["threads"]):  # a factory that trains gives the model of the run
        setup = set_up(job, path, job.seeds[0])
        canonical = canonicalize(job, path, setup, parse_passes(manifest["passes"]))
    qat = api.prepare(canonical, plan)
    load_state(qat, folder / "qat.safetensors")
    report = api.verify(qat, onnx, setup.data.evaluate, float_model=setup.model, labels=setup.data.labels)
    report.job = job.name
    return report


def replay_folder(folder: Path, path: Path, output: Path, *, say: Say = lambda line: None) -> str:
    """Run a job from the plan and the manifest of an earlier run and compare the bytes of the ONNX file.

    Returns:
        The SHA-256 of the file.

    Raises:
        JobError: QG807 no run there, or another plan; QG808 the job, the data or the bytes differ.
    """
    manifest = read_manifest(folder)
    target = manifest["job"]["target"]  # perhaps given on the command line
    job = load_job(path).model_copy(update={"target": target})
    if job.model_dump(mode="json") != manifest["job"]:
        raise _differs("the job file", path.name, "it was changed since the run")
    plan = _plan_of_run(folder, manifest)
    with threads(manifest["threads"]):  # sums in float depend on it
        run_job(path, output, target=target, train=manifest["train"], passes=manifest["passes"], plan=plan, say=say)
    again = read_manifest(output)
    if again["data"] != manifest["data"]:
        raise _differs("the data", path.name, f"{again['data']} instead of {manifest['data']}")
    if again["hashes"]["onnx"] != manifest["hashes"]["onnx"]:
        changed = [k for k in manifest["versions"] if again["versions"].get(k) != manifest["versions"][k]]
        machines = f"recorded on {manifest['isa']} with {manifest['threads']} threads, here {again['isa']}"
        raise _differs("the ONNX file", str(output), f"{machines}; changed versions: {', '.join(changed) or 'none'}")
    return str(again["hashes"]["onnx"])


def _plan_of_run(folder: Path, manifest: dict[str, Any]) -> Plan:
    """The plan in a folder; one for another target, or of another table, is not that of the run.

    Raises:
        JobError: QG807 it is another one.
    """
    plan, wanted = Plan.load(folder / "plan.json"), manifest["hashes"]["plan"]
    if plan.hash() != wanted:
        table = "the table of the run" if plan.hashes.get("target") == manifest["hashes"]["target"] else "another table"
        raise JobError(
            "QG807",
            "'plan.json' is not the plan of the run",
            where=str(folder),
            why=f"it is {plan.hash()[:12]}, for '{plan.target}' by {table}; the run's is {wanted[:12]}",
            todo="run the job again: another plan needs a run of its own (--target, recipe and passes of the job)",
        )
    return plan


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if missing := MANIFEST_KEYS - set(found):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError) as error:
        raise JobError(
            "QG807",
            f"'{folder}' does not hold a run",
            where=MANIFEST,
            why=str(error),
            todo="run the job first: qatgraph run JOB.toml",
        ) from error
    return found


def _differs(what: str, where: str, why: str) -> JobError:
    todo = "replay on the machine and with the versions of the run"
    return JobError("QG808", f"the replay differs: {what}", where=where, why=why, todo=todo)
