"""Patterns, the registry, and the manager that holds every pass to its word."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.passes import BUILTIN
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.matcher import match
from qatgraph.rewriting.passes import GraphPass, Pass, RewritePass, parse_options, same, within
from qatgraph.rewriting.pattern import Any as AnyValue
from qatgraph.rewriting.pattern import Const, Match, Number, Op, Pattern, Refusal
from qatgraph.rewriting.registry import builtin_names, make_pass, parse_passes, pass_class, passes_from_file
from tests.models import floats


class Toy(nn.Module):
    """A little of everything that a pattern may ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.relu(self.fc(x) + y)
        return torch.tanh(z * self.scale) + z * 3.0 + y * y


@pytest.fixture(scope="module")
def toy() -> qg.Graph:
    return qg.capture(Toy(), (floats(2, 4), floats(2, 4, seed=1)))


def matches(pattern: Pattern, graph: qg.Graph) -> list[str]:
    return [record(n).name for n in graph.nodes if match(pattern, n) is not None]


X, Y, W = AnyValue("x"), AnyValue("y"), Const("w")


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (Op("linear", X, W), ["fc:linear"]),
        (Op("linear", X, W, Const("b")), ["fc:linear"]),
        (Op("linear", X, W, Const("b"), Y), []),
        (Op("add", Op("linear", X, W), Y), ["Toy:add"]),
        (Op("add", Y, Op("linear", X, W)), ["Toy:add"]),
        (Op("relu", Op("add", Y, Op("linear", X, W))), ["Toy:relu"]),
        (Op("mul", X, W), ["Toy:mul"]),
        (Op("mul", W, X), ["Toy:mul"]),
        (Op("mul", X, Number(3.0)), ["Toy:mul#2"]),
        (Op("mul", Number(3), X), ["Toy:mul#2"]),
        (Op("mul", X, Number(2.999)), []),
        (Op("mul", X, Number(None)), ["Toy:mul#2"]),
        (Op("mul", X, X), ["Toy:mul#3"]),
        (Op("mul", X, Y), ["Toy:mul", "Toy:mul#3"]),
        (Op("tanh", W), []),
        (Op("relu", X, Y), []),
        (Op("gelu", X), []),
    ],
    ids=str,
)
def test_a_pattern_finds(toy: qg.Graph, pattern: Pattern, found: list[str]) -> None:
    assert matches(pattern, toy) == found


class Divided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) / torch.tanh(x)


def test_operands_that_do_not_commute_keep_their_order() -> None:
    graph = qg.capture(Divided(), floats(2, 4))
    assert matches(Op("div", Op("relu", X), Op("tanh", Y)), graph) == ["Divided:div"]
    assert matches(Op("div", Op("tanh", Y), Op("relu", X)), graph) == []


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(torch.relu(x), torch.tanh(x), alpha=2)


def test_operands_of_a_scaled_add_keep_their_order() -> None:
    graph = qg.capture(Scaled(), floats(2, 4))
    assert matches(Op("add", Op("relu", X), Op("tanh", Y)), graph) == ["Scaled:add"]
    assert matches(Op("add", Op("tanh", Y), Op("relu", X)), graph) == []


def test_a_match_binds_names_to_nodes(toy: qg.Graph) -> None:
    pattern = Op("add", Y, Op("linear", X, W, name="fc"), name="sum")
    found = match(pattern, toy.node("Toy:add"))
    assert found is not None
    assert found.root is found["sum"] is toy.node("Toy:add")
    assert found["fc"] is toy.node("fc:linear")
    assert (found["x"].name, found["y"].name, found["w"].target) == ("x", "y", "fc.weight")


def test_one_name_is_one_node_across_operands(toy: qg.Graph) -> None:
    shared = Op("add", Op("tanh", Op("mul", X, W)), Op("mul", X, Number(3.0)))
    assert matches(shared, toy) == ["Toy:add#2"]
    other = Op("add", Op("tanh", Op("mul", W, Const("v"))), Op("mul", X, Number(3.0)))
    assert matches(other, toy) == []


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / math.sqrt(2)


def test_number_is_compared_to_six_digits() -> None:
    graph = qg.capture(Root(), floats(2, 4))
    assert matches(Op("div", X, Number(1.4142135)), graph) == ["Root:div"]
    assert matches(Op("div", X, Number(1.4142)), graph) == []


# ---------------------------------------------------------------- rewriting to a fixed point


