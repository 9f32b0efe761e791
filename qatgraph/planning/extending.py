"""Targets that extend another: its table, with rows changed by id, left out and added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qatgraph.errors import nearest

if TYPE_CHECKING:
    from qatgraph.planning.target import Target

OWN = {"name", "description", "extends", "without", "row"}  # what is not taken over


def taken_over(data: dict[str, Any], base: Target) -> dict[str, Any]:
    """What a user wrote, completed by the table that it extends; see ``Target``.

    Raises:
        ValueError: a row stands twice, or an id is none of the base.
    """
    given, without = data.get("row", []), data.get("without", [])
    if not _are(given, dict) or not _are(without, str):
        return data  # the types of the fields say what is wrong
    rows = {r.id: r.model_dump(mode="json", exclude_defaults=True) for r in base.row}
    ids = [r.get("id") for r in given]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise ValueError(f"the row '{twice}' stands twice")
    for name in without:
        if name not in rows:
            raise ValueError(_stranger(f"without = ['{name}']", name, base))
        if name in ids:
            raise ValueError(f"the row '{name}' is changed and left out")
    for row in given:
        if row.get("id") not in rows and "op" not in row:
            raise ValueError(_stranger(f"a row '{row.get('id')}' without an op changes nothing", row.get("id"), base))
    changes = {r["id"]: r for r in given if r.get("id") in rows}
    kept = [row | changes.get(name, {}) for name, row in rows.items() if name not in without]
    settings = base.model_dump(mode="json", exclude=OWN)
    return settings | data | {"row": [*(r for r in given if r.get("id") not in rows), *kept]}


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, kind) for v in values)


def _stranger(what: str, name: Any, base: Target) -> str:
    near = nearest(str(name), [r.id for r in base.row])
    return f"{what}: the target '{base.name}' has no such row" + (f", did you mean {near}?" if near else "")
