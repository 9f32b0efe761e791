"""fuse-add-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.fusing import FuseActivation
from qatgraph.rewriting.passes import same
from qatgraph.rewriting.pattern import Any, Op


@dataclass(frozen=True)
class FuseAddActivation(FuseActivation):
    """Group a residual addition with the ReLU or limit that alone reads it.

    What: both nodes get one region.
    Why: an engine that adds integers clamps in the same kernel, so that no grid belongs between the two.
    Before and after: the arithmetic stays; ``residual_add`` and ``relu`` carry ``@…:residual_add+relu``.
    Refuses: a sum that something else reads too, or that has a region already.
    Numerics: same.
    """

    name = "fuse-add-activation"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = same
    noun = "sum"
    pattern = Op("relu|clamp", Op("residual_add", Any(), Any(), name="head"), name="act")
