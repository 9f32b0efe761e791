"""The whole road for one architecture of the zoo: what was found on it, and every fault as a sentence."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import QatgraphError
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.ir.meta import record
from qatgraph.kernels import compare_kernels, owner
from qatgraph.ops import BY_NAME, REFINED
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import Target
from qatgraph.proof import feed_of, prove
from qatgraph.rewriting.passes import Pass
from tests.zoo.entry import NONE, Counts, Entry, regions_of

# the whole proof on this CPU alone: other instruction sets are emulated in tests/test_overflow.py
NATIVE = SimpleNamespace(**{**vars(ort_cpu), "can_emulate": lambda: False})
FLOAT_LIMIT = 1e-4  # canonical against the user's model, of the largest value
# engine against fake-quantized, of the largest value: a rounding that flips moves on to the output, and where layers
# write 8 bits, it is a step of 1/255 at each of them (vae: 0.11). The proof by region has no such limit.
INT8_LIMIT = 0.2


@dataclass
class Result:
    """One line of the table. ``faults`` is empty when the whole road was walked."""

    name: str
    nodes: int = 0
    refused: str = ""
    leftover: dict[str, int] = field(default_factory=dict)
    found: Counts = NONE
    planned: int = 0
    realized: int = 0
    float_distance: float = 0.0
    int8_distance: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def walk(name: str, entry: Entry, *, target: str | Target = "ort-cpu", passes: Sequence[Pass] = ()) -> Result:
    """Capture, canonicalize, plan, prepare, calibrate, train one step, lower, run and audit."""
    result = Result(name)
    try:
        with _timed(result, "capture"):
            graph = entry.capture()
    except QatgraphError as error:
        result.refused = error.code
        result.faults += [] if entry.refused == error.code else [f"capture: {error}"]
        return result
    if entry.refused:
        result.faults.append(f"capture: it succeeds, where {entry.refused} was expected")
    try:
        _walk_on(result, entry, graph, target, passes)
    except QatgraphError as error:
        result.faults.append(f"{next(reversed(result.seconds))}: {error}")
    return result


def _walk_on(result: Result, entry: Entry, graph: Graph, target: str | Target, passes: Sequence[Pass]) -> None:
    with _timed(result, "canonicalize"):
        canonical = qg.canonicalize(graph, passes)
    _describe(result, entry, canonical)
    with _timed(result, "plan"):
        plan = qg.plan(canonical, target)
    with _timed(result, "prepare"):
        qat = qg.prepare(canonical, plan)
    with _timed(result, "calibrate"):
        qg.calibrate(qat, [entry.inputs(1), entry.inputs(2)], progress=False)
    with _timed(result, "train"):
        result.faults += train_one_step(qat, entry.inputs(3))
    with _timed(result, "lower"):
        file = ort_cpu.lower(convert(Graph.prepared(qat)), plan)
    with _timed(result, "audit"):
        result.planned, result.realized, faults = compare_plan(plan, file)
        result.faults += faults
    with _timed(result, "run"):
        result.int8_distance, faults = compare_engine(qat, file, entry.inputs(4))
        result.faults += faults
    with _timed(result, "prove"):
        report = prove(NATIVE, qat, file, [entry.inputs(4)], None)
        result.faults += [f"proof: {failure}" for failure in report.failures]


@contextmanager
def _timed(result: Result, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    result.seconds[stage] = 0.0
    try:
        yield
    finally:
        result.seconds[stage] = time.perf_counter() - start


def _describe(result: Result, entry: Entry, canonical: Graph) -> None:
    """Count nodes, kinds that the table of operations lacks, and regions; compare outputs with the user's model."""
    kinds = Counter(record(n).kind for n in canonical.nodes)
    result.nodes = len(canonical.nodes)
    result.leftover = {k: c for k, c in sorted(kinds.items()) if REFINED.get(k, k) not in BY_NAME}
    result.found = regions_of(canonical)
    wanted = entry.counts - entry.gaps
    if result.found != wanted:
        result.faults.append(f"regions: found {result.found}, expected {wanted}")
    batch = entry.inputs(5)
    wanted_outputs = _outputs(entry.model(), batch)
    result.float_distance = distance(_outputs(canonical.module, batch), wanted_outputs)
    if not any(bool(t.any()) for t in wanted_outputs):
        result.faults.append("numerics: every output is zero, so that nothing could be seen in it")
    if not result.float_distance <= FLOAT_LIMIT:
        result.faults.append(f"numerics: outputs differ from those of the model by {result.float_distance:.3g}")


def train_one_step(qat: nn.Module, batch: Batch) -> list[str]:
    """A plain loop's step: AdamW on the mean square of every float output. Returns the faults."""
    args, kwargs = bind(batch)
    optimizer = torch.optim.AdamW([p for p in qat.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    qat.train()
    outputs = [t for t in pytree.tree_leaves(qat(*args, **kwargs)) if torch.is_tensor(t) and t.requires_grad]
    before = [p.detach().clone() for p in qat.parameters()]
    torch.stack([t.square().mean() for t in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    qat.eval()
    after = list(qat.parameters())
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    finite = all(bool(p.isfinite().all()) for p in after)
    return ([] if moved else ["train: no parameter has moved"]) + (
        [] if finite else ["train: a parameter is not finite"]
    )


def compare_plan(plan: Plan, file: bytes) -> tuple[int, int, list[str]]:
    """How many products shall run in int8, how many do, and every prediction that the engine does not honour."""
    realized = ort_cpu.audit(file)
    ran = {owner(n.name) for n in realized if n.int8}
    compute = {p.node for p in plan.predictions if p.int8 and p.accumulator}
    return len(compute), len(compute & ran), [f"kernels: {m}" for m in compare_kernels(plan, realized)]


def compare_engine(qat: nn.Module, file: bytes, batch: Batch) -> tuple[float, list[str]]:
    """How far the file in ONNX Runtime is from the fake-quantized model, and the faults."""
    found = ort_cpu.run(ort_cpu.session(file), feed_of(Graph.prepared(qat), batch))
    have, want = [torch.from_numpy(a) for a in found], _outputs(qat, batch)
    finite = all(bool(t.isfinite().all()) for t in have if t.is_floating_point())
    far = distance(have, want)
    faults = [] if finite else ["engine: an output is not finite"]
    if not far <= INT8_LIMIT:
        faults.append(f"engine: outputs differ from the fake-quantized ones by {far:.3g}")
    return far, faults


def _outputs(model: nn.Module, batch: Batch) -> list[Any]:
    args, kwargs = bind(batch)
    with torch.no_grad():
        return [t.clone() for t in pytree.tree_leaves(model(*args, **kwargs)) if torch.is_tensor(t)]


def distance(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest difference over the largest value, over all outputs; infinite where shapes differ."""
    if [t.shape for t in have] != [t.shape for t in want]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(have, want, strict=True) if b.numel()), default=0.0)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    top = float(b.double().abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) / top
