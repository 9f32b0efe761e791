"""What installed packages add by entry points: passes (``qatgraph.passes``) and targets (``qatgraph.targets``)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qatgraph.errors import QatgraphError


@dataclass(frozen=True)
class Plugins:
    """A group of entry points: names -> what ``what`` says. ``taken`` and ``broken`` are the codes of its refusals."""

    group: str
    what: str
    error: type[QatgraphError]
    taken: str
    broken: str

    def names(self, builtin: Iterable[str]) -> list[str]:
        """Every name that a package brings; one that two bring, or that is built in, is refused."""
        known = tuple(builtin)
        return sorted({p.name for p in _points(self.group, tuple(sys.path)) if self.find(p.name, known)})

    def find(self, name: str, builtin: Iterable[str]) -> EntryPoint | None:
        """The entry point of a name, if a package brings it; a name that is taken is refused."""
        points = [p for p in _points(self.group, tuple(sys.path)) if p.name == name]
        owners = [*(["qatgraph"] if name in builtin else []), *(distribution(p) for p in points)]
        if len(points) and len(owners) > 1:
            raise self.error(
                self.taken,
                f"two packages bring the {self.what} '{name}'",
                where=f"entry points {self.group}",
                why=f"it comes from {' and from '.join(owners)}",
                todo="uninstall one of them, or rename it in its package",
            )
        return points[0] if points else None

    def load(self, point: EntryPoint) -> Any:
        """The object behind an entry point."""
        try:
            return point.load()
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise self.unusable(point, f"{type(error).__name__}: {reason[0]}") from error

    def unusable(self, point: EntryPoint, why: str) -> QatgraphError:
        what = f"the {self.what} '{point.name}' of {distribution(point)} cannot be used"
        return self.error(self.broken, what, where=point.value, why=why, todo="mend the package, or uninstall it")


def distribution(point: EntryPoint) -> str:
    """The package that an entry point belongs to."""
    return point.dist.name if point.dist is not None else point.value


@cache
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))  # reads a file of every installed package: once for each ``sys.path``
