"""Job files and folders: values out of range, factories that cannot be called, folders that hold no run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatgraph.errors import JobError
from qatgraph.job import MANIFEST, Job, load_job, make, output_folder
from qatgraph.runner import read_manifest, replay_folder, run_job, sha256

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "tests" / "jobs"
TINY = (JOBS / "tiny.toml").read_text(encoding="utf-8")


def loaded(tmp_path: Path, old: str, new: str) -> Job:
    assert old in TINY
    (tmp_path / "job.toml").write_text(TINY.replace(old, new), encoding="utf-8")
    return load_job(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps = 5", "steps = -1", "training.steps: Input should be greater than or equal to 0"),
        ("steps = 5", "lr = -1.0", "training.lr: Input should be greater than or equal to 0"),
        ("steps = 5", "lr = nan", "training.lr: Input should be a finite number"),
        ("warmup = 1", "warmup = -1", "training.warmup: Input should be greater than or equal to 0"),
        ("warmup = 1", "clip = 0.0", "training.clip: Input should be greater than 0"),
        ('outputs = ["y"]', "seeds = []", "seeds: .* at least 1 item"),
        ("[training]", "[dims.batch]\nmin = 9\nmax = 4\n[training]", "min = 9 is larger than max = 4"),
        ('name = "tiny"', 'name = ""', "name: String should match"),
        ('name = "tiny"', 'name = "../tiny"', "name: String should match"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence) as caught:
        loaded(tmp_path, old, new)
    assert caught.value.code == "QG802"


@pytest.mark.parametrize("new", ["steps = 0", "lr = 0.0\nsteps = 1", "steps = 5\nclip = 1e-9"])
def test_a_value_at_the_end_of_its_range_is_taken(tmp_path: Path, new: str) -> None:
    assert loaded(tmp_path, "steps = 5", new).training != load_job(JOBS / "tiny.toml").training


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job whose factories lack something."""
    text = "def model(seed, width=1):\n    return seed, width\n\ndef data(seed):\n    import not_installed\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    return tmp_path / "job.toml"


def test_options_that_a_factory_does_not_take(job: Path) -> None:
    with pytest.raises(JobError, match="unexpected keyword argument 'wdith'") as caught:
        make(job, "mine.py:model", "model", 0, {"wdith": 3})
    assert caught.value.code == "QG803"
    assert "[model_options]" in caught.value.todo
    assert make(job, "mine.py:model", "model", 7, {"width": 3}) == (7, 3)


def test_a_factory_that_needs_what_is_not_installed(job: Path) -> None:
    with pytest.raises(JobError, match="No module named 'not_installed'") as caught:
        make(job, "mine.py:data", "data", 0, {})
    assert caught.value.code == "QG804"
    assert "qatgraph[examples]" in caught.value.todo


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(JobError, match="something else than a run") as caught, output_folder(folder):
        pass
    assert caught.value.code == "QG805"
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "chapter1.txt"]


def test_a_file_in_the_place_of_the_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    with pytest.raises(JobError, match="something else than a run"), output_folder(tmp_path / "run"):
        pass
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("run", "a file")]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an earlier run"])
def test_anything_else_is_replaced_whole(tmp_path: Path, before: str) -> None:
    folder = tmp_path / "run"
    if before != "nothing":
        folder.mkdir()
    if before == "an earlier run":
        (folder / MANIFEST).write_text("{}", encoding="utf-8")
        (folder / "old.txt").write_text("old", encoding="utf-8")
    with output_folder(folder) as scratch:
        (scratch / "new.txt").write_text("new", encoding="utf-8")
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "new.txt"]


@pytest.mark.parametrize("text", ["{}", '{"job": {}}', "[]", "not JSON"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(JobError, match="does not hold a run") as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "QG807"


def test_a_run_for_a_target_of_the_command_line_can_be_replayed(tmp_path: Path) -> None:
    table = (ROOT / "backends" / "ort_cpu.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(table, encoding="utf-8")
    _, folder = run_job(JOBS / "tiny.toml", tmp_path / "run", target=str(tmp_path / "mine.toml"), train=False)
    digest = replay_folder(folder, JOBS / "tiny.toml", tmp_path / "again")
    assert digest == sha256(folder / "tiny.onnx") == sha256(tmp_path / "again" / "tiny.onnx")
    (tmp_path / "tiny.toml").write_text(TINY.replace("steps = 5", "steps = 6"), encoding="utf-8")
    with pytest.raises(JobError, match="the job file") as caught:
        replay_folder(folder, tmp_path / "tiny.toml", tmp_path / "third")
    assert caught.value.code == "QG808"


@pytest.mark.parametrize("wanted", [0, 3])
def test_a_job_says_how_many_threads_it_runs_with(tmp_path: Path, wanted: int) -> None:
    (tmp_path / "tiny.py").write_text((JOBS / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(f"threads = {wanted}\n" + TINY, encoding="utf-8")
    before = torch.get_num_threads()
    assert before != 3
    _, folder = run_job(tmp_path / "tiny.toml", tmp_path / "run", train=False)
    assert read_manifest(folder)["threads"] == (wanted or before)
    assert torch.get_num_threads() == before
