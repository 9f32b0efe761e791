"""The command that holds a target to its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatgraph.cli.common import AsJson, app, print_table

if TYPE_CHECKING:
    from qatgraph.engines import Simulator


@app.command()
def probe(
    target: Annotated[str, typer.Argument(help="a target by name, or a TOML file")],
    isa: Annotated[str, typer.Option(help="native, or an instruction set to emulate: avx2, sse")] = "native",
    row: Annotated[str, typer.Option(help="a glob of the rows' ids")] = "*",
    examples: Annotated[int, typer.Option(min=1, help="so many small models a row")] = 50,
    engine: Annotated[
        str | None, typer.Option(help="file.py:function, which does a case in place of the target's engine")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every row of a target as small models on the real engine.

    The operation with its neighbours and borders, its shapes, grids and integers drawn anew for each; a row that the
    engine does not honour fails, with the smallest model that shows it.

    \b
    Example: qatgraph probe ort-cpu --isa avx2
    """
    from qatgraph import api

    found = api.probe(target, engine=_simulator(engine), isa=isa, rows=row, examples=examples)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        title = f"{found.target} on {found.engine}: {len(found.false)} of {len(found.rows)} rows are false"
        rows = [(r.row, r.kernel.replace("|", " "), str(r.cases), r.verdict) for r in found.rows]
        print_table(title, ("row", "kernel", "cases", "verdict"), rows)
        for bad in found.false:
            print(f"\n{bad.text()}")
    if found.false:
        raise typer.Exit(1)


def _simulator(text: str | None) -> Simulator | None:
    from qatgraph.job import factory

    if text is None:
        return None
    file, _, name = text.rpartition(":")
    return factory(Path(file), f"{Path(file).name}:{name}", "engine")
