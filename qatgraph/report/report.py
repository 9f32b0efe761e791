"""The report of a verification: numbers with how they were measured, and what failed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from qatgraph.errors import VerifyError

NOT_RUN = "NOT RUN"


@dataclass
class Report:
    """Sections of plain data. ``failures`` are sentences that name the node and the rule."""

    job: str = ""
    target: str = ""
    files: dict[str, Any] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    fallback: dict[str, Any] = field(default_factory=dict)
    overflow: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def check(self) -> None:
        """Raise VerifyError QG601 if anything failed."""
        if self.failures:
            raise VerifyError(
                "QG601",
                f"the artifact is not what the plan promised ({len(self.failures)} failures)",
                where=self.failures[0],
                why="; ".join(self.failures[1:4]),
                todo="`qatgraph explain plan.json NODE` shows the row; mend the row or pin the node",
            )

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.as_json(), indent=1, sort_keys=True) + "\n"

    def to_markdown(self) -> str:
        """The same for people."""
        verdict = "every check passed" if self.ok else f"{len(self.failures)} checks FAILED"
        lines = [f"# {self.job or 'verification'} on {self.target}: {verdict}", ""]
        lines += [f"- FAILED: {f}" for f in self.failures]
        lines += [f"- note: {n}" for n in self.notes]
        for title in ("fidelity", "parity", "kernels", "fallback", "overflow", "latency", "files"):
            section = getattr(self, title)
            if section:
                lines += ["", f"## {title}", "", *_rows(section)]
        return "\n".join(lines) + "\n"


def _rows(section: dict[str, Any]) -> list[str]:
    how = section.get("how")
    rows = ["| what | value |", "|---|---|"]
    for key, value in flatten(section):
        if key != "how":
            rows.append(f"| {key} | {format_value(value)} |")
    return [*([str(how), ""] if how else []), *rows]


def flatten(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return ", ".join(str(v) for v in value) or "none"
    return str(value)
