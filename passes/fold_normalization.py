"""fold-normalization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import weight_of
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.operators import DEQUANTIZE
from qatgraph.ops import keeps_grid
from qatgraph.rewriting.channels import Channels, problem_of, replace_weight
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute, operands
from qatgraph.rewriting.passes import GraphPass, within

STEPS = frozenset({"add", "sub", "rsub", "mul", "div", "cast"})  # an affine function, with a constant beside the pixels
LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
THROUGH = frozenset({"pad", "max_pool1d", "max_pool2d", "max_pool3d"})  # a layer reads pixels also behind these
OTHERS = (torch.int8, torch.int16, torch.uint16)
NEAR = 2.0**-16  # of a pixel: what float32 makes of 127 / 255
EQUAL = 2.0**-22  # factors of 1 that float32 has rounded


@dataclass(frozen=True)
class FoldNormalization(GraphPass):
    """Let a model take pixels as integers: read the normalization of a uint8 image as their grid.

    What: ``(pixel / 255 - mean) / std``, in any order and spelling, is ``(pixel - zero_point) * scale``: one
        ``dequantize``. Factors that differ by channel go into the weight of the layer that reads the image, and what is
        left of the zero point into its bias.
    Why: the integers of the image are those that the first kernel takes; nothing is converted, and nothing rounded.
    Before and after: ``conv2d(div(sub(cast(x), 127), 128), w)`` becomes ``conv2d(dequantize(x, 1/128, 127), w)``.
    Refuses: means that no integer pixel stands for, in front of a convolution that pads with zeros: those zeros would
        be another pixel in each channel; other readers than one layer; other integers than uint8; numbers that train.
    Numerics: within 1e-5 (new parameters are rounded to float32).
    """

    name = "fold-normalization"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-5)

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            source = None if node._erased else _integers(graph, node)
            if source is None:
                continue
            *_, end = chain = [node, *_following(graph, node)]
            if not _read_by_layer(end):
                continue
            if value_of(source).dtype is not torch.uint8:
                edit.refuse(end, f"its pixels are {value_of(source).dtype}: kernels on integers take uint8")
                continue
            _fold(graph, source, chain, edit)
        graph.module.graph.eliminate_dead_code()


def _integers(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The integers that a step turns into float32."""
    if record(node).kind not in STEPS or value_of(node).dtype is not torch.float32:
        return None
    source = _moving(graph, node)
    known = source is not None and value_of(source).dtype in (torch.uint8, *OTHERS)
    return source if known else None


