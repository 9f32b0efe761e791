"""What rows are run on: a user's simulator, an emulated CPU; and what is refused, with code and sentence."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import qatgraph as qg
from qatgraph.backends import emulation
from qatgraph.errors import LowerError, QatgraphError, VerifyError
from qatgraph.planning.target import Row
from qatgraph.probing.cases import Case
from qatgraph.specs import QuantSpec

ROOT = Path(__file__).parents[1]
NPU = str(ROOT / "examples" / "targets" / "toy_npu.toml")
SIMULATOR = '''
import numpy as np
from math import erf
import qatgraph as qg

KERNELS = {"linear": "MAC", "gelu": "LUT", "residual_add": "ADD"}


def shifted(acc, shift):
    """acc / 2**shift, half to even."""
    return np.rint(acc / 2.0**shift)


def realize(case):
    out = case.out
    if case.op == "linear":
        x, weight = case.inputs["x"], case.weight
        acc = x.q.astype(np.int64) @ weight.q.T.astype(np.int64) + (0 if case.bias is None else case.bias)
        q = shifted(acc, np.log2(out.scale) - np.log2(x.grid.scale) - np.log2(weight.grid.scale))
    elif case.op == "gelu":
        x = case.inputs["x"].real.astype(float)
        q = np.rint(x * 0.5 * (1 + np.vectorize(erf)(x / 2**0.5)) / out.scale)
    else:
        q = np.rint(sum(o.real.astype(float) for o in case.inputs.values()) / out.scale)
    return qg.Realized(KERNELS[case.op], True, np.clip(q, -128, 127).astype(np.int8))
'''


def simulator(source: str) -> Callable[[Case], Any]:
    space: dict[str, Any] = {}
    exec(source, space)
    found: Callable[[Case], Any] = space["realize"]
    return found


def test_a_users_target_holds_on_a_simulator_of_theirs() -> None:
    found = qg.probe(NPU, engine=simulator(SIMULATOR), examples=40, progress=False)
    assert [r.text() for r in found.false] == []
    assert {r.verdict for r in found.rows} == {"holds", "host"}
    assert found.engine == "realize"


@pytest.mark.parametrize(
    ("right", "wrong", "row", "says"),
    [
        ("return np.rint(acc / 2.0**shift)", "return np.floor(acc / 2.0**shift)", "linear.mac-array", "wrong"),
        ('"residual_add": "ADD"', '"residual_add": "SUM"', "residual_add.s8", "SUM runs in int8, not ADD"),
        ("case.op], True", 'case.op], case.op != "gelu"', "gelu.table", "LUT runs in float, not in int8"),
        ("-128, 127", "0, 127", "residual_add.s8", "wrong"),
        (".astype(np.int8))", ".astype(np.int8)[..., :1])", "gelu.table", "the result has the shape"),
        ("    out = case.out", "    out = 1 / (case.op != 'gelu')", "gelu.table", "refuses it: ZeroDivisionError"),
    ],
)
def test_a_simulator_that_does_otherwise_is_told(right: str, wrong: str, row: str, says: str) -> None:
    assert right in SIMULATOR
    found = qg.probe(NPU, engine=simulator(SIMULATOR.replace(right, wrong)), rows=row, examples=40, progress=False)
    assert [says in r.text() for r in found.false] == [True]


PASSED: dict[str, Callable[..., Any]] = {
    "relu": lambda case, x: np.maximum(x, 0),
    "clamp": lambda case, x: np.clip(x, 0, 6),
    "leaky_relu": lambda case, x: np.where(x >= 0, x, np.float32(case.attributes["alpha"]) * x),
    "cat": lambda case, *parts: np.concatenate(parts, case.attributes["axis"]),
}
SHIFTS, FREE, U8 = "s8 symmetric per-tensor power-of-two", "s8 symmetric per-tensor", "u8 affine per-tensor"
ROUNDINGS: dict[str, Callable[[Any], Any]] = {
    "half away from zero": lambda v: np.trunc(v + np.copysign(0.5, v)),
    "half to zero": lambda v: np.copysign(np.ceil(np.abs(v) - 0.5), v),
    "half up": lambda v: np.floor(v + 0.5),
}


def rounds_by(rounding: Callable[[Any], Any]) -> Callable[[Case], Any]:
    """An engine that lets numbers pass from one grid to another in float32, and rounds them its own way."""

    def realize(case: Case) -> Any:
        assert case.out is not None
        steps = PASSED[case.op](case, *(o.real for o in case.inputs.values())) / case.out.scale
        span = np.iinfo(case.out.zero.dtype)
        q = np.clip(rounding(steps) + case.out.zero_point, span.min, span.max)
        return qg.Realized("K", True, q.astype(span.dtype))

    return realize


@pytest.mark.parametrize("grids", [(SHIFTS, SHIFTS), (FREE, FREE), (U8, U8), (FREE, U8), (U8, FREE)], ids=str)
@pytest.mark.parametrize("kind", PASSED)
def test_halves_are_drawn_and_rounded_as_the_row_says(kind: str, grids: tuple[str, str]) -> None:
    """In as many cases as the command draws; an engine that rounds another way is false, with one step too many."""
    x, out = ((spec,) for spec in map(QuantSpec.parse, grids))
    row = Row(id="r", op=kind, placement="int8", kernel="K", why="{name}", x=x, out=out, requant="through-float")
    table = qg.Target(name="t", description="t", row=(row,))
    (right,) = qg.probe(table, engine=rounds_by(np.rint), progress=False).rows
    assert right.verdict == "holds", right.text()
    for name, rounding in ROUNDINGS.items():
        (wrong,) = qg.probe(table, engine=rounds_by(rounding), progress=False).rows
        assert "are wrong" in wrong.text(), name
    loose = table.model_copy(update={"row": (row.model_copy(update={"deviation": 1}),)})
    assert qg.probe(loose, engine=rounds_by(ROUNDINGS["half up"]), progress=False).false == ()


class NoHypothesis:
    """An import that finds no hypothesis."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "hypothesis":
            raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")
        return self.original(name, *args)


