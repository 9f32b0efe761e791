"""``docs/passes.md`` is written from the docstrings; this test compares it, ``--golden-write`` writes it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from qatgraph.passes import PIPELINES
from qatgraph.rewriting.passes import GraphPass, Pass
from qatgraph.rewriting.registry import builtin_names, make_pass, pass_class

PAGE = Path(__file__).parent.parent / "docs" / "passes.md"
HEADING = re.compile(r"^(What|Why|Before and after|Refuses|Numerics): ", re.MULTILINE)
HEAD = """# Passes

Every built-in pass, in the order of `passes/__init__.py`. Written from the docstrings by `make golden`;
`qatgraph passes NAME` prints one.
"""


def section(name: str, cls: type[Pass]) -> str:
    """What a pass says of itself, its options, and where it stands."""
    summary, _, body = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    items = HEADING.sub(r"- **\1**: ", re.sub(r"\n\s+", " ", body))
    pipelines = [f"`{p}`" for p, steps in PIPELINES.items() if name in [s.partition("{")[0] for s in steps]]
    facts = [f"- **In the pipelines**: {', '.join(pipelines) or 'none; on request'}"]
    options = [f"`{f.name} = {f.default!r}`" for f in fields(cls)]
    facts += [f"- **Options**: {', '.join(options)}"] if options else []
    if issubclass(cls, GraphPass):
        facts += [
            f"- **{what.title()}**: {', '.join(p)}" for what in ("requires", "ensures") if (p := getattr(cls, what))
        ]
        facts += ["- **Looks at**: calibration data, and the plan for the user's target"] if cls.needs_data else []
    return "\n".join([f"## `{name}`", "", summary, "", items.rstrip(), *facts, ""])


def page() -> str:
    return "\n".join([HEAD, *(section(name, pass_class(name)) for name in builtin_names())])


def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--golden-write"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "a docstring has changed: run `make golden`"


def test_every_pass_has_its_five_headings_on_the_page() -> None:
    texts = {name: section(name, pass_class(name)) for name in builtin_names()}
    assert {name for name, text in texts.items() if len(re.findall(r"^- \*\*", text, re.MULTILINE)) < 6} == set()
    assert texts["fold-gelu"].splitlines()[0] == "## `fold-gelu`"


def test_a_changed_docstring_an_option_and_a_pipeline_show() -> None:
    old = make_pass("fold-gelu")
    changed = type("FoldGelu", (type(old),), {"__doc__": (type(old).__doc__ or "").replace("Why:", "Why: because")})
    assert section("fold-gelu", changed) != section("fold-gelu", type(old))
    assert "`min_bytes = " in section("pin-small-embeddings", pass_class("pin-small-embeddings"))
    assert "- **In the pipelines**: `canonicalize`" in section("fold-gelu", type(old))
    assert "- **Looks at**: " in section("scale-outliers", pass_class("scale-outliers"))
    assert "- **Looks at**: " not in section("fold-gelu", type(old))
    assert "- **In the pipelines**: none; on request" in section("fold-nothing", type(old))
