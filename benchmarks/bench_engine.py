"""How fast are the int8 files of the convolutional jobs against float and against ONNX Runtime's own quantizer?

Of each job: the float model by torch's exporter; our files, calibrated and not trained, for ort-cpu and, on a CPU with
VNNI, for ort-cpu-vnni; and ``quantize_static`` per channel on the same calibration batches, once with its default
options and once with u8 activations. The default is s8, of which ONNX Runtime on x86 makes u8, but not where a value
has several readers: convolutions there stay in float. All files of a job run in turn in one process on one thread;
medians, and ratios to float. ``--quick``: the small job and few rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import publish_table
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.utils._pytree import tree_map_only

import qatgraph as qg
from qatgraph import fidelity
from qatgraph.backends import ort_cpu
from qatgraph.job import Job, load_job
from qatgraph.latency import export_float
from qatgraph.proof import feed_of
from qatgraph.report.machine import has_vnni
from qatgraph.runner import Setup, canonicalize, make_plan, set_up

JOBS = Path(__file__).parents[1] / "examples" / "jobs"
FLOAT = "float"
PEERS = {"quantize_static": QuantType.QInt8, "quantize_static, u8": QuantType.QUInt8}
TARGETS = ("ort-cpu", "ort-cpu-vnni") if has_vnni() else ("ort-cpu",)
EXACT = {} if has_vnni() else {"session__x64quantprecision": "1"}  # else the sums of the peers' files saturate


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """The calibration batches of a job, as ``quantize_static`` asks for them."""

    def __init__(self, setup: Setup) -> None:
        self.feeds = iter([feed_of(setup.graph, batch) for batch in setup.data.calibrate])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def write_files(job: Job, path: Path, setup: Setup, folder: Path) -> dict[str, Path]:
    """The files that are compared, by name; the float model first."""
    files = {name: folder / f"{name}.onnx" for name in (FLOAT, *TARGETS, *PEERS)}
    export_float(setup.model, setup.graph, files[FLOAT])
    for target in TARGETS:
        ours = job.model_copy(update={"target": target})
        canonical = canonicalize(ours, path, setup, ())
        qat = qg.prepare(canonical, make_plan(ours, path, canonical))
        qg.calibrate(qat, setup.data.calibrate, progress=False)
        if job.correct_biases:
            qg.correct_biases(qat, setup.data.calibrate)
        qg.lower(qat.eval(), files[target])
    prepared = folder / "prepared.onnx"  # as ONNX Runtime's documentation advises: batch norms folded, shapes inferred
    quant_pre_process(files[FLOAT], prepared, skip_symbolic_shape=True)
    for name, activations in PEERS.items():
        quantize_static(prepared, files[name], Batches(setup), per_channel=True, activation_type=activations)
    return files


def convolutions(file: Path) -> tuple[int, int]:
    """How many convolutions ONNX Runtime runs in an integer kernel, and how many there are."""
    found = [n.int8 for n in ort_cpu.audit(str(file)) if "Conv" in n.kernel]
    return sum(found), len(found)


def measure(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a job: each file at batch 1 and 8."""
    path = JOBS / f"{name}.toml"
    job = load_job(path)
    setup = set_up(job, path, 0)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(job, path, setup, Path(folder))
        sessions = {n: ort_cpu.session(str(f), threads=1, **(EXACT if n in PEERS else {})) for n, f in files.items()}
        counted = {n: convolutions(f) for n, f in files.items()}
        for size in (1, 8):
            feed = feed_of(setup.graph, tree_map_only(torch.Tensor, lambda t, size=size: t[:size], setup.data.latency))
            outputs = {n: [torch.from_numpy(ort_cpu.run(s, feed)[0])] for n, s in sessions.items()}
            times = ort_cpu.median_latencies(sessions, feed, rounds=rounds)
            for n, ms in times.items():
                yield {
                    "job": name,
                    "batch": size,
                    "file": n,
                    "ms": ms,
                    "float / it": times[FLOAT] / ms,
                    "convolutions in int8": f"{counted[n][0]} of {counted[n][1]}",
                    "cosine to float": fidelity.cosine(outputs[n], outputs[FLOAT])["cosine_mean"],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small job and few rounds")
    quick = parser.parse_args().quick
    jobs, rounds = (("digits_cnn",), 5) if quick else (("digits_cnn", "efficientnet_lite0"), 25)
    options = "session.x64quantprecision=1" if EXACT else "default session options"
    note = f"medians of {rounds} interleaved rounds, one thread; the files of quantize_static run with {options}"
    publish_table("bench_engine", [row for job in jobs for row in measure(job, rounds)], note)


if __name__ == "__main__":
    main()