@dataclass(frozen=True)
class Tanh(RewritePass):
    """``relu`` becomes ``tanh``: declares whatever a test gives it."""

    name = "tanh"
    pattern = Op("relu", X, name="relu")

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["relu"], edit.call("tanh", match["x"], at=match["relu"]))


@dataclass(frozen=True)
class Honest(Tanh):
    numerics = within(2.0)


@dataclass(frozen=True)
class Endless(Honest):
    budget = 7

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["relu"], edit.call("relu", match["x"], at=match["relu"]))


def builtin(text: str) -> GraphPass:
    one = make_pass(text)
    assert isinstance(one, GraphPass)
    return one


def apply(one: GraphPass, graph: qg.Graph) -> tuple[qg.Graph, PassManager]:
    manager = PassManager([one], leaves=Stage.CAPTURED)
    return manager.run(graph), manager


def refusal(one: GraphPass, graph: qg.Graph) -> PassError:
    with pytest.raises(PassError) as caught:
        apply(one, graph)
    error = caught.value
    assert error.todo, "every refusal says what to do"
    assert one.name in str(error), "every refusal names the pass"
    return error


def test_a_rewrite_replaces_and_leaves_a_trace(toy: qg.Graph) -> None:
    text = str(toy)
    after, manager = apply(Honest(), toy)
    assert matches(Op("relu", X), after) == []
    assert record(after.node("Toy:tanh#2")).history == ("tanh",)
    assert "Toy:tanh#2 = tanh(Toy:add) : float32[2, 4]" in str(after)
    assert [(r.name, r.modified, r.refused) for r in manager.reports] == [("tanh", True, ())]
    assert str(toy) == text, "the pass ran over a copy"


def test_a_pass_that_finds_nothing_has_not_modified(toy: qg.Graph) -> None:
    after, manager = apply(builtin("fold-addmm"), toy)
    assert str(after) == str(toy)
    assert [r.modified for r in manager.reports] == [False]


@dataclass(frozen=True)
class Picky(Honest):
    def check(self, match: Match) -> Refusal | None:
        return match.refuse("tests come first") if match["x"].op != "placeholder" else None


def test_a_refusal_is_reported_with_its_reason(toy: qg.Graph) -> None:
    after, manager = apply(Picky(), toy)
    assert str(after) == str(toy)
    assert manager.reports[0].refused == (Refusal("Toy:relu", "tests come first"),)


@pytest.mark.parametrize("answer", [False, "tests come first"])
def test_qg206_a_check_that_answers_neither_nothing_nor_a_refusal(toy: qg.Graph, answer: Any) -> None:
    class Talking(Honest):
        def check(self, match: Match) -> Refusal | None:
            return answer  # type: ignore[no-any-return]

    error = refusal(Talking(), toy)
    assert (error.code, error.where) == ("QG206", "Talking.check")
    assert repr(answer) in error.what


def test_qg204_a_rewrite_without_end(toy: qg.Graph) -> None:
    error = refusal(Endless(), toy)
    assert error.code == "QG204"
    assert error.what == "'tanh' did not come to an end after 7 rewrites"
    assert error.why == "its result matches its own pattern"


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 1.0 * 1.0


@dataclass(frozen=True)
class FromTheEnd(RewritePass):
    """Drop products by 1, the last one first."""

    name = "from-the-end"
    pattern = Op("mul", X, Number(1.0), name="mul")

    def check(self, match: Match) -> Refusal | None:
        return match.refuse("a product reads it") if any(u.op != "output" for u in match.root.users) else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.bypass(match["mul"], match["x"])


def test_what_was_refused_is_tried_again_when_the_graph_has_changed() -> None:
    after, manager = apply(FromTheEnd(), qg.capture(Products(), floats(2, 4)))
    assert [record(n).name for n in after.nodes] == ["Products:relu"]
    assert manager.reports[0].refused == ()


# ---------------------------------------------------------------- passes that break their word


def test_qg207_declares_same_but_changes_numbers(toy: qg.Graph) -> None:
    error = refusal(Tanh(), toy)
    assert error.code == "QG207"
    assert error.what == "'tanh' declares its numerics as same, but the output 'output' differs"
    assert error.why.startswith("largest difference ")


