"""fuse-conv-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same
from qatgraph.rewriting.pattern import Any, Match, Op, Refusal

_CONVOLUTIONS = "conv1d|conv2d|conv3d|conv_transpose1d|conv_transpose2d"


@dataclass(frozen=True)
class FuseConvActivation(RewritePass):
    """Group a convolution with the activation that alone reads it.

    What: both nodes get one region.
    Why: most engines clamp inside the kernel of the convolution, so that no grid belongs between the two.
    Before and after: the arithmetic stays; ``conv2d`` and ``relu`` carry ``@…:conv2d+relu``.
    Refuses: a convolution that something else reads too, or that has a region already.
    Numerics: same.
    """

    name = "fuse-conv-activation"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    pattern = Op(
        "relu|clamp|leaky_relu|sigmoid|tanh|silu|gelu|hardswish", Op(_CONVOLUTIONS, Any(), name="conv"), name="act"
    )

    def check(self, match: Match) -> Refusal | None:
        users = len(match["conv"].users)
        if users > 1:
            return match.refuse(f"'{record(match['conv']).name}' has {users} users")
        return match.refuse("the convolution has a region") if record(match["conv"]).region else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.group(record(match["act"]).kind, match["conv"], match["act"])
