"""Where the channels of a value come from: the weights into which a factor per channel can be folded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.graph import arguments, example_size
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ops import BY_NAME
from qatgraph.rewriting.channels import problem_of
from qatgraph.rewriting.matcher import attribute

SOURCES = frozenset({"linear", "layer_norm", "rms_norm"})
_SAME = frozenset({"relu", "dropout"})  # f(c x) = c f(x) for c > 0, element by element


@dataclass(frozen=True)
class Source:
    """Channel ``i`` of the value is channel ``channels[i]`` of the result of ``node`` (the last axis of both).

    ``path`` leads from the value back to the node, both included: whatever is computed there has the factors in it.
    """

    node: fx.Node
    channels: torch.Tensor
    path: tuple[fx.Node, ...]


def source_of(value: fx.Node) -> Source | str:
    """The linear or norm whose output channels, scaled, scale the channels of ``value``, and nothing else; or why not.

    Between them stand shape operations, ReLU, products with another value, and attention, which mixes positions and
    leaves the channels of its value operand where they are.
    """
    path = _path(value)
    return path if isinstance(path, str) else _channels(path)


def _path(value: fx.Node) -> list[fx.Node] | str:
    """The nodes from ``value`` back to its source, or why there is none."""
    if not has_record(value):
        return f"'{value.target}' is an input of the model"
    kind, name = record(value).kind, record(value).name
    if kind in SOURCES:
        return _no_weight(value) or problem_of(value, "weight") or problem_of(value, "bias") or [value]
    reasons = []
    for carrier in _carriers(value):
        if len(carrier.users) > 1 or _uses(node=value, of=carrier) > 1:
            reasons.append(f"'{_name(carrier)}' is also read elsewhere")
            continue
        found = _path(carrier)
        if not isinstance(found, str):
            return [value, *found]
        reasons.append(found)
    return reasons[-1] if reasons else f"a factor does not pass through '{name}'"


def _no_weight(source: fx.Node) -> str:
    """Why a linear or norm has no weight with one row, or one element, for each channel; empty if it has."""
    weight = attribute(source, "weight")
    if weight is None:
        return f"'{record(source).name}' has no weight"
    several = record(source).kind != "linear" and value_of(weight).ndim > 1
    return f"'{record(source).name}' normalizes several axes" if several else ""


def _uses(node: fx.Node, of: fx.Node) -> int:
    """How often a node reads another: ``x * x``, or attention whose keys are its values."""
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return read.count(of)


def _carriers(node: fx.Node) -> list[fx.Node]:
    """The operands through which a factor per channel reaches the result."""
    kind, operands = record(node).kind, dict(arguments(node))
    if kind == "attention":
        return [operands["value"]]
    if kind == "matmul":  # probabilities @ value
        y = operands["y"]
        return [y] if isinstance(y, fx.Node) and 2 <= len(_shape(y)) <= len(_shape(node)) else []
    if kind == "mul":
        shape = _shape(node)
        return [n for n in (operands["x"], operands["y"]) if isinstance(n, fx.Node) and _shape(n) == shape]
    moves = kind in BY_NAME and BY_NAME[kind].keeps_grid
    return [n for n in node.args[:1] if isinstance(n, fx.Node)] if moves or kind in _SAME else []


def _channels(path: list[fx.Node]) -> Source | str:
    """Follow the numbers of the source's channels through the path."""
    *rest, source = path
    shape = _shape(source)
    numbers = torch.arange(shape[-1]).expand(shape)
    for node, carrier in zip(reversed(rest), reversed(path), strict=False):
        moved = _through(node, carrier, numbers)
        if isinstance(moved, str):
            return moved
        numbers = moved
    rows = numbers.reshape(-1, numbers.shape[-1])
    if not bool((rows == rows[0]).all()):
        return f"the channels of '{_name(path[0])}' differ from position to position"
    return Source(source, rows[0].clone(), tuple(path))


def _through(node: fx.Node, carrier: fx.Node, numbers: torch.Tensor) -> torch.Tensor | str:
    kind = record(node).kind
    if kind in ("attention", "matmul"):
        if not bool((numbers == numbers[..., :1, :]).all()):
            return f"'{_name(node)}' mixes the channels of its value"
        shape, row = _shape(node), numbers[..., :1, :]
        if row.ndim > 2:
            row = row.repeat_interleave(shape[-3] // row.shape[-3], dim=-3)
        return row.expand(shape)
    if kind in _SAME or kind == "mul":
        return numbers
    # a shape operation: it moves the numbers as it moves the values
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: numbers if n is carrier else example_size(value_of(n))
    )
    moved: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return moved


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = value_of(node)
    return tuple(example_size(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()


def _name(node: fx.Node) -> str:
    return record(node).name if has_record(node) else str(node.target)
