"""Finds passes by name or file. Built-in ones are listed as strings, so that no lower floor imports them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from qatgraph.errors import PassError, nearest
from qatgraph.rewriting.passes import Pass, parse_options
from qatgraph.rewriting.plugins import Plugins

BUILTIN_PACKAGE = "qatgraph.passes"
PLUGINS = Plugins("qatgraph.passes", "pass", PassError, taken="QG215", broken="QG216")


def builtin_names() -> tuple[str, ...]:
    return tuple(_builtin())


def pass_names() -> tuple[str, ...]:
    """Every pass that can be named: the built-in ones, then those of installed packages."""
    return (*_builtin(), *PLUGINS.names(_taken()))


def pipeline_named(name: str) -> tuple[str, ...]:
    """The steps of a built-in pipeline; none if there is no such pipeline."""
    return _pipelines().get(name, ())


def _builtin() -> dict[str, str]:
    table: dict[str, str] = importlib.import_module(BUILTIN_PACKAGE).BUILTIN
    return table


def _pipelines() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = importlib.import_module(BUILTIN_PACKAGE).PIPELINES
    return table


def _taken() -> list[str]:
    """Names that no package may bring: a pipeline's text could not tell them apart."""
    return [*_builtin(), *_pipelines()]


def pass_class(name: str) -> type[Pass]:
    """The class of a pass: built in, or of an installed package (entry point group ``qatgraph.passes``).

    Raises:
        PassError: QG201 there is none, QG215 two packages bring one of this name, QG216 the package does not load.
    """
    point = PLUGINS.find(name, _taken())
    table = _builtin()
    if name in table:
        module = importlib.import_module(f"{BUILTIN_PACKAGE}.{name.replace('-', '_')}")
        found: type[Pass] = getattr(module, table[name])
        return found
    if point is not None:
        return _loaded(point)
    near = nearest(name, [*table, *PLUGINS.names(_taken())])
    raise PassError(
        "QG201",
        f"there is no pass '{name}'",
        where="pipeline",
        why=f"did you mean {near}?" if near else "it is neither built in, nor of an installed package, nor a file",
        todo="list them with `qatgraph passes`, or give the path of a Python file",
    )


def _loaded(point: EntryPoint) -> type[Pass]:
    cls = PLUGINS.load(point)
    if not (isinstance(cls, type) and issubclass(cls, Pass) and getattr(cls, "name", None) == point.name):
        raise PLUGINS.unusable(point, f"'{point.value}' is no pass of this name")
    return cls


def make_pass(text: str) -> Pass:
    """``fold-gelu``, ``pin-small-embeddings{min_bytes=1000}`` or ``mine.py:fold-it{rate=2}`` -> a pass."""
    name, options = parse_options(text)
    file, colon, own = name.rpartition(":")
    cls = _class_of_file(Path(file), own) if colon else pass_class(name)
    known = [f.name for f in fields(cls)]
    unknown = next((o for o in options if o not in known), None)
    if unknown is not None:
        near = nearest(unknown, known)
        have = f"did you mean {near}?" if near else f"it has {', '.join(known) or 'none'}"
        raise _bad_options(name, text, f"'{name}' has no option '{unknown}'; {have}")
    try:
        hints = get_type_hints(cls)
        for option, value in options.items():
            if option in hints:
                TypeAdapter(hints[option]).validate_python(value, strict=True)
        return cls(**options)
    except (TypeError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise _bad_options(name, text, why) from error


def _bad_options(name: str, text: str, why: str) -> PassError:
    what, todo = f"'{name}' does not take these options", f"`qatgraph passes {name}` tells its options"
    return PassError("QG202", what, where=text, why=why, todo=todo)


def passes_from_file(path: Path) -> list[Pass]:
    """Every pass class that a Python file defines, in order of definition, with default options."""
    return [_instance(cls, path) for cls in _classes_of_file(path)]


def _class_of_file(path: Path, name: str) -> type[Pass]:
    known = {str(getattr(cls, "name", "")): cls for cls in _classes_of_file(path)}
    if name not in known:
        near = nearest(name, known)
        why = f"did you mean {near}?" if near else f"it defines {', '.join(known)}"
        raise PassError("QG201", f"'{path.name}' defines no pass '{name}'", where=str(path), why=why, todo="name one")
    return known[name]


def _classes_of_file(path: Path) -> list[type[Pass]]:
    if not path.is_file():
        raise PassError("QG201", f"there is no file of passes '{path}'", where="--passes", todo="check the path")
    return _defined(path, path.read_bytes())


@cache
def _defined(path: Path, content: bytes) -> list[type[Pass]]:
    """One text of a file is run once: its passes, read again, are the same values."""
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
    for cls in classes:
        cls.file = str(path)
    return classes


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
