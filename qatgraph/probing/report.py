"""What a probe found, as a value that can be compared with that of another engine or version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RowResult:
    """What became of one row, or did not: ``host`` rows are not for the engine.

    ``why`` it is false, as a sentence, and the smallest ``counterexample`` that was found.
    """

    row: str
    kernel: str
    cases: int
    verdict: Literal["holds", "false", "host"]
    why: str = ""
    counterexample: str = ""

    def text(self) -> str:
        return "\n".join(line for line in (f"'{self.row}' is false: {self.why}", self.counterexample) if line)


@dataclass(frozen=True)
class ProbeReport:
    """The rows of a target on one engine, of which ``engine`` names version and instruction set."""

    target: str
    table: str  # its hash
    engine: str
    examples: int
    rows: tuple[RowResult, ...]

    @property
    def false(self) -> tuple[RowResult, ...]:
        return tuple(r for r in self.rows if r.verdict == "false")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
