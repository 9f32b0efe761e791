"""Patterns written as plain PyTorch code: captured and canonicalized as a model is, then turned into a pattern."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any as Anything

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qatgraph.errors import PassError, QatgraphError
from qatgraph.frontend import capture
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import has_record, record
from qatgraph.ops import REFINED
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.matcher import attribute, is_operand
from qatgraph.rewriting.pattern import Any, Const, Group, Number, Op, Opt, Pattern, walk
from qatgraph.rewriting.pipeline import Pipeline

Function = Callable[..., Anything]
KERNEL = "cudnn"  # attributes of this name choose a kernel, not a value
WEIGHT = "weight_"  # in front of the names of weights, which may be those of a module's own attributes


@dataclass(frozen=True)
class Code(Pattern):
    """The pattern that a function computes: ``Code(lambda x, w, b: gelu(linear(x, w, b)), (2, 4), Weight(8, 4), …)``.

    Args:
        function: PyTorch code over its arguments.
        inputs: one for each argument: the shape of an activation, or an example tensor (of integers), for which any
            value matches, or ``Weight(*shape)`` (a parameter or buffer). Shapes only have to run; they do not enter
            the pattern, but where the code spells them out (``view(2, 4)``): name such an attribute in ``free``.
        free: attributes that may differ in the model, by the names of the operators' schemas (``shape``, ``eps``).

    A match binds each argument by its name, and the last operation as ``out``. Several outputs become a group, of
    ``out``, ``out1`` and so on. It is exact: an operand that the code leaves out is absent, and an attribute that it
    does not name has its default.
    """

    function: Function
    inputs: tuple[Anything, ...]
    free: tuple[str, ...] = ()

    def resolve(self) -> Pattern:
        """The pattern of operations.

        Raises:
            PassError: QG209 the code does not run, or describes no pattern.
        """
        inputs = tuple(tuple(i) if isinstance(i, list) else i for i in self.inputs)
        return _pattern_of(self.function, inputs, tuple(self.free))

    def elements(self) -> int:
        return self.resolve().elements()


@dataclass(frozen=True, init=False)
class Weight:
    """An argument of a ``Code`` pattern that is a parameter or buffer of this shape."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


class _Holder(torch.nn.Module):
    def __init__(self, function: Function, inputs: dict[str, Anything]) -> None:
        super().__init__()
        self.function, self.order = function, list(inputs)
        self.weights = {name for name, given in inputs.items() if isinstance(given, Weight)}
        for name in self.weights:
            self.register_parameter(WEIGHT + name, torch.nn.Parameter(torch.rand(inputs[name].shape)))

    def forward(self, *activations: torch.Tensor) -> Anything:
        given = iter(activations)
        return self.function(*(getattr(self, WEIGHT + n) if n in self.weights else next(given) for n in self.order))


@cache
def _pattern_of(function: Function, inputs: tuple[Anything, ...], free: tuple[str, ...]) -> Pattern:
    names = _arguments_of(function)
    if len(names) != len(inputs):
        why = f"it takes {len(names)} arguments, {len(inputs)} shapes are given"
        raise _bad_code(function, why, "give one for each")
    given = dict(zip(names, inputs, strict=True))
    activations = {n: i for n, i in given.items() if not isinstance(i, Weight)}
    graph = _canonical(function, given, tuple(_example(function, n, i) for n, i in activations.items()))
    placeholders = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
    leaves = {node: Any(name) for node, name in zip(placeholders, activations, strict=True)}
    pattern = _Reader(function, graph, leaves, free).pattern()
    bound = {getattr(part, "name", "") for part in walk(pattern)}
    unused = next((n for n in names if n not in bound), None)
    if unused is not None:
        why = f"its result does not depend on '{unused}'"
        raise _bad_code(function, why, "take the argument out, or use it")
    return pattern


def _arguments_of(function: Function) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise _bad_code(function, f"its arguments cannot be read: {error}", "wrap it in a lambda") from error


