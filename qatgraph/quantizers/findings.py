"""What is odd about the grids of a calibrated model, in sentences, from its state alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import weight_of
from qatgraph.ir.names import quantizer_name
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FixedFakeQuantize, WeightFakeQuantize
from qatgraph.quantizers.grids import weight_scale
from qatgraph.quantizers.observers import MinMax


def findings(graph: Graph) -> list[str]:
    """Of a prepared graph: activations that calibration saw as one value or as denormals, channels of weights that are
    all zero, and those whose scale follows their bias."""
    modules = dict(graph.module.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    for node in graph.module.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        name = quantizer_name(str(node.target))
        if isinstance(module, ActivationFakeQuantize):
            found.update(dict.fromkeys(f"'{name}': {s}" for s in _activation(module)))
        elif isinstance(module, WeightFakeQuantize) and len(node.args) == 1:
            weight = weight_of(node.args[0])
            assert weight is not None
            found.update(dict.fromkeys(f"'{name}': {s}" for s in _weight(weight.tensor, module)))
    return list(found)


def _activation(module: ActivationFakeQuantize) -> Iterator[str]:
    observer = module.observer
    if not isinstance(observer, MinMax) or isinstance(module, FixedFakeQuantize):
        return
    low, high = float(observer.low), float(observer.high)
    if low == high == 0:
        yield "calibration saw nothing but zeros, so its grid is a guess"
    elif low == high:
        yield f"calibration saw nothing but {high:g}, so its grid is good for constants only"
    elif max(-low, high) / 255 < torch.finfo(torch.float32).tiny:
        yield f"calibration saw no value beyond {max(-low, high):g}, and the step of such a grid would be denormal"


def _weight(weight: torch.Tensor, module: WeightFakeQuantize) -> Iterator[str]:
    axis = module.spec.axis
    rows = (weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)).abs().amax(1)
    zero = (rows == 0).nonzero().flatten().tolist()
    if zero:
        yield f"{_some(zero, len(rows))} all zero"
    free, scale = (weight_scale(weight, module.spec, f).reshape(-1) for f in (None, module.floor))
    raised = ((scale > free) & (rows != 0)).nonzero().flatten().tolist()
    if raised:
        yield f"{_some(raised, len(rows))} too small for the bias, which would overflow int32: their scale follows it"


def _some(channels: list[int], count: int) -> str:
    """``the weights of 2 of 8 channels (3, 5) are``; the first four are named."""
    names = ", ".join(map(str, channels[:4])) + (", …" if len(channels) > 4 else "")
    return f"the weights of {len(channels)} of {count} channels ({names}) are" if count > 1 else "the weights are"
