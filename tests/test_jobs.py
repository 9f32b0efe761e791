"""Jobs: what a run writes, replay to the same bytes in a new process and folder, audit of foreign files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qatgraph.runner import run_job

ROOT = Path(__file__).parent.parent
JOBS = Path(__file__).parent / "jobs"
KEYS = {
    "files": ["onnx.bytes"],
    "fidelity": [f"{s}.{k}" for s in ("ptq", "qat", "engine") for k in ("cosine_mean", "cosine_min")],
    "parity": ["max_steps", "off_by_one_share", "float_max_rel", "elements", "how"],
    "kernels": ["planned", "realized", "mismatches", "pinned", "how"],
    "latency": ["isa", "float_ms", "float_same_options_ms", "engine_ms", "ratio", "how"],
}


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from qatgraph.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_job(JOBS / "tiny.toml", tmp_path_factory.mktemp("build") / "tiny")[1]


def test_a_run_writes_what_it_promises(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"tiny.onnx", "plan.json", "manifest.json", "report.md", "report.json", "qat.safetensors"}
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for section, keys in KEYS.items():
        for key in keys:
            value: Any = report[section]
            for part in key.split("."):
                value = value[part]
    assert report["ok"] is True
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {"onnx", "plan", "state"} <= set(manifest["hashes"])
    assert {"torch", "onnxruntime", "python"} <= set(manifest["versions"])
    everything = "".join(p.read_text(encoding="utf-8") for p in folder.glob("*.json"))
    assert str(ROOT) not in everything


def test_replay_in_a_new_process_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    done = cli("replay", str(folder), str(JOBS / "tiny.toml"), "--output", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "tiny.onnx").read_bytes() == (folder / "tiny.onnx").read_bytes()


def test_another_seed_gives_other_bytes(folder: Path, tmp_path: Path) -> None:
    """The control: equal bytes are not a matter of course."""
    text = (JOBS / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "tiny.toml").write_text("seeds = [1]\n" + text, encoding="utf-8")
    (tmp_path / "tiny.py").write_text((JOBS / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    other = run_job(tmp_path / "tiny.toml", tmp_path / "build")[1]
    assert (other / "tiny.onnx").read_bytes() != (folder / "tiny.onnx").read_bytes()


def test_run_with_passes_from_a_file(tmp_path: Path) -> None:
    done = cli(
        "run",
        str(JOBS / "tiny.toml"),
        "--no-train",
        "--passes",
        "examples/custom_pass.py",
        "--output",
        str(tmp_path / "o"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))
    assert report["kernels"]["planned"] == 1
    verified = cli("verify", str(JOBS / "tiny.toml"), "--output", str(tmp_path / "o"))
    assert verified.returncode == 0, verified.stderr


def test_plan_from_the_command_line(tmp_path: Path) -> None:
    done = cli("plan", str(JOBS / "tiny.toml"), "--target", "examples/targets/toy_npu.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "toy-npu"


def test_every_command_has_an_example() -> None:
    for name in ("run", "plan", "verify", "replay", "audit", "show", "explain", "diff", "passes", "targets"):
        done = cli(name, "--help")
        assert done.returncode == 0
        assert f"Example: qatgraph {name}" in " ".join(done.stdout.split()), name


def static_default(tmp_path: Path, *, bias: bool) -> Path:
    """A rank-2 linear as ORT's own static quantizer writes it with all defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    rng = np.random.default_rng(0)
    weight, vector = rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="fc/MatMul")]
    if bias:
        nodes.append(helper.make_node("Add", ["m", "b"], ["a"], name="fc/Add"))
    nodes.append(helper.make_node("Erf", ["a" if bias else "m"], ["y"], name="act/Erf"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(vector, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "float.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(3)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    quantize_static(tmp_path / "float.onnx", tmp_path / "static.onnx", Reader())
    return tmp_path / "static.onnx"


def test_audit_of_a_foreign_file(tmp_path: Path) -> None:
    done = cli("audit", str(static_default(tmp_path, bias=True)), "--json")
    assert done.returncode == 0, done.stderr
    assert [k["kernel"] for k in json.loads(done.stdout)["kernels"] if k["int8"]]


def test_audit_refuses_what_is_not_there() -> None:
    done = cli("audit", "nothing.onnx")
    assert done.returncode == 1
    assert "QG506" in done.stderr
