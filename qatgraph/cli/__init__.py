"""The command line, in the order of ``--help``. Reading a plan imports neither torch nor an engine."""

from __future__ import annotations

import sys

from qatgraph.cli import audit, inspect, jobs, new, passes, probing
from qatgraph.cli.common import app
from qatgraph.errors import QatgraphError

ORDER = (
    "run",
    "plan",
    "verify",
    "replay",
    "saturation",
    "show",
    "explain",
    "diff",
    "targets",
    "probe",
    "audit",
    "passes",
    "opt",
    "bisect",
)
app.registered_commands.sort(key=lambda c: ORDER.index(c.callback.__name__) if c.callback is not None else 0)

__all__ = ["app", "audit", "inspect", "jobs", "main", "new", "passes", "probing"]


def main() -> None:
    """Entry point: a refusal is a sentence on standard error and exit code 1."""
    try:
        app()
    except QatgraphError as error:
        print(error.text(), file=sys.stderr)
        raise SystemExit(1) from None
