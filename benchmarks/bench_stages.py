"""How long do capture, plan, prepare and lower of MiniLM take, and how much does `import qatgraph` cost?"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish

import qatgraph as qg
from qatgraph.job import load_job
from qatgraph.runner import set_up

JOB = Path("examples/jobs/minilm.toml")


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    job = load_job(JOB)
    setup = set_up(job, JOB, 0)
    figures: dict[str, Any] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        figures[f"{name} s"], clock = now - clock, now

    graph = qg.capture(setup.model, setup.data.calibrate[0], job.shapes(), output_names=job.outputs)
    lap("capture")
    plan = qg.plan(graph)
    lap("plan")
    qat = qg.prepare(graph, plan)
    lap("prepare")
    qg.calibrate(qat, setup.data.calibrate, progress=False)
    lap("calibrate (64 paragraphs)")
    with tempfile.TemporaryDirectory() as folder:
        qg.lower(qat, Path(folder) / "model.onnx")
        lap("lower")
    figures["capture + plan + prepare + lower s"] = sum(
        figures[f"{n} s"] for n in ("capture", "plan", "prepare", "lower")
    )
    # everything that a user touches first, in turn with torch alone
    pairs = [(seconds("import torch"), seconds("import torch, qatgraph; qatgraph.capture")) for _ in range(7)]
    torch_s, both_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    figures |= {
        "import torch s": torch_s,
        "import torch + qatgraph.capture s": both_s,
        "import ratio": both_s / torch_s,
    }
    publish("stages", figures)


if __name__ == "__main__":
    main()
