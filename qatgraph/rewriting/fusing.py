"""What passes that group an operation with the activation behind it share."""

from __future__ import annotations

from typing import ClassVar

from qatgraph.ir.meta import record
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass
from qatgraph.rewriting.pattern import Match, Refusal


class FuseActivation(RewritePass):
    """Makes the nodes that a pattern names ``head`` and ``act`` one region, if ``act`` alone reads ``head``."""

    noun: ClassVar[str]  # what the head is called where it is refused

    def check(self, match: Match) -> Refusal | None:
        head = match["head"]
        if len(head.users) > 1:
            return match.refuse(f"'{record(head).name}' has {len(head.users)} users")
        return match.refuse(f"the {self.noun} has a region") if record(head).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group(record(match["act"]).kind, match["head"], match["act"])