def _moving(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The one operand of a step that is no constant; ``None`` if there are two, or it is a divisor."""
    values = [a for a in operands(node) if isinstance(a, fx.Node) and _constant(graph, a) is None]
    divides = record(node).kind == "div" and (node.args[0] not in values or attribute(node, "rounding_mode"))
    return None if len(values) != 1 or divides else values[0]


def _constant(graph: Graph, node: fx.Node) -> torch.Tensor | None:
    found = graph.parameter(node)
    return None if found is None or found.requires_grad else found


def _following(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """The steps behind, as long as nothing else reads what is between them."""
    while len(node.users) == 1:
        (node,) = node.users
        step = has_record(node) and record(node).kind in STEPS and value_of(node).dtype is torch.float32
        if not step or _moving(graph, node) is None:
            return
        yield node


def _read_by_layer(node: fx.Node) -> bool:
    kinds = {user: record(user).kind for user in node.users if has_record(user)}
    return any(k in LAYERS or ((keeps_grid(k) or k in THROUGH) and _read_by_layer(u)) for u, k in kinds.items())


def _fold(graph: Graph, source: fx.Node, chain: list[fx.Node], edit: Edit) -> None:
    end = chain[-1]
    factor, shift = _affine(graph, chain, value_of(source).ndim)
    if not bool(torch.isfinite(factor).all() & torch.isfinite(shift).all()):
        raise _not_finite(end)
    if list(map(str, value_of(end).shape)) != list(map(str, value_of(source).shape)):
        edit.refuse(end, "its constants make the image larger")
        return
    scale = factor.abs().mean().float()
    if not bool(factor.abs().min() >= torch.finfo(torch.float32).tiny):
        edit.refuse(end, "it multiplies the pixels by zero, or by a denormal")
        return
    zero = _common_zero(factor, shift)
    ratio, rest = factor / scale.double(), shift if zero is None else torch.zeros_like(shift)
    alone = zero is not None and bool(((ratio - 1).abs() < EQUAL).all())
    why = "" if alone else _not_foldable(end, ratio, rest)
    if why:
        edit.refuse(end, why)
        return
    if not alone:
        _into_layer(next(iter(end.users)), ratio.flatten(), rest.flatten(), edit)
    stem = end.name
    constants = (
        edit.constant(f"{stem}/scale", scale, at=end),
        edit.constant(f"{stem}/zero_point", torch.tensor(zero or 0, dtype=torch.uint8), at=end),
    )
    edit.replace(end, edit.custom(DEQUANTIZE, source, *constants, 0, at=end, near=end, kind="dequantize"))


def _affine(graph: Graph, chain: list[fx.Node], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``factor * pixel + shift`` of the whole chain in float64, each of the shape that its constants have."""

    def of(pixel: float) -> torch.Tensor:
        value = torch.full([1] * rank, pixel, dtype=torch.float64)
        for step in chain:
            moving = _moving(graph, step)

            def operand(node: fx.Node, moving: Any = moving, value: torch.Tensor = value) -> Any:
                return value if node is moving else graph.parameter(node).detach().double()  # type: ignore[union-attr]

            if record(step).kind != "cast":
                args, kwargs = fx.map_arg((step.args, step.kwargs), operand)
                value = step.target(*args, **kwargs)  # type: ignore[operator]
        return value

    low, high = of(0.0), of(255.0)
    return (high - low) / 255, low


def _common_zero(factor: torch.Tensor, shift: torch.Tensor) -> int | None:
    """The pixel that is zero in all channels, if there is one."""
    zeros = -shift / factor
    nearest = zeros.flatten()[0].round()
    one = bool(((zeros - nearest).abs() <= NEAR).all()) and 0 <= nearest <= 255
    return int(nearest) if one else None


def _not_foldable(end: fx.Node, ratio: torch.Tensor, rest: torch.Tensor) -> str:
    """Why factors and shifts cannot go into the layer behind; empty if they can."""
    readers = list(end.users)
    layer = readers[0]
    kind = record(layer).kind if has_record(layer) else "output"
    if len(readers) > 1 or kind not in LAYERS or layer.args[0] is not end:
        reads = "several operations read it" if len(readers) > 1 else f"a {kind} reads it"
        return f"{reads}, and its factors, or its zero, could only go into the weight and bias of one layer"
    axis = ratio.ndim - 1 if kind == "linear" else ratio.ndim - 1 - int(kind[4])
    if any(size > 1 for t in (ratio, rest) for d, size in enumerate(t.shape) if d != axis % t.ndim):
        return "its numbers differ from pixel to pixel, not only from channel to channel"
    if bool(rest.any()) and _pads(layer):
        return (
            f"'{record(layer).name}' pads with zeros, which stand for no integer pixel, or for another one in each "
            "channel; pad the image with the mean colour before, or normalize with a mean that is one integer pixel"
        )
    return problem_of(layer, "weight") or problem_of(layer, "bias")


def _pads(layer: fx.Node) -> bool:
    padding = attribute(layer, "padding")
    if padding == "same":
        return any(size > 1 for size in value_of(layer.args[1]).shape[2:])  # type: ignore[arg-type]
    return padding not in (None, "valid") and any([padding] if isinstance(padding, int) else padding)


def _into_layer(layer: fx.Node, ratio: torch.Tensor, rest: torch.Tensor, edit: Edit) -> None:
    """``w . (ratio * x + rest) + b`` -> ``(w * ratio) . x + (b + w . rest)``."""
    weight, channels = weight_of(layer.args[1]), Channels.of(layer)
    assert weight is not None
    stored = weight.stored.detach().double()
    count = stored.shape[1] * channels.groups
    added = channels.split(channels.scaled(weight.tensor.double(), input=rest.expand(count))).sum((2, 3)).flatten()
    replace_weight(layer, weight, channels.scaled(stored, input=ratio.expand(count)), "folded", edit)
    if not bool(rest.any()):
        return
    old = weight_of(attribute(layer, "bias"))
    if old is not None:
        replace_weight(layer, old, old.stored.detach().double() + added, "folded", edit)
        return
    path = str(weight.parameter.target).removesuffix("/folded").removesuffix("weight")
    bias = added.to(weight.stored.dtype).requires_grad_(weight.stored.requires_grad)
    args = (*layer.args[:2], edit.parameter(f"{path}bias/folded", bias, at=layer), *layer.args[3:])
    edit.replace(layer, edit.operator(layer.target, *args, at=layer, near=layer, **layer.kwargs))


def _not_finite(end: fx.Node) -> PassError:
    return PassError(
        "QG221",
        "the normalization of the pixels gives no finite numbers",
        where=record(end).name,
        why="it divides by zero, or a mean or factor is NaN or infinite",
        todo="look at the mean and the standard deviation that the model was given",
    )