@pytest.mark.parametrize(("eps", "holds"), [(1e-7, True), (1e-9, False)])
def test_qg207_the_declared_eps_counts_in_float64(toy: qg.Graph, eps: float, holds: bool) -> None:
    @dataclass(frozen=True)
    class Nearly(RewritePass):
        name = "nearly"
        numerics = within(eps)
        pattern = Op("tanh", X, name="tanh")

        def rewrite(self, match: Match, edit: Edit) -> None:
            new = edit.call("mul", match["tanh"], 1 + 1e-8, at=match["tanh"].next)
            match["tanh"].replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    if holds:
        apply(Nearly(), toy)
    else:
        assert refusal(Nearly(), toy).code == "QG207"


def test_qg206_a_pass_that_raises_is_named_with_its_predecessors(toy: qg.Graph) -> None:
    def fail(graph: qg.Graph, edit: Edit) -> None:
        raise ZeroDivisionError("one over none")

    with pytest.raises(PassError) as caught:
        PassManager([Honest(), by_hand(fail)]).run(toy)
    error = caught.value
    assert (error.code, error.what) == ("QG206", "the pass 'by-hand' failed")
    assert error.why == "ZeroDivisionError: one over none"
    assert error.todo == "mend the pass (passes before it: tanh)"
    assert isinstance(error.__cause__, ZeroDivisionError)


Change = Callable[[qg.Graph, Edit], object]


def by_hand(change: Change) -> GraphPass:
    @dataclass(frozen=True)
    class ByHand(GraphPass):
        name = "by-hand"
        numerics = same

        def apply(self, graph: qg.Graph, edit: Edit) -> None:
            change(graph, edit)
            return

    return ByHand()


def _nameless(graph: qg.Graph, edit: Edit) -> None:
    relu = graph.node("Toy:relu")
    with graph.module.graph.inserting_before(relu):
        graph.module.graph.call_function(torch.ops.aten.relu.default, (relu.args[0],))


def _same_name(graph: qg.Graph, edit: Edit) -> None:
    new = edit.call("relu", graph.node("Toy:relu").args[0], at=graph.node("Toy:relu"))
    new.meta["custom"] = graph.node("Toy:relu").meta["custom"]


def _foreign(graph: qg.Graph, edit: Edit) -> None:
    graph.node("Toy:relu").target = nn.functional.relu


def _nowhere(graph: qg.Graph, edit: Edit) -> None:
    next(n for n in graph.module.graph.nodes if n.op == "get_attr").target = "no.such.weight"


def _too_early(graph: qg.Graph, edit: Edit) -> None:
    graph.node("fc:linear").prepend(graph.node("Toy:relu"))


def _cycle(graph: qg.Graph, edit: Edit) -> None:
    graph.node("fc:linear").update_arg(0, graph.node("Toy:relu"))


def _quantized(graph: qg.Graph, edit: Edit) -> None:
    from qatgraph.operators import QUANTIZE

    graph.node("Toy:relu").target = QUANTIZE


