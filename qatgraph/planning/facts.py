"""Facts of a graph that planning needs, as values that read without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qatgraph.ops import keeps_grid

if TYPE_CHECKING:
    from torch import fx

    from qatgraph.ir.graph import Graph

WORDS = ("name", "kind", "shape", "rank", "width", "weight", "mib")  # of the sentences of rows and pins
Size = int | str  # a dynamic size bears the user's name


@dataclass(frozen=True)
class ParameterFact:
    """A parameter that a node reads: ``storage`` is the first path of the same tensor (ties are equal there).

    A weight behind a pruning mask has the path of its parameter, and both in its storage.
    """

    role: str
    path: str
    storage: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class NodeFact:
    """One operation with a float result.

    ``inputs`` are (role, name of the producing node or graph input) pairs; ``shape`` is that of the result and
    ``x_shape`` that of the first input; ``readers`` the kinds that read the result, also behind a dropout, and
    ``output`` if the model returns it, ``outputs`` then the names under which it does; ``behind`` those that read it
    behind the activation of its region and behind what only moves it; ``low`` the smallest value that
    the operation can give, if it has one; ``zeros`` says that it pads an image with zeros,
    ``beyond`` that windows may reach beyond the padding (``ceil_mode``), of an average those that count it;
    ``bytes`` its size on the example batch, and ``macs`` its multiply-accumulates there. ``absent`` says why no kernel
    is left of it, if none is: it is a ``constant`` (it depends on no input), or only gives a ``state`` of the model a
    new value.
    """

    name: str
    kind: str
    module: str
    region: str
    source: str
    inputs: tuple[tuple[str, str], ...]
    parameters: tuple[ParameterFact, ...]
    shape: tuple[Size, ...]
    x_shape: tuple[Size, ...]
    readers: tuple[str, ...]
    bytes: int
    behind: tuple[str, ...] = ()
    x_bytes: int = 0
    macs: int = 0
    low: float | None = None
    zeros: bool = False
    beyond: bool = False
    absent: Literal["", "constant", "state"] = ""
    outputs: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.x_shape)

    @property
    def dynamic(self) -> bool:
        return any(isinstance(s, str) for s in self.x_shape)

    @property
    def terms(self) -> int:
        """How many products a sum of a linear or a convolution has; 0 without a constant weight."""
        weight = self.parameter("weight")
        return math.prod(weight.shape[1:]) if weight is not None else 0

    @property
    def depthwise(self) -> bool:
        """Whether each channel of a convolution has one filter of its own: ``[C, 1, ...]`` over C channels."""
        weight = self.parameter("weight")
        if weight is None or len(weight.shape) < 3:
            return False
        return weight.shape[1] == 1 < weight.shape[0] == self.x_shape[-len(weight.shape) + 1]

    @property
    def batched(self) -> bool:
        """Whether samples and channels stand in front of the spatial axes of a convolution or pool."""
        axes = self.kind[-2:-1]
        return not axes.isdigit() or self.rank == int(axes) + 2

    def parameter(self, role: str) -> ParameterFact | None:
        return next((p for p in self.parameters if p.role == role), None)

    def words(self) -> dict[str, str]:
        """Words for the sentences of rows and pins."""
        weight = self.parameter("weight")
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": shape_text(self.x_shape),
            "rank": str(self.rank),
            "width": str(self.x_shape[-1]) if self.x_shape else "1",
            "weight": shape_text(weight.shape) if weight else "no weight",
            "mib": f"{weight.bytes / 2**20:.1f}" if weight else "0",
        }


def shape_text(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _varying(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on an input of the model, or on chance."""
    from qatgraph.ir.aliases import draws
    from qatgraph.ir.meta import has_record, record

    found: set[fx.Node] = set()
    for node in nodes:
        # attention is tagged as random for its dropout, which no captured graph has
        random = draws(node) and not (has_record(node) and record(node).kind == "attention")
        if node.op == "placeholder" or random or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _needed(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that an output depends on."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "output" or node in found:
            found.update((node, *node.all_input_nodes))
    return found


def _reader_kinds(node: fx.Node, through: Callable[[str], bool] = lambda kind: False) -> Iterator[str]:
    """The kinds that read a value, also behind a dropout, which is gone when the engine runs, and ``through`` what."""
    from qatgraph.ir.meta import has_record, record

    for user in node.users:
        if user.op == "output":
            yield "output"
        elif has_record(user):
            yield record(user).kind
            if record(user).kind == "dropout" or through(record(user).kind):
                yield from _reader_kinds(user, through)


def _picks(kind: str) -> bool:
    """Whether the elements of the result are those of the inputs, moved, picked or side by side."""
    return keeps_grid(kind) or kind == "cat" or kind.startswith("max_pool")


def _end(node: fx.Node) -> fx.Node:
    """The activation from 0 on that alone reads a node and is of one region with it, else the node."""
    from qatgraph.ir.meta import has_record, record

    reader = next(iter(node.users)) if len(node.users) == 1 else node
    if not has_record(reader) or record(reader).region != record(node).region:
        return node
    kind = record(reader).kind
    return reader if kind in ("relu", "clamp") and _low(reader, kind) == 0 else node


def _returned(graph: Graph) -> dict[fx.Node, tuple[str, ...]]:
    """The names of the outputs that each node is, also behind a dropout."""
    from torch import fx
    from torch.utils import _pytree as pytree

    from qatgraph.ir.meta import has_record, record

    found: dict[fx.Node, tuple[str, ...]] = {}
    leaves = pytree.tree_leaves(graph.module.graph.output_node().args[0])
    for name, node in zip(graph.info.outputs, leaves, strict=True):
        while isinstance(node, fx.Node):
            found[node] = (*found.get(node, ()), name)
            dropout = has_record(node) and record(node).kind == "dropout"
            node = node.args[0] if dropout else None
    return found


def _pads_images(node: fx.Node) -> bool:
    """Whether zeros are put around the spatial axes, and nothing is cut off."""
    from qatgraph.rewriting.matcher import attribute

    ends: Any = attribute(node, "pad")
    plain = attribute(node, "mode") == "constant" and attribute(node, "value") in (None, 0)
    spatial = 2 * (node.meta["val"].ndim - 2)
    return plain and all(isinstance(e, int) and e >= 0 for e in ends) and not any(ends[spatial:])


def _reaches_beyond(node: fx.Node, kind: str) -> bool:
    """Whether the last window of a pool may reach beyond the padding; of an average, only if it counts the padding."""
    from qatgraph.rewriting.matcher import attribute

    if kind.startswith("max_pool"):
        return bool(attribute(node, "ceil_mode"))
    padding = attribute(node, "padding")
    pads = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    return bool(pads and attribute(node, "ceil_mode") and attribute(node, "count_include_pad"))


def _low(node: fx.Node, kind: str) -> float | None:
    """The smallest value of a result that has a bound by its operation."""
    if kind == "clamp":
        bound = node.args[1] if len(node.args) > 1 else None
        return float(bound) if isinstance(bound, (int, float)) else None
    return 0.0 if kind in ("relu", "sigmoid", "softmax", "safe_softmax") else None


def macs_of(node: fx.Node, kind: str) -> int:
    """Multiply-accumulates of an operation of products on the example batch; of others 0."""
    from qatgraph.ir.graph import arguments, example_size
    from qatgraph.ir.meta import value_of

    def size(value: Any) -> list[int]:
        return [example_size(s) for s in value_of(value).shape]

    operand = {role: arg for role, arg in arguments(node) if hasattr(arg, "meta")}
    if kind in ("linear", "matmul"):
        return math.prod(size(node)) * size(operand["x"])[-1]
    if kind.startswith("conv"):
        spread = operand["x"] if kind.startswith("conv_transpose") else node  # there each input is multiplied
        return math.prod(size(spread)) * math.prod(size(operand["weight"])[1:])
    if kind == "attention":
        query, key, value = (size(operand[role]) for role in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def facts_of(graph: Graph) -> tuple[NodeFact, ...]:
    """The facts of every named node whose result is a float tensor, in the order of ``dataflow_order``."""
    import torch
    from torch import fx

    from qatgraph.ir.graph import arguments, example_size, size_text
    from qatgraph.ir.masks import ROLES, weight_of
    from qatgraph.ir.meta import has_record, record, value_of
    from qatgraph.ir.topology import dataflow_order

    nodes = dataflow_order(graph.module.graph)
    symbols = graph.size_names()
    storage: dict[int, str] = {}
    for node in nodes:
        tensor = graph.parameter(node)
        if tensor is not None:
            storage.setdefault(id(tensor), str(node.target))

    def first_path(*nodes: fx.Node | None) -> str:
        return " * ".join(storage[id(graph.parameter(n))] for n in nodes if n is not None)

    varying, needed, returned = _varying(nodes), _needed(nodes), _returned(graph)

    def shape(value: object) -> tuple[Size, ...]:
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(s if isinstance(s, int) else size_text(s, symbols) for s in value.shape)

    def fact(node: fx.Node) -> NodeFact:
        inputs, parameters = [], []
        x_shape: tuple[Size, ...] = ()
        x_bytes = 0
        for role, arg in arguments(node):
            if not isinstance(arg, fx.Node):
                continue
            weight = weight_of(arg) if role in ROLES or arg.op == "get_attr" else None
            if weight is not None:
                path, paths = str(weight.parameter.target), first_path(weight.parameter, weight.mask)
                size = weight.stored.numel() * weight.stored.element_size()
                parameters.append(ParameterFact(role, path, paths, tuple(weight.stored.shape), size))
            elif isinstance(value_of(arg), torch.Tensor):
                x_bytes = x_bytes if x_shape else math.prod(example_size(s) for s in value_of(arg).shape) * 4
                x_shape = x_shape or shape(value_of(arg))
                inputs.append((role, record(arg).name if has_record(arg) else arg.name))
        value = value_of(node)
        known = record(node)
        elements = math.prod(example_size(s) for s in value.shape)
        return NodeFact(
            name=known.name,
            kind=known.kind,
            module=known.module,
            region=known.region,
            source=known.source,
            inputs=tuple(inputs),
            parameters=tuple(parameters),
            shape=shape(value),
            x_shape=x_shape or shape(value),
            readers=tuple(sorted(set(_reader_kinds(node)))),
            behind=tuple(sorted(set(_reader_kinds(_end(node), _picks)))),
            bytes=elements * 4,
            x_bytes=x_bytes,
            macs=macs_of(node, known.kind),
            low=_low(node, known.kind),
            zeros=known.kind == "pad" and _pads_images(node),
            beyond=known.kind.startswith(("avg_pool", "max_pool")) and _reaches_beyond(node, known.kind),
            absent="constant" if node not in varying else "" if node in needed else "state",
            outputs=returned.get(node, ()),
        )

    named = (n for n in nodes if has_record(n) and isinstance(value_of(n), torch.Tensor))
    return tuple(fact(n) for n in named if value_of(n).is_floating_point())
