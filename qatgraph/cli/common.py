"""What the commands share: the application, arguments that several take, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Quantization-aware training as a compiler: plan, train, lower and prove int8 models.",
)

JobFile = Annotated[Path, typer.Argument(help="the job, a TOML file", metavar="JOB.toml")]
PlanFile = Annotated[Path, typer.Argument(help="a plan, as JSON", metavar="plan.json")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
TargetOption = Annotated[str | None, typer.Option("--target", help="a built-in target or a TOML file")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="the folder of the run, by default build/NAME")]
PassesOption = Annotated[
    list[str] | None, typer.Option("--passes", help="a pass with options, or a Python file of passes; may be repeated")
]


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
