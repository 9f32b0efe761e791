"""What the zoo knows of one architecture, and how its regions are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from tests.models import Case

NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})
ACTIVATIONS = frozenset({
    "gelu", "silu", "relu", "tanh", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu", "elu",
    "softplus", "mish", "prelu", "glu",
})  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """How often an architecture has what a plan speaks of.

    An attention counts once, be it one operation or written out, and the softmax inside it is no activation. ``norms``
    are those that stay: LayerNorm, RMSNorm, GroupNorm.
    """

    attention: int = 0
    norms: int = 0
    activations: int = 0
    linears: int = 0
    convs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.names())

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))


NONE = Counts()


@dataclass(frozen=True, kw_only=True)
class Entry(Case):
    """A tiny model of an architecture.

    ``counts`` come from its description (layers times what a layer holds), never from a graph. ``gaps`` are regions
    that no pass recognises yet, with ``why``; ``refused`` is the code with which capture refuses the model.
    """

    counts: Counts = NONE
    gaps: Counts = NONE
    refused: str = ""
    why: str = ""


def regions_of(graph: Graph) -> Counts:
    """What was recognised in a canonical graph."""
    kinds = Counter(record(n).kind for n in graph.nodes)
    written_out = {record(n).region for n in graph.nodes if record(n).region.endswith("+attention")}
    return Counts(
        attention=kinds["attention"] + len(written_out),
        norms=sum(kinds[k] for k in NORMS),
        activations=sum(kinds[k] for k in ACTIVATIONS) + sum(_is_relu6(n) for n in graph.nodes),
        linears=kinds["linear"],
        convs=sum(count for kind, count in kinds.items() if kind.startswith("conv")),
    )


def _is_relu6(node: fx.Node) -> bool:
    """A clamp from 0 to 6; with other bounds it is arithmetic, as in a normalization."""
    return record(node).kind == "clamp" and tuple(node.args[1:]) == (0, 6)
