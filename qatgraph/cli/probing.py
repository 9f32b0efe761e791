"""The command that holds a target to its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatgraph.cli.common import AsJson, app, print_table

if TYPE_CHECKING:
    from qatgraph.engines import Simulator
    from qatgraph.probing.report import EngineDiff, ProbeReport


@app.command()
def probe(
    target: Annotated[str, typer.Argument(help="a target by name, or a TOML file")],
    isa: Annotated[
        str, typer.Option(help="native, or an instruction set to emulate: avx2, sse, arm64, arm64-dot")
    ] = "native",
    engine_version: Annotated[
        str, typer.Option("--engine-version", help="a version of the engine, by default the installed one")
    ] = "",
    diff: Annotated[
        str | None, typer.Option("--diff", help="a version or an instruction set: what changes in its place")
    ] = None,
    row: Annotated[str, typer.Option(help="a glob of the rows' ids")] = "*",
    examples: Annotated[int, typer.Option(min=1, help="so many small models a row")] = 50,
    engine: Annotated[
        str | None, typer.Option(help="file.py:function, which does a case in place of the target's engine")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every row of a target as small models on the real engine.

    The operation with its neighbours and borders, its shapes, grids and integers drawn anew for each; a row that the
    engine does not honour fails, with the smallest model that shows it. With --diff the same models run on a second
    engine, which is another version or instruction set; a row that is false on one of them alone fails.

    \b
    Example: qatgraph probe ort-cpu --isa avx2
    Example: qatgraph probe ort-cpu --diff 1.24.4
    """
    from qatgraph import api

    if diff is not None:
        if engine is not None:
            raise typer.BadParameter("a simulator is one engine, and --diff asks for two of the target's")
        change = api.probe_diff(target, diff, isa=isa, version=engine_version, rows=row, examples=examples)
        print(json.dumps(change.as_json(), indent=1)) if as_json else _show_diff(change)
        raise typer.Exit(1 if change.broken else 0)
    found = api.probe(target, engine=_simulator(engine), isa=isa, version=engine_version, rows=row, examples=examples)
    print(json.dumps(found.as_json(), indent=1)) if as_json else _show(found)
    raise typer.Exit(1 if found.false else 0)


def _show(found: ProbeReport) -> None:
    title = f"{found.target} on {found.engine}: {len(found.false)} of {len(found.rows)} rows are false"
    rows = [(r.row, r.kernel.replace("|", " "), str(r.cases), r.verdict) for r in found.rows]
    print_table(title, ("row", "kernel", "cases", "verdict"), rows)
    for bad in found.false:
        print(f"\n{bad.text()}")


def _show_diff(found: EngineDiff) -> None:
    one, two = found.engines
    title = (
        f"{found.target} on {one}, then on {two}: {len(found.broken)} of {len(found.rows)} rows are false on one alone"
    )
    rows = [(r.row, str(r.cases), ", ".join(r.verdicts), r.changes() or "nothing") for r in found.rows]
    print_table(title, ("row", "cases", "verdicts", "changes"), rows)
    for row in found.rows:
        if row.smallest:
            print(f"\n'{row.row}' differs, smallest:\n{row.smallest}")


def _simulator(text: str | None) -> Simulator | None:
    from qatgraph.job import factory

    if text is None:
        return None
    file, _, name = text.rpartition(":")
    return factory(Path(file), f"{Path(file).name}:{name}", "engine")
