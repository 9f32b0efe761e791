"""Passes and targets of installed packages: built as a wheel, found by entry points, refused when they do not load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qatgraph.errors import PassError, QatgraphError, TargetError
from qatgraph.planning.target import load_target, target_names
from qatgraph.rewriting.pipeline import Pipeline
from qatgraph.rewriting.registry import pass_class, pass_names

ROOT = Path(__file__).parent.parent
PACKAGE = Path(__file__).parent / "plugin"
TABLE = (PACKAGE / "qatgraph_plugin" / "mini_npu.toml").read_text(encoding="utf-8")
MODEL = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        return x.abs().abs()

def model():
    return Model(), torch.randn(2, 4)
"""
CLI = """
import sys
from qatgraph.cli import app
for words in sys.argv[1:]:
    app(words.split(), standalone_mode=False)
    print("=" * 9, flush=True)
"""


# ---------------------------------------------------------------- a real package


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built as a wheel and unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "source"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(folder: Path, *commands: str, site: Path | None) -> subprocess.CompletedProcess[str]:
    """Commands in one fresh process, with or without the package."""
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    path = os.pathsep.join([*([str(site)] if site is not None else []), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    command = [sys.executable, "-c", CLI, *commands]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_an_installed_package_is_named_run_and_planned_for(site: Path, tmp_path: Path) -> None:
    job = ROOT / "tests" / "jobs" / "tiny.toml"
    commands = (
        "opt model.py:model -p canonicalize,fold-double-abs --print-after fold-double-abs",
        f"plan {job} --target mini-npu",
        "passes",
        "passes fold-double-abs",
        "targets",
        "targets mini-npu",
    )
    done = run(tmp_path, *commands, site=site)
    assert done.returncode == 0, done.stderr
    opt, plan, passes, one, targets, rows = done.stdout.split("=" * 9)[:-1]
    assert "  Model:abs = abs(x) : float32[2, 4]\n  return [Model:abs]" in opt
    assert plan.strip().startswith("plan for mini-npu")
    assert "int8 as MAC, by row linear.s8: the array multiplies [batch, 8] by [16, 8] in s8" in plan
    assert re.search(r"fold-double-abs +rewrite +Remove the absolute value of an absolute value\.", passes)
    assert "Refuses: nothing." in one
    assert re.search(r"mini-npu +a target of an installed package", targets)
    assert "linear.float" in rows


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        ("opt model.py:model -p fold-double-abs", "QG201: there is no pass 'fold-double-abs'"),
        (f"plan {ROOT}/tests/jobs/tiny.toml --target mini-npu", "QG401: there is no target 'mini-npu'"),
    ],
)
def test_without_the_package_nobody_knows_them(tmp_path: Path, command: str, refusal: str) -> None:
    done = run(tmp_path, command, site=None)
    assert done.returncode == 1
    assert refusal in done.stderr


# ---------------------------------------------------------------- packages that cannot be used

PASS, OTHER = "qatgraph.passes", "qatgraph.targets"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(package, group, name, value, source)``: a package with one entry point and one module."""

    def put(package: str, group: str, name: str, value: str, source: str = "") -> None:
        site = tmp_path / package
        (site / f"{package}-1.dist-info").mkdir(parents=True)
        (site / f"{package}-1.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 1\n", encoding="utf-8")
        (site / f"{package}-1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n", "utf-8")
        (site / f"{value.partition(':')[0]}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))

    return put


def source_of(name: str) -> str:
    return f"""
import qatgraph as qg

class Own(qg.RewritePass):
    name = "{name}"
    pattern = qg.Op("relu")

    def rewrite(self, match, edit):
        pass
