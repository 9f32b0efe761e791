"""``--help``: the commands in the order in which they are used, each with an example that runs as it stands."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qatgraph.cli import ORDER, app
from qatgraph.errors import PassError

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMANDS = [*ORDER, "new pass", "new target"]


def answer(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app(list(words), standalone_mode=False)
    return out.getvalue()


def example(text: str) -> str:
    """The whole line of the example, as a user would copy it; empty if there is none, or if it is broken."""
    found = re.search(r"^  Example: (qatgraph .*)\n\n", text, re.MULTILINE)
    return found[1] if found else ""


def listed(text: str) -> list[str]:
    return re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], re.MULTILINE)


def test_the_commands_stand_in_the_order_in_which_they_are_used() -> None:
    text = answer("--help")
    assert listed(text) == [*ORDER, "new"]
    assert "..." not in text.partition("Commands:")[2], "a summary is cut off"
    assert listed("Commands:\n  plan  a\n  run   b\n") == ["plan", "run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_on_one_line(command: str) -> None:
    assert example(answer(*command.split(), "--help")).startswith(f"qatgraph {command} ")
    assert example("  Example: qatgraph opt --print-\n  after changed\n\n") == ""


def small(folder: Path) -> Path:
    """The examples, with a job that takes seconds."""
    shutil.copytree(EXAMPLES, folder / "examples")
    job = folder / "examples" / "jobs" / "digits.toml"
    text = job.read_text(encoding="utf-8")
    for old, new in (("[0, 1, 2]", "[0]"), ("epochs = 40", "epochs = 1"), ("steps = 100", "steps = 2")):
        assert old in text
        text = text.replace(old, new)
    job.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another in one folder, as the commands stand: what one writes, the next reads."""
    monkeypatch.chdir(small(tmp_path))
    for command in COMMANDS:
        words = shlex.split(example(answer(*command.split(), "--help")))[1:]
        if command != "bisect":
            assert answer(*words), command
            continue
        with pytest.raises(PassError, match="QG214"):  # the example's passes are right
            answer(*words)
    assert {"build", "npu.json", "my_passes", "my_target"} <= {p.name for p in tmp_path.iterdir()}
    with pytest.raises(PassError, match="QG201"):
        answer("opt", "examples/jobs/digits.toml", "-p", "examples/no_pass.py")
