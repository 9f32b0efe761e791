"""``qatgraph new``: skeletons that work as they are, whose tests see a fault, and that overwrite nothing."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qatgraph.cli import app
from qatgraph.errors import JobError

ROOT = Path(__file__).parent.parent
SKELETONS = ROOT / "qatgraph" / "skeletons"
NAMES = {"pass": "fold-double-negation", "target": "my-npu"}
FILES = {
    "pass": ["fold_double_negation.py", "golden/fold-double-negation.txt", "test_fold_double_negation.py"],
    "target": ["golden/my-npu.txt", "my_npu.toml", "test_my_npu.py"],
}


def new(*words: str) -> None:
    app(["new", *words], standalone_mode=False)


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return {str(f.relative_to(folder)): f.read_text(encoding="utf-8") for f in files}


def make(folder: Path) -> Path:
    for kind, name in NAMES.items():
        new(kind, name, "--output", str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with both skeletons; read it, and spoil copies only. ``--golden-write`` writes their golden texts."""
    if request.config.getoption("--golden-write"):
        found = written_anew(make(tmp_path_factory.mktemp("golden")))
        for kind, name in NAMES.items():
            template = found[f"{name}.txt"].replace(name, "$NAME")
            (SKELETONS / f"{kind}.txt.in").write_text(template, encoding="utf-8")
    return make(tmp_path_factory.mktemp("new") / "deep" / "folder")


def run_tests(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest as a user runs it in that folder, with this checkout installed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_files_have_the_names_that_were_asked_for(made: Path) -> None:
    assert sorted(contents(made)) == sorted(FILES["pass"] + FILES["target"])
    assert [f for f, text in contents(made).items() if "$" in text] == []


def test_the_generated_tests_pass_outside_the_repository(made: Path) -> None:
    done = run_tests(made)
    assert done.stdout.splitlines()[-1].startswith("5 passed"), done.stdout


FAULTS = {  # file, what stands there, the fault, and the tests that must see it
    "the rewrite takes the wrong value": (
        "fold_double_negation.py",
        'edit.bypass(match["outer"], match["x"])',
        'edit.bypass(match["outer"], match["inner"])',
        {"test_the_graph_that_it_leaves", "test_the_results_stay", "test_what_it_refuses_and_why"},
    ),
    "the pass rewrites nothing": (
        "fold_double_negation.py",
        'qg.Op("neg", qg.AnyValue("x"), name="inner")',
        'qg.Op("abs", qg.AnyValue("x"), name="inner")',
        {"test_the_graph_that_it_leaves", "test_what_it_refuses_and_why"},
    ),
    "the target takes another kernel": (
        "my_npu.toml",
        "MatMulInt8",
        "MatMulInt9",
        {"test_the_plan_of_a_small_model"},
    ),
    "the target has no int8": (
        "my_npu.toml",
        'placement = "int8"',
        'placement = "host"',
        {"test_the_plan_of_a_small_model", "test_the_linears_are_int8"},
    ),
}


def test_the_generated_tests_see_a_fault(made: Path, tmp_path: Path) -> None:
    """Each fault in a copy of its own, all in one process: the folders hold files of the same names."""
    for number, (file, old, fault, _) in enumerate(FAULTS.values()):
        shutil.copytree(made, tmp_path / str(number))
        path = tmp_path / str(number) / file
        assert old in path.read_text(encoding="utf-8")
        path.write_text(path.read_text(encoding="utf-8").replace(old, fault), encoding="utf-8")
    done = run_tests(tmp_path, "--import-mode=importlib")
    failed = set(re.findall(r"FAILED (\d)/test_\w+\.py::(\w+)", done.stdout))
    wanted = {(str(n), test) for n, (_, _, _, tests) in enumerate(FAULTS.values()) for test in tests}
    assert failed == wanted, done.stdout


def written_anew(folder: Path) -> dict[str, str]:
    """The golden texts that the generated tests write into a folder."""
    for path in (folder / "golden").iterdir():
        path.write_text("", encoding="utf-8")
    done = run_tests(folder, GOLDEN_WRITE="1")
    assert done.returncode == 0, done.stdout
    return contents(folder / "golden")


def test_the_golden_texts_are_written_anew_by_one_switch(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "again")
    assert written_anew(tmp_path / "again") == contents(made / "golden")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("pass", "Fold-Twice", "small letters and digits"),
        ("pass", "fold_twice", "small letters and digits"),
        ("pass", "../fold-twice", "small letters and digits"),
        ("pass", "fold-", "small letters and digits"),
        ("pass", "2-fold", "small letters and digits"),
        ("pass", "", "small letters and digits"),
        ("pass", "fold", "it is one word"),
        ("pass", "fold-gelu", "there is a pass of this name"),
        ("target", "my npu", "small letters and digits"),
        ("target", "ort-cpu", "there is a target of this name"),
    ],
)
def test_a_bad_name_is_refused(tmp_path: Path, kind: str, name: str, why: str) -> None:
    with pytest.raises(JobError, match=rf"QG810: '{re.escape(name)}' cannot be the name of a {kind}[\s\S]*{why}"):
        new(kind, name, "--output", str(tmp_path))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in FILES for file in FILES[kind]])
def test_what_exists_is_not_overwritten(tmp_path: Path, kind: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine", encoding="utf-8")
    with pytest.raises(JobError, match=rf"QG811: cannot write '{Path(file).name}'[\s\S]*it exists"):
        new(kind, NAMES[kind], "--output", str(tmp_path))
    assert contents(tmp_path) == {file: "mine"}


@pytest.mark.parametrize("blocked", ["folder", "folder/golden"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file", encoding="utf-8")
    with pytest.raises(JobError, match="QG811: cannot write 'folder'"):
        new("pass", NAMES["pass"], "--output", str(tmp_path / "folder"))
    assert contents(tmp_path) == {blocked: "a file"}


# ---------------------------------------------------------------- how small a pass is


def lines_of(source: str) -> int:
    """Lines of code: without blank ones, comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return sum(bool(line.strip()) for line in ast.unparse(tree).splitlines())


def imports_of(source: str) -> set[str]:
    nodes = ast.walk(ast.parse(source))
    return {ast.unparse(n) for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))}


def test_a_pass_is_at_most_fifteen_lines_that_import_qatgraph_only(made: Path) -> None:
    source = (made / "fold_double_negation.py").read_text(encoding="utf-8")
    assert lines_of(source) <= 15
    assert imports_of(source) == {"import qatgraph as qg"}
    spoiled = source.replace("import qatgraph as qg\n", "import qatgraph as qg\nimport torch\n") + "x = 1\n\n" * 15
    assert lines_of(spoiled) == lines_of(source) + 16
    assert imports_of(spoiled) == {"import qatgraph as qg", "import torch"}


def missing(skeletons: list[str], patterns: list[str]) -> list[str]:
    return [f for f in skeletons if not any(fnmatch.fnmatch(f"skeletons/{f}", p) for p in patterns)]


def test_the_wheel_holds_every_skeleton() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = [f.name for f in SKELETONS.iterdir()]
    assert len(files) == 6
    assert missing(files, settings["package-data"]["qatgraph"]) == []
    assert missing(files, ["py.typed", "skeletons/*.txt.in"]) != []


@pytest.mark.parametrize("kind", FILES)
def test_help_has_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    new(kind, "--help")
    assert f"Example: qatgraph new {kind}" in capsys.readouterr().out
