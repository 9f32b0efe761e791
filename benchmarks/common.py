"""What every benchmark shares: where the numbers go, and with what they are labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatgraph.report.machine import isa, versions

OUT = Path("build/bench")


def publish(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write ``build/bench/NAME.json`` with instruction set and versions."""
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"isa": isa(), "versions": versions(), **figures}
    (OUT / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{name} on {isa()}")
    for key, value in figures.items():
        print(f"  {key:<44} {value:.3f}" if isinstance(value, float) else f"  {key:<44} {value}")
