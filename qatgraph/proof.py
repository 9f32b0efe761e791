"""Verification: load the artifact and hold it against plan, float model, fake-quantized model and reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from qatgraph import fidelity, reference
from qatgraph.conversion import convert
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Batch, Graph, arguments, bind
from qatgraph.ir.meta import record
from qatgraph.kernels import compare_kernels, owner
from qatgraph.parity import RegionTap, compare_regions, without_reference
from qatgraph.planning.plan import Plan
from qatgraph.report.machine import has_vnni, isa
from qatgraph.report.report import NOT_RUN, Report

REGION_BATCHES = 4  # batches on which every region is compared with the reference
SEGMENT_LIMIT = 1e-5  # between regions, of the largest value: two float libraries, from equal inputs


def feed_of(graph: Graph, batch: Batch) -> dict[str, reference.Array]:
    """The inputs of the lowered file for a batch."""
    graph.check_batch(batch, "evaluation batch")
    leaves = graph.leaves(batch, "evaluation batch")
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
    graph = Graph.prepared(qat)
    plan: Plan = graph.info.plan
    if not batches:
        raise VerifyError("QG602", "there is no batch to verify on", where="verify", todo="give at least one batch")
    report = Report(target=plan.target, notes=list(graph.info.notes))
    report.files = {"onnx": {"bytes": len(model)}, "how": "bytes of the file that was verified"}
    stamped = backend.stamped_plan(model)
    if stamped != plan.hash():
        raise VerifyError(
            "QG603",
            "the file was not lowered from this plan",
            where="metadata 'qatgraph.plan'",
            why=f"it bears {stamped[:12] or 'no plan'}, the plan is {plan.hash()[:12]}",
            todo="lower again, or verify with the plan that the file was made from",
        )
    have = dict(zip(("inputs", "outputs"), backend.interface(model), strict=True))
    for what, want in (("inputs", graph.info.inputs), ("outputs", graph.info.outputs)):
        if have[what] != list(want):
            report.failures.append(f"the file's {what} are {', '.join(have[what])}, the model's are {', '.join(want)}")
    if report.failures:
        return report  # nothing that follows could be compared
    _kernels(report, backend, plan, model)
    _overflow(report, backend, plan, model, feed_of(graph, batches[0]))
    _regions(report, backend, graph, plan, model, batches[:REGION_BATCHES])
    _fidelity(report, backend, qat, model, batches, float_model, labels)
    return report


def _kernels(report: Report, backend: Any, plan: Plan, model: bytes) -> None:
    realized = backend.audit(model)
    mismatches = compare_kernels(plan, realized)
    tables = {f.name for f in plan.nodes if f.kind == "embedding"}
    compute = {p.node for p in plan.predictions if p.int8} - tables
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
        "int8_tables": sum(p.int8 and p.node in tables for p in plan.predictions),
        "mismatches": [str(m) for m in mismatches],
        "pinned": pinned,
        "unnamed_int8": unnamed,
        "how": "predicted from the plan alone; realized: the optimized graph that ORT writes at default options",
    }
    report.failures += [str(m) for m in mismatches]


def _overflow(report: Report, backend: Any, plan: Plan, model: bytes, feed: dict[str, reference.Array]) -> None:
    weights = backend.gemm_weights(model)
    worst = {name: reference.worst_pair(w) for name, w in weights.items()}
    low = {name: int(w.min()) for name, w in weights.items()}
    bad = [n for n in worst if worst[n] > 128 or low[n] < -127]
    seen = {owner(n) for n in weights}
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
        f"'{n}': a pair of weights sums to {worst[n]}, which overflows 16 bits without VNNI"
        if worst[n] > 128
        else f"'{n}': a weight is {low[n]}, which overflows 16 bits on 64-bit Arm"
        for n in bad
    ]
    report.failures += [
        f"'{p.node}': its int8 weight is not found in the file, so nothing is known about overflow"
        for p in plan.predictions
        if p.int8 and p.accumulator and p.node not in seen
    ]
    report.failures += [
        f"'{n}': its int32 bias does not count in s_x * s_w, which the engine does not check"
        for n in backend.bias_misfits(model)
    ]


def _same_on_haswell(report: Report, backend: Any, model: bytes, feed: dict[str, reference.Array]) -> bool | str:
    if not backend.can_emulate():
        return f"{NOT_RUN}: qemu-x86_64 is not installed"
    native = backend.run(backend.session(model), feed)
    emulated = backend.run_on("Haswell", model, feed)
    same = all(a.tobytes() == b.tobytes() for a, b in zip(native, emulated, strict=True))
    if not same:
        report.failures.append("outputs differ on an emulated Haswell (AVX2 without VNNI)")
    return same


def _regions(report: Report, backend: Any, graph: Graph, plan: Plan, model: bytes, batches: Sequence[Batch]) -> None:
    tapped, names = backend.tap(model, plan)
    again = compare_kernels(plan, backend.audit(tapped))
    report.failures += [f"in the tapped file: {m}" for m in again]
    qdq, segments, without = convert(graph), dict[str, float](), without_reference(plan)

    def taps() -> Iterator[RegionTap]:
        runs = backend.run_taps(tapped, names, (feed_of(graph, b) for b in batches))
        for batch, (found, outputs) in zip(batches, runs, strict=True):
            for where, difference in _segments(qdq, batch, found, outputs):
                segments[where] = max(segments.get(where, 0.0), difference)
            yield from found

    regions = compare_regions(qdq, taps())
    integers = sum(r.integers for r in regions.values())
    report.parity = {
        "regions": len(regions),
        "elements": sum(r.elements for r in regions.values()),
        "float_max_rel": max((r.float_rel for r in regions.values()), default=0.0),
        "integers": integers,
        "max_steps": max((r.steps for r in regions.values()), default=0),
        "off_by_one_share": sum(r.off for r in regions.values()) / max(1, integers),
        "between_regions_max_rel": max(segments.values(), default=0.0),
        "without_reference": without,
        "how": f"each int8 region by itself on the integers that the engine saw, and the float operations between them "
        f"on the results that it wrote, {len(batches)} batches, {isa()}; "
        "the reference computes from the converted graph, not from the file; what has no integer reference is compared "
        "as a part of the float operations between regions, with what torch makes of it",
    }
    missing = [p.node for p in plan.predictions if p.int8 and p.node not in [*names, *without]]
    report.failures += [f"region '{n}': the file does not hold it" for n in missing]
    report.failures += [f"region '{r.node}': {r.failure}" for r in regions.values() if r.failure]
    report.failures += [
        f"{where}: values differ by {d:.3g} of the largest value (limit {SEGMENT_LIMIT:g})"
        for where, d in segments.items()
        if not d <= SEGMENT_LIMIT
    ]


def _segments(
    qdq: Graph, batch: Batch, taps: Sequence[RegionTap], outputs: dict[str, reference.Array]
) -> Iterator[tuple[str, float]]:
    """How far the engine is from torch in front of each region and at each output, from equal results of the regions.

    So no rounding that falls on the other side can cascade: the float operations between two regions stand alone.
    """
    nodes = {record(n).name: n for n in qdq.nodes}
    tables = {n for n in nodes.values() if record(n).kind == "embedding"}
    given = {nodes[t.node]: torch.from_numpy(t.out.copy()) for t in taps}  # relu_ writes into it
    replay = _Replay(qdq.module, {next(iter(n.users)) if n in tables else n: given[n] for n in given})
    with torch.no_grad():
        results = replay.run(*qdq.leaves(batch, "evaluation batch"), enable_io_processing=False)
    for tap in (t for t in taps if nodes[t.node] not in tables):
        quantized = dict(arguments(nodes[tap.node]))["x"].args[0]
        if tap.border is None:
            yield f"integers in front of '{tap.node}'", _difference(tap.integers, replay.env[quantized])
        else:
            yield f"in front of '{tap.node}'", _difference(tap.border, replay.env[quantized.args[0]])
    for name, result in zip(qdq.info.outputs, results, strict=True):
        yield f"output '{name}'", _difference(outputs[name], result)


class _Replay(fx.Interpreter):
    """A graph run node by node, where the results of some nodes are given."""

    def __init__(self, module: fx.GraphModule, given: dict[fx.Node, torch.Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.given = given

    def run_node(self, n: fx.Node) -> Any:
        return self.given[n] if n in self.given else super().run_node(n)


def _difference(have: reference.Array, want: Any) -> float:
    """The largest difference over the largest value; infinite if shapes or NaNs differ."""
    wanted = torch.as_tensor(want).numpy()
    if have.shape != wanted.shape:
        return float("inf")
    top = float(np.abs(wanted.astype(np.float64)).max(initial=0.0)) or 1.0
    difference = np.abs(have.astype(np.float64) - wanted).max(initial=0.0) / top
    return float(difference) if np.isfinite(difference) else float("inf")


def _fidelity(
    report: Report,
    backend: Any,
    qat: torch.nn.Module,
    model: bytes,
    batches: Sequence[Batch],
    float_model: torch.nn.Module | None,
    labels: Sequence[torch.Tensor] | None,
) -> None:
    graph = Graph.prepared(qat)
    plain, precise = backend.session(model), backend.session(model, session__x64quantprecision="1")
    engine, equal = [], True
    for feed in (feed_of(graph, b) for b in batches):
        outputs, exact = backend.run(plain, feed), backend.run(precise, feed)
        equal = equal and all(a.tobytes() == b.tobytes() for a, b in zip(outputs, exact, strict=True))
        engine.append(fidelity.first_output([torch.from_numpy(a) for a in outputs]))
    if not equal:
        report.failures.append("outputs differ between default options and session.x64quantprecision=1")
    fake = fidelity.outputs(model_run(qat), batches)
    report.fidelity = {
        "samples": sum(len(t) for t in engine),
        "engine_to_fake_quantized": fidelity.cosine(engine, fake),
        "same_under_x64quantprecision": equal,
        "isa": isa(),
        "vnni": has_vnni(),
        "how": "first output, every evaluation sample; float64 cosine by row",
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
