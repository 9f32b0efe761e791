"""Rows on machines and versions that are not installed: what is fetched, what changes, the table on each of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import qatgraph as qg
from qatgraph.backends import emulation, fetched, ort_cpu
from qatgraph.errors import LowerError, VerifyError
from qatgraph.planning.target import Row, load_target, ordered
from qatgraph.probing.cases import Case
from qatgraph.probing.comparing import compare
from qatgraph.probing.report import RowDiff
from qatgraph.probing.search import probe_row
from tests.false_rows import planted, sample, with_row

ORT = load_target("ort-cpu")
ARM = ("arm64", "arm64-dot")
OLDER = "1.31.1"


def row(name: str) -> Row:
    return next(r for r in ORT.row if r.id == name)


# what is fetched


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that is a folder with one onnxruntime and one numpy, which hold nothing."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("onnxruntime-7.7.7", "numpy-1.0"):
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
            package, _, version = name.partition("-")
            info = f"{name}.dist-info"
            wheel.writestr(f"{package}/__init__.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return tmp_path / "cache" / "qatgraph"


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put scripts in the place of apt-get and dpkg-deb: one package, which holds a Python; ``apt`` comes first."""

    def place(apt: str = "") -> None:
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        scripts = {
            "apt-get": f'{apt}\ncache=$(sed -n \'s/.*Dir::Cache "\\(.*\\)".*/\\1/p\' "$APT_CONFIG")\n'
            'case "$*" in *install*) touch "$cache/archives/python.deb";; esac',
            "dpkg-deb": 'mkdir -p "$3/usr/bin" && ln -s python3.12 "$3/usr/bin/python3"',
        }
        for name, script in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")

    return place


def refused(act: Callable[[], object], *sentences: str) -> None:
    with pytest.raises(VerifyError, match="QG611") as caught:
        act()
    assert caught.value.where
    assert caught.value.todo
    assert [s for s in sentences if s not in caught.value.text()] == []


