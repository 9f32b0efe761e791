"""What users write (targets, recipes, jobs): TOML into typed models, with errors that name the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qatgraph.errors import QatgraphError, nearest


class UserModel(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=UserModel)


def parse_toml(
    model: type[M], text: str, *, where: str, error: type[QatgraphError], code: str, todo: str, context: Any = None
) -> M:
    """Read a typed model from TOML text, or raise ``error`` with ``code``; ``context`` is for its validators."""
    try:
        return model.model_validate(tomllib.loads(text), context=context)
    except (tomllib.TOMLDecodeError, ValidationError) as problem:
        raise error(
            code, f"the {model.__name__.lower()} is not valid", where=where, why=_first(problem), todo=todo
        ) from (problem)


def read_text(path: Path, *, what: str, error: type[QatgraphError], code: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(
            code,
            f"cannot read the {what} '{path}'",
            where=what,
            why=getattr(problem, "strerror", None) or str(problem),
            todo="check the path",
        ) from problem


def _first(problem: Exception) -> str:
    """The first problem as a sentence, with the key that was probably meant."""
    if not isinstance(problem, ValidationError):
        return str(problem)
    first = problem.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}".removeprefix(": ")
    near = nearest(str(first["loc"][-1]), {k for m in UserModel.__subclasses__() for k in m.model_fields})
    return f"unknown key '{where}'" + (f", did you mean {near}?" if near else "")