"""


def ask_pass(name: str) -> str:
    return str(Pipeline.parse(name))


def ask_target(name: str) -> str:
    return load_target(name).name


@pytest.mark.parametrize(
    ("group", "ask", "names", "code"),
    [(PASS, ask_pass, pass_names, "QG215"), (OTHER, ask_target, target_names, "QG404")],
)
def test_two_packages_with_one_name_are_both_named(
    install: Install, group: str, ask: Callable[[str], str], names: Callable[[], object], code: str
) -> None:
    install("alpha", group, "own-name", "alpha_twice:Own", source_of("own-name"))
    install("beta", group, "own-name", "beta_twice:Own", source_of("own-name"))
    for question in (lambda: ask("own-name"), names):
        with pytest.raises(QatgraphError, match=rf"{code}.*\n.*\n.*(beta and from alpha|alpha and from beta)"):
            question()


@pytest.mark.parametrize(
    ("group", "ask", "name", "code"),
    [
        (PASS, ask_pass, "fold-gelu", "QG215"),
        (PASS, pass_class, "canonicalize", "QG215"),
        (OTHER, ask_target, "ort-cpu", "QG404"),
    ],
)
def test_a_name_of_ours_is_not_overruled(
    install: Install, group: str, ask: Callable[[str], object], name: str, code: str
) -> None:
    install("gamma", group, name, "gamma_ours:Own", source_of(name))
    with pytest.raises(
        QatgraphError, match=rf"{code}: two packages bring .*'{name}'[\s\S]*from qatgraph and from gamma"
    ):
        ask(name)


def test_other_names_stay_usable_beside_a_clash(install: Install) -> None:
    install("delta", PASS, "fold-gelu", "delta_clash:Own", source_of("fold-gelu"))
    install("epsilon", PASS, "do-nothing", "epsilon_fine:Own", source_of("do-nothing"))
    assert ask_pass("fold-silu,do-nothing") == "fold-silu,do-nothing"
    with pytest.raises(PassError, match="QG215"):
        ask_pass("fold-gelu")


FAULTY_PASSES = {
    "a module that is not there": ("nowhere.deeper:Own", "", "ModuleNotFoundError"),
    "a module that fails": ("fails_at_import:Own", "1 / 0", "ZeroDivisionError: division by zero"),
    "a class that is not there": ("lacks_the_class:Own", "", "AttributeError"),
    "no pass": ("is_no_pass:Own", "Own = int", "is no pass of this name"),
    "a pass of another name": ("other_name:Own", source_of("other-name"), "is no pass of this name"),
    "a pattern without sense": ("bad_pattern:Own", source_of("own-pass").replace("relu", "rleu"), "QG209"),
}


@pytest.mark.parametrize(("value", "source", "why"), FAULTY_PASSES.values(), ids=FAULTY_PASSES)
def test_a_pass_that_does_not_load_names_its_package(install: Install, value: str, source: str, why: str) -> None:
    install("zeta", PASS, "own-pass", value, source)
    with pytest.raises(PassError, match=rf"QG216: the pass 'own-pass' of zeta cannot be used[\s\S]*{why}"):
        ask_pass("own-pass")


FAULTY_TARGETS = {
    "a module that fails": ("fails_too:T", "1 / 0", "ZeroDivisionError: division by zero"),
    "no target": ("is_no_target:T", "T = 7", "is no Target, no TOML text"),
    "a table of another name": ("other_table:T", f"T = {TABLE!r}", "its table bears the name 'mini-npu'"),
    "a file that is not there": ("no_file:T", "T = '/no/such/file.toml'", "FileNotFoundError"),
}


@pytest.mark.parametrize(("value", "source", "why"), FAULTY_TARGETS.values(), ids=FAULTY_TARGETS)
def test_a_target_that_does_not_load_names_its_package(install: Install, value: str, source: str, why: str) -> None:
    install("eta", OTHER, "own-npu", value, source)
    with pytest.raises(TargetError, match=rf"QG405: the target 'own-npu' of eta cannot be used[\s\S]*{why}"):
        load_target("own-npu")


def test_a_wrong_table_names_its_package(install: Install) -> None:
    install("theta", OTHER, "mini-npu", "wrong_table:T", f"T = {TABLE.replace('bias =', 'bais =')!r}")
    with pytest.raises(TargetError, match=r"QG402[\s\S]*the target 'mini-npu' of theta[\s\S]*did you mean 'bias'"):
        load_target("mini-npu")


FORMS = {
    "text": f"T = {TABLE!r}",
    "path as text": f"T = {str(PACKAGE / 'qatgraph_plugin' / 'mini_npu.toml')!r}",
    "path": f"import pathlib\nT = pathlib.Path({str(PACKAGE / 'qatgraph_plugin' / 'mini_npu.toml')!r})",
    "Target": f"import qatgraph as qg, tomllib\nT = qg.Target(**tomllib.loads({TABLE!r}))",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_target_may_come_as(install: Install, form: str) -> None:
    install("iota", OTHER, "mini-npu", f"form_{form.lower().replace(' ', '_')}:T", FORMS[form])
    assert target_names()[-1] == "mini-npu"
    assert load_target("mini-npu") == load_target(str(PACKAGE / "qatgraph_plugin" / "mini_npu.toml"))


def test_the_nearest_name_may_be_of_a_package(install: Install) -> None:
    install("kappa", PASS, "fold-everything", "kappa_near:Own", source_of("fold-everything"))
    with pytest.raises(PassError, match=r"QG201[\s\S]*did you mean 'fold-everything'"):
        ask_pass("fold-everythin")
