"""fuse-conv-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.fusing import FuseActivation
from qatgraph.rewriting.passes import same
from qatgraph.rewriting.pattern import Any, Op

_CONVOLUTIONS = "conv1d|conv2d|conv3d|conv_transpose1d|conv_transpose2d"


@dataclass(frozen=True)
class FuseConvActivation(FuseActivation):
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
    noun = "convolution"
    pattern = Op(
        "relu|clamp|leaky_relu|sigmoid|tanh|silu|gelu|hardswish", Op(_CONVOLUTIONS, Any(), name="head"), name="act"
    )
