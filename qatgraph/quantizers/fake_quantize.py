"""Fake quantizers: float in, float on the grid out, straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch

from qatgraph.quantizers.grids import STORAGE, channel_shape, quantize, range_grid, weight_scale
from qatgraph.quantizers.observers import make_observer
from qatgraph.specs import QuantSpec


class _StraightThrough(torch.autograd.Function):
    """Gradient 1 inside the clip range, 0 outside (Bengio et al., arXiv:1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int, axis: int | None
    ) -> torch.Tensor:
        shape = channel_shape(x, axis)
        raw = torch.round(x / scale.reshape(shape)).add_(zero.reshape(shape))
        q = raw.clamp(qmin, qmax)
        ctx.save_for_backward(raw == q)
        return q.sub_(zero.reshape(shape)).mul_(scale.reshape(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None, None


def straight_through(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int, axis: int | None
) -> torch.Tensor:
    """The nearest point of the grid, with the straight-through gradient."""
    out: torch.Tensor = _StraightThrough.apply(x, scale, zero, qmin, qmax, axis)  # type: ignore[no-untyped-call]
    return out


class FakeQuantize(torch.nn.Module):
    """Base: passes its input through until it is calibrated. All state is in buffers.

    ``calibrated`` says whether the grid is known; it travels in the ``state_dict``.
    """

    calibrated: torch.Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.on = False
        self.register_buffer("calibrated", torch.tensor(False))

    def switch_on(self) -> None:
        self.on = True
        self.calibrated.fill_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.on = bool(self.calibrated)  # a Python flag decides in forward: a branch on a buffer would not export

    def extra_repr(self) -> str:
        return f"{self.spec}, {'on' if self.on else 'off'}"


class ActivationFakeQuantize(FakeQuantize):
    """A grid found by an observer, per tensor; fixed after calibration.

    It saturates where ONNX QuantizeLinear does, at the limits of the integer type: s8 reaches -128. ``bound`` is the
    largest value that a clamp in front lets through.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, observer: str, bound: float | None = None) -> None:
        super().__init__(spec)
        self.bound = bound
        self.observer = make_observer(observer)
        span = torch.iinfo(STORAGE[spec.dtype])
        self.qmin, self.qmax = span.min, span.max
        self.observing = False
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0.0))

    def settle(self, least: float = 0.0) -> None:
        """Turn what was observed into the grid, of steps of at least ``least``.

        Behind a clamp, a range of zeros becomes that of the clamp, up to steps of 1: an engine takes a clamp into the
        kernel in front of it only if the grid ends there.
        """
        low, high = self.observer.range(self.spec)
        if self.bound is not None and self.bound > 0 and not bool(low.any() | high.any()):
            high = torch.full_like(high, min(self.bound, self.spec.qmax - self.spec.qmin))
        scale, zero = range_grid(low, high, self.spec)
        if scale < least:
            wider = least / scale
            scale, zero = range_grid(low * wider, high * wider, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.switch_on()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            self.observer.observe(x.detach())
            return x
        if not self.on:
            return x
        return straight_through(x, self.scale, self.zero_point, self.qmin, self.qmax, None)


class FixedFakeQuantize(ActivationFakeQuantize):
    """The grid of an integer input: the model says it, calibration leaves it alone; what lies on it passes as it is."""

    def __init__(self, spec: QuantSpec, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__(spec, "minmax")
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def settle(self, least: float = 0.0) -> None:
        self.switch_on()


class WeightFakeQuantize(FakeQuantize):
    """A symmetric grid that follows the weight: the scale is computed from it in each forward, and at conversion
    by the same function, so that training and deployment agree bit for bit.

    ``floor``, one or per channel, is the least scale that a bias in units of it allows; calibration sets it.

    ``forward(rows, table)`` puts looked-up rows on the grid of their table: the same result as looking up in the
    quantized table, at a fraction of the cost.
    """

    floor: torch.Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec)
        self.register_buffer("floor", torch.zeros(() if channels is None else channels))

    def forward(self, weight: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        if not self.on:
            return weight
        scale = weight_scale(weight if table is None else table, self.spec, self.floor)
        zero = torch.zeros((), device=weight.device).expand_as(scale)
        return straight_through(weight, scale, zero, self.spec.qmin, self.spec.qmax, self.spec.axis)

    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(int8 weight, scale)``."""
        with torch.no_grad():
            scale = weight_scale(weight, self.spec, self.floor)
            q = quantize(weight, scale, torch.zeros_like(scale), self.spec.qmin, self.spec.qmax, self.spec.axis)
        return q.to(torch.int8), scale
