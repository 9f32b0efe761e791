"""What kernels and borders cost, as data of a target: picoseconds an element or a product, measured on its engine.

They are estimates: one number for all shapes of a class, measured on one machine. What they are good for is to weigh
a border against what it buys, and to order fallbacks by what they cost.
"""

from __future__ import annotations

from pydantic import Field

from qatgraph.ops import keeps_grid
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.user_files import UserModel


class Rates(UserModel):
    """Picoseconds of one multiply-accumulate by class of product, and of one element of any other operation."""

    element: float = Field(ge=0)
    linear: float = Field(ge=0)
    conv: float = Field(ge=0)
    depthwise: float = Field(ge=0)
    matmul: float = Field(ge=0)


class Cost(UserModel):
    """The section ``[cost]`` of a table, in picoseconds on one thread.

    ``node``: what a kernel costs before it computes anything. ``quantize`` and ``dequantize``: of one element.
    ``source``: how it was measured, and on which instruction set.
    """

    source: str
    node: float = Field(ge=0)
    quantize: float = Field(ge=0)
    dequantize: float = Field(ge=0)
    float_kernels: Rates
    int8_kernels: Rates

    def kernel(self, fact: NodeFact, *, int8: bool) -> float:
        """Picoseconds of one operation on the example batch, without what a call costs by itself."""
        if fact.absent or keeps_grid(fact.kind):
            return 0.0
        rates = self.int8_kernels if int8 else self.float_kernels
        if fact.macs:
            return fact.macs * float(getattr(rates, _class(fact)))
        if fact.kind == "embedding":  # a table of integers is looked up as one of floats is
            return elements(fact) * (rates.element + (self.dequantize if int8 else 0.0))
        return elements(fact) * rates.element

    def node_us(self, fact: NodeFact, *, int8: bool) -> float:
        """Microseconds of one operation on the example batch, with the call."""
        silent = fact.absent or keeps_grid(fact.kind)
        return 0.0 if silent else (self.node + self.kernel(fact, int8=int8)) / 1e6

    def border_us(self, quantized: list[int], dequantized: list[int]) -> float:
        """Microseconds of quantizes and dequantizes of so many elements each, with their calls."""
        moved = self.quantize * sum(quantized) + self.dequantize * sum(dequantized)
        return (moved + self.node * (len(quantized) + len(dequantized))) / 1e6


def elements(fact: NodeFact) -> int:
    """What an operation that adds no products works on: its result, or what it reads if that is more."""
    return max(fact.bytes, fact.x_bytes) // 4


def _class(fact: NodeFact) -> str:
    if fact.kind.startswith("conv"):
        return "depthwise" if fact.depthwise else "conv"
    return "linear" if fact.kind == "linear" else "matmul"
