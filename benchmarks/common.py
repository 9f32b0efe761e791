"""What every benchmark shares: where the numbers go, and with what they are labelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatgraph.report.machine import isa, versions

OUT = Path("build/bench")


def publish(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write ``build/bench/NAME.json`` with instruction set and versions."""
    _write(name, figures)
    print(f"{name} on {isa()}")
    for key, value in figures.items():
        print(f"  {key:<44} {_shown(value)}")


def publish_table(name: str, rows: Sequence[dict[str, Any]], note: str) -> None:
    """Print rows as Markdown, and write ``build/bench/NAME.json`` and ``NAME.md`` with instruction set and versions."""
    _write(name, {"note": note, "rows": rows})
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_shown(v) for v in row.values()] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    text = f"{name} on {isa()}: {note}\n\n{table}\n"
    (OUT / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, end="")


def _write(name: str, figures: dict[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"isa": isa(), "versions": versions(), **figures}
    (OUT / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
