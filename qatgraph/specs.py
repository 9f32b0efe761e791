"""Number formats: what a quantizer does, as plain values (no torch, so that a plan reads anywhere)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

OBSERVER_NAMES = ("minmax", "moving-average", "mse", "percentile", "entropy")


class DType(StrEnum):
    """Integer formats, with the closed range that a quantizer may use.

    ``S8`` stops at -127: a weight of -128 wraps a 16-bit product sum on 64-bit Arm, and a range
    symmetric about zero needs no zero point. So does ``S4``, at -7.
    """

    U8 = "u8"
    S8 = "s8"
    S4 = "s4"
    S32 = "s32"

    @property
    def qmin(self) -> int:
        return {"u8": 0, "s8": -127, "s4": -7, "s32": -(2**31) + 1}[self.value]

    @property
    def qmax(self) -> int:
        return {"u8": 255, "s8": 127, "s4": 7, "s32": 2**31 - 1}[self.value]


class Scheme(StrEnum):
    AFFINE = "affine"
    SYMMETRIC = "symmetric"


class Granularity(StrEnum):
    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"
    PER_BLOCK = "per-block"


class ScaleRule(StrEnum):
    """How a scale may be chosen.

    ``PAIR_SAFE``: no two neighbouring products along K overflow the 16-bit sums of VPMADDUBSW
    (Intel SDM vol. 2, x86 without VNNI): ``|q[2k]| + |q[2k+1]| <= 128`` for pairs of one sign.
    ``PAIR_SAFE_BY_POSITION``: the same where pairs start anew at each position of a filter, as in oneDNN.
    ``REDUCED_RANGE``: weights of 7 bits, ``|q| <= 63``, which cannot overflow them either.
    ``DYNAMIC``: the grid is that of each tensor itself, found at run time, as ONNX DynamicQuantizeLinear finds it.
    ``FIXED``: that of an integer input, which the model itself says; nobody chooses it.
    ``DERIVED``: the product of the scales of the quantizers that it is derived from (int32 bias).
    """

    FREE = "free"
    POWER_OF_TWO = "power-of-two"
    PAIR_SAFE = "pair-safe"
    PAIR_SAFE_BY_POSITION = "pair-safe-by-position"
    REDUCED_RANGE = "reduced-range"
    DYNAMIC = "dynamic"
    FIXED = "fixed"
    DERIVED = "derived"


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one quantizer: ``q = clamp(round_half_even(x / s) + z, qmin, qmax)``.

    ``axis`` is the channel axis of the tensor as the *model* stores it (``[out, in]`` for a linear
    weight), ``None`` when per tensor. ``block``: so many neighbours along the last axis share a scale, when per block;
    the last block of a row may be shorter.
    """

    dtype: DType
    scheme: Scheme = Scheme.SYMMETRIC
    granularity: Granularity = Granularity.PER_TENSOR
    axis: int | None = None
    scale: ScaleRule = ScaleRule.FREE
    block: int | None = None

    @property
    def qmin(self) -> int:
        return self.dtype.qmin

    @property
    def qmax(self) -> int:
        return self.dtype.qmax

    def __str__(self) -> str:
        number = self.axis if self.block is None else self.block
        where = self.granularity.value if number is None else f"{self.granularity.value}({number})"
        rule = "" if self.scale is ScaleRule.FREE else f" {self.scale.value}"
        return f"{self.dtype.value} {self.scheme.value} {where}{rule}"

    def meet(self, other: QuantSpec) -> QuantSpec | None:
        """The one grid that satisfies both wants, or ``None``. A free scale yields to a bound one, but one that is
        found at run time is another than one that is fixed."""
        if replace(self, scale=other.scale) != other:
            return None
        if self.scale is other.scale:
            return self
        if ScaleRule.DYNAMIC in (self.scale, other.scale):
            return None
        if other.scale is ScaleRule.FREE:
            return self
        return other if self.scale is ScaleRule.FREE else None

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read what ``str`` writes: ``s8 symmetric per-channel(0) pair-safe``.

        Raises:
            ValueError: the text is not a grid.
        """
        words = text.split()
        if len(words) not in (3, 4):
            raise ValueError(f"'{text}' is not a grid; write e.g. 'u8 affine per-tensor'")
        name, bracket, inside = words[2].partition("(")
        granularity = Granularity(name)
        if bool(bracket) != inside.endswith(")") or bool(bracket) != (granularity is not Granularity.PER_TENSOR):
            raise ValueError(f"'{words[2]}' is none of 'per-tensor', 'per-channel(AXIS)' and 'per-block(SIZE)'")
        if inside.startswith("-"):
            raise ValueError(f"'{words[2]}' counts its axis from the end; count from 0 at the front")
        number = int(inside.removesuffix(")")) if bracket else None
        if granularity is Granularity.PER_BLOCK and not number:
            raise ValueError(f"'{words[2]}': a block has at least one element")
        return cls(
            dtype=DType(words[0]),
            scheme=Scheme(words[1]),
            granularity=granularity,
            axis=number if granularity is Granularity.PER_CHANNEL else None,
            scale=ScaleRule(words[3]) if len(words) == 4 else ScaleRule.FREE,
            block=number if granularity is Granularity.PER_BLOCK else None,
        )


def parse_observer(text: str) -> tuple[str, tuple[float, ...]]:
    """The name of an observer and its numbers: ``mse``, ``percentile`` or ``percentile(99.9)``.

    Raises:
        ValueError: there is no such observer, or it does not take that.
    """
    if text in OBSERVER_NAMES:
        return text, ()
    found = re.fullmatch(r"percentile\(([0-9]+(?:\.[0-9]+)?)\)", text)
    if found is None:
        names = ", ".join(f"'{n}'" for n in OBSERVER_NAMES)
        raise ValueError(f"'{text}' is not an observer; write one of {names} or, e.g., 'percentile(99.9)'")
    percent = float(found[1])
    if not 50 < percent <= 100:
        raise ValueError(f"'{text}' keeps {found[1]} % of the values; keep more than 50 and at most 100")
    return "percentile", (percent,)