def _example(function: Function, name: str, given: Anything) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        return given
    if not isinstance(given, tuple) or not all(isinstance(size, int) for size in given):
        todo = "give a shape, an example tensor, or Weight(*shape)"
        raise _bad_code(function, f"the input of '{name}' is {given!r}, which is no shape", todo)
    return torch.rand(given)


def _canonical(function: Function, given: dict[str, Anything], example: tuple[torch.Tensor, ...]) -> Graph:
    with torch.random.fork_rng(devices=[]):
        try:
            graph = capture(_Holder(function, given).eval(), example)
            return PassManager(Pipeline.parse("canonicalize").steps).run(graph)
        except QatgraphError as error:
            raise _bad_code(function, f"{error.what}: {error.why}", error.todo) from error


class _Reader:
    """Reads the pattern off the graph of the code."""

    def __init__(self, function: Function, graph: Graph, leaves: dict[fx.Node, Any], free: tuple[str, ...]) -> None:
        self.function, self.graph, self.leaves, self.free = function, graph, leaves, free
        self.results = pytree.tree_leaves(graph.module.graph.output_node().args[0])
        reads = Counter[fx.Node]()
        for node in graph.nodes:
            fx.map_arg((node.args, node.kwargs), lambda read: reads.update([read]))
        self.names = {node: f"%{node.name}" for node in graph.nodes if reads[node] > 1}
        self.names.update({node: f"out{i or ''}" for i, node in reversed(list(enumerate(self.results)))})

    def pattern(self) -> Pattern:
        patterns = [self._operation(node) for node in dict.fromkeys(self.results)]
        return patterns[0] if len(patterns) == 1 else Group(*patterns)

    def _operation(self, node: Anything) -> Op:
        if not (isinstance(node, fx.Node) and has_record(node)):
            raise _bad_code(self.function, "its result is not computed", "let the function compute something")
        operands: list[Pattern] = [] if _schema(node) else [self._operand(v) for v in node.args]
        where: dict[str, Anything] = {}
        for argument in _schema(node):
            value = attribute(node, argument.name)
            if argument.kwarg_only or not is_operand(argument):
                where[argument.name] = value
            elif value is None:  # ``where`` says that it is absent, the operand keeps its place
                where[argument.name] = None
                operands.append(Opt(Any()))
            elif isinstance(value, (list, tuple)):
                operands += [self._operand(v) for v in value]
            else:
                operands.append(Number() if argument.name in self.free else self._operand(value))
        while operands and operands[-1] == Opt(Any()):
            operands.pop()
        where = {k: v for k, v in where.items() if k not in self.free and not k.startswith(KERNEL)}
        return Op(_kinds(node), *operands, name=self.names.get(node, ""), where=where)

    def _operand(self, value: Anything) -> Pattern:
        if isinstance(value, (int, float)):
            return Number(float(value))
        if value in self.leaves:
            return self.leaves[value]
        if value.op != "get_attr":
            return self._operation(value)
        path = str(value.target)
        if path.startswith(WEIGHT):
            return Const(path.removeprefix(WEIGHT))
        tensor = self.graph.parameter(value)
        if tensor is not None and tensor.numel() == 1:
            return Number(float(tensor))
        todo = "make it an argument: Weight(*shape)"
        raise _bad_code(self.function, "it holds a constant of several elements", todo)


def _kinds(node: fx.Node) -> str:
    """The kind, or its refinements too: in a model, an ``add`` may be a ``residual_add``, and the other way round."""
    base = REFINED.get(record(node).kind, record(node).kind)
    return "|".join([base, *(refined for refined, of in REFINED.items() if of == base)])


def _schema(node: fx.Node) -> list[Anything]:
    schema = getattr(node.target, "_schema", None)
    return list(schema.arguments) if schema is not None else []


def _bad_code(function: Function, why: str, todo: str) -> PassError:
    where = f"Code({getattr(function, '__qualname__', function)!s})"
    return PassError("QG209", "the pattern written as code can match nothing", where=where, why=why, todo=todo)
