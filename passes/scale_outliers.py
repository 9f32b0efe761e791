"""scale-outliers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import ROLES, Weight, weight_of
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.planning.plan import Plan, Quantizer
from qatgraph.progress import track
from qatgraph.quantizers.smoothing import Activation, Reader, Smoothing, search
from qatgraph.rewriting.channel_source import Source, source_of
from qatgraph.rewriting.channels import problem_of, replace_weight
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.evidence import Sample, sample
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, changes_grid

MARGIN = 0.95  # the share of the error that must be left at most: less may be chance, and is not worth a product


@dataclass(frozen=True)
class ScaleOutliers(GraphPass):
    """Move the outliers of activations into the weights of the linears that read them.

    What: the int8 linears that read one value get their input channels multiplied by factors, and the value is divided
        by them. The factors, SmoothQuant's (arXiv:2211.10438) or a threshold (Outlier Suppression+, arXiv:2304.09145),
        are searched for each such group by the error of the layers' outputs on calibration data, on the grids of the
        plan. The division is folded into the norm or the linear that the value comes from, through attention and gates,
        unless a grid between has one scale for all channels and loses by it; else it becomes one product.
    Why: one channel that is a hundred times as large as the others leaves these two or three steps of the grid.
    Before and after: ``linear(layer_norm(x, w), v)`` becomes ``linear(layer_norm(x, w / s), v * s)``.
    Refuses: values whose linears are scaled already, share their weight, or have one in half precision; groups whose
        error no factors lower.
    Numerics: changes-grid 1e-5 of weights and biases (new parameters are rounded to the type of the old).
    """

    name = "scale-outliers"
    stage = Stage.CAPTURED
    requires = ("functional",)
    needs_data = True
    numerics = changes_grid(
        1e-5, "linear.weight", "linear.bias", "layer_norm.weight", "layer_norm.bias", "rms_norm.weight"
    )

    @torch.no_grad()
    def apply(self, graph: Graph, edit: Edit) -> None:
        groups = [g for g in _groups(graph, edit.evidence.plan(graph)) if self._fits(g, edit)]
        if groups:
            seen = sample(graph, edit.evidence.batches, [g.value for g in groups])
        for group in track(groups, "scale", show=edit.evidence.progress):
            _scale(group, seen[group.value], edit)

    def _fits(self, group: _Group, edit: Edit) -> bool:
        problems = [p for n in group.linears if (p := problem_of(n, "weight") or _rounded(n))]
        if any(self.name in record(n).history for n in edit.graph.nodes):
            problems = ["the graph is scaled already"]
        if problems:
            edit.refuse(group.linears[0], problems[0])
        return not problems


@dataclass(frozen=True)
class _Group:
    """The int8 linears that read one value on one grid; ``others`` are all grids of the plan but that one."""

    value: fx.Node
    linears: tuple[fx.Node, ...]
    x: Quantizer
    weights: tuple[Quantizer, ...]
    others: tuple[Quantizer, ...]


def _groups(graph: Graph, plan: Plan) -> Iterator[_Group]:
    nodes = {record(n).name: n for n in graph.nodes}
    weights = {p.node: q for q in plan.quantizers for p in q.ports if p.role == "weight"}
    for quantizer in plan.quantizers:
        readers = [nodes[p.node] for p in quantizer.ports if p.role == "x"]
        linear = all(record(n).kind == "linear" and record(n).name in weights for n in readers)
        if not readers or not linear or len(readers) < len(quantizer.ports) or len({n.args[0] for n in readers}) > 1:
            continue
        value = readers[0].args[0]
        assert isinstance(value, fx.Node)
        others = tuple(q for q in plan.quantizers if q is not quantizer)
        yield _Group(value, tuple(readers), quantizer, tuple(weights[record(n).name] for n in readers), others)


def _rounded(linear: fx.Node) -> str:
    """Why real factors would change what a linear computes; empty if they do not."""
    dtype = _weight(linear).stored.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return f"the weight of '{record(linear).name}' is {dtype}, which would round what is scaled" if half else ""


def _alone(group: _Group) -> bool:
    return set(group.value.users) <= set(group.linears)


def _coarsens(group: _Group, source: Source, found: Smoothing) -> bool:
    """Whether grids with one scale for all channels, between the source and the value, lose by the factors.

    The step of such a grid follows the largest channel, and the error of a channel grows with its factor; it counts as
    much as the weights that read it. The rows of the source's weight stand for the ranges of the channels.
    """
    names = {record(n).name for n in source.path}
    if not any(q.spec.axis is None and _touches(q, names, source) for q in group.others):
        return False
    rows = _weight(source.node).tensor.float().abs().cpu()
    top = rows.reshape(len(rows), -1).amax(1)[source.channels]
    read = torch.stack([_weight(n).tensor.float().square().sum(0).cpu() for n in group.linears]).sum(0)
    before, after = top.max().square() * read.sum(), (top / found.factors).max().square()
    return bool(after * (found.factors.square() * read).sum() > before)


def _touches(quantizer: Quantizer, names: set[str], source: Source) -> bool:
    """Whether a grid stands on a value of the path, or on the weight of its source."""
    weight = any(p.node == record(source.node).name and p.role == "weight" for p in quantizer.ports)
    return weight or not names.isdisjoint(quantizer.values)


def _scale(group: _Group, seen: Sample, edit: Edit) -> None:
    source = source_of(group.value) if _alone(group) else "it is also read elsewhere"
    ties = torch.arange(len(seen.top)) if isinstance(source, str) else source.channels
    x = Activation(seen.rows, seen.top, group.x.spec, group.x.observer, ties)
    weights = [_weight(n) for n in group.linears]
    found = search(x, [Reader(w.tensor.float().cpu(), q.spec) for w, q in zip(weights, group.weights, strict=True)])
    if found.error > MARGIN:
        edit.refuse(group.linears[0], f"no factors lower the error of what reads its input (best: {found.error:.3f})")
        return
    multiply = isinstance(source, str) or _coarsens(group, source, found)
    for linear, weight in zip(group.linears, weights, strict=True):
        replace_weight(linear, weight, weight.stored * found.factors.to(weight.stored.device), "scaled", edit)
    if isinstance(source, str) or multiply:
        _multiply(group, found, edit)
    else:
        _fold(source, found, edit)


def _fold(source: Source, found: Smoothing, edit: Edit) -> None:
    """Divide the output channels of the norm or linear."""
    factors = torch.ones(len(_weight(source.node).stored)).scatter(0, source.channels, found.factors)
    for role in ROLES:
        if attribute(source.node, role) is not None:
            old = _weight(source.node, role)
            shape = [-1] + [1] * (old.stored.ndim - 1)
            replace_weight(source.node, old, old.stored / factors.reshape(shape).to(old.stored.device), "scaled", edit)


def _multiply(group: _Group, found: Smoothing, edit: Edit) -> None:
    """Divide the value itself, in front of the first linear."""
    first = min(group.linears)
    path = f"{_weight(first).parameter.target}/factors".replace("/scaled", "")
    inverse = 1.0 / found.factors.to(value_of(group.value).dtype).to(_weight(first).stored.device)
    scaled = edit.call("mul", group.value, edit.constant(path, inverse, at=first), at=first)
    for linear in group.linears:
        edit.reread(linear, group.value, scaled)


def _weight(node: fx.Node, role: str = "weight") -> Weight:
    found = weight_of(attribute(node, role))
    assert found is not None
    return found
