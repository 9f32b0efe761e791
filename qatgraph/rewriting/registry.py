"""Finds passes by name or file. Built-in ones are listed as strings, so that no lower floor imports them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from qatgraph.errors import PassError, nearest
from qatgraph.rewriting.passes import Pass, parse_options

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
        hints = get_type_hints(cls)
        for option, value in options.items():
            if option in hints:
                TypeAdapter(hints[option]).validate_python(value, strict=True)
        return cls(**options)
    except (TypeError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise PassError(
            "QG202", f"'{name}' does not take these options", where=text, why=why, todo="see `qatgraph passes`"
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
        raise _bad_file(path, f"the file of passes '{path.name}' does not import", repr(error)) from error
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == spec.name]
    classes = [v for v in own if issubclass(v, Pass)]
    if not classes:
        why = "no subclass of qatgraph.RewritePass or qatgraph.PlanningPass was found in it"
        raise _bad_file(path, f"'{path.name}' defines no pass", why)
    return [_instance(cls, path) for cls in classes]


def _instance(cls: type[Pass], path: Path) -> Pass:
    what = f"the pass '{cls.__name__}' of '{path.name}' cannot be used"
    if not isinstance(getattr(cls, "name", None), str):
        raise _bad_file(path, what, "it has no name: write name = 'verb-noun' in its body")
    try:
        return cls()
    except TypeError as error:
        raise _bad_file(path, what, str(error)) from error


def _bad_file(path: Path, what: str, why: str) -> PassError:
    return PassError("QG205", what, where=str(path), why=why, todo="compare with examples/custom_pass.py")


def parse_passes(texts: Sequence[str]) -> list[Pass]:
    """Names with options, or paths of Python files."""
    passes: list[Pass] = []
    for text in texts:
        passes.extend(passes_from_file(Path(text)) if text.endswith(".py") else [make_pass(text)])
    return passes
