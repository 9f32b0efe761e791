"""Verification: load the artifact and hold it against plan, float model, fake-quantized model and reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qatgraph import fidelity, reference
from qatgraph.conversion import convert
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.kernels import compare_kernels, owner
from qatgraph.parity import compare_regions
from qatgraph.planning.plan import Plan
from qatgraph.report.machine import has_vnni, isa
from qatgraph.report.report import NOT_RUN, Report

REGION_BATCHES = 4  # batches on which every region is compared with the reference


def feed_of(graph: Graph, batch: Batch) -> dict[str, reference.Array]:
    """The inputs of the lowered file for a batch."""
    graph.check_batch(batch, "evaluation batch")
    args, kwargs = bind(batch)
    leaves = pytree.tree_leaves((args, kwargs))
    return {n: t.detach().cpu().numpy() for n, t in zip(graph.info.inputs, leaves, strict=True)}


def prove(
    backend: Any,
    qat: torch.nn.Module,
    model: bytes,
    batches: Sequence[Batch],
    float_model: torch.nn.Module | None,
    labels: Sequence[torch.Tensor] | None = None,
) -> Report:
    """Every check on one artifact; the report lists what failed.

    Raises:
        VerifyError: QG602 no batch, QG603 the file bears the hash of another plan.
    """
    graph = Graph.of(qat)
    plan: Plan = graph.info.plan
    if not batches:
        raise VerifyError("QG602", "there is no batch to verify on", where="verify", todo="give at least one batch")
    report = Report(target=plan.target, notes=list(graph.info.notes))
    report.files = {"onnx": {"bytes": len(model)}}
    stamped = backend.stamped_plan(model)
    if stamped != plan.hash():
        raise VerifyError(
            "QG603",
            "the file was not lowered from this plan",
            where="metadata 'qatgraph.plan'",
            why=f"it bears {stamped[:12] or 'no plan'}, the plan is {plan.hash()[:12]}",
            todo="lower again, or verify with the plan that the file was made from",
        )
    _kernels(report, backend, plan, model)
    _overflow(report, backend, model, feed_of(graph, batches[0]))
    _regions(report, backend, graph, plan, model, batches[:REGION_BATCHES])
    _fidelity(report, backend, qat, model, batches, float_model, labels)
    return report


def _kernels(report: Report, backend: Any, plan: Plan, model: bytes) -> None:
    realized = backend.audit(model)
    mismatches = compare_kernels(plan, realized)
    compute = {p.node for p in plan.predictions if p.int8 and p.accumulator}
    ran = {owner(n.name) for n in realized if n.int8}
    broken = {m.node for m in mismatches}
    pinned: dict[str, int] = {}
    for p in plan.predictions:
        if p.pinned and p.node not in broken:
            pinned[p.kernel.split("|")[0]] = pinned.get(p.kernel.split("|")[0], 0) + 1
    unnamed = [n.name for n in realized if n.int8 and plan.prediction(owner(n.name)) is None]
    report.kernels = {
        "planned": len(compute),
        "realized": len(compute & ran),
        "int8_tables": sum(p.int8 for p in plan.predictions) - len(compute),
        "mismatches": [str(m) for m in mismatches],
        "pinned": pinned,
        "unnamed_int8": unnamed,
        "how": "predicted from the plan alone; realized: the optimized graph that ORT writes at default options",
    }
    report.failures += [str(m) for m in mismatches]


def _overflow(report: Report, backend: Any, model: bytes, feed: dict[str, reference.Array]) -> None:
    weights = backend.gemm_weights(model)
    worst = {name: reference.worst_pair(w) for name, w in weights.items()}
    low = {name: int(w.min()) for name, w in weights.items()}
    bad = [n for n in worst if worst[n] > 128 or low[n] < -127]
    report.overflow = {
        "gemms": len(weights),
        "worst_pair": max(worst.values(), default=0),
        "smallest_weight": min(low.values(), default=0),
        "unsafe": bad,
        "same_on_haswell": _same_on_haswell(report, backend, model, feed),
        "how": "on the file's integers: |w[2k]| + |w[2k+1]| <= 128 for pairs of one sign along K, and w >= -127; "
        "same_on_haswell: bit for bit on an emulated CPU with AVX2 and no VNNI, one batch",
    }
    report.failures += [
        f"'{n}': a pair of weights sums to {worst[n]}, which overflows 16 bits without VNNI" for n in bad
    ]


def _same_on_haswell(report: Report, backend: Any, model: bytes, feed: dict[str, reference.Array]) -> bool | str:
    if not backend.can_emulate():
        return f"{NOT_RUN}: qemu-x86_64 is not installed"
    native = backend.session(model).run(None, feed)
    emulated = backend.run_on("Haswell", model, feed)
    same = all(a.tobytes() == b.tobytes() for a, b in zip(native, emulated, strict=True))
    if not same:
        report.failures.append("outputs differ on an emulated Haswell (AVX2 without VNNI)")
    return same


def _regions(report: Report, backend: Any, graph: Graph, plan: Plan, model: bytes, batches: Sequence[Batch]) -> None:
    tapped, names = backend.tap(model, plan)
    again = compare_kernels(plan, backend.audit(tapped))
    report.failures += [f"in the tapped file: {m}" for m in again]
    feeds = [feed_of(graph, b) for b in batches]
    regions = compare_regions(convert(graph), backend.run_taps(tapped, names, feeds))
    integers = sum(r.integers for r in regions.values())
    report.parity = {
        "regions": len(regions),
        "elements": sum(r.elements for r in regions.values()),
        "float_max_rel": max((r.float_rel for r in regions.values()), default=0.0),
        "integers": integers,
        "max_steps": max((r.steps for r in regions.values()), default=0),
        "off_by_one_share": sum(r.off for r in regions.values()) / max(1, integers),
        "how": f"each int8 region by itself on the integers that the engine saw, {len(batches)} batches, {isa()}; "
        "the reference computes from the converted graph, not from the file",
    }
    report.failures += [f"region '{r.node}': {r.failure}" for r in regions.values() if r.failure]


def _fidelity(
    report: Report,
    backend: Any,
    qat: torch.nn.Module,
    model: bytes,
    batches: Sequence[Batch],
    float_model: torch.nn.Module | None,
    labels: Sequence[torch.Tensor] | None,
) -> None:
    graph = Graph.of(qat)
    engine = fidelity.outputs(engine_run(graph, backend.session(model)), batches)
    exact = fidelity.outputs(engine_run(graph, backend.session(model, session__x64quantprecision="1")), batches)
    equal = all(torch.equal(a, b) for a, b in zip(engine, exact, strict=True))
    if not equal:
        report.failures.append("outputs differ between default options and session.x64quantprecision=1")
    fake = fidelity.outputs(model_run(qat), batches)
    report.fidelity = {
        "samples": sum(len(t) for t in engine),
        "engine_to_fake_quantized": fidelity.cosine(engine, fake),
        "same_under_x64quantprecision": equal,
        "isa": isa(),
        "vnni": has_vnni(),
    }
    if float_model is not None:
        wanted = fidelity.outputs(model_run(float_model), batches)
        report.fidelity["float"] = fidelity.top1(wanted, labels) if labels else {}
        report.fidelity["qat"] = score(fake, wanted, labels)
        report.fidelity["engine"] = score(engine, wanted, labels)


def score(
    have: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None
) -> dict[str, float]:
    """Cosine to the float model, and top-1 where there are labels."""
    return {**fidelity.cosine(have, wanted), **(fidelity.top1(have, labels) if labels else {})}


def model_run(model: torch.nn.Module) -> fidelity.Run:
    """Run a module in evaluation mode; its mode is restored."""

    def run(batch: Batch) -> torch.Tensor:
        modes = {m: m.training for m in model.modules()}
        model.eval()
        try:
            args, kwargs = bind(batch)
            return fidelity.first_output(model(*args, **kwargs))
        finally:
            for module, mode in modes.items():
                module.training = mode

    return run


def engine_run(graph: Graph, runner: Any) -> fidelity.Run:
    def run(batch: Batch) -> torch.Tensor:
        return fidelity.first_output([torch.from_numpy(a) for a in runner.run(None, feed_of(graph, batch))])

    return run