BREAKS: dict[str, tuple[Change, str]] = {
    "a node without a name": (_nameless, "the node has no name; create nodes through Edit"),
    "a name twice": (_same_name, "the name 'Toy:relu' is used twice"),
    "an operator that is not ATen": (_foreign, "is not an ATen operator"),
    "a parameter that is not there": (_nowhere, "'no.such.weight' does not exist in the module"),
    "a use before its definition": (_too_early, "'Toy:relu' reads 'Toy:add', which comes after it"),
    "a cycle": (_cycle, "'fc:linear' reads 'Toy:relu', which depends on it: that is a cycle"),
    "an operator of another stage": (_quantized, "quantize operators belong to the stage qdq"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_qg203_a_pass_that_breaks_the_structure(toy: qg.Graph, fault: str) -> None:
    change, why = BREAKS[fault]
    error = refusal(by_hand(change), toy)
    assert error.code == "QG203"
    assert error.what == "the graph is not a valid 'captured' graph after 'by-hand'"
    assert why in error.why


def _drop_output(graph: qg.Graph, edit: Edit) -> None:
    graph.module.graph.output_node().args = ((),)


def _does_not_run(graph: qg.Graph, edit: Edit) -> None:
    add = graph.node("Toy:add")
    add.args = (add.args[0], graph.node("fc:linear").args)


@pytest.mark.parametrize("change", [_drop_output, _does_not_run])
def test_a_pass_that_leaves_a_graph_that_does_not_run(toy: qg.Graph, change: Change) -> None:
    refusal(by_hand(change), toy)


def _in_place(graph: qg.Graph, edit: Edit) -> None:
    with torch.no_grad():
        graph.module.get_parameter("fc.weight").mul_(2)


def test_a_pass_that_changes_weights_in_place_is_caught() -> None:
    graph = qg.capture(Toy(), (floats(2, 4), floats(2, 4)))
    assert refusal(by_hand(_in_place), graph).code == "QG207"


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.relu(x), None


def test_an_output_that_is_not_a_tensor_is_no_fault_of_the_pass() -> None:
    after, _ = apply(Honest(), qg.capture(Nothing(), floats(2, 4)))
    assert after(floats(2, 4))[1] is None


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-torch.relu(x).clone() - 1.0)


def test_a_model_with_nan_in_its_result_is_no_fault_of_the_pass() -> None:
    after, _ = apply(builtin("remove-no-ops"), qg.capture(NotANumber(), floats(2, 4)))
    assert matches(Op("clone", X), after) == []


# ---------------------------------------------------------------- names, options, files


@pytest.mark.parametrize("text", [*BUILTIN, "pin-small-embeddings{min_bytes=1000}"])
def test_option_text_round_trips(text: str) -> None:
    assert str(make_pass(text)) == text
    assert make_pass(str(make_pass(text))) == make_pass(text)


def test_default_options_are_not_printed() -> None:
    assert str(make_pass(f"pin-small-embeddings{{min_bytes={4 * 2**20}}}")) == "pin-small-embeddings"


@dataclass(frozen=True)
class Worded(Pass):
    name = "worded"
    text: str = ""
    share: float = 0.5
    kinds: tuple[str, ...] = ()


@pytest.mark.parametrize("one", [Worded(), Worded("a}b,{c='d'"), Worded(share=1e-9, kinds=("x", "y")), Worded("'\"\\")])
def test_any_literal_round_trips(one: Worded) -> None:
    name, options = parse_options(str(one))
    assert (name, Worded(**options)) == ("worded", one)


def test_every_builtin_pass_is_found_by_its_name() -> None:
    assert builtin_names() == tuple(BUILTIN)
    for name, cls in BUILTIN.items():
        assert pass_class(name).__name__ == cls
        assert pass_class(name).name == name


def test_qg201_an_unknown_pass() -> None:
    with pytest.raises(PassError) as caught:
        make_pass("fold-gellu")
    error = caught.value
    assert (error.code, error.what) == ("QG201", "there is no pass 'fold-gellu'")
    assert error.why == "did you mean 'fold-gelu'?"
    assert "qatgraph passes" in error.todo


def test_qg201_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="QG201: there is no file of passes") as caught:
        parse_passes(["fold-gelu", str(tmp_path / "none.py")])
    assert caught.value.todo == "check the path"


@pytest.mark.parametrize(
    "text",
    [
        "pin-small-embeddings{min_bites=1}",
        "pin-small-embeddings{min_bytes=1",
        "pin-small-embeddings{min_bytes=}",
        "pin-small-embeddings{min_bytes=huge}",
        "pin-small-embeddings{min_bytes=1}x",
        "pin-small-embeddings{1000}",
        "pin-small-embeddings{min_bytes='1000'}",
        "fold-gelu{eps=1}",
        "pin-small-embeddings{min_bytes=1,min_bytes=2}",
        "pin-small-embeddings{**{'min_bytes': 1}}",
    ],
)
def test_qg202_options_that_the_pass_does_not_take(text: str) -> None:
    with pytest.raises(PassError) as caught:
        make_pass(text)
    error = caught.value
    assert error.code == "QG202"
    assert text.partition("{")[0] in str(error)
    assert error.todo


HEAD = """
from dataclasses import dataclass
import qatgraph as qg
"""
GOOD = """
@dataclass(frozen=True)
class Mine(qg.PlanningPass):
    name = "mine"

    def state(self, graph, context):
        return []
"""


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(HEAD + text, encoding="utf-8")
    return path


def test_passes_come_from_names_and_files(tmp_path: Path) -> None:
    passes = parse_passes([str(write(tmp_path, GOOD)), "fold-gelu"])
    assert [p.name for p in passes] == ["mine", "fold-gelu"]


def test_two_files_of_one_name_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path, GOOD), write(tmp_path / "other", GOOD.replace('"mine"', '"theirs"'))]
    assert [p.name for path in paths for p in passes_from_file(path)] == ["mine", "theirs"]


