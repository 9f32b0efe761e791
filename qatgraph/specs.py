"""Number formats: what a quantizer does, as plain values (no torch, so that a plan reads anywhere)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

OBSERVER_NAMES = ("minmax", "moving-average", "mse", "percentile", "entropy")


class DType(StrEnum):
    """Integer formats, with the closed range that a quantizer may use.

    ``S8`` stops at -127: a weight of -128 wraps a 16-bit product sum on 64-bit Arm, and a range
    symmetric about zero needs no zero point.
    """

    U8 = "u8"
    S8 = "s8"
    S32 = "s32"

    @property
    def qmin(self) -> int:
        return {"u8": 0, "s8": -127, "s32": -(2**31) + 1}[self.value]

    @property
    def qmax(self) -> int:
        return {"u8": 255, "s8": 127, "s32": 2**31 - 1}[self.value]


class Scheme(StrEnum):
    AFFINE = "affine"
    SYMMETRIC = "symmetric"


class Granularity(StrEnum):
    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


class ScaleRule(StrEnum):
    """How a scale may be chosen.

    ``PAIR_SAFE``: no two neighbouring products along K overflow the 16-bit sums of VPMADDUBSW
    (Intel SDM vol. 2, x86 without VNNI): ``|q[2k]| + |q[2k+1]| <= 128`` for pairs of one sign.
    ``REDUCED_RANGE``: weights of 7 bits, ``|q| <= 63``, which cannot overflow them either.
    ``FIXED``: that of an integer input, which the model itself says; nobody chooses it.
    ``DERIVED``: the product of the scales of the quantizers that it is derived from (int32 bias).
    """

    FREE = "free"
    POWER_OF_TWO = "power-of-two"
    PAIR_SAFE = "pair-safe"
    REDUCED_RANGE = "reduced-range"
    FIXED = "fixed"
    DERIVED = "derived"


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one quantizer: ``q = clamp(round_half_even(x / s) + z, qmin, qmax)``.

    ``axis`` is the channel axis of the tensor as the *model* stores it (``[out, in]`` for a linear
    weight), ``None`` when per tensor.
    """

    dtype: DType
    scheme: Scheme = Scheme.SYMMETRIC
    granularity: Granularity = Granularity.PER_TENSOR
    axis: int | None = None
    scale: ScaleRule = ScaleRule.FREE

    @property
    def qmin(self) -> int:
        return self.dtype.qmin

    @property
    def qmax(self) -> int:
        return self.dtype.qmax

    def __str__(self) -> str:
        where = self.granularity.value if self.axis is None else f"{self.granularity.value}({self.axis})"
        rule = "" if self.scale is ScaleRule.FREE else f" {self.scale.value}"
        return f"{self.dtype.value} {self.scheme.value} {where}{rule}"

    def meet(self, other: QuantSpec) -> QuantSpec | None:
        """The one grid that satisfies both wants, or ``None``. A free scale yields to a bound one."""
        if (self.dtype, self.scheme, self.granularity, self.axis) != (
            other.dtype,
            other.scheme,
            other.granularity,
            other.axis,
        ):
            return None
        if self.scale is other.scale or other.scale is ScaleRule.FREE:
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
        name, bracket, axis = words[2].partition("(")
        granularity = Granularity(name)
        if bool(bracket) != axis.endswith(")") or bool(bracket) != (granularity is Granularity.PER_CHANNEL):
            raise ValueError(f"'{words[2]}' is neither 'per-tensor' nor 'per-channel(AXIS)'")
        if axis.startswith("-"):
            raise ValueError(f"'{words[2]}' counts its axis from the end; count from 0 at the front")
        return cls(
            dtype=DType(words[0]),
            scheme=Scheme(words[1]),
            granularity=granularity,
            axis=int(axis.removesuffix(")")) if bracket else None,
            scale=ScaleRule(words[3]) if len(words) == 4 else ScaleRule.FREE,
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
