"""Names: ``module.path:kind``, globs over them, and their spelling as module attributes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from urllib.parse import quote, unquote

from qatgraph.errors import PlanError, nearest


class Namer:
    """Hands out unique names in the order asked: ``a:linear``, ``a:linear#2``, …"""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def __call__(self, stem: str) -> str:
        name, count = stem, 1
        while name in self._taken:
            count += 1
            name = f"{stem}#{count}"
        self._taken.add(name)
        return name


def is_glob(selector: str) -> bool:
    return any(c in selector for c in "*?[")


def matches(selector: str, name: str) -> bool:
    return name == selector or (is_glob(selector) and fnmatch.fnmatchcase(name, selector))


def select(selector: str, names: Iterable[str], *, where: str) -> list[str]:
    """The names that a selector (exact or glob) means; none is an error, never silence."""
    names = list(names)
    found = [n for n in names if matches(selector, n)]
    if not found:
        near = nearest(selector, names)
        raise PlanError(
            "QG301",
            f"the selector '{selector}' matches nothing",
            where=where,
            why="a selector that matches nothing would be ignored silently",
            todo=f"did you mean {near}?" if near else "list the names with `qatgraph show plan.json`",
        )
    return found


def attribute_path(module: str, port: str) -> str:
    """Where a quantizer lives: the user's module path, then the port, percent-encoded.

    Module names refuse dots, so ``enc.query`` + ``linear.x`` becomes ``enc.query.%3Alinear%2Ex``.
    """
    last = quote(":" + port, safe="").replace(".", "%2E")
    return f"{module}.{last}" if module else last


def quantizer_name(path: str) -> str:
    """The name of the quantizer that lives at a path: the way back from ``attribute_path``."""
    return unquote(path).replace(".:", ":").removeprefix(":")
