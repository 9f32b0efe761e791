"""How fast is the MiniLM artifact against float and against ORT's dynamic quantization? 8 x 128 tokens, one thread.

All files run in turn in one process; medians and ratios. Needs `make demo` (or any run of examples/jobs/minilm.toml).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort
from common import publish
from onnxruntime.quantization import quantize_dynamic

from qatgraph.backends import ort_cpu
from qatgraph.job import load_job
from qatgraph.latency import export_float, lower_float
from qatgraph.proof import feed_of
from qatgraph.report.machine import has_vnni
from qatgraph.runner import set_up

JOB, ARTIFACT = Path("examples/jobs/minilm.toml"), Path("build/minilm/minilm.onnx")


def without_skip_layer_norm(file: Path, **config: str) -> Any:
    """A session with ORT's SkipLayerNormFusion switched off, which makes float and dynamic models faster."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in config.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    return ort.InferenceSession(str(file), options, disabled_optimizers=["SkipLayerNormFusion"])


def main() -> None:
    if not ARTIFACT.is_file():
        raise SystemExit(f"there is no {ARTIFACT}: run `make demo` first")
    setup = set_up(load_job(JOB), JOB, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock, dynamic, own = folder / "stock.onnx", folder / "dynamic.onnx", folder / "own.onnx"
        export_float(setup.model, setup.graph, stock)
        quantize_dynamic(stock, dynamic, per_channel=True)
        lower_float(setup.graph, own)
        sessions = {
            "engine": ort_cpu.session(ARTIFACT.read_bytes(), threads=1),
            "float": ort_cpu.session(str(stock), threads=1),
            "float, SkipLayerNormFusion off": without_skip_layer_norm(stock),
            "float, lowered as the artifact": ort_cpu.session(str(own), threads=1),
            "dynamic": ort_cpu.session(str(dynamic), threads=1),
            "dynamic, SkipLayerNormFusion off": without_skip_layer_norm(dynamic),
        }
        if not has_vnni():
            exact = without_skip_layer_norm(dynamic, session__x64quantprecision="1")
            sessions["dynamic, exact, SkipLayerNormFusion off"] = exact
        times = ort_cpu.median_latencies(sessions, feed_of(setup.graph, setup.data.latency), rounds=25)
    figures: dict[str, Any] = {f"{name} ms": value for name, value in times.items()}
    figures |= {f"{name} / engine": value / times["engine"] for name, value in times.items() if name != "engine"}
    publish("latency", figures)


if __name__ == "__main__":
    main()
