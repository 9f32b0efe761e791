"""What may read a result: none of them changes what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qatgraph.probing.cases import Case
from qatgraph.probing.draws import Draw, flag, one_of
from qatgraph.probing.floats import gelu, sigmoid
from qatgraph.probing.operation import Expected
from qatgraph.reference import Array, dequantize

# each alone, or with a quantize behind it; "quantize" alone is drawn by name
READERS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda v: np.maximum(v, 0),
    "clamp": lambda v: np.clip(v, 0, 6),
    "gelu": gelu,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "transpose": lambda v: v.transpose(),
}
HIGHEST = {"relu": float("inf"), "clamp": 6.0}  # what an activation inside a kernel lets through, from 0 on
EXACT = frozenset({"relu", "clamp", "transpose"})
GELU_FALL = 0.13  # the other readers never fall; between two ends gelu is not lower than this slope takes it
ROUNDING = 4e-6  # of the reader itself, in float32


def draw_readers(draw: Draw, case: Case) -> tuple[str, ...]:
    """What reads the result, as the row lets it: nothing, one reader or two in a row, and behind them a quantize.

    Integers are read by a kernel that takes them, are dequantized, or are an output of the file.
    """
    row = case.row
    kinds = [k for k in READERS if k not in row.not_read_by]
    if row.needs in ("readers-int8", "between-int8"):
        return tuple(one_of(draw, [(), ("kernel",)]))
    if case.out is not None:
        return tuple(one_of(draw, [(), ("kernel",), ("dequantize",), *(("dequantize", k) for k in kinds)]))
    first: tuple[str, ...] = one_of(draw, [(), *((k,) for k in kinds)])
    first = (*first, one_of(draw, kinds)) if first and flag(draw) else first
    naive = case.quantized and row.placement != "int8"
    return first if naive or flag(draw) else (*first, "quantize")


def behind(case: Case, found: Expected) -> Expected:
    """What is right behind the readers."""
    for reader in case.readers:
        if reader == "quantize":
            assert case.read_grid is not None
            found = found.rounded(case.read_grid)
        elif reader == "dequantize":
            assert case.out is not None
            grid = case.out
            found = Expected(*(dequantize(v, grid.scale, grid.zero) for v in (found.low, found.high)))
        elif reader != "kernel":  # it gives the integers that it takes
            found = _read(reader, found)
    return found


def _read(reader: str, found: Expected) -> Expected:
    ends = [READERS[reader](v) for v in (found.low, found.high)]
    slack = ROUNDING * (1 + np.abs(ends[0])) if reader not in EXACT else 0.0
    slack = slack + GELU_FALL * (found.high - found.low) if reader == "gelu" else slack
    return Expected(np.minimum(*ends) - slack, np.maximum(*ends) + slack)
