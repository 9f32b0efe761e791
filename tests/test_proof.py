"""Verification: what it proves of a lowered file, and that each planted fault is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.errors import QatgraphError, VerifyError
from qatgraph.ir.graph import Batch
from qatgraph.ops import keeps_grid
from qatgraph.parity import has_region
from qatgraph.planning.explain import kind
from qatgraph.planning.plan import Plan
from qatgraph.report.report import Report, format_value
from qatgraph.runner import run_job
from tests.lowered import LOWERED, Lowered, case_of, lowered, node, read, write
from tests.models import padded

ROOT = Path(__file__).parents[1]
JOBS = Path(__file__).parent / "jobs"
SECTIONS = ("files", "fidelity", "parity", "kernels", "overflow")


@pytest.fixture(autouse=True)
def no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_overflow.py runs it."""
    monkeypatch.setattr(ort_cpu, "can_emulate", lambda: False)


def verify(found: Lowered, folder: Path, batches: Sequence[Batch], **more: Any) -> Report:
    path = folder / "model.onnx"
    path.write_bytes(found.file)
    return qg.verify(found.qat, path, batches, **more)


# a file as it was lowered


@pytest.mark.parametrize("name", LOWERED)
def test_every_file_is_proved(name: str, tmp_path: Path) -> None:
    found, batches = lowered(name), [case_of(name).inputs(s) for s in (3, 4)]
    report = verify(found, tmp_path, batches, float_model=found.model)
    report.check()
    shapes = {f.name for f in found.plan.nodes if keeps_grid(f.kind)}
    int8 = {p.node for p in found.plan.predictions if p.int8 and p.kernel} - shapes
    tables = {p.node for p in found.plan.predictions if p.int8 and kind(found.plan, p.node) == "embedding"}
    assert report.parity["regions"] == sum(has_region(p, kind(found.plan, p.node)) for p in found.plan.predictions) > 0
    assert report.parity["without_reference"] == []
    assert report.kernels["planned"] == report.kernels["realized"] == len(int8 - tables) > 0
    assert (report.kernels["int8_tables"], report.kernels["unnamed_int8"]) == (len(tables), [])
    assert sum(report.kernels["pinned"].values()) == sum(p.pinned for p in found.plan.predictions)
    assert (report.parity["integers"] > 0) == (name != "pixels")  # there nothing is quantized
    assert report.parity["max_steps"] == 0
    assert report.fidelity["samples"] == sum(len(b if isinstance(b, torch.Tensor) else b["input_ids"]) for b in batches)
    assert report.fidelity["engine"]["cosine_min"] > (0.98 if name == "pixels" else 0.99)  # there of 64 samples
    assert all(getattr(report, section)["how"] for section in SECTIONS)


def test_labels_give_the_share_of_right_answers(tmp_path: Path) -> None:
    found, batch = lowered("erf-gelu"), case_of("erf-gelu").inputs(3)
    labels = found.model(batch).argmax(-1)
    for shift, share in ((0, 1.0), (1, 0.0)):
        report = verify(found, tmp_path, [batch], float_model=found.model, labels=[(labels + shift) % 32])
        assert report.fidelity["float"]["top1"] == report.fidelity["engine"]["top1"] == share


# planted faults


def stamped(file: str, plan: str) -> Callable[[], Lowered]:
    """The file of one plan, with the hash of another."""

    def made() -> Lowered:
        proto = lowered(file).proto
        next(p for p in proto.metadata_props if p.key == "qatgraph.plan").value = lowered(plan).plan.hash()
        return lowered(plan).changed(proto)

    return made


def edited(name: str, edit: Callable[[Any], Any]) -> Callable[[], Lowered]:
    def made() -> Lowered:
        proto = lowered(name).proto
        edit(proto)
        return lowered(name).changed(proto)

    return made


def scaled(constant: str, factor: float) -> Callable[[Any], None]:
    return lambda p: write(p, constant, (read(p, constant) * factor).astype(read(p, constant).dtype))


def renamed(old: str, new: str) -> Callable[[Any], None]:
    return lambda p: setattr(node(p, old), "name", new)


def add_output(proto: Any) -> None:
    """A value inside a region becomes an output: the kernel can no longer be fused."""
    proto.graph.output.append(onnx.ValueInfoProto(name="up:dequantize/DequantizeLinear/out"))


def no_mask(proto: Any) -> None:
    del node(proto, "layer.0.attention:attention/Attention").input[3]


def other_output(proto: Any) -> None:
    node(proto, "Mlp:residual_add/Sum").output[0] = proto.graph.output[0].name = "div_1"


def other_input(proto: Any) -> None:
    proto.graph.input[0].name = "input"
    for one in proto.graph.node:
        one.input[:] = ["input" if v == "x" else v for v in one.input]


