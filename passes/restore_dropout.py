"""restore-dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatgraph.ir.meta import record
from qatgraph.ir.names import attribute_path
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Op, Refusal


@dataclass(frozen=True)
class RestoreDropout(RewritePass):
    """Turn a captured dropout back into a module, so that ``train()`` and ``eval()`` work on the graph.

    What: ``aten.dropout(x, p, False)`` becomes a call of ``nn.Dropout(p)`` at the user's module path.
    Why: capture runs in eval; the operator carries the mode as a constant, the module does not.
    Before and after: ``dropout(x, 0.1, False)`` becomes ``encoder.dropout(x)``.
    Refuses: dropout that also runs in evaluation mode. That of scaled_dot_product_attention is not in the graph:
        capture notes it.
    Numerics: same (in eval).
    """

    name = "restore-dropout"
    stage = Stage.CAPTURED
    numerics = same
    pattern = Op("dropout", Any("x"), name="dropout", where={"p": lambda p: p is not None})  # a module has none

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("it drops in evaluation mode too") if match["dropout"].args[2] else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        node = match["dropout"]
        path = attribute_path(record(node).module, record(node).name.rpartition(":")[2])
        rate = float(node.args[1])
        new = edit.module(path, torch.nn.Dropout(rate).eval(), match["x"], at=node, near=node, kind="dropout")
        edit.replace(node, new)
