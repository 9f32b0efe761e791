"""Small synthetic graphs as facts, and tables on which kinds disagree: what the tests of the solver share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qatgraph.planning.facts import NodeFact, ParameterFact
from qatgraph.planning.target import Row, Target
from qatgraph.specs import QuantSpec

U8, S8 = QuantSpec.parse("u8 affine per-tensor"), QuantSpec.parse("s8 symmetric per-tensor")
SHAPE = ("batch", 5, 16)


def op(name: str, kind: str, *sources: str, storage: str = "", bias: bool = False) -> NodeFact:
    """A node that reads ``sources``; a linear or embedding has a weight of its own, or the tensor ``storage``."""
    parameters: tuple[ParameterFact, ...] = ()
    if kind in ("linear", "embedding"):
        parameters = (ParameterFact("weight", f"{name}.weight", storage or f"{name}.weight", (16, 16), 1024),)
    if bias:
        parameters += (ParameterFact("bias", f"{name}.bias", f"{name}.bias", (16,), 64),)
    return NodeFact(
        name=name,
        kind=kind,
        module=name,
        region="",
        source="",
        inputs=tuple(zip(("x", "y"), sources, strict=False)),
        parameters=parameters,
        shape=SHAPE,
        x_shape=SHAPE,
        readers=(),
        bytes=4 * 5 * 16 * 4,
    )


def net(*facts: NodeFact) -> tuple[NodeFact, ...]:
    def readers(name: str) -> tuple[str, ...]:
        return tuple(sorted({f.kind for f in facts if name in [v for _, v in f.inputs]}))

    return _grouped([replace(f, readers=readers(f.name) or ("output",)) for f in facts])


def _grouped(facts: Sequence[NodeFact]) -> tuple[NodeFact, ...]:
    """A ReLU and what it alone reads are one region, as the canonical pipeline leaves them."""
    alone = {f.inputs[0][1]: f.name for f in facts if f.kind in ("relu", "clamp")}
    alone = {v: n for v, n in alone.items() if sum(v in [w for _, w in f.inputs] for f in facts) == 1}
    region = {name: value for value, name in alone.items()} | {value: value for value in alone}
    low = {f.name: 0.0 if f.kind in ("relu", "clamp") else None for f in facts}
    return tuple(replace(f, region=region.get(f.name, ""), low=low[f.name], zeros=f.kind == "pad") for f in facts)


def clashing(*kinds: str, x: Sequence[QuantSpec] = (U8, S8)) -> Target:
    """A target on which kinds disagree about the grid of what they read: the grids go round among them."""
    rows = []
    for kind, grid in zip(kinds, [x[i % len(x)] for i in range(len(kinds))], strict=True):
        rows.append(Row(id=f"{kind}.int8", op=kind, placement="int8", kernel="K", x=(grid,), why="{name} {shape}"))
        rows.append(Row(id=f"{kind}.float", op=kind, placement="engine-float", kernel="F", why="{name} {shape}"))
    return Target(name="clashing", description="kinds disagree", row=tuple(rows))
