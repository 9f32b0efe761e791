"""The tutorials run: blocks of files are written, commands are run, and what they print stands in the text."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qatgraph.cli import app
from qatgraph.errors import QatgraphError

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PASSES, ACCELERATOR = (ROOT / "docs" / "tutorials" / f"{n}.md" for n in ("write-a-pass", "describe-an-accelerator"))
THEIRS = ("my_npu.toml", "simulator.py", "honest.toml")  # what describes the accelerator
NAME = re.compile(r"# (\w+\.\w+)\n")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A file to write, or a command with what it prints."""

    line: int
    file: str = ""
    command: str = ""
    text: str = ""


def steps(text: str) -> Iterator[Step]:
    """The steps of a tutorial: blocks of files, whose first line is a comment with a name, and ``console`` blocks."""
    for block in FENCE.finditer(text):
        line = text[: block.start()].count("\n") + 2
        if name := NAME.match(block[2]):
            yield Step(line, file=name[1], text=block[2])
        elif block[1] == "console":
            for one in re.split(r"^\$ ", block[2], flags=re.MULTILINE)[1:]:
                command, _, output = one.partition("\n")
                yield Step(line, command=command, text=output)


def run(command: str, folder: Path) -> str:
    """What a command prints; ours run in this process, which has torch loaded."""
    if not command.startswith("qatgraph "):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    for name in [n for n in sys.modules if n.startswith("qatgraph_job_")]:  # a file of this name in another folder
        del sys.modules[name]
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app(shlex.split(command)[1:], standalone_mode=False)
        except QatgraphError as error:
            print(error.text())
    return out.getvalue()


def first_difference(text: str, folder: Path) -> str:
    """Follow a tutorial in a folder up to the first command that prints something else."""
    for step in steps(text):
        if step.file:
            (folder / step.file).write_text(step.text, encoding="utf-8")
            continue
        have = "\n".join(line.rstrip() for line in run(step.command, folder).splitlines()) + "\n"
        if not doctest.OutputChecker().check_output(step.text, have, doctest.ELLIPSIS):
            return f"line {step.line}: '{step.command}' prints\n{have}"
    return ""


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: str(p.stem))
def test_a_tutorial_does_what_it_says(path: Path, tmp_path: Path) -> None:
    assert first_difference(path.read_text(encoding="utf-8"), tmp_path) == ""


@pytest.mark.parametrize(
    ("path", "old", "fault", "command"),
    [
        (PASSES, "self.query(x) * 0.5", "self.query(x) * 0.25", "opt model.py:model -p remove-no-ops"),
        (PASSES, "Block:mul#4 = mul(out:linear, 2.0)", "Block:mul#4 = mul(out:linear, 3.0)", "opt model.py:model -p"),
        (
            PASSES,
            'match["factor"] for node in old]',
            'match["factor"] * 2 for node in old]',
            "opt model.py:model -p fold_linear",
        ),
        (PASSES, '.refuse("the linear is', '.refuse("the result is', "opt model.py:model -p fold_linear_scale.py --ex"),
        (PASSES, "wrote golden/", "wrote silver/", "new pass fold-linear-scale"),
        (ACCELERATOR, 'kernel = "CLIP"', 'kernel = "CLAMP"', "plan job.toml"),
        (ACCELERATOR, "return np.floor(total", "return np.rint(total", "probe my_npu.toml"),
        (ACCELERATOR, "scale 128, zero point 0", "scale 64, zero point 0", "probe my_npu.toml"),
        (ACCELERATOR, '"linear.mac"\ndeviation = 1', '"linear.mac"\ndeviation = 0', "probe honest.toml"),
        (ACCELERATOR, "per-channel(0) power", "per-tensor power", "probe wish.toml"),
        (ACCELERATOR, "QG403", "QG404", "run job.toml"),
    ],
    ids=["the model", "an output", "the rewrite", "the refusal", "a file", "a row", "the simulator", "a counterexample",
         "the deviation", "a wish", "a code"],
)  # fmt: skip
def test_a_fault_in_a_tutorial_is_seen(path: Path, old: str, fault: str, command: str, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    assert f"'qatgraph {command}" in first_difference(text.replace(old, fault), tmp_path)


def test_a_test_that_fails_in_a_tutorial_is_seen(tmp_path: Path) -> None:
    text = PASSES.read_text(encoding="utf-8").replace("atol=1e-6", "atol=-1.0")
    assert "prints\n" in (found := first_difference(text, tmp_path))
    assert "test_the_results_stay" in found


def lines_of_passes(text: str) -> dict[int, tuple[int, set[str]]]:
    """Lines of code, and what is imported, of each block that defines a pass, by its line in the text."""
    found = {}
    for step in steps(text):
        if "qg.RewritePass" not in step.text or not step.file:
            continue
        tree = ast.parse(step.text)
        imported = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
        bare = [line for line in step.text.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
        found[step.line] = (len(bare), imported)
    return found


def test_its_passes_have_at_most_fifteen_lines_that_import_qatgraph_only() -> None:
    text = PASSES.read_text(encoding="utf-8")
    passes = lines_of_passes(text)
    assert len(passes) == 3
    assert max(lines for lines, _ in passes.values()) <= 15
    assert all(imported == {"import qatgraph as qg"} for _, imported in passes.values())
    spoiled = lines_of_passes(
        text.replace("import qatgraph as qg\n\nLINEAR", "import qatgraph as qg\nimport torch\nLINEAR")
    )
    assert sorted(spoiled) == sorted(passes)
    assert max(lines for lines, _ in spoiled.values()) == 16
    assert {"import torch"} <= set.union(*(imported for _, imported in spoiled.values()))


def lines_of_an_accelerator(text: str) -> int:
    """What a user writes to describe and to simulate it: lines that are neither empty nor a comment."""
    theirs = [s for s in steps(text) if s.file in THEIRS]
    assert tuple(s.file for s in theirs) == THEIRS
    lines = [line.strip() for s in theirs for line in s.text.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_an_accelerator_takes_at_most_sixty_lines() -> None:
    text = ACCELERATOR.read_text(encoding="utf-8")
    assert lines_of_an_accelerator(text) <= 60
    row = text[text.index("[[row]]") : text.index('[[row]]\nid = "relu.clip"')]
    assert lines_of_an_accelerator(text.replace(row, row * 2, 1)) > 60
