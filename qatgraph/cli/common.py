"""What the commands share: the application, arguments that several take, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

NAME, WORD = 30, 14  # characters of a table's columns that stay together

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


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what takes so long, and a function that changes it; none in front of a file."""
    from rich.console import Console
    from rich.text import Text

    if not (sys.stdout.isatty() and sys.stderr.isatty()):  # or what is printed meanwhile would go to standard error
        yield lambda text: None
        return
    with Console(stderr=True).status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def least_widths(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> list[int]:
    """How narrow each column may become: words and numbers stay whole up to ``WORD`` characters, sentences fold.

    The names in the first column get ``NAME``, less where the rest would leave the line: what leaves it is cut.
    """
    cells = [(column, *(row[i] for row in rows)) for i, column in enumerate(columns)]
    words = [max((len(w) for cell in column for w in cell.split()), default=0) for column in cells[1:]]
    wholes = [min(word, WORD) for word in words]
    left = width - sum(wholes) - 2 * len(wholes)
    longest = max(map(len, cells[0]))
    return [min(longest, NAME, max(left, len(columns[0]), 1)), *wholes]


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(title))
    table = Table(box=None, pad_edge=False)
    for column, whole in zip(columns, least_widths(columns, rows, console.width), strict=True):
        table.add_column(column, overflow="fold", min_width=whole)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
