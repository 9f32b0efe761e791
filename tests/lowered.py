"""Lowered models of the zoo, made once and shared by all tests: read them, and plant faults in copies only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.ir.meta import record
from qatgraph.kernels import compare_kernels, owner
from qatgraph.parity import compare_regions
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.proof import feed_of, other_constants
from qatgraph.reference import Array
from qatgraph.regions import Region
from tests.models import ZOO, Case

# beside the zoo as it is: an encoder whose word table is int8, and the prediction head of a model in float
RECIPES: dict[str, tuple[str, Recipe]] = {
    **{name: (name, Recipe()) for name in ZOO},
    "table": ("encoder", Recipe(override=(Override(select="token:embedding", place="int8"),))),
    "pinned": ("mlp", Recipe(override=(Override(select="down:linear", place="float"),))),
}
LOWERED = list(RECIPES)


@dataclass(frozen=True)
class Lowered:
    """A model, the prepared one, its plan, and the bytes of the file."""

    model: nn.Module
    qat: nn.Module
    plan: Plan
    file: bytes

    @property
    def proto(self) -> Any:
        """A copy of the file to read or to spoil."""
        return onnx.load_from_string(self.file)

    def changed(self, proto: Any) -> Lowered:
        return replace(self, file=proto.SerializeToString())

    def run(self, batch: Batch, *, precise: bool = False) -> list[Array]:
        """Every output of the file; ``precise`` under the option against 16-bit overflow."""
        session = ort_cpu.session(self.file, session__x64quantprecision="1" if precise else "0")
        return ort_cpu.run(session, feed_of(Graph.of(self.qat), batch))

    def fake_quantized(self, batch: Batch) -> list[Array]:
        """Every output of the prepared model."""
        args, kwargs = bind(batch)
        with torch.no_grad():
            leaves: Sequence[Tensor] = pytree.tree_leaves(self.qat(*args, **kwargs))
        return [t.numpy() for t in leaves]

    def distance(self, batch: Batch) -> float:
        """The largest difference between the two, over the largest value."""
        have, want = self.run(batch), self.fake_quantized(batch)
        assert [a.shape for a in have] == [b.shape for b in want]
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(have, want, strict=True))


def lower(case: Case, recipe: Recipe | None = None, seeds: Sequence[int] = (1, 2)) -> Lowered:
    """Capture, plan, prepare, calibrate, convert and lower a model."""
    graph = case.capture()
    plan = qg.plan(graph, recipe=recipe or Recipe())
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, [case.inputs(s) for s in seeds], progress=False)
    return Lowered(case.model(), qat, plan, ort_cpu.lower(convert(Graph.of(qat)), plan))


@cache
def lowered(name: str) -> Lowered:
    """One of ``LOWERED``."""
    base, recipe = RECIPES[name]
    return lower(ZOO[base], recipe)


def case_of(name: str) -> Case:
    return ZOO[RECIPES[name][0]]


def faults(lowered: Lowered, batch: Batch) -> list[str]:
    """What speaks against a file: its kernels, its constants and its regions, as ``prove`` compares them."""
    plan, qdq = lowered.plan, convert(Graph.of(lowered.qat))
    tapped, names = ort_cpu.tap(lowered.file, plan)
    taps = [t for found, _ in ort_cpu.run_taps(tapped, names, [feed_of(qdq, batch)]) for t in found]
    nodes = {record(n).name: n for n in qdq.nodes}
    held = {owner(name): parts for name, parts in ort_cpu.product_constants(lowered.file).items()}
    return [
        *map(str, compare_kernels(plan, ort_cpu.audit(lowered.file))),
        *(w for name, have in held.items() if (w := other_constants(have, Region.of(qdq, nodes[name]).constants))),
        *(p.failure for p in compare_regions(qdq, taps).values() if p.failure),
    ]


def product_weights(file: bytes) -> dict[str, Array]:
    """The int8 weights of every product in a file, by the name of its node."""
    return {name: roles["weight"][0] for name, roles in ort_cpu.product_constants(file).items()}


def node(proto: Any, name: str) -> Any:
    return next(n for n in proto.graph.node if n.name == name)


def initializer(proto: Any, name: str) -> Any:
    return next(i for i in proto.graph.initializer if i.name == name)


def write(proto: Any, name: str, array: Array) -> None:
    """Give an initializer other values."""
    initializer(proto, name).CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))


def read(proto: Any, name: str) -> Array:
    found: Array = onnx.numpy_helper.to_array(initializer(proto, name)).copy()
    return found