@pytest.mark.parametrize(
    ("text", "sentence", "why"),
    [
        ("x = 1", "'mine.py' defines no pass", "no subclass of qatgraph.RewritePass"),
        ("1 / 0", "the file of passes 'mine.py' does not import", "ZeroDivisionError"),
        ("class Mine(:", "the file of passes 'mine.py' does not import", "SyntaxError"),
        (GOOD.replace('    name = "mine"\n', ""), "", "name"),
        (GOOD.replace('"mine"\n', '"mine"\n    rate: float\n'), "", "rate"),
        ("class Mine(qg.GraphPass):\n    name = 'mine'", "", ""),
    ],
    ids=["no pass", "raises", "syntax", "no name", "an option without a default", "no apply"],
)
def test_qg205_a_file_of_passes_that_cannot_be_used(tmp_path: Path, text: str, sentence: str, why: str) -> None:
    with pytest.raises(PassError) as caught:
        passes_from_file(write(tmp_path, text))
    error = caught.value
    assert error.code == "QG205"
    assert sentence in error.what
    assert why in error.why
    assert "mine.py" in error.where
    assert error.todo


def test_a_file_gives_only_the_passes_that_it_defines(tmp_path: Path) -> None:
    text = f"from qatgraph.passes.fold_gelu import FoldGelu\n{GOOD}"
    assert [p.name for p in passes_from_file(write(tmp_path, text))] == ["mine"]


# ---------------------------------------------------------------- editing


def test_edit_names_what_it_makes(toy: qg.Graph) -> None:
    graph = toy.clone()
    relu = graph.node("Toy:relu")
    new = Edit(graph, "me").call("relu", relu.args[0], at=relu)
    assert record(new).name == "Toy:relu#2"
    assert record(new).history == ("me",)
    assert new.meta["val"].shape == (2, 4)


def test_a_new_parameter_takes_no_path_of_other_values_and_keeps_what_is_tied(toy: qg.Graph) -> None:
    graph = toy.clone()
    relu = graph.node("Toy:relu")
    made = [Edit(graph, "me").parameter("fc.weight/folded", torch.full((4,), v), relu) for v in (1.0, 2.0, 1.0)]
    assert [n.target for n in made] == ["fc.weight/folded", "fc.weight/folded#2", "fc.weight/folded"]
    assert [graph.parameter(n).tolist()[0] for n in made] == [1.0, 2.0, 1.0]  # type: ignore[union-attr]


def test_edit_group_and_rename_keep_the_arithmetic(toy: qg.Graph) -> None:
    graph = toy.clone()
    edit = Edit(graph, "me")
    edit.group("relu", graph.node("Toy:add"), graph.node("Toy:relu"))
    edit.rename_kind(graph.node("Toy:add"), "residual_add")
    assert "Toy:residual_add = residual_add(fc:linear, y) : float32[2, 4]  @Toy:add+relu" in str(graph)
    assert graph.node("Toy:residual_add").target is torch.ops.aten.add.Tensor
    assert record(graph.node("Toy:residual_add")).history == ("me", "me")


def test_a_clone_shares_parameters_and_no_structure(toy: qg.Graph) -> None:
    twin = toy.clone()
    assert dict(twin.module.named_parameters()) == dict(toy.module.named_parameters())
    assert {id(n) for n in twin.module.graph.nodes} & {id(n) for n in toy.module.graph.nodes} == set()
    twin.node("Toy:relu").target = operator.neg
    assert "neg" not in str(toy.module.graph)


def test_same_and_within_print_as_they_are_written() -> None:
    values: list[Any] = [same, within(1e-6)]
    assert [str(v) for v in values] == ["same", "within(1e-06)"]


# ---------------------------------------------------------------- sizes that move


def fixes_a_size() -> bool:
    """A new operation that only fits the example: is the batch, which other graphs share, free afterwards?"""
    graph = qg.capture(nn.Linear(4, 4), floats(2, 4), {"input": {0: "batch"}})
    node = graph.node("Linear:linear")
    env = value_of(node).fake_mode.shape_env
    before = dict(env.replacements), dict(env.var_to_range)
    Edit(graph, "a test").operator(torch.ops.aten.add.Tensor, node, torch.ones(2, 4), at=node.next, near=node)
    return (env.replacements, env.var_to_range) != before


def test_a_new_operation_fixes_no_size_of_the_model() -> None:
    assert not fixes_a_size()


def test_an_edit_that_lets_sizes_be_fixed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatgraph.rewriting.edit._sizes_kept", lambda env: contextlib.nullcontext())
    assert fixes_a_size()
