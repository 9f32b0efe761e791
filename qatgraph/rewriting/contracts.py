"""Holds a pass to its word: parameters, properties, inputs and outputs, noted shapes, constants, and numerics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph, arguments, example_size
from qatgraph.ir.masks import masked, weight_of
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.properties import PROPERTIES, held
from qatgraph.rewriting.passes import GraphPass
from qatgraph.rewriting.probes import Leaves, Runner, StaleError, Values, difference, probes, type_text

SAMPLE = 2**16
Prints = dict[str, tuple[torch.Tensor, int, torch.Tensor]]
Answers = dict[bool, list[tuple[Leaves, list[Any]]]]  # in float64 or not -> what a graph gives for each probe


def fingerprints(graph: Graph, *, deep: bool, known: Prints | None = None) -> Prints:
    """Of each parameter and buffer: torch's count of the writes to it, and when ``deep``, a sample of its bits.

    Writes through ``.data`` are not counted, so the sample stands in: evenly spaced, all of a small tensor, and of a
    large one enough to show a write to a row. What is ``known`` of the same tensor is taken over.
    """
    found = graph.module.state_dict(keep_vars=True)
    fresh = {n: t for n, t in found.items() if known is None or n not in known or known[n][0] is not t}
    return {**(known or {}), **{n: (t, t._version, _sample(t, deep)) for n, t in fresh.items()}}


def _sample(tensor: torch.Tensor, deep: bool) -> torch.Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if not deep or integer is None or tensor.layout is not torch.strided:
        return torch.empty(0)
    bits = tensor.detach().view(integer).reshape(-1)  # as integers, NaN equals itself
    return bits[:: max(1, bits.numel() // SAMPLE)].clone()


def check_parameters(one: GraphPass, before: Prints, after: Graph, *, deep: bool) -> None:
    """All graphs of a model share its parameters: a pass makes new ones and never writes into them."""
    have = after.module.state_dict(keep_vars=True)
    for name, (tensor, version, sample) in before.items():
        verb = ""
        if tensor._version != version or not torch.equal(_sample(tensor, deep), sample):
            verb, why = "writes into", "other graphs of the model share it, so their results change too"
        elif have.get(name, tensor) is not tensor:
            verb, why = "replaces", "its name is the user's, and says which values it holds"
        if verb:
            what = f"'{one.name}' {verb} the parameter '{name}'"
            raise PassError("QG207", what, where=name, why=why, todo="make a new parameter with edit.parameter(...)")


def check_properties(one: GraphPass, before: Graph, after: Graph, *, done: bool = True) -> None:
    """What held before still does, and what the pass ensures holds when it is ``done``."""
    ensured = set(one.ensures) if done else set()
    for name in sorted(held(before) | ensured):
        problem = PROPERTIES[name](after)
        if problem:
            verb = "ensures" if name in one.ensures else "breaks"
            raise PassError(
                "QG211",
                f"'{one.name}' {verb} that the graph is {name}, but it is not",
                where=problem,
                why=(PROPERTIES[name].__doc__ or "").splitlines()[0],
                todo=f"mend '{one.name}'",
            )


def check_signature(one: GraphPass, before: Graph, after: Graph) -> None:
    """The model keeps its inputs, and its outputs their number, types and shapes."""
    for what, want, have in zip(("inputs", "outputs"), _signature(before), _signature(after), strict=True):
        if len(want) != len(have):
            why = f"it had {len(want)} {what}, now it has {len(have)}"
        else:
            changed = (f"'{n}' was {a}, now it is {b}" for (n, a), (_, b) in zip(want, have, strict=True) if a != b)
            why = next(changed, "")
        if why:
            raise PassError(
                "QG203",
                f"'{one.name}' changes the {what} of the model",
                where=f"the {what} of the graph",
                why=why,
                todo="keep the placeholders, and as many results of the same type and shape",
            )


def _signature(graph: Graph) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, type) of each input and of each leaf of the output."""
    inputs = [(str(n.target), str(n.target)) for n in graph.module.graph.nodes if n.op == "placeholder"]
    results = pytree.tree_leaves(graph.module.graph.output_node().args[0])
    names = [*graph.info.outputs, *map(str, range(len(results)))]
    return inputs, [(name, _noted_text(result)) for name, result in zip(names, results, strict=False)]


def _noted_text(result: Any) -> str:
    noted = value_of(result) if isinstance(result, fx.Node) else result
    if not isinstance(noted, torch.Tensor):
        return type(noted).__name__
    return f"{noted.dtype}{[example_size(s) for s in noted.shape]}"


