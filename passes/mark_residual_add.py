"""mark-residual-add."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Op, Refusal


@dataclass(frozen=True)
class MarkResidualAdd(RewritePass):
    """Tell the sum of two activations from the addition of a constant.

    What: an ``add`` of two float tensors that are computed, or inputs of the model, becomes of kind ``residual_add``.
    Why: targets treat it apart: it joins two grids, and some engines fuse it to slower kernels.
    Before and after: ``layer.0.output:add`` becomes ``layer.0.output:residual_add``.
    Refuses: an operand that is a parameter or not a float tensor; a scaled add.
    Numerics: same.
    """

    name = "mark-residual-add"
    stage = Stage.CAPTURED
    numerics = same
    pattern = Op("add", Any("x"), Any("y"), name="add")

    def check(self, match: Match) -> Refusal | None:
        if record(match["add"]).region:
            return match.refuse("it is a part of a region")
        for name in ("x", "y"):
            value = value_of(match[name])
            if match[name].op == "get_attr":
                return match.refuse(f"'{match[name].name}' is a constant")
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return match.refuse(f"'{match[name].name}' is not a float tensor")
        return match.refuse("it scales an operand (alpha)") if match["add"].kwargs else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.rename_kind(match["add"], "residual_add")