def test_a_version_is_fetched_once(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = fetched.onnxruntime("7.7.7")
    assert {p.name for p in found.iterdir()} >= {"onnxruntime", "numpy"}
    assert found.parent == store
    assert f"fetching {found.name} into {store}, once" in capfd.readouterr().err
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    assert fetched.onnxruntime("7.7.7") == found
    assert capfd.readouterr().err == ""


def test_arm_is_made_of_its_packages_and_of_wheels_for_their_python(store: Path, debian: Callable[[], None]) -> None:
    debian()
    found = fetched.arm_onnxruntime("7.7.7")
    assert found.name == "onnxruntime-7.7.7-cpython-312-aarch64"
    root = fetched.arm_root()
    assert "CPU implementer\t: 0x41" in (root / "proc/cpuinfo").read_text(encoding="utf-8")
    assert sorted(p.name for p in store.iterdir()) == sorted([root.name, found.name])


@pytest.mark.parametrize(
    ("version", "says"),
    [("7.7.8", "No matching distribution|Could not find a version"), ("../7", "no version"), ("--pre", "no version")],
)
def test_a_version_that_is_not_to_be_had_leaves_nothing(store: Path, version: str, says: str) -> None:
    with pytest.raises(VerifyError, match=says):
        fetched.onnxruntime(version)
    assert not store.exists() or not any(store.iterdir())


@pytest.mark.parametrize(
    ("apt", "says"),
    [
        ('echo "E: Failed to fetch the list" >&2; exit 100', "Failed to fetch the list"),
        ('case "$*" in *install*) echo "E: no such package" >&2; exit 100;; esac', "no such package"),
    ],
)
def test_without_debians_packages_there_is_no_half_root(
    store: Path, debian: Callable[[str], None], apt: str, says: str
) -> None:
    debian(apt)
    refused(fetched.arm_root, says, "apt-get update")
    assert not any(store.iterdir())


def test_a_source_that_fails_and_is_not_needed_does_not_matter(store: Path, debian: Callable[[str], None]) -> None:
    debian('case "$*" in *update*) echo "E: a stranger fails" >&2; exit 100;; esac')
    assert (fetched.arm_root() / "usr/bin/python3").is_symlink()


def test_what_is_missing_is_named(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(fetched.arm_root, "there is no 'apt-get' in PATH")
    with pytest.raises(VerifyError, match="QG608") as caught:
        qg.probe("ort-cpu", isa="arm64", progress=False)
    assert "qemu-aarch64" in caught.value.text()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qatgraph").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused(lambda: fetched.onnxruntime("7.7.7"), str(tmp_path), "XDG_CACHE_HOME")


# what a row says of versions


def test_versions_follow_each_other_by_their_numbers() -> None:
    assert ordered("1.9.2") < ordered("1.24.1") < ordered("1.32.0") == ordered("1.32.0.dev1")
    since = row("softmax.qlinear").model_copy(update={"versions": "onnxruntime >= 1.24.1"})
    assert [since.claims(v) for v in ("1.23.2", "1.24.1", "1.32.0", "")] == [False, True, True, True]
    assert since.model_copy(update={"versions": ""}).claims("0.1")


def test_a_row_is_not_held_to_a_version_of_which_it_does_not_speak() -> None:
    with ort_cpu.engine(ORT, "native", "") as engine:
        false = row("sigmoid.qlinear").model_copy(update={"kernel": "Sigmoid"})
        later = false.model_copy(update={"versions": "onnxruntime >= 99"})
        assert probe_row(with_row(ORT, false), false, engine, 5).verdict == "false"
        assert probe_row(with_row(ORT, later), later, engine, 5).verdict == "unclaimed"


# what changes from one engine to another


def change(name: str, act: Callable[[Case, qg.Realized], qg.Realized], version: str = "") -> RowDiff:
    """What changes where the second engine does as ``act`` says, with nothing behind the operation."""
    with ort_cpu.engine(ORT, "native", "") as one:
        one = replace(one, neighbours=False)
        two = replace(one, realize=lambda case: act(case, one.realize(case)), version=version or one.version)
        return compare(ORT, one, two, rows=name, examples=20, progress=False).rows[0]


def test_nothing_changes_on_one_and_the_same_engine() -> None:
    found = change("sigmoid.qlinear", lambda case, seen: seen)
    assert found == RowDiff("sigmoid.qlinear", 20, ("holds", "holds"), {})
    assert found.changes() == ""


def test_another_kernel_is_told_with_the_smallest_case() -> None:
    found = change("sigmoid.qlinear", lambda case, seen: replace(seen, kernel="Sigmoid", int8=False))
    assert found.kernels == {"QLinearSigmoid in int8 -> Sigmoid in float": 20}
    assert found.verdicts == ("holds", "false")
    assert "[1, 1]" in found.smallest


def test_other_integers_are_told_in_steps_and_only_where_they_differ() -> None:
    def shifted(case: Case, seen: qg.Realized) -> qg.Realized:
        wide = case.inputs["x"].q.shape[-1] > 4
        shift = np.where(seen.output < 100, 3, -3) * wide
        return replace(seen, output=(seen.output + shift).astype(seen.output.dtype))

    found = change("reshape.integers", shifted)
    assert 0 < found.values < 20
    assert found.steps == 3
    assert found.verdicts == ("holds", "false")
    assert ", 5]" in found.smallest, "the smallest that is wide"


def test_floats_that_two_libraries_round_apart_are_counted_and_not_shown() -> None:
    def rounded(case: Case, seen: qg.Realized) -> qg.Realized:
        return seen if case.out else replace(seen, output=np.nextafter(seen.output, np.float32(9)))

    found = change("gelu.float", rounded)
    assert found.values
    assert 0 < found.relative < 2e-6
    assert found.smallest == ""
    assert found.verdicts == ("holds", "holds")


def test_a_refusal_is_a_change() -> None:
    def refuse(case: Case, seen: qg.Realized) -> qg.Realized:
        raise LowerError("QG508", "it fails", where="two", why="no such kernel")

    found = change("sigmoid.qlinear", refuse)
    assert found.kernels == {"QLinearSigmoid in int8 -> refused": 20}
    assert found.verdicts == ("holds", "false")
    assert change("softmax.qlinear", refuse, "1.24.1").verdicts == ("holds", "unclaimed")


def test_the_command_takes_one_or_two_engines_and_no_simulator_beside(tmp_path: Path) -> None:
    code = "from qatgraph.cli import main; main()"
    run = [sys.executable, "-c", code, "probe", "ort-cpu", "--row", "sigmoid*", "--examples", "3"]
    both = subprocess.run([*run, "--diff", "1.24", "--engine", "a.py:b"], capture_output=True, text=True, check=False)
    assert both.returncode == 2
    assert "--diff asks for two" in " ".join(both.stderr.split()).replace("│ ", "")
    import onnxruntime

    same = subprocess.run([*run, "--diff", onnxruntime.__version__], capture_output=True, text=True, check=False)
    assert same.returncode == 0, same.stderr
    assert "0 of 1 rows are false on one alone" in " ".join(same.stdout.split())
    assert "holds, holds nothing" in " ".join(same.stdout.split())


# the table on each of them


@cache
def absent(isa: str) -> str:
    """Why this machine cannot show it; a fault in what is ours is no reason."""
    index = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "packaging"]
    if isa in ARM and not (shutil.which(emulation.ARM_EMULATOR) and shutil.which("apt-get")):
        return "NOT RUN: qemu-aarch64 or apt-get is not installed"
    if subprocess.run(index, capture_output=True, check=False).returncode:
        return "NOT RUN: there is no package index"
    return ""


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(instruction set, version)."""
    isa, version = request.param
    if absent(isa):
        pytest.skip(absent(isa))
    return isa, version


assert ORT.tested is not None
PLACES = [("arm64", ""), ("arm64-dot", ""), ("native", ORT.tested[0]), ("native", OLDER), ("arm64", OLDER)]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, indirect=True, ids="-".join)
def test_all_rows_hold(place: tuple[str, str]) -> None:
    isa, version = place
    found = qg.probe("ort-cpu", isa=isa, version=version, examples=50, progress=False)
    assert [r.text() for r in found.false] == []
    assert {r.row for r in found.rows if r.verdict == "unclaimed"} == {r.id for r in ORT.row if not r.claims(version)}
    assert sum(r.verdict == "holds" for r in found.rows) >= len(ORT.row) - 3


@pytest.mark.slow
@pytest.mark.parametrize("place", [("arm64", "")], indirect=True)
def test_a_false_row_is_caught_on_arm(place: tuple[str, str]) -> None:
    plants = [*planted(ORT, "sse"), *sample(ORT, "native", 8, seed=5)]
    with ort_cpu.engine(ORT, *place) as engine:
        for name, target, false in plants:
            assert probe_row(target, false, engine, 200).verdict == "false", name


VERSIONS = sorted({r.versions.rpartition(" ")[2] for r in ORT.row if r.versions}, key=ordered)


@pytest.mark.slow
@pytest.mark.parametrize("place", [("native", v) for v in VERSIONS], indirect=True, ids="-".join)
def test_a_row_holds_on_the_oldest_version_that_it_names(place: tuple[str, str]) -> None:
    with ort_cpu.engine(ORT, *place) as engine:
        for one in (r for r in ORT.row if r.versions.endswith(f" {place[1]}")):
            assert probe_row(ORT, one, engine, 40).text() == f"'{one.id}' is false: "


@pytest.mark.slow
@pytest.mark.parametrize("place", [("native", "1.24.1"), ("native", "1.26.0"), ("native", OLDER)], indirect=True)
def test_a_row_that_names_too_old_a_version_is_caught(place: tuple[str, str]) -> None:
    with ort_cpu.engine(ORT, *place) as engine:
        rows = [r for r in ORT.row if not r.claims(place[1]) and r.placement == "int8"]  # floats are off in rare cases
        assert rows
        for one in rows:
            older = one.model_copy(update={"versions": f"onnxruntime >= {place[1]}"})
            assert probe_row(with_row(ORT, older), older, engine, 100).verdict == "false"


@pytest.mark.slow
@pytest.mark.parametrize("place", [("native", OLDER)], indirect=True, ids="-".join)
def test_the_difference_of_two_versions_is_shown(place: tuple[str, str]) -> None:
    found = qg.probe_diff("ort-cpu", place[1], rows="s*", examples=30, progress=False)
    assert {r.row: r.verdicts for r in found.rows if r.smallest} == {"softmax.qlinear": ("holds", "unclaimed")}
    assert found.broken == ()
