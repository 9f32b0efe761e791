"""Bad input: a coded sentence, and an output folder that is byte for byte as it was."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qatgraph as qg
from qatgraph.cli import main
from qatgraph.errors import QatgraphError
from qatgraph.planning.plan import Plan
from qatgraph.runner import replay_folder, run_job, verify_folder
from tests.models import ZOO

JOBS = Path(__file__).parent / "jobs"


def digest(folder: Path) -> dict[str, str]:
    """Every file below the folder's parent: also what a failed run might leave beside it."""
    files = sorted(p for p in folder.parent.rglob("*") if p.is_file())
    return {str(p.relative_to(folder.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a good run, which no bad run may change."""
    return run_job(JOBS / "tiny.toml", tmp_path_factory.mktemp("build") / "tiny")[1]


Refused = Callable[..., QatgraphError]


@pytest.fixture
def refused(good: Path, tmp_path: Path) -> Refused:
    """Run the tiny job with changed lines; it must fail with the code and sentence, and change nothing."""

    def run(code: str, sentence: str, *lines: str, job: str | None = None, **options: object) -> QatgraphError:
        text = job if job is not None else (JOBS / "tiny.toml").read_text(encoding="utf-8")
        path = tmp_path / "tiny.toml"
        path.write_text("\n".join(lines[:1]) + "\n" + text + "\n" + "\n".join(lines[1:]), encoding="utf-8")
        (tmp_path / "tiny.py").write_text((JOBS / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
        before = digest(good)
        with pytest.raises(QatgraphError) as caught:
            run_job(path, good, **options)  # type: ignore[arg-type]
        assert caught.value.code == code
        assert sentence in caught.value.text()
        assert caught.value.where
        assert caught.value.todo
        assert digest(good) == before
        return caught.value

    return run


def test_a_good_run_does_change_the_folder(good: Path, tmp_path: Path) -> None:
    """The control: the same comparison sees a run that succeeds."""
    folder = run_job(JOBS / "tiny.toml", tmp_path / "build" / "tiny")[1]
    before = digest(folder)
    run_job(JOBS / "tiny.toml", folder, train=False)
    assert digest(folder) != before


def test_nan_in_data(refused: Refused) -> None:
    error = refused("QG110", "the batch does not fit the captured model", "", '[data_options]\nfault = "nan"')
    assert "NaN" in error.why
    assert "calibration batch 1" in error.where


def test_nan_in_training_data(refused: Refused) -> None:
    refused("QG110", "it contains NaN or infinity", "", '[data_options]\nfault = "nan in training"')


def test_nan_in_weights(refused: Refused) -> None:
    error = refused("QG103", "a weight contains NaN or infinity", "", "[model_options]\nnan = true")
    assert "first.weight" in error.where


def test_wrong_dtype(refused: Refused) -> None:
    error = refused("QG110", "the batch does not fit", "", '[data_options]\nfault = "dtype"')
    assert "torch.float64" in error.why


def test_wrong_rank(refused: Refused) -> None:
    error = refused("QG110", "the batch does not fit", "", '[data_options]\nfault = "rank"')
    assert "rank 3" in error.why


@pytest.mark.parametrize("fault", ["empty", "nothing to evaluate"])
def test_empty_loader(refused: Refused, fault: str) -> None:
    refused("QG806", "batch", "", f'[data_options]\nfault = "{fault}"')


def test_nothing_to_train_on(refused: Refused) -> None:
    refused("QG703", "there is no batch to train on", "", '[data_options]\nfault = "nothing to train on"')


def test_data_dependent_branch(refused: Refused) -> None:
    error = refused("QG101", "the model branches on the values of a tensor", "", "[model_options]\nbranch = true")
    assert "tiny.py:" in error.where
    assert "if self.branch and h.sum() > 0" in error.where


def test_unknown_target(refused: Refused) -> None:
    error = refused("QG401", "there is no target 'ort-gpu'", 'target = "ort-gpu"')
    assert "ort-cpu" in error.text()


def test_unknown_recipe(refused: Refused) -> None:
    refused("QG302", "there is no recipe 'int9'", 'recipe = "int9"')


def test_unknown_recipe_key(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[override]]\nselect = "*"\nplcae = "float"\n', encoding="utf-8")
    error = refused("QG303", "the recipe is not valid", 'recipe = "mine.toml"')
    assert "did you mean 'place'" in error.why


def test_selector_that_matches_nothing(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[override]]\nselect = "frist:linear"\nplace = "float"\n', encoding="utf-8")
    error = refused("QG301", "the selector 'frist:linear' matches nothing", 'recipe = "mine.toml"')
    assert "first:linear" in error.todo


def test_job_file_with_a_typo(refused: Refused) -> None:
    error = refused("QG802", "the job is not valid", 'traget = "ort-cpu"')
    assert "did you mean 'target'" in error.why


def test_job_file_that_is_not_toml(refused: Refused) -> None:
    refused("QG802", "the job is not valid", job="name = ")


def test_factory_that_does_not_exist(refused: Refused) -> None:
    text = (JOBS / "tiny.toml").read_text(encoding="utf-8").replace("tiny.py:model", "tiny.py:modle")
    refused("QG803", "has no function 'modle'", job=text)


def test_target_without_a_backend(refused: Refused) -> None:
    toy = Path(__file__).parent.parent / "examples" / "targets" / "toy_npu.toml"
    error = refused("QG403", "can be planned for, but not lowered to", target=str(toy))
    assert "backend" in error.todo


@pytest.mark.parametrize(
    ("backend", "why"),
    [("ort_gpu", "No module named 'qatgraph.backends.ort_gpu'"), ("emulation", "has no function lower(graph, plan)")],
)
def test_target_with_a_backend_that_is_none(refused: Refused, tmp_path: Path, backend: str, why: str) -> None:
    toy = (Path(__file__).parent.parent / "examples" / "targets" / "toy_npu.toml").read_text(encoding="utf-8")
    table = tmp_path / "table.toml"
    table.write_text(f'backend = "{backend}"\nopset = 23\n{toy}', encoding="utf-8")
    error = refused("QG403", f"the backend '{backend}' cannot be used", target=str(table))
    assert why in error.why
    assert "'toy-npu'" in error.where
    assert "ort_cpu" in error.todo


def test_unknown_pass(refused: Refused) -> None:
    refused("QG201", "there is no pass 'fold-geul'", passes=["fold-geul"])


def test_plan_made_for_another_model(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text((JOBS / "tiny.toml").read_text(encoding="utf-8"), encoding="utf-8")
    source = (JOBS / "tiny.py").read_text(encoding="utf-8")
    (tmp_path / "tiny.py").write_text(source.replace("width: int = 16", "width: int = 24"), encoding="utf-8")
    before = digest(good)
    with pytest.raises(QatgraphError, match="made for another model") as caught:
        run_job(path, good, plan=Plan.load(good / "plan.json"))
    assert caught.value.code == "QG307"
    assert digest(good) == before


ANOTHER_TABLE = 'name = "ort-cpu"\ndescription = "of the same name, with the same rows"\nextends = "ort-cpu"\n'
OTHER_TARGETS = ["ort-cpu-vnni", "openvino-cpu", "table.toml"]


def other_target(name: str, folder: Path) -> str:
    """A target by name, or the file of a table that bears the name of ort-cpu."""
    (folder / "table.toml").write_text(ANOTHER_TABLE, encoding="utf-8")
    return str(folder / name) if name.endswith(".toml") else name


def prepared(target: str) -> torch.nn.Module:
    graph = ZOO["mlp"].capture()
    qat = qg.prepare(graph, qg.plan(graph, target)).eval()
    qg.calibrate(qat, [ZOO["mlp"].inputs(1)], progress=False)
    return qat


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_a_file_is_refused_with_the_plan_for_another_target(name: str, tmp_path: Path) -> None:
    batches = [ZOO["mlp"].inputs(2)]
    right, other = prepared("ort-cpu"), prepared(other_target(name, tmp_path))
    files = [qg.lower(qat, tmp_path / f"{i}.onnx") for i, qat in enumerate((right, other))]
    assert qg.verify(right, files[0], batches).ok
    for qat, file in ((right, files[1]), (other, files[0])):
        with pytest.raises(QatgraphError, match="QG603: the file was not lowered from this plan") as caught:
            qg.verify(qat, file, batches)
        assert "the plan is" in caught.value.why


def test_without_the_hash_of_its_table_such_a_file_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: plans that are equal but for the table that they were made by."""
    full = Plan.hash
    monkeypatch.setattr(Plan, "hash", lambda plan: full(replace(plan, hashes={})))
    file = qg.lower(prepared(other_target("table.toml", tmp_path)), tmp_path / "other.onnx")
    assert qg.verify(prepared("ort-cpu"), file, [ZOO["mlp"].inputs(2)]).ok


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: its exit code, and what it says on standard error."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qatgraph", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", [*OTHER_TARGETS, "toy_npu.toml", "ort-cpu"])
def test_commands_refuse_a_folder_with_the_plan_for_another_target(
    good: Path, tmp_path: Path, command: Command, name: str
) -> None:
    """As ``qatgraph plan --output`` writes it over that of the run; the plan for the target of the run is no fault."""
    job, copy, again = str(JOBS / "tiny.toml"), tmp_path / "tiny", tmp_path / "again"
    toy = Path(__file__).parent.parent / "examples" / "targets" / name
    target = str(toy) if toy.is_file() else other_target(name, tmp_path)
    shutil.copytree(good, copy)
    assert command("plan", job, "--target", target, "--output", str(copy / "plan.json"))[0] == 0
    answers = [
        command("verify", job, "--output", str(copy)),
        command("replay", str(copy), job, "--output", str(again)),
    ]
    if name == "ort-cpu":
        assert [code for code, _ in answers] == [0, 0]
        return
    made_for = f"for '{Plan.load(copy / 'plan.json').target}' by another table"
    for code, says in answers:
        assert code == 1
        assert "QG807: 'plan.json' is not the plan of the run" in says
        assert made_for in says
    assert not again.exists()


def test_a_manifest_that_names_the_other_plan_does_not_help(good: Path, tmp_path: Path, command: Command) -> None:
    """The planted fault of the folder: then it is the file that bears the plan of the run."""
    copy, job = tmp_path / "tiny", str(JOBS / "tiny.toml")
    shutil.copytree(good, copy)
    old = Plan.load(copy / "plan.json").hash()
    command("plan", job, "--target", other_target("table.toml", tmp_path), "--output", str(copy / "plan.json"))
    manifest = (copy / "manifest.json").read_text(encoding="utf-8")
    assert old in manifest
    manifest = manifest.replace(old, Plan.load(copy / "plan.json").hash())
    (copy / "manifest.json").write_text(manifest, encoding="utf-8")
    code, says = command("verify", job, "--output", str(copy))
    assert (code, "QG603: the file was not lowered from this plan" in says) == (1, True)


def test_unwritable_output_folder(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(QatgraphError, match="cannot write the output folder") as caught:
        run_job(JOBS / "tiny.toml", tmp_path / "file" / "tiny")
    assert caught.value.code == "QG805"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


def test_interrupted_run(good: Path, tmp_path: Path) -> None:
    """Ctrl-C while the job works: exit code not 0, nothing changed, nothing left beside the folder."""
    path = tmp_path / "tiny.toml"
    text = (JOBS / "tiny.toml").read_text(encoding="utf-8") + '[data_options]\nfault = "slow"\n'
    path.write_text(text, encoding="utf-8")
    (tmp_path / "tiny.py").write_text((JOBS / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    before = digest(good)
    command = [sys.executable, "-c", "from qatgraph.cli import main; main()", "run", str(path), "--output", str(good)]
    # a background job of a shell ignores SIGINT, and its children inherit that
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert "load model" in process.stdout.readline()
    while not any(good.parent.glob(".tiny.*")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert digest(good) == before
    assert not list(good.parent.glob(".tiny.*"))


def test_verify_refuses_a_changed_file(good: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(good, copy)
    assert verify_folder(JOBS / "tiny.toml", copy).ok
    data = bytearray((copy / "tiny.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "tiny.onnx").write_bytes(bytes(data))
    with pytest.raises(QatgraphError, match="is not the file that the run wrote") as caught:
        verify_folder(JOBS / "tiny.toml", copy)
    assert caught.value.code == "QG807"


def test_replay_refuses_other_data(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text((JOBS / "tiny.toml").read_text(encoding="utf-8"), encoding="utf-8")
    source = (JOBS / "tiny.py").read_text(encoding="utf-8")
    (tmp_path / "tiny.py").write_text(source.replace('facts={"seed": seed}', 'facts={"seed": 7}'), encoding="utf-8")
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    with pytest.raises(QatgraphError, match="the replay differs: the data") as caught:
        replay_folder(copy, path, tmp_path / "again")
    assert caught.value.code == "QG808"


def test_nothing_in_the_folder_to_verify(tmp_path: Path) -> None:
    with pytest.raises(QatgraphError, match="does not hold a run") as caught:
        verify_folder(JOBS / "tiny.toml", tmp_path)
    assert caught.value.code == "QG807"