UP = "up:linear"
PLANTED: dict[str, tuple[Callable[[], Lowered], str]] = {
    "a pinned node runs int8": (stamped("mlp", "pinned"), r"'down:linear': row 'linear.float'.* int8 QGemm"),
    "an int8 node runs float": (stamped("pinned", "mlp"), r"'down:linear': row 'linear.gemm-int32-bias'.* float Gemm"),
    "the same, its region": (stamped("pinned", "mlp"), r"region 'down:linear': the file does not hold it"),
    "an int8 node is renamed": (edited("mlp", renamed(f"{UP}/Gemm", "fc1/Gemm")), rf"'{UP}': .*no node of this name"),
    "and nobody planned that": (edited("mlp", renamed(f"{UP}/Gemm", "fc1/Gemm")), r"'fc1': row 'no row'.* int8 QGemm"),
    "a float node is renamed": (
        edited("mlp", renamed("norm:layer_norm/LayerNormalization", "ln/LayerNormalization")),
        r"'norm:layer_norm': row 'layer_norm.float'.*no node of this name",
    ),
    "a border is exposed": (edited("mlp", add_output), r"outputs are output, up:dequantize"),
    "the scale of a weight": (edited("table", scaled("layer.0.mlp.up:dequantize#2/DequantizeLinear/scale", 1.01)),
                              r"region 'layer.0.mlp.up:linear': float outputs differ by 0.0\d+ of the largest"),
    "the scale of a table": (edited("table", scaled("token:dequantize/DequantizeLinear/scale", 1.01)),
                             r"region 'token:embedding': float outputs differ by 0.0\d+ of the largest"),
    "the scale of a quantize": (edited("mlp", scaled("up:quantize/QuantizeLinear/scale", 1.1)),
                                rf"region '{UP}': \d+ of \d+ integers differ, by up to \d+ steps"),
    "a weight": (edited("mlp", scaled("up.weight/int8", -1)), rf"region '{UP}': float outputs differ"),
    "a float constant": (edited("mlp", scaled("norm.weight", 1.01)), rf"in front of '{UP}': values differ"),
    "the mask is forgotten": (edited("encoder", no_mask), r"in front of 'layer.0.attention.out:linear': values"),
    "behind the last region": (edited("mlp", scaled("val_2", 2)), r"output 'output': values differ by"),
    "another output name": (edited("mlp", other_output), r"the file's outputs are div_1, the model's are output"),
    "another input name": (edited("mlp", other_input), r"the file's inputs are input, the model's are x"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_named(fault: str, tmp_path: Path) -> None:
    plant, named = PLANTED[fault]
    found = plant()
    batch = padded(3, 6, 3) if "token" in str(found.plan) else case_of("mlp").inputs(3)
    report = verify(found, tmp_path, [batch])
    assert any(re.search(named, f) for f in report.failures), report.failures
    with pytest.raises(VerifyError) as caught:
        report.check()
    assert (caught.value.code, caught.value.where) == ("QG601", report.failures[0])


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_outputs_that_an_option_changes_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, options = ort_cpu.session, []

    class Off:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def run(self, names: Any, feed: Any) -> list[Any]:
            return [np.nextafter(a, np.float32(np.inf)) for a in self.inner.run(names, feed)]

    def off(model: bytes, **config: Any) -> Any:
        options.append(config)
        return Off(session(model)) if config else session(model)

    monkeypatch.setattr(ort_cpu, "session", off)
    report = verify(lowered(name), tmp_path, [case_of(name).inputs(3)])
    assert report.failures == ["outputs differ between default options and session.x64quantprecision=1"]
    assert report.fidelity["same_under_x64quantprecision"] is False
    assert {"session__x64quantprecision": "1"} in options


REFUSED: dict[str, tuple[Callable[[], Lowered], int, str]] = {
    "the file of another plan": (lambda: replace(lowered("mlp"), file=lowered("pinned").file), 1, "QG603"),
    "a file that is no model": (lambda: replace(lowered("mlp"), file=b"no model"), 1, "QG603.*\n.*\n.*no plan"),
    "an empty file": (lambda: replace(lowered("mlp"), file=b""), 1, "QG603"),
    "no batch": (lambda: lowered("mlp"), 0, "QG602"),
    "a file that the engine refuses": (
        edited("mlp", lambda p: setattr(node(p, "gelu:gelu/Gelu"), "domain", "nowhere")), 1, "QG505"),
    "a file that does not run": (
        edited("encoder", lambda p: node(p, "layer.0.attention:attention/Attention").input.__setitem__(
            3, "Encoder:cast/Cast/out")), 1, "QG508"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_verified_is_refused_with_a_code(fault: str, tmp_path: Path) -> None:
    plant, count, code = REFUSED[fault]
    found = plant()
    batch = padded(3, 6, 3) if fault == "a file that does not run" else case_of("mlp").inputs(3)
    with pytest.raises(QatgraphError, match=code):
        verify(found, tmp_path, [batch] * count)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"QG604: there is no file 'gone.onnx'"):
        qg.verify(lowered("mlp").qat, tmp_path / "gone.onnx", [case_of("mlp").inputs(3)])


# the report itself


def test_a_report_reads_the_same_in_every_form(tmp_path: Path) -> None:
    report = verify(lowered("mlp"), tmp_path, [case_of("mlp").inputs(3)])
    data = json.loads(report.to_json())
    assert data == {**report.as_json(), "ok": True}
    assert Report(**{k: v for k, v in data.items() if k != "ok"}) == report
    text = report.to_markdown()
    assert text.startswith("# verification on ort-cpu: every check passed\n")
    for section in SECTIONS:
        assert f"\n## {section}\n\n{data[section]['how']}\n\n| what | value |" in text
    assert f"| engine_to_fake_quantized.cosine_min | {format_value(1.0)} |" in text
    assert "FAILED" not in text


def test_a_report_shows_what_failed_in_every_form() -> None:
    failures = [f"'{n}:linear': nothing" for n in "abcdef"]
    report = Report(job="job", target="toy", notes=["a note"], failures=failures)
    text, data = report.to_markdown(), json.loads(report.to_json())
    assert text.startswith("# job on toy: 6 checks FAILED\n\n- FAILED: 'a:linear': nothing\n- FAILED: 'b:linear'")
    assert "- note: a note" in text
    assert (data["ok"], data["failures"]) == (False, failures)
    with pytest.raises(VerifyError) as caught:
        report.check()
    assert (caught.value.code, caught.value.where) == ("QG601", failures[0])
    assert "(6 failures)" in caught.value.what


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.5, "0.5"), (1.0, "1"), (0.99996, "1"), (3.84e-7, "3.84e-07"), (123456.0, "1.235e+05"),
     ([], "none"), ([8, 128], "8, 128"), (True, "True"), (32, "32"), ("NOT RUN", "NOT RUN")],
)  # fmt: skip
def test_a_value_is_written_for_people(value: Any, text: str) -> None:
    assert format_value(value) == text


