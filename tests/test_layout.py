"""The house: floors, packages, what an import loads, sizes. Read from the source by ``ast``, and by fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qatgraph as qg
from tests.models import captured

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qatgraph"

FLOORS: dict[str, int] = {
    **dict.fromkeys(["errors", "ops", "specs", "version"], 0),
    "ir": 1,
    **dict.fromkeys(["rewriting", "planning"], 2),
    **dict.fromkeys(["frontend", "quantizers", "calibration", "conversion", "reference", "parity", "training"], 3),
    **dict.fromkeys(["report", "fidelity", "job", "kernels", "operators", "progress", "proof", "pattern_code"], 3),
    **dict.fromkeys(["probing", "regions", "bias_correction", "saturation", "borders"], 3),
    **dict.fromkeys(["passes", "backends"], 4),
    **dict.fromkeys(["", "api", "cli", "runner", "latency", "sources", "engines", "tested"], 5),
}
OPEN_FLOORS = {3, 5}  # their rooms may use one another
ENGINES = {"onnx", "onnxruntime", "onnxscript", "onnx_ir", "openvino", "tensorrt"}
THIRD_PARTY: dict[int, set[str]] = {0: set(), 1: {"torch", "networkx"}, 2: {"torch", "networkx", "pydantic"}}


def modules(package: Path) -> dict[str, Path]:
    """Every module below a package, also behind symbolic links: ``ir.graph`` -> its file; the package itself is ""."""
    found: dict[str, Path] = {}
    for file in sorted(package.glob("*.py")):
        found["" if file.stem == "__init__" else file.stem] = file
    for folder in sorted(p for p in package.iterdir() if (p / "__init__.py").is_file()):
        for name, file in modules(folder).items():
            found[f"{folder.name}.{name}".rstrip(".")] = file
    return found


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it lazy) of each import: lazy ones stand in a function; typing-only ones count as well."""
    tree = ast.parse(source)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def breaches(module: str, source: str) -> list[str]:
    """The imports of a module that the table of floors forbids, as sentences."""
    room = module.partition(".")[0]
    floor = FLOORS[room]
    return [
        f"'{module}' (floor {floor}) imports '{name}'{why}"
        for name, lazy in imports(source)
        if (why := _foreign(name, lazy, room) if name.partition(".")[0] != "qatgraph" else _own(name, room))
    ]


def _own(name: str, room: str) -> str:
    head = [*name.split("."), ""][1]
    other = head if head in FLOORS else ""  # a name that the package itself re-exports
    if other == room:
        return " : no pass imports another" if room == "passes" else ""
    floor, above = FLOORS[room], FLOORS[other]
    if above < floor or (above == floor and floor in OPEN_FLOORS) or (room, other) == ("planning", "rewriting"):
        return ""
    return f" (floor {above})"


def _foreign(name: str, lazy: bool, room: str) -> str:
    head = name.partition(".")[0]
    if head in sys.stdlib_module_names:
        return ""
    if head in ENGINES:
        return "" if room == "backends" and lazy else " : engines are imported inside the functions of a backend"
    allowed = THIRD_PARTY.get(FLOORS[room])
    return "" if allowed is None or head in allowed else " : not a library of this floor"


@pytest.mark.parametrize("module", modules(PACKAGE))
def test_a_module_imports_only_from_lower_floors(module: str) -> None:
    assert breaches(module, modules(PACKAGE)[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specs", "import torch"),
        ("ir.graph", "import pydantic"),
        ("ir.graph", "def f():\n    from qatgraph.planning.plan import Plan"),
        ("rewriting.edit", "from qatgraph.planning import plan"),
        ("planning.build", "from qatgraph.passes.fold_gelu import FoldGelu"),
        ("planning.build", "from qatgraph import capture"),
        ("conversion", "import qatgraph.backends.ort_cpu"),
        ("conversion", "def f():\n    import onnx"),
        ("passes.fold_gelu", "from qatgraph.passes.fold_addmm import FoldAddmm"),
        ("passes.fold_gelu", "from qatgraph.backends import ort_cpu"),
        ("backends.ort_cpu", "from qatgraph.passes.fold_addmm import FoldAddmm"),
        ("backends.ort_cpu", "import onnxruntime"),
        ("backends.openvino_cpu", "import openvino"),
        ("runner", "import onnx"),
    ],
)
def test_the_floors_refuse_planted_imports(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in modules(PACKAGE)} <= set(FLOORS)


def packages(package: Path) -> set[str]:
    return {
        ".".join(["qatgraph", *name.split(".")]).rstrip(".")
        for name, file in modules(package).items()
        if file.name == "__init__.py"
    }


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(settings["packages"]) == packages(PACKAGE)
    for name, folder in settings["package-dir"].items():
        assert (ROOT / folder).samefile(PACKAGE.parent / name.replace(".", "/"))


def test_a_package_that_nobody_listed_is_seen(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "deeper"):
        (folder / "__init__.py").touch()
    assert packages(tmp_path) == {"qatgraph", "qatgraph.deep", "qatgraph.deep.deeper"}


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_the_outer_packages_are_links_and_flat(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert [p.name for p in link.iterdir() if p.is_dir() and p.name != "__pycache__"] == []


def test_files_stay_short() -> None:
    long = {n: c for n, f in modules(PACKAGE).items() if (c := len(f.read_text(encoding="utf-8").splitlines())) >= 400}
    assert long == {}


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the root of the repository."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after some code has run in a fresh interpreter."""
    done = run(f"{textwrap.dedent(code)}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_qatgraph_loads_no_engine_and_no_torch() -> None:
    have = loaded("import qatgraph")
    assert have & (ENGINES | {"torch"}) == set()
    assert "torch" in loaded("import qatgraph; qatgraph.Graph"), "the check sees what a first use loads"


def test_the_passes_are_never_imported_by_their_folder() -> None:
    every = (
        "import importlib, pkgutil, qatgraph.passes as p\n[importlib.import_module(f'{p.__name__}.{m.name}') for m in "
    )
    assert "passes" not in loaded(f"{every}pkgutil.iter_modules(p.__path__)]")
    assert "passes" in loaded("import passes"), "the check sees it"


BLOCKER = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition('.')[0] in {'torch', 'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir'}:
                raise ImportError(f'{name} is blocked')

    sys.meta_path.insert(0, Blocker())
    import qatgraph as qg
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(qg.plan(captured("mlp")).to_json(), encoding="utf-8")
    return path


def test_a_plan_reads_without_torch(plan_file: Path) -> None:
    done = run(
        f"""{BLOCKER}
    from qatgraph.planning.explain import diff, explain, module_tree
    plan = qg.Plan.load({str(plan_file)!r})
    assert diff(plan, plan) == [] and module_tree(plan) and explain(plan, 'up').decisions
    print(plan, plan.hash())
    """
    )
    assert done.returncode == 0, done.stderr
    plan = qg.Plan.load(plan_file)
    assert done.stdout == f"{plan} {plan.hash()}\n"


def test_the_blocker_blocks_torch() -> None:
    done = run(f"{BLOCKER}\n    qg.Graph")
    assert done.returncode == 1
    assert "torch is blocked" in done.stderr
