"""Finds passes by name or file. Built-in ones are listed as strings, so that no lower floor imports them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from qatgraph.errors import PassError, nearest
from qatgraph.rewriting.passes import GraphPass, Pass, PlanningPass, RewritePass, parse_options

BUILTIN_PACKAGE = "qatgraph.passes"


def builtin_names() -> tuple[str, ...]:
    return tuple(importlib.import_module(BUILTIN_PACKAGE).BUILTIN)


def pass_class(name: str) -> type[Pass]:
    """The class of a built-in pass."""
    table: dict[str, str] = importlib.import_module(BUILTIN_PACKAGE).BUILTIN
    if name not in table:
        near = nearest(name, table)
        raise PassError(
            "QG201",
            f"there is no pass '{name}'",
            where="pipeline",
            why=f"did you mean {near}?" if near else "it is neither built in nor a file",
            todo="list them with `qatgraph passes`, or give the path of a Python file",
        )
    module = importlib.import_module(f"{BUILTIN_PACKAGE}.{name.replace('-', '_')}")
    found: type[Pass] = getattr(module, table[name])
    return found


def make_pass(text: str) -> Pass:
    """``fold-gelu`` or ``pin-small-embeddings{min_bytes=1000}`` -> a pass."""
    name, options = parse_options(text)
    cls = pass_class(name)
    try:
        return cls(**options)
    except TypeError as error:
        raise PassError(
            "QG202", f"'{name}' does not take these options", where=text, why=str(error), todo="see `qatgraph passes`"
        ) from error


def passes_from_file(path: Path) -> list[Pass]:
    """Every pass class that a Python file defines, in order of definition, with default options."""
    if not path.is_file():
        raise PassError("QG201", f"there is no file of passes '{path}'", where="--passes", todo="check the path")
    spec = importlib.util.spec_from_file_location(f"qatgraph_user_passes_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PassError(
            "QG205", f"the file of passes '{path.name}' does not import", where=str(path), why=repr(error)
        ) from error
    bases = {Pass, GraphPass, RewritePass, PlanningPass}
    found = [
        value()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value not in bases
    ]
    if not found:
        raise PassError(
            "QG205",
            f"'{path.name}' defines no pass",
            where=str(path),
            why="no subclass of qatgraph.RewritePass or qatgraph.PlanningPass was found in it",
            todo="see examples/custom_pass.py",
        )
    return found


def parse_passes(texts: Sequence[str]) -> list[Pass]:
    """Names with options, or paths of Python files."""
    passes: list[Pass] = []
    for text in texts:
        passes.extend(passes_from_file(Path(text)) if text.endswith(".py") else [make_pass(text)])
    return passes
