"""That a repaired file is the file it was: both run on ONNX Runtime, and their numbers are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qatgraph.backends import ort_cpu
from qatgraph.backends.onnx_file import OnnxFile
from qatgraph.errors import LowerError
from qatgraph.reference import Array
from qatgraph.report.machine import isa

TOLERANCE = 1e-5  # of the largest number of a tensor
LENGTHS = (64, 32, 8, 224)  # of dynamic dimensions, tried in this order
BATCH = 2


@dataclass(frozen=True)
class Proof:
    """What was measured of two files. Distances are the largest ``|a - b|`` over the largest ``|a|`` of a tensor.

    ``outputs``: of the outputs at default options, where roundings that flip can cascade. ``regions``: of every value
    in front of a quantize and of every output, as both files are written (no optimization), where each quantize of
    both reads the same floats.
    Milliseconds are medians of interleaved runs with one thread. ``refused``: the engine does not load the first file
    at default options, so that it ran as written.
    """

    outputs: float
    regions: float
    before_ms: float
    after_ms: float
    isa: str
    refused: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prove(before: Any, after: Any) -> Proof:
    """Run two models on random inputs.

    Raises:
        LowerError: QG513 the first does not run, or on no random input, QG514 they do not compute the same.
    """
    first, second = bytes(before.SerializeToString()), bytes(after.SerializeToString())
    sessions, refused = {}, False
    try:
        sessions["before"] = ort_cpu.session(first, threads=1)
    except LowerError:
        sessions["before"], refused = _as_written(first), True
    feed = _feed(before, sessions["before"])
    expected = ort_cpu.run(sessions["before"], feed)
    try:
        sessions["after"] = ort_cpu.session(second, threads=1)
        outputs = distance(expected, ort_cpu.run(sessions["after"], feed))
        regions = _regions(before, after, feed)
    except LowerError as error:
        raise _differs(error.why) from error
    if regions > TOLERANCE:
        raise _differs(f"between two quantizes they differ by {regions:.2g} of the largest number, not {TOLERANCE:g}")
    times = ort_cpu.median_latencies(sessions, feed)
    return Proof(outputs, regions, times["before"], times["after"], isa(), refused)


def _as_written(model: bytes) -> Any:
    try:
        return ort_cpu.session(model, threads=1, optimize=False)
    except LowerError as error:
        raise LowerError(
            "QG513", "the engine refuses the file, also as it is written, so that no repair of it can be proved",
            where="audit --fix", why=error.why, todo="mend what the engine says, then try again",
        ) from error  # fmt: skip


def _differs(why: str) -> LowerError:
    return LowerError(
        "QG514", "the repaired file does not compute what the file computes", where="audit --fix", why=why,
        todo="nothing was written; report it with the file",
    )  # fmt: skip


def distance(a: Iterable[Array], b: Iterable[Array]) -> float:
    """See ``Proof``; infinite where one is not finite and the other is."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not np.array_equal(np.isfinite(x64), np.isfinite(y64)):
            return float("inf")
        finite = np.isfinite(x64)
        off = np.abs(x64[finite] - y64[finite]).max(initial=0)
        largest = np.abs(x64[finite]).max(initial=0)
        worst = max(worst, float(off / largest) if largest else float(off))
    return worst


def _feed(model: Any, session: Any) -> dict[str, Array]:
    """Random inputs that the file runs on."""
    error = LowerError("QG513", "the file has no inputs")
    for length in LENGTHS:
        feed = random_inputs(model, length)
        try:
            ort_cpu.run(session, feed)
            return feed
        except LowerError as refused:
            error = refused
    raise LowerError(
        "QG513", "the file runs on no random input, so that no repair of it can be proved", where="audit --fix",
        why=error.why, todo="fix the dynamic dimensions in the file, then try again",
    )  # fmt: skip


def random_inputs(model: Any, length: int) -> dict[str, Array]:
    """One array for each input: normal floats, integers 0 and 1, which suit tokens and masks, and the whole range of
    8 bits. A first dimension without a size is ``BATCH``, others are ``length``."""
    from onnx import helper

    rng, file = np.random.default_rng(0), OnnxFile(model)
    feed: dict[str, Array] = {}
    for value in (i for i in model.graph.input if i.name in file.inputs):
        sizes = [s if isinstance(s, int) else length if i else BATCH for i, s in enumerate(file.shape(value.name))]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype == np.bool_:
            feed[value.name] = np.ones(sizes, dtype)
        elif np.issubdtype(dtype, np.integer):
            span = np.iinfo(dtype)
            low, high = (span.min, span.max) if span.bits == 8 else (0, 1)
            feed[value.name] = rng.integers(low, high + 1, sizes).astype(dtype)
        else:
            feed[value.name] = rng.normal(size=sizes).astype(dtype)
    return feed


def _regions(before: Any, after: Any, feed: dict[str, Array]) -> float:
    """How far the two are apart where every quantize that both have reads what it reads in the first."""
    cuts = sorted(_quantized(before) & _quantized(after))
    floats = _run(_expose(before, cuts), feed)
    parts = [_run(_cut(m, cuts), {**feed, **{f"{c}/cut": floats[c] for c in cuts}}) for m in (before, after)]
    names = sorted(parts[0])
    return distance([parts[0][n] for n in names], [parts[1][n] for n in names])


def _quantized(model: Any) -> set[str]:
    """The activations inside the model that are quantized."""
    file = OnnxFile(model)
    read = {n.input[0] for n in file.nodes if n.op_type == "QuantizeLinear"}
    return {v for v in read if v in file.producers and file.constant(v) is None}


def _expose(model: Any, names: Iterable[str]) -> Any:
    """The same with more outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {o.name for o in copy.graph.output}
    for name in names:
        if name not in have:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


def _cut(model: Any, names: Iterable[str]) -> Any:
    """What quantizes one of these values reads an input instead; the value itself is an output."""
    from onnx import helper

    file, cut = OnnxFile(model), set(names)
    copy = _expose(model, sorted(cut))
    for name in sorted(cut):
        copy.graph.input.append(helper.make_tensor_value_info(f"{name}/cut", file.element_type(name) or 1, None))
    for node in copy.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in cut:
            node.input[0] = f"{node.input[0]}/cut"
    return copy


def _run(model: Any, feed: dict[str, Array]) -> dict[str, Array]:
    """Every output by name, as the file is written."""
    session = ort_cpu.session(bytes(model.SerializeToString()), threads=1, optimize=False)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, ort_cpu.run(session, feed), strict=True))
