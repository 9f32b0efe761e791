"""Verification: load the artifact and hold it against plan, float model, fake-quantized model and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from qatgraph import borders, fidelity, reference
from qatgraph.conversion import convert
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.ir.meta import record
from qatgraph.kernels import compare_borders, compare_kernels, owner
from qatgraph.operators import QUANTIZE
from qatgraph.ops import keeps_grid
from qatgraph.parity import RegionTap, compare_regions, has_region, without_reference
from qatgraph.planning.fallback import fallback_report
from qatgraph.planning.plan import Plan, Prediction
from qatgraph.quantizers.findings import findings
from qatgraph.regions import Region
from qatgraph.report.machine import check_cpu, has_vnni, isa
from qatgraph.report.report import NOT_RUN, Report

REGION_BATCHES = 4  # batches on which every region is compared with the reference
SEGMENT_LIMIT = 1e-5  # between regions, of the largest value: two float libraries, from equal inputs


def feed_of(graph: Graph, batch: Batch) -> dict[str, reference.Array]:
    """The inputs of the lowered file for a batch."""
    graph.check_batch(batch, "evaluation batch")
    leaves = graph.leaves(batch, "evaluation batch")
    return {n: t.detach().cpu().numpy() for n, t in zip(graph.info.inputs, leaves, strict=True)}


def _one_sample(graph: Graph, feed: dict[str, reference.Array]) -> dict[str, reference.Array]:
    """The first sample of a batch, if all inputs move along their first axis under one name: an emulator is slow."""
    first = {graph.info.inputs[d.leaf]: d.name for d in graph.info.dims if d.axis == 0}
    alone = set(first) == set(feed) and len(set(first.values())) == 1
    return {name: array[:1] for name, array in feed.items()} if alone else feed


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
        VerifyError: QG602 no batch, QG603 the file bears the hash of another plan, QG610 the target requires more than
            this CPU has.
    """
    graph = Graph.prepared(qat)
    plan: Plan = graph.info.plan
    if not batches:
        raise VerifyError("QG602", "there is no batch to verify on", where="verify", todo="give at least one batch")
    report = Report(target=plan.target, notes=[*graph.info.notes, *findings(graph)])
    report.files = {"onnx": {"bytes": len(model)}, "how": "bytes of the file that was verified"}
    stamped, requires = backend.stamps(model)
    if stamped != plan.hash():
        raise VerifyError(
            "QG603",
            "the file was not lowered from this plan",
            where="metadata 'qatgraph.plan'",
            why=f"it bears {stamped[:12] or 'no plan'}, the plan is {plan.hash()[:12]}",
            todo="lower again, or verify with the plan that the file was made from",
        )
    check_cpu(plan.requires, f"target '{plan.target}'")
    if requires != plan.requires:
        report.failures.append(
            f"the file bears that it requires '{requires}' of a CPU, its plan requires '{plan.requires}'"
        )
    qdq = convert(graph)
    _interface(report, backend, qdq, model)
    if report.failures:
        return report  # nothing that follows could be compared
    _kernels(report, backend, plan, model)
    report.fallback = fallback_report(plan)
    _overflow(report, backend, plan, model, _one_sample(graph, feed_of(graph, batches[0])))
    _constants(report, backend, qdq, model)
    _regions(report, backend, qdq, plan, model, batches[:REGION_BATCHES])
    _fidelity(report, backend, qat, model, batches, float_model, labels)
    return report


def _interface(report: Report, backend: Any, qdq: Graph, model: bytes) -> None:
    """Names and types of inputs and outputs are the model's, and the file states the grids of integers."""
    wanted = borders.interface(qdq)
    names = qdq.info.inputs, qdq.info.outputs
    for what, order, want, have in zip(("inputs", "outputs"), names, wanted, backend.interface(model), strict=True):
        if list(have) != list(order):
            report.failures.append(f"the file's {what} are {', '.join(have)}, the model's are {', '.join(order)}")
        report.failures += [
            f"the file's '{name}' is {have[name]}, the model's is {kind}"
            for name, kind in want.items()
            if have.get(name, kind) != kind
        ]
    grids, stated = (
        {name: borders.text(grid) for name, grid in found.items()}
        for found in (borders.output_grids(qdq), backend.output_grids(model))
    )
    for name in sorted({*grids, *stated}):
        own, other = (found.get(name, "no grid") for found in (grids, stated))
        if own != other:
            report.failures.append(f"the file states {other} for the output '{name}', the model has {own}")
    taken = {name: kind for name, kind in wanted[0].items() if kind == "uint8"}
    if taken or grids:
        report.files["integers"] = {**taken, **{name: f"{wanted[1][name]}, {grid}" for name, grid in grids.items()}}


