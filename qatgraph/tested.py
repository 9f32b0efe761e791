"""An engine of a version that its table was not tested with: verify says so, and probes the rows that the plan uses."""

from __future__ import annotations

from typing import Any

from qatgraph.errors import QatgraphError, TargetError
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import Target, load_target, ordered
from qatgraph.report.report import NOT_RUN, Report

EXAMPLES = 20  # small models a row: seconds


def check_version(report: Report, plan: Plan, backend: Any) -> None:
    """Note a version outside ``Target.tested`` and probe on it; a row that is false there, or that does not speak of
    the version, is a failure. The table is found by the plan's name of it, if it is the one that the plan was made by.
    """
    table, version = _table(plan), backend.version()
    if table is None or table.tested is None:
        return
    used = {p.row for p in plan.predictions if p.row}
    rows = [r for r in table.row if r.id in used]
    report.failures += [
        f"row '{r.id}' holds for {r.versions}, this is {version}" for r in rows if not r.claims(version)
    ]
    oldest, newest = map(ordered, table.tested)
    if oldest <= ordered(version) <= newest:
        return
    known = " to ".join(table.tested)
    try:
        false = [text for row in rows for text in _false(table, row.id)]
    except QatgraphError as error:
        report.notes.append(f"version {version} of the engine is not one of {known}; probe {NOT_RUN}: {error.what}")
        return
    report.notes.append(f"version {version} of the engine is not one of {known}: {len(rows)} rows were probed on it")
    report.failures += false


def _table(plan: Plan) -> Target | None:
    try:
        found = load_target(plan.target)
    except TargetError:
        return None
    return found if found.hash() == plan.hashes.get("target") else None


def _false(table: Target, row: str) -> list[str]:
    from qatgraph import api

    found = api.probe(table, rows=row, examples=EXAMPLES, progress=False)
    return [f"row '{r.row}' is false on this version: {r.why}" for r in found.false]