def without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("qatgraph.probing.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", NoHypothesis(builtins.__import__))


@pytest.mark.parametrize(
    ("code", "sentence", "options"),
    [
        ("QG407", "no row fits 'conv*'", {"rows": "conv*"}),
        ("QG410", "no engine to run the rows of 'toy-npu' on", {"engine": None}),
        ("QG411", "the simulator gives a int", {"engine": lambda case: 3}),
        ("QG409", "there is no instruction set 'mmx'", {"target": "ort-cpu", "engine": None, "isa": "mmx"}),
        ("QG401", "there is no target 'ort-gpu'", {"target": "ort-gpu"}),
    ],
)
def test_what_cannot_be_probed_is_refused(code: str, sentence: str, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"target": NPU, "engine": simulator(SIMULATOR), "progress": False, **options}
    refused(code, sentence, lambda: qg.probe(asked.pop("target"), **asked))


def test_an_operation_without_a_small_model_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(Path(NPU).read_text(encoding="utf-8").replace('op = "gelu"', 'op = "swish"'), encoding="utf-8")
    refused("QG406", "no small model of 'swish'", lambda: qg.probe(str(table), engine=simulator(SIMULATOR)))


def test_without_hypothesis_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_hypothesis(monkeypatch)
    refused("QG408", "pip install 'qatgraph[probe]'", lambda: qg.probe(NPU, engine=simulator(SIMULATOR)))


def test_without_an_emulator_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    refused("QG608", "qemu-user", lambda: qg.probe("ort-cpu", isa="avx2", progress=False))


def refused(code: str, sentence: str, act: Callable[[], object]) -> None:
    with pytest.raises(QatgraphError) as caught:
        act()
    assert caught.value.code == code
    assert sentence in caught.value.text()
    assert caught.value.where
    assert caught.value.todo


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qatgraph.cli import main; main()"
    run = [sys.executable, "-c", code, "probe", *words]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)


def test_the_command_prints_the_rows_and_fails_if_one_is_false(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(SIMULATOR, encoding="utf-8")
    wrong.write_text(SIMULATOR.replace('"MAC"', '"GEMV"'), encoding="utf-8")
    words = [NPU, "--examples", "10", "--row", "linear.*"]
    done = command(tmp_path, *words, "--engine", f"{right}:realize", "--json")
    assert (done.returncode, done.stderr.count("QG")) == (0, 0)
    found = json.loads(done.stdout)
    assert [r["verdict"] for r in found["rows"]] == ["holds", "host"]
    assert (found["target"], found["engine"], found["examples"]) == ("toy-npu", "realize", 10)
    done = command(tmp_path, *words, "--engine", f"{wrong}:realize")
    assert done.returncode == 1
    assert "1 of 2 rows are false" in " ".join(done.stdout.split())
    assert "GEMV runs in int8, not MAC" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"right.py", "wrong.py"}, (
        "it leaves nothing behind"
    )


# a process on another CPU: here an emulator that runs the code as it is, so that no emulator is needed


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in the place of the emulator."""

    def place(script: str) -> None:
        file = tmp_path / emulation.EMULATOR
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return place


def negation() -> bytes:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"], "minus")], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


RUN = 'shift 2; exec "$@"'  # drops "-cpu NAME"


def test_one_process_runs_file_after_file_and_outlives_a_bad_one(fake: Callable[[str], None]) -> None:
    fake(RUN)
    with emulation.Worker("Haswell") as worker:
        for x in (np.arange(3, dtype=np.float32), np.arange(70_000, dtype=np.float32)):
            graph, (y,) = worker.run(negation(), {"x": x})
            assert np.array_equal(y, -x)
            assert b"minus" in graph
        with pytest.raises(LowerError, match="QG508"):
            worker.run(b"no model", {"x": x})
        assert worker.run(negation(), {"x": x[:2]}, graph=False)[0] == b""
    assert worker.process.poll() is not None


@pytest.mark.parametrize(
    ("script", "says"),
    [("echo cannot start >&2; exit 3", "cannot start"), ("exit 3", "it said nothing"), ("head -c 4", "died")],
)
def test_a_process_that_dies_is_told_with_its_last_words(fake: Callable[[str], None], script: str, says: str) -> None:
    fake(script)
    with emulation.Worker("Haswell") as worker, pytest.raises(VerifyError, match="QG609") as caught:
        worker.run(negation(), {"x": np.zeros(1, np.float32)})
    assert says in caught.value.text()


def test_a_process_that_dies_in_the_middle_is_told(fake: Callable[[str], None]) -> None:
    fake(RUN)
    with emulation.Worker("Haswell") as worker:
        worker.run(negation(), {"x": np.zeros(1, np.float32)})
        worker.process.kill()
        with pytest.raises(VerifyError, match="QG609"):
            worker.run(negation(), {"x": np.zeros(1, np.float32)})