def _kernels(report: Report, backend: Any, plan: Plan, model: bytes) -> None:
    realized = backend.audit(model)
    mismatches = compare_kernels(plan, realized)
    seen = backend.SHOWS_CONVERSIONS
    misplaced = compare_borders(plan, realized) if seen else ""
    tables = {f.name for f in plan.nodes if f.kind == "embedding"}
    shapes = {f.name for f in plan.nodes if keeps_grid(f.kind)}
    compute = {p.node for p in plan.predictions if p.int8 and p.kernel} - tables - shapes
    ran = {owner(n.name) for n in realized if n.int8}
    broken = {m.node for m in mismatches}
    pinned: dict[str, int] = {}
    for p in plan.predictions:
        if p.pinned and p.node not in broken:
            pinned[p.kernel.split("|")[0]] = pinned.get(p.kernel.split("|")[0], 0) + 1
    unnamed = [n.name for n in realized if n.int8 and not n.moves and plan.prediction(owner(n.name)) is None]
    report.kernels = {
        "planned": len(compute),
        "realized": len(compute & ran),
        "int8_tables": sum(p.int8 and p.node in tables for p in plan.predictions),
        "mismatches": [str(m) for m in mismatches],
        "pinned": pinned,
        "unnamed_int8": unnamed,
        "borders": misplaced or ("as planned" if seen else f"{NOT_RUN}: the engine does not show them"),
        "how": f"predicted from the plan alone; realized: {backend.AUDITED}",
    }
    report.failures += [str(m) for m in mismatches] + ([misplaced] if misplaced else [])
    if seen:
        report.failures += [f"integers are converted at a border: {c}" for c in backend.border_conversions(model)]


def _k_rows(prediction: Prediction) -> Callable[[reference.Array], reference.Array]:
    return reference.position_rows if prediction.k_order == "by-position" else reference.k_rows


def _overflow(report: Report, backend: Any, plan: Plan, model: bytes, feed: dict[str, reference.Array]) -> None:
    weights = {owner(n): c["weight"][0] for n, c in backend.product_constants(model).items()}
    paired = [] if plan.requires == "vnni" else [p for p in plan.predictions if p.in_pairs and p.node in weights]
    worst = {p.node: reference.worst_pair(_k_rows(p)(weights[p.node])) for p in paired}
    low = {n: int(w.min()) for n, w in weights.items()}
    bad = [n for n in weights if worst.get(n, 0) > 128 or low[n] < -127]
    report.overflow = {
        "products": len(weights),
        "added_in_pairs": len(worst),
        "worst_pair": max(worst.values(), default=0),
        "smallest_weight": min(low.values(), default=0),
        "unsafe": bad,
        "requires": plan.requires or "nothing",
        "same_on_haswell": _same_on_haswell(report, backend, plan, model, feed),
        "how": "on the file's integers: |w[2k]| + |w[2k+1]| <= 128 for pairs of one sign along K, where the kernel "
        "adds in pairs, and w >= -127; same_on_haswell: bit for bit on an emulated CPU with AVX2, no VNNI, one sample",
    }
    report.failures += [
        f"'{n}': a pair of weights sums to {worst[n]}, which overflows 16 bits without VNNI"
        if worst.get(n, 0) > 128
        else f"'{n}': a weight is {low[n]}, which overflows 16 bits on 64-bit Arm"
        for n in bad
    ]
    planned = {p.node for q in plan.quantizers for p in q.ports if p.role == "weight"}
    report.failures += [
        f"'{p.node}': its int8 weight is not found in the file, so nothing is known about overflow"
        for p in plan.predictions
        if p.int8 and p.accumulator and p.node in planned and p.node not in weights
    ]
    report.failures += [
        f"'{n}': its int32 bias does not count in s_x * s_w, which the engine does not check"
        for n in backend.bias_misfits(model)
    ]


def _same_on_haswell(
    report: Report, backend: Any, plan: Plan, model: bytes, feed: dict[str, reference.Array]
) -> bool | str:
    if plan.requires == "vnni":
        return f"not asked: it differs there by design, since '{plan.target}' requires VNNI"
    if not backend.SAME_EVERYWHERE:
        return f"not asked: the float kernels of {backend.NAME} differ in the last bit between instruction sets"
    if any(q.spec.block is not None for q in plan.quantizers):
        return "not asked: the sums over blocks of weights are of floats, in another order on each instruction set"
    if not backend.can_emulate():
        return f"{NOT_RUN}: qemu-x86_64 is not installed"
    native = backend.run(backend.session(model), feed)
    emulated = backend.run_on("Haswell", model, feed)
    same = all(a.tobytes() == b.tobytes() for a, b in zip(native, emulated, strict=True))
    if not same:
        report.failures.append("outputs differ on an emulated Haswell (AVX2 without VNNI)")
    return same