def check_constants(one: GraphPass, before: Graph, after: Graph) -> None:
    """A pass that changes grids changes only constants that stand at the roles that it declares."""
    if one.numerics.kind != "changes-grid":
        return
    was, now = _constants(before), _constants(after)
    kinds = {record(n).name: record(n).kind for n in before.nodes}
    both = kinds.keys() & {record(n).name for n in after.nodes}
    for name, role in dict.fromkeys([*was, *now]):
        if name not in both or {role, f"{kinds[name]}.{role}"} & set(one.numerics.roles):
            continue
        if difference(was.get((name, role)), now.get((name, role))) > 0:
            raise PassError(
                "QG207",
                f"'{one.name}' declares {one.numerics}, but another constant changes",
                where=f"the {role} of '{name}'",
                why=f"only constants at {', '.join(one.numerics.roles) or 'no role'} may change",
                todo=f"leave it, or declare changes_grid(eps, …, '{role}')",
            )


def _constants(graph: Graph) -> dict[tuple[str, str], torch.Tensor]:
    """(node, role) -> each parameter or buffer that an operation reads; a masked one as the layer reads it."""
    found = {}
    for node in graph.nodes:
        for role, argument in arguments(node) if masked(node) is None else ():
            weight = weight_of(argument)
            if weight is not None:
                found[record(node).name, role] = weight.tensor
    return found


def check_numerics(one: GraphPass, before: Graph, after: Graph, known: Answers) -> Answers:
    """Hold every value against its noted shape, and run both graphs on the probes: they agree as the pass declared.

    ``known`` are answers of the graph before, which need no run; what the graph after answers is returned.
    """
    wide = one.numerics.kind != "same"
    native = Runner(after)
    changed = Runner(after, wide=True) if wide else native
    where = "on the example inputs"
    answers: list[tuple[Leaves, list[Any]]] = []
    for leaves, want in known.get(wide) or _references(one, before, Runner(before, wide=wide)):
        if wide and not answers:
            _run_after(one, native, leaves, where, noted=True)
        have = _run_after(one, changed, leaves, where, noted=not wide and not answers)
        answers.append((leaves, _kept(have.output)))
        _compare(one, before, want, have, [leaves for leaves, _ in answers])
        where = "on inputs in another order, and of other sizes where they move"
    return {wide: answers}


def _kept(output: list[Any]) -> list[Any]:
    """An output may be a buffer, which the next run writes into."""
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in output]


def _references(one: GraphPass, before: Graph, runner: Runner) -> Iterator[tuple[Leaves, list[Any]]]:
    try:
        for leaves, values in probes(before, runner):
            yield leaves, values.output
    except Exception as error:
        todo = "run the graph on its example inputs, and look at what the passes before it did"
        what = f"the graph does not run before '{one.name}'"
        raise _does_not_run(what, "on its example inputs", error, todo) from error


def _run_after(one: GraphPass, runner: Runner, leaves: Leaves, where: str, *, noted: bool = False) -> Values:
    try:
        return runner(leaves, noted=noted)
    except StaleError as stale:
        raise PassError(
            "QG210",
            f"'{one.name}' left a stale shape or type",
            where=stale.args[0],
            why=stale.args[1],
            todo="make new operations through Edit, which notes their shapes",
        ) from stale
    except Exception as error:
        what = f"the graph does not run after '{one.name}'"
        raise _does_not_run(what, where, error, f"mend '{one.name}'") from error


def _does_not_run(what: str, where: str, error: Exception, todo: str) -> PassError:
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return PassError("QG206", what, where=where, why=why, todo=todo)


def _compare(one: GraphPass, before: Graph, want: list[Any], have: Values, asked: list[Leaves]) -> None:
    eps = one.numerics.eps
    for name, a, b in zip(before.info.outputs, want, have.output, strict=True):
        error = difference(a, b)
        if error > eps:
            runner = Runner(before, wide=one.numerics.kind != "same")
            *_, again = (runner(leaves).named for leaves in asked)
            named = (n for n, value in have.named.items() if n in again and difference(again[n], value) > eps)
            raise PassError(
                "QG207",
                f"'{one.name}' declares its numerics as {one.numerics}, but the output '{name}' differs",
                where=f"the first value that differs is '{next(named, name)}'",
                why=_difference_text(a, b, error),
                todo="mend the rewrite, or declare within(eps) if the difference is intended",
            )


def _difference_text(a: Any, b: Any, error: float) -> str:
    if error < float("inf"):
        return f"largest difference {error:.3g} of the largest value"
    if type_text(a) != type_text(b):
        return f"it was {type_text(a)}, now it is {type_text(b)}"
    return f"{int((a != b).sum())} of {a.numel()} values differ"


def outputs_differ(before: Graph, after: Graph, eps: float) -> bool:
    """Whether an output differs by more than ``eps`` of its largest value on a probe, in float64."""
    changed = Runner(after, wide=True)
    return any(
        difference(a, b) > eps
        for leaves, want in probes(before, Runner(before, wide=True))
        for a, b in zip(want.output, changed(leaves).output, strict=True)
    )
