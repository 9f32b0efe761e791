"""Wrong passes over one small model: ``FUNCTION`` change what it computes, ``MADE`` leave an ill-made graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass, Numerics, same
from tests.models import BATCH, floats

Change = Callable[[Graph, Edit], object]


class Net(nn.Module):
    """Something for each mutant to break: [batch, 8] -> [batch, 8] and [batch, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.fc(x)))
        p = torch.softmax(y - x, dim=-1)
        return self.out(p * 0.5 + y.tanh()), p.reshape(x.shape[0], 2, 4).flatten(1)


def captured(sizes: str = "moving") -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    shapes = {"x": BATCH} if sizes == "moving" else None
    return qg.capture(model, floats(4, 8), shapes, output_names=("y", "p"))


def by_hand(
    change: Change, numerics: Numerics = same, ensures: tuple[str, ...] = (), name: str = "by-hand"
) -> GraphPass:
    @dataclass(frozen=True)
    class ByHand(GraphPass):
        def apply(self, graph: Graph, edit: Edit) -> None:
            change(graph, edit)

    declared = {"name": name, "numerics": numerics, "ensures": ensures, "__module__": __name__}
    made: type[ByHand] = type("ByHand", (ByHand,), declared)
    return made()


def replaced(graph: Graph, edit: Edit, name: str, *args: Any, **kwargs: Any) -> None:
    """The same operator with other arguments, by the rules."""
    old = graph.node(name)
    edit.replace(old, edit.operator(old.target, *args, at=old, **kwargs))


def args_of(graph: Graph, name: str) -> Any:
    return graph.node(name).args


# ---------------------------------------------------------------- mutants: the function is another


def wrong_axis(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "Net:softmax", args_of(graph, "Net:softmax")[0], 0)


def dropped_bias(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "fc:linear", *args_of(graph, "fc:linear")[:2])


def swapped_operands(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "Net:sub", *reversed(args_of(graph, "Net:sub")))


def wrong_epsilon(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "norm:layer_norm", *args_of(graph, "norm:layer_norm")[:4], 1e-6)


def lost_user(graph: Graph, edit: Edit) -> None:
    """The new value reaches one of two readers, the other still reads what stood before it."""
    relu, tanh = graph.node("Net:relu"), graph.node("Net:tanh")
    tanh.replace_input_with(relu, relu.args[0])  # type: ignore[arg-type]


def wrong_scale(graph: Graph, edit: Edit) -> None:
    replaced(graph, edit, "Net:mul", args_of(graph, "Net:mul")[0], 0.5000001)


def transposed_weight(graph: Graph, edit: Edit) -> None:
    x, _, bias = args_of(graph, "out:linear")
    weight = graph.module.get_parameter("out.weight")
    replaced(graph, edit, "out:linear", x, edit.parameter("out.weight/t", weight.t(), at=graph.nodes[0]), bias)


def baked_size(graph: Graph, edit: Edit) -> None:
    """The batch of the example stands where a size was."""
    replaced(graph, edit, "Net:reshape", args_of(graph, "Net:reshape")[0], [4, 2, 4])


def another_operator(graph: Graph, edit: Edit) -> None:
    """Behind the record's back: the text of the graph stays the same."""
    graph.node("Net:tanh").target = torch.ops.aten.sigmoid.default


def swapped_outputs(graph: Graph, edit: Edit) -> None:
    output = graph.module.graph.output_node()
    output.args = (tuple(reversed(output.args[0])),)  # type: ignore[arg-type]


def narrowed(graph: Graph, edit: Edit) -> None:
    """Rounds to half precision on the way; shapes and types of the outputs stay."""
    tanh = graph.node("Net:tanh")
    half = edit.call("cast", tanh, torch.float16, at=tanh.next)
    back = edit.call("cast", half, torch.float32, at=tanh.next.next)
    tanh.replace_all_uses_with(back, delete_user_cb=lambda user: user is not half)


FUNCTION: dict[str, tuple[Change, str]] = {
    "wrong axis": (wrong_axis, "Net:softmax"),
    "dropped bias": (dropped_bias, "fc:linear"),
    "swapped operands": (swapped_operands, "Net:sub"),
    "wrong epsilon": (wrong_epsilon, "norm:layer_norm"),
    "lost user": (lost_user, "Net:tanh"),
    "wrong scale": (wrong_scale, "Net:mul"),
    "transposed weight": (transposed_weight, "out:linear"),
    "another operator": (another_operator, "Net:tanh"),
    "swapped outputs": (swapped_outputs, "y"),
    "a narrower type on the way": (narrowed, "Net:add"),
}


def baked_constant(graph: Graph, edit: Edit) -> None:
    node = graph.node("Net:mul")
    with torch.no_grad():
        half = graph.module(*graph.info.args)[1] * 0.5
    node.replace_all_uses_with(edit.constant("baked", half, at=node))


# ---------------------------------------------------------------- mutants: the graph is no longer well made


def stale_shape(graph: Graph, edit: Edit) -> None:
    graph.node("Net:tanh").meta["val"] = torch.empty(4, 9)


def stale_type(graph: Graph, edit: Edit) -> None:
    graph.node("Net:tanh").meta["val"] = torch.empty(4, 8, dtype=torch.float64)