def _regions(report: Report, backend: Any, qdq: Graph, plan: Plan, model: bytes, batches: Sequence[Batch]) -> None:
    tapped, names = backend.tap(model, plan)
    again = compare_kernels(plan, backend.audit(tapped))
    report.failures += [f"in the tapped file: {m}" for m in again]
    segments, without = dict[str, float](), without_reference(plan)

    def taps() -> Iterator[RegionTap]:
        runs = backend.run_taps(tapped, names, (feed_of(qdq, b) for b in batches))
        for batch, (found, outputs) in zip(batches, runs, strict=True):
            for where, difference in _segments(qdq, batch, found, outputs):
                segments[where] = max(segments.get(where, 0.0), difference)
            yield from found

    regions = compare_regions(qdq, taps(), quantize=backend.quantize)
    integers = sum(r.integers for r in regions.values())
    report.parity = {
        "regions": len(regions),
        "elements": sum(r.elements for r in regions.values()),
        "float_max_rel": max((r.float_rel for r in regions.values()), default=0.0),
        "integers": integers,
        "max_steps": max((r.steps for r in regions.values()), default=0),
        "out_max_steps": max((r.out_steps for r in regions.values()), default=0),
        "out_off_share": sum(r.out_off for r in regions.values()) / max(1, sum(r.elements for r in regions.values())),
        "off_by_one_share": sum(r.off for r in regions.values()) / max(1, integers),
        "between_regions_max_rel": max(segments.values(), default=0.0),
        "without_reference": without,
        "how": f"each int8 region by itself on the integers that the engine saw, and the float operations between them "
        f"on the results that it wrote, {len(batches)} batches, {isa()}; "
        "the reference computes from the converted graph, not from the file; what has no integer reference is compared "
        "as a part of the float operations between regions, with what torch makes of it",
    }
    kinds = {f.name: f.kind for f in plan.nodes}
    missing = [p.node for p in plan.predictions if has_region(p, kinds[p.node]) and p.node not in names]
    report.failures += [f"region '{n}': the file does not hold it" for n in missing]
    report.failures += [f"region '{r.node}': {r.failure}" for r in regions.values() if r.failure]
    report.failures += [
        f"{where}: values differ by {d:.3g} of the largest value (limit {SEGMENT_LIMIT:g})"
        for where, d in segments.items()
        if not d <= SEGMENT_LIMIT
    ]


def _constants(report: Report, backend: Any, qdq: Graph, model: bytes) -> None:
    """The file holds what was converted: what is too small to change a result of 8 bits is found here."""
    nodes = {record(n).name: n for n in qdq.nodes}
    for name, have in backend.product_constants(model).items():
        node = nodes.get(owner(name))
        if node is not None and (wrong := other_constants(have, Region.of(qdq, node).constants)):
            report.failures.append(f"region '{owner(name)}': {wrong} in the file is not what was converted")


def other_constants(have: dict[str, tuple[reference.Array, ...]], want: dict[str, tuple[reference.Array, ...]]) -> str:
    """The first role of which the integers or scales differ; empty if none does."""
    for role, parts in want.items():
        same = role in have and all(np.array_equal(a, b) for a, b in zip(have[role], parts, strict=True))
        if not same:
            return f"its {role}"
    return ""


def _segments(
    qdq: Graph, batch: Batch, taps: Sequence[RegionTap], outputs: dict[str, reference.Array]
) -> Iterator[tuple[str, float]]:
    """How far the engine is from torch in front of each region and at each output, from equal results of the regions.

    So no rounding that falls on the other side can cascade: the float operations between two regions stand alone.
    """
    nodes = {record(n).name: n for n in qdq.nodes}
    regions = {t.node: Region.of(qdq, nodes[t.node]) for t in taps}
    given = {regions[t.node].writes: torch.from_numpy(t.out.copy()) for t in taps}  # relu_ writes into it
    replay = _Replay(qdq.module, given)
    with torch.no_grad():
        results = replay.run(*qdq.leaves(batch, "evaluation batch"), enable_io_processing=False)
    for tap in taps:
        region = regions[tap.node]
        for quantize, border, integers in zip(region.quantizes, tap.borders, tap.integers, strict=False):
            if border is None or not (region.reads_floats or quantize.target is QUANTIZE):
                yield f"integers in front of '{tap.node}'", _difference(integers, replay.env[quantize])
            else:
                yield f"in front of '{tap.node}'", _difference(border, replay.env[quantize.all_input_nodes[0]])
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
    plain, precise = backend.session(model), backend.session(model, **backend.PRECISE) if backend.PRECISE else None
    engine, equal, grids = [], True, backend.output_grids(model)
    for feed in (feed_of(graph, b) for b in batches):
        outputs = backend.run(plain, feed)
        exact = backend.run(precise, feed) if precise is not None else outputs
        equal = equal and all(a.tobytes() == b.tobytes() for a, b in zip(outputs, exact, strict=True))
        tensors = [torch.from_numpy(a) for a in outputs]
        engine.append(fidelity.first_output(borders.in_float(tensors, graph.info.outputs, grids)))
    if not equal:
        report.failures.append("outputs differ between default options and session.x64quantprecision=1")
    fake = fidelity.outputs(model_run(qat), batches)
    report.fidelity = {
        "samples": sum(len(t) for t in engine),
        "engine_to_fake_quantized": fidelity.cosine(engine, fake),
        **({"same_under_x64quantprecision": equal} if precise is not None else {}),
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
