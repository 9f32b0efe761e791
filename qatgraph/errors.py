"""One tree of errors. Each says: code, what, where, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QatgraphError(Exception):
    """A refusal that a user can act on.

    Args:
        code: stable identifier such as ``QG304``; the hundreds name the stage.
        what: one sentence, what went wrong.
        where: the value, file or source line concerned.
        why: the rule, pass or engine fact behind the refusal.
        todo: what to do about it.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", todo: str = "") -> None:
        self.code, self.what, self.where, self.why, self.todo = code, what, where, why, todo
        super().__init__(self.text())

    def text(self) -> str:
        lines = [f"{self.code}: {self.what}"]
        for label, value in (("where", self.where), ("why", self.why), ("do", self.todo)):
            if value:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "what": self.what, "where": self.where, "why": self.why, "do": self.todo}


class CaptureError(QatgraphError):
    """QG1xx: the model or a batch cannot be captured."""


class PassError(QatgraphError):
    """QG2xx: a pass is unknown, broke its contract, or failed.

    ``after`` is then the graph's text that it left, and ``diff`` what it changed.
    """

    diff: str = ""
    after: str = ""


class PlanError(QatgraphError):
    """QG3xx: a plan or recipe is inconsistent, or does not belong to this model."""


class TargetError(QatgraphError):
    """QG4xx: a target is unknown, malformed, or has no backend."""


class LowerError(QatgraphError):
    """QG5xx: a graph cannot be lowered or an artifact cannot be written or read."""


class VerifyError(QatgraphError):
    """QG6xx: an artifact is not what the plan promised."""


class TrainError(QatgraphError):
    """QG7xx: calibration or training cannot go on."""


class JobError(QatgraphError):
    """QG8xx: a job file is wrong or a run cannot start."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The closest candidate, quoted, for "did you mean"; empty when nothing is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"'{close[0]}'" if close else ""
