"""fuse-linear-activation."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.ir.stages import Stage
from qatgraph.rewriting.fusing import FuseActivation
from qatgraph.rewriting.passes import same
from qatgraph.rewriting.pattern import Any, Op


@dataclass(frozen=True)
class FuseLinearActivation(FuseActivation):
    """Group a linear with the activation that alone reads it.

    What: both nodes get one region.
    Why: targets decide on the pair (an engine may fuse bias and activation), and plans read better by region.
    Before and after: the arithmetic stays; ``linear`` and ``gelu`` carry ``@…:linear+gelu``.
    Refuses: a linear that something else reads too, or that has a region already.
    Numerics: same.
    """

    name = "fuse-linear-activation"
    stage = Stage.CAPTURED
    numerics = same
    noun = "linear"
    pattern = Op("gelu|relu|tanh", Op("linear", Any(), name="head"), name="act")
