"""What probing must know of one kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qatgraph.planning.target import Row
from qatgraph.probing.cases import Case, Grid
from qatgraph.probing.draws import Draw
from qatgraph.reference import Array, quantize


@dataclass(frozen=True)
class Expected:
    """The lowest and the highest result that is right, element by element."""

    low: Array
    high: Array

    @classmethod
    def around(cls, value: Array, slack: Array | float = 0) -> Expected:
        return cls(value - slack, value + slack)

    def rounded(self, grid: Grid) -> Expected:
        """As integers of a grid."""
        ends = (quantize(v, grid.scale, grid.zero).astype(np.int32) for v in (self.low, self.high))
        return Expected(*ends)


@dataclass(frozen=True)
class Operation:
    """``draw`` gives the fields of a case that are the operation's own, as the row wants them. ``apply`` is the
    operation on the numbers of its inputs by role, in float64 or on the integers that are only moved. ``exact`` are
    the ways in which int8 kernels make its result, by the ``requant`` of a row, where these are more than ``apply``.
    ``slack``: how far rounding in float32 may move its result where small differences of large numbers are divided.
    ``passes``: whether it lets numbers through as they are, so that a coarser grid behind it puts them on halves.
    """

    draw: Callable[[Draw, Row], dict[str, Any]]
    apply: Callable[[Case, Mapping[str, Array]], Array]
    exact: Mapping[str, Callable[[Case], Expected]] = field(default_factory=dict)
    free_axes: int = -1  # so many axes of x in front may have no size in the file; -1: all but the last
    slack: Callable[[Case, Mapping[str, Array]], Array | float] = lambda case, values: 0.0
    passes: bool = False


def real(case: Case, operation: Operation) -> Array:
    """The operation on the numbers that the integers stand for, in float64."""
    return operation.apply(case, numbers(case))


def numbers(case: Case) -> Mapping[str, Array]:
    """What the integers stand for, by role."""
    return {role: o.real.astype(np.float64) for role, o in case.inputs.items()}


def integers(function: Callable[[Case], Array]) -> Callable[[Case], Expected]:
    """A way that writes integers, of the reference."""
    return lambda case: Expected.around(function(case).astype(np.int32))
