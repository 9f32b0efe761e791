"""The tables of the README are generated; this test compares them, `--golden-write` writes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qatgraph.planning.target import load_target, target_names
from qatgraph.rewriting.registry import builtin_names, pass_class

README = Path(__file__).parent.parent / "README.md"


def passes_table() -> str:
    rows = [f"| `{name}` | {pass_class(name).summary()} |" for name in builtin_names()]
    return "\n".join(["| pass | what it does |", "|---|---|", *rows])


def targets_table() -> str:
    rows = [f"| `{name}` | {load_target(name).description} | {len(load_target(name).row)} |" for name in target_names()]
    return "\n".join(["| target | what it is | rows |", "|---|---|---|", *rows])


TABLES = {"passes": passes_table, "targets": targets_table}


def section(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found is not None, f"the README has no section '{name}'"
    return found[1]


@pytest.mark.parametrize("name", TABLES)
def test_table_is_current(name: str, request: pytest.FixtureRequest) -> None:
    text = README.read_text(encoding="utf-8")
    if request.config.getoption("--golden-write"):
        between = f"<!-- {name} -->\n{{}}\n<!-- end -->"
        README.write_text(
            text.replace(between.format(section(text, name)), between.format(TABLES[name]())), encoding="utf-8"
        )
        return
    assert section(text, name) == TABLES[name]()


def test_a_stale_table_is_seen() -> None:
    text = README.read_text(encoding="utf-8").replace("`pin-softmax`", "`pin-nothing`")
    assert section(text, "passes") != passes_table()


def test_readme_names_only_commands_that_exist() -> None:
    from qatgraph.cli import app

    known = {(c.name or c.callback.__name__) for c in app.registered_commands if c.callback is not None} | {"new"}
    used = set(re.findall(r"^\s*(?:\$ )?qatgraph (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= known
    assert used


def shown_classes(text: str) -> list[str]:
    return re.findall(r"^```python\n(class .*?)```", text, re.MULTILINE | re.DOTALL)


def test_the_pass_that_is_shown_is_the_example() -> None:
    example = (README.parent / "examples" / "custom_pass.py").read_text(encoding="utf-8")
    (shown,) = shown_classes(README.read_text(encoding="utf-8"))
    assert shown in example
    assert shown.replace("within(1e-12)", "same") not in example