# the command

ROW = "linear.gemm-int32-bias"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from qatgraph.cli import main; main()", *words]
    environment = {**os.environ, "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)


def test_a_run_for_a_target_with_a_false_row_fails_and_writes_nothing(tmp_path: Path) -> None:
    text = (resources.files("qatgraph.backends") / "ort_cpu.toml").read_text(encoding="utf-8")
    before, row, after = text.partition(f'id = "{ROW}"')
    assert 'kernel = "QGemm"' in after
    (tmp_path / "false.toml").write_text(before + row + after.replace("QGemm", "Wishful", 1), encoding="utf-8")
    target, output = str(tmp_path / "false.toml"), tmp_path / "output"
    done = command("run", str(JOBS / "tiny.toml"), "--no-train", "--target", target, "--output", str(output))
    assert (done.returncode, output.exists()) == (1, False)
    assert "QG601" in done.stderr
    assert f"'first:linear': row '{ROW}' predicts int8 Wishful, the engine runs int8 QGemm" in done.stderr


def test_verify_fails_for_a_folder_whose_plan_promises_another_kernel(tmp_path: Path) -> None:
    """Everything in the folder agrees with everything else; only the engine does not."""
    folder = run_job(JOBS / "tiny.toml", tmp_path / "tiny", train=False)[1]
    job, output = str(JOBS / "tiny.toml"), ["--output", str(folder)]
    assert command("verify", job, *output).returncode == 0
    plan = Plan.load(folder / "plan.json")
    wishful = replace(plan, predictions=tuple(replace(p, kernel=f"Wishful{p.kernel}") for p in plan.predictions))
    model = (folder / "tiny.onnx").read_bytes().replace(plan.hash().encode(), wishful.hash().encode())
    (folder / "tiny.onnx").write_bytes(model)
    (folder / "plan.json").write_text(wishful.to_json(), encoding="utf-8")
    manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    old = json.loads(manifest)["hashes"]["onnx"]
    manifest = manifest.replace(old, hashlib.sha256(model).hexdigest()).replace(plan.hash(), wishful.hash())
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    done = command("verify", job, *output)
    assert done.returncode == 1
    assert "QG601" in done.stderr
    assert f"'first:linear': row '{ROW}' predicts int8 WishfulQGemm, the engine runs int8 QGemm" in done.stderr