def writes_in_place(graph: Graph, edit: Edit) -> None:
    with torch.no_grad():
        graph.module.get_parameter("fc.weight").mul_(2)


def writes_behind_the_counter(graph: Graph, edit: Edit) -> None:
    graph.module.get_parameter("fc.weight").data.mul_(2)


def permutes_in_place(graph: Graph, edit: Edit) -> None:
    weight = graph.module.get_parameter("fc.weight").data
    weight.copy_(weight.t().clone())


def writes_nan(graph: Graph, edit: Edit) -> None:
    graph.module.get_parameter("fc.weight").data[3] = float("nan")


def another_parameter_of_the_name(graph: Graph, edit: Edit) -> None:
    graph.module.get_submodule("fc").weight = nn.Parameter(graph.module.get_parameter("fc.weight").detach().clone())


def nameless(graph: Graph, edit: Edit) -> None:
    node = graph.node("Net:tanh")
    with graph.module.graph.inserting_before(node):
        node.replace_all_uses_with(graph.module.graph.call_function(torch.ops.aten.tanh.default, node.args))


def named_twice(graph: Graph, edit: Edit) -> None:
    new = edit.call("tanh", *args_of(graph, "Net:tanh"), at=graph.node("Net:tanh"))
    new.meta["custom"] = graph.node("Net:tanh").meta["custom"]


def foreign_operator(graph: Graph, edit: Edit) -> None:
    graph.node("Net:tanh").target = functional.tanh


def used_before_defined(graph: Graph, edit: Edit) -> None:
    graph.node("fc:linear").prepend(graph.node("Net:tanh"))


def reads_its_own_result(graph: Graph, edit: Edit) -> None:
    graph.node("fc:linear").update_arg(0, graph.node("Net:tanh"))


def dropped_output(graph: Graph, edit: Edit) -> None:
    output = graph.module.graph.output_node()
    output.args = (output.args[0][:1],)  # type: ignore[index]


def output_of_nothing(graph: Graph, edit: Edit) -> None:
    output = graph.module.graph.output_node()
    output.args = ((output.args[0][0], None),)  # type: ignore[index]


def output_of_another_shape(graph: Graph, edit: Edit) -> None:
    output = graph.module.graph.output_node()
    output.args = ((output.args[0][0], graph.node("Net:reshape")),)  # type: ignore[index]


def new_input(graph: Graph, edit: Edit) -> None:
    with graph.module.graph.inserting_before(graph.nodes[0]):
        graph.module.graph.placeholder("more")


def does_not_run(graph: Graph, edit: Edit) -> None:
    graph.node("Net:add").args = (graph.node("Net:relu"),)


def raises(graph: Graph, edit: Edit) -> None:
    raise ZeroDivisionError("one over none")


def breaks_functional(graph: Graph, edit: Edit) -> None:
    graph.node("Net:relu").target = torch.ops.aten.relu_.default


def nothing(graph: Graph, edit: Edit) -> None:
    return


MADE: dict[str, tuple[Change, str, str, str]] = {
    "stale shape": (stale_shape, "QG210", "left a stale shape or type", "'Net:tanh'"),
    "stale type": (stale_type, "QG210", "left a stale shape or type", "'Net:tanh'"),
    "in-place write": (writes_in_place, "QG207", "writes into the parameter 'fc.weight'", "fc.weight"),
    "in-place write of .data": (writes_behind_the_counter, "QG207", "writes into the parameter", "fc.weight"),
    "in-place permutation": (permutes_in_place, "QG207", "writes into the parameter 'fc.weight'", "fc.weight"),
    "in-place write of one row": (writes_nan, "QG207", "writes into the parameter 'fc.weight'", "fc.weight"),
    "another parameter": (another_parameter_of_the_name, "QG207", "replaces the parameter 'fc.weight'", "fc.weight"),
    "nameless node": (nameless, "QG203", "not a valid 'captured' graph after 'by-hand'", "node tanh"),
    "duplicate name": (named_twice, "QG203", "not a valid 'captured' graph after 'by-hand'", "node tanh"),
    "foreign operator": (foreign_operator, "QG203", "not a valid 'captured' graph after 'by-hand'", "node tanh"),
    "use before definition": (used_before_defined, "QG203", "not a valid 'captured' graph", "node tanh"),
    "cycle": (reads_its_own_result, "QG203", "not a valid 'captured' graph", "node linear"),
    "output dropped": (dropped_output, "QG203", "changes the outputs of the model", "the outputs of the graph"),
    "output of nothing": (output_of_nothing, "QG203", "changes the outputs of the model", "the outputs of the graph"),
    "output of another shape": (output_of_another_shape, "QG203", "changes the outputs", "the outputs of the graph"),
    "new input": (new_input, "QG203", "changes the inputs of the model", "the inputs of the graph"),
    "size baked from the example": (baked_size, "QG206", "does not run after 'by-hand'", "on inputs in another order"),
    "does not run": (does_not_run, "QG206", "the graph does not run after 'by-hand'", "on the example inputs"),
    "raises": (raises, "QG206", "the pass 'by-hand' failed", "by-hand"),
    "breaks functional": (breaks_functional, "QG211", "breaks that the graph is functional", "'Net:relu' writes"),
}  # fmt: skip
