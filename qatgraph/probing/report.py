"""What a probe found, as a value that can be compared with that of another engine or version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RowResult:
    """What became of one row, or did not: ``host`` rows are not for the engine, ``unclaimed`` ones not for its version.

    ``why`` it is false, as a sentence, and the smallest ``counterexample`` that was found.
    """

    row: str
    kernel: str
    cases: int
    verdict: Literal["holds", "false", "host", "unclaimed"]
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


@dataclass(frozen=True)
class RowDiff:
    """What two engines make of the same ``cases`` of a row.

    ``verdicts`` of the first and the second engine, ``unclaimed`` if it is false on a version of which it does not
    speak; ``kernels`` that
    changed, each with its cases; ``values``: in how many cases numbers differ, integers by up to ``steps``, floats by
    up to ``relative`` of the largest. ``smallest`` is the smallest case on which they differ by more than the rounding
    of floats.
    """

    row: str
    cases: int
    verdicts: tuple[str, str]
    kernels: dict[str, int]
    values: int = 0
    steps: int = 0
    relative: float = 0.0
    smallest: str = ""

    def changes(self) -> str:
        """In words; empty if nothing changed."""
        kernels = [f"{what} in {n} cases" for what, n in self.kernels.items()]
        by = f"{self.steps} steps" if self.steps else f"{self.relative:.2g} of the largest"
        return "; ".join([*kernels, *([f"values in {self.values} cases, by up to {by}"] if self.values else [])])


@dataclass(frozen=True)
class EngineDiff:
    """What changed from one engine of a target to another, of which ``engines`` name version and instruction set."""

    target: str
    table: str  # its hash
    engines: tuple[str, str]
    examples: int
    rows: tuple[RowDiff, ...]

    @property
    def broken(self) -> tuple[RowDiff, ...]:
        """The rows that are false on one engine alone."""
        return tuple(r for r in self.rows if r.verdicts.count("false") == 1)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
