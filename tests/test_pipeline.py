"""Pipelines: text that round-trips, what names and files expand to, editing, and orders that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.errors import PassError, QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.ir.stages import Stage
from qatgraph.passes import BUILTIN, CANONICALIZE, PIPELINES, PLANNING
from qatgraph.passes.insert_quantizers import InsertQuantizers
from qatgraph.planning.target import load_target
from qatgraph.rewriting import registry
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.passes import GraphPass, Pass, PlanningPass
from qatgraph.rewriting.pipeline import Pipeline
from qatgraph.rewriting.registry import make_pass
from tests.models import canonical, captured, floats

FILE = """
from dataclasses import dataclass
import qatgraph as qg


@dataclass(frozen=True)
class First(qg.PlanningPass):
    name = "pin-nothing"

    def state(self, graph, context):
        return []


@dataclass(frozen=True)
class Second(First):
    name = "pin-little"
    most: int = 0
"""

Change = Callable[[Pipeline], Pipeline]


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline.steps]


def parsed(text: str) -> Pipeline:
    return Pipeline.parse(text)


@dataclass(frozen=True)
class Worded(Pass):
    """A pass with an option of each kind."""

    name = "worded"
    text: str = ""
    share: float = 0.5
    count: int | None = None
    kinds: tuple[str, ...] = ()
    on: bool = False


# ---------------------------------------------------------------- text

WORDED = st.builds(
    Worded,
    text=st.text(st.sampled_from("ab ,{}()[]'\"\\\n=é"), max_size=8),
    share=st.floats(allow_nan=False, allow_infinity=False),
    count=st.none() | st.integers(),
    kinds=st.lists(st.text(st.sampled_from("a,}'"), max_size=3), max_size=3).map(tuple),
    on=st.booleans(),
)
BUILT_IN = st.sampled_from(list(BUILTIN)).map(make_pass)
BYTES = st.integers(0, 10**9).map(lambda n: make_pass(f"pin-small-embeddings{{min_bytes={n}}}"))


@pytest.fixture(scope="module", autouse=True)
def _worded_is_known() -> Iterator[None]:
    """The registry knows ``worded`` in this file."""
    with pytest.MonkeyPatch.context() as patch:
        inner = registry.pass_class
        patch.setattr(registry, "pass_class", lambda name: Worded if name == "worded" else inner(name))
        yield


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps=st.lists(WORDED | BUILT_IN | BYTES, max_size=6))
def test_the_text_of_a_pipeline_round_trips(steps: list[Pass]) -> None:
    pipeline = Pipeline(tuple(steps))
    assert parsed(str(pipeline)) == pipeline
    assert str(parsed(str(pipeline))) == str(pipeline)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("worded{text='a,b'},worded", "worded{text='a'},worded{text='b'},worded"),
        ("worded{text='}'}", "worded{text='{'}"),
        ("fold-gelu,fold-silu", "fold-silu,fold-gelu"),
        ("pin-small-embeddings{min_bytes=1}", "pin-small-embeddings"),
    ],
)
def test_different_texts_are_different_pipelines(text: str, other: str) -> None:
    assert parsed(text) != parsed(other)


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_an_empty_text_is_the_empty_pipeline(text: str) -> None:
    assert parsed(text) == Pipeline(())


def test_spaces_and_empty_steps_do_not_count() -> None:
    assert parsed(" fold-gelu , ,fold-silu ") == parsed("fold-gelu,fold-silu")


# ---------------------------------------------------------------- expansion


@pytest.mark.parametrize("name", PIPELINES)
def test_the_name_of_a_pipeline_stands_for_its_steps(name: str) -> None:
    assert names(parsed(name)) == list(PIPELINES[name])
    assert str(parsed(f"{name},fold-gelu")) == ",".join([*PIPELINES[name], "fold-gelu"])


def test_a_file_stands_for_the_passes_that_it_defines(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE, encoding="utf-8")
    pipeline = parsed(f"fold-gelu,{file},plan")
    assert names(pipeline) == ["fold-gelu", "pin-nothing", "pin-little", *PLANNING]


def test_the_text_of_passes_of_files_round_trips_with_their_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE, encoding="utf-8")
    pipeline = parsed(f"fold-gelu,{file}:pin-little{{most=3}},{file}")
    assert str(pipeline) == f"fold-gelu,{file}:pin-little{{most=3}},{file}:pin-nothing,{file}:pin-little"
    assert parsed(str(pipeline)) == pipeline


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for name in ("pin-nothing", "pin-everything"):
        file.write_text(FILE.replace("pin-nothing", name), encoding="utf-8")
        assert names(parsed(str(file)))[0] == name


def test_only_the_passes_that_change_the_graph_run() -> None:
    both = parsed("plan,fold-gelu")
    assert [p.name for p in both.graph_passes()] == ["fold-gelu"]
    assert names(both)[0] == PLANNING[0]


# ---------------------------------------------------------------- editing

ABC = "fold-gelu,fold-silu,fold-softmax"
EDITS: dict[str, tuple[Change, str]] = {
    "insert at the end": (lambda p: p.insert(make_pass("fold-addmm")), f"{ABC},fold-addmm"),
    "insert before": (
        lambda p: p.insert(make_pass("fold-addmm"), before="fold-gelu"), f"fold-addmm,{ABC}",
    ),
    "insert two after": (
        lambda p: p.insert(make_pass("fold-addmm"), make_pass("fold-silu"), after="fold-gelu"),
        "fold-gelu,fold-addmm,fold-silu,fold-silu,fold-softmax",
    ),
    "remove": (lambda p: p.remove("fold-silu"), "fold-gelu,fold-softmax"),
    "replace": (lambda p: p.replace("fold-silu", make_pass("fold-addmm")), "fold-gelu,fold-addmm,fold-softmax"),
    "replace by two": (
        lambda p: p.replace("fold-gelu", make_pass("fold-addmm"), make_pass("fold-gelu")), f"fold-addmm,{ABC}",
    ),
    "move before": (lambda p: p.move("fold-softmax", before="fold-gelu"), "fold-softmax,fold-gelu,fold-silu"),
    "move after": (lambda p: p.move("fold-gelu", after="fold-silu"), "fold-silu,fold-gelu,fold-softmax"),
    "move to the end": (lambda p: p.move("fold-gelu"), "fold-silu,fold-softmax,fold-gelu"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_gives_a_new_pipeline_and_keeps_the_old(edit: str) -> None:
    old = parsed(ABC)
    change, text = EDITS[edit]
    assert str(change(old)) == text
    assert str(old) == ABC


ABSENT: dict[str, tuple[Change, str, str]] = {
    "remove": (lambda p: p.remove("fold-gellu"), "'fold-gellu'", "did you mean 'fold-gelu'?"),
    "replace": (lambda p: p.replace("nothing", make_pass("fold-gelu")), "'nothing'", "no step bears this name"),
    "move": (lambda p: p.move("fold-sillu", before="fold-gelu"), "'fold-sillu'", "did you mean 'fold-silu'?"),
    "before": (lambda p: p.insert(before="fold-addmm"), "'fold-addmm'", ""),
    "after": (lambda p: p.move("fold-gelu", after="fold-addmm"), "'fold-addmm'", ""),
    "beside itself": (lambda p: p.move("fold-gelu", after="fold-gelu"), "'fold-gelu'", ""),
    "two places": (
        lambda p: p.insert(before="fold-gelu", after="fold-silu"),
        "before 'fold-gelu' and after 'fold-silu' at once", "one place is wanted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", ABSENT)
def test_qg212_a_step_that_the_pipeline_does_not_have(edit: str) -> None:
    change, step, why = ABSENT[edit]
    with pytest.raises(PassError) as caught:
        change(parsed(ABC))
    error = caught.value
    assert (error.code, error.what) == ("QG212", f"the pipeline has no step {step}")
    assert why in error.why
    assert "fold-softmax" in error.where
    assert error.todo


# ---------------------------------------------------------------- order


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(torch_tanh(x), inplace=True)


def torch_tanh(x: Tensor) -> Tensor:
    return x.tanh()


@dataclass(frozen=True)
class Watched(GraphPass):
    """Notes that it ran."""

    name = "watched"
    requires = ("functional",)
    ran = False

    def apply(self, graph: Graph, edit: Edit) -> None:
        type(self).ran = True


def test_qg213_a_pass_before_what_it_requires_is_refused_before_anything_runs() -> None:
    graph = qg.capture(InPlace(), floats(2, 4))
    pipeline = Pipeline((Watched(), make_pass("functionalize-in-place")))
    Watched.ran = False
    with pytest.raises(PassError) as caught:
        PassManager(pipeline.steps).run(graph)
    error = caught.value
    assert (error.code, error.what) == (
        "QG213", "'watched' requires that the graph is functional, which nothing before it ensures",
    )  # fmt: skip
    assert error.why.startswith("functional: no operation writes into its input")
    assert error.todo == "put 'functionalize-in-place' before it"
    assert not Watched.ran
    PassManager(pipeline.move("watched").steps).run(graph)
    assert Watched.ran


def test_qg213_a_pipeline_in_which_nothing_ensures_it() -> None:
    with pytest.raises(PassError, match="QG213") as caught:
        parsed("fold-layer-norm").check_order()
    assert caught.value.todo == "put a pass before it that ensures 'functional'"
    parsed("fold-layer-norm").check_order({"functional"})


def test_a_graph_that_has_the_property_needs_no_pass_that_ensures_it() -> None:
    PassManager(parsed("fold-layer-norm").steps).run(captured("mlp"))


def test_the_built_in_pipelines_stand_in_an_order_that_holds() -> None:
    parsed("canonicalize").check_order()
    with pytest.raises(PassError, match="QG213"):
        parsed("canonicalize").remove("functionalize-in-place").check_order()
    assert CANONICALIZE[0] == "functionalize-in-place"


@dataclass(frozen=True)
class OfQuantizers(Watched):
    name = "of-quantizers"
    stage = Stage.PREPARED


def test_qg213_a_pass_that_takes_a_graph_of_another_stage_is_refused_before_anything_runs() -> None:
    OfQuantizers.ran = False
    for run in (PassManager([OfQuantizers()]).run, lambda graph: qg.bisect(graph, Pipeline((OfQuantizers(),)))):
        with pytest.raises(PassError, match="QG213") as caught:
            run(captured("mlp"))
        assert caught.value.what == ("'of-quantizers' takes a graph at the stage prepared, and gets one at captured")
    assert not OfQuantizers.ran


def test_a_pass_that_leaves_another_stage_leads_to_it() -> None:
    graph = canonical("mlp")
    steps = [InsertQuantizers(qg.plan(graph)), OfQuantizers()]
    OfQuantizers.ran = False
    PassManager(steps, leaves=Stage.PREPARED).run(graph)
    assert OfQuantizers.ran
    with pytest.raises(PassError, match=r"'of-quantizers' takes a graph at .* prepared, and gets one at canonical"):
        PassManager(steps[::-1], leaves=Stage.PREPARED).run(graph)
    with pytest.raises(PassError, match=r"'remove-no-ops' takes a graph at .* captured, and gets one at prepared"):
        PassManager([steps[0], make_pass("remove-no-ops")]).run(graph)


# ---------------------------------------------------------------- names and options that are wrong


def test_qg205_a_pass_without_a_name() -> None:
    unnamed = type("Unnamed", (GraphPass,), {"apply": Watched.apply, "__module__": __name__})
    with pytest.raises(PassError, match="QG205: the pass 'Unnamed' has no name"):
        Pipeline((unnamed(),))


@pytest.mark.parametrize("step", ["fold-gelu", Watched])
@pytest.mark.parametrize("verb", [qg.canonicalize, qg.plan])
def test_qg205_what_is_no_pass(step: Any, verb: Callable[..., object]) -> None:
    with pytest.raises(PassError, match="QG205") as caught:
        verb(captured("mlp"), passes=[step])
    assert caught.value.what == f"{step!r} is no pass"


def raises() -> list[object]:
    raise KeyError("x")


STATED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a name that is not there": (
        lambda: [qg.pin("upp:linear", by="mine", why="")],
        "QG219",
        "did you mean 'up:linear'?",
    ),
    "nothing": (lambda: None, "QG206", "'NoneType' object is not iterable"),
    "no constraint": (lambda: ["up:linear"], "QG206", "it states 'up:linear', which is no constraint"),
    "an error": (raises, "QG206", "KeyError: 'x'"),
}


@pytest.mark.parametrize("fault", STATED)
def test_a_planning_pass_that_states_what_cannot_be_is_named(fault: str) -> None:
    make, code, why = STATED[fault]

    class Stating(PlanningPass):
        name = "stating"

        def state(self, graph: Graph, context: Any) -> Any:
            return make()

    with pytest.raises(PassError, match=f"{code}: .*'stating'") as caught:
        qg.plan(captured("mlp"), passes=[Stating()])
    assert why in caught.value.why


def test_qg215_two_passes_of_one_name_are_both_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE.replace("pin-little", "pin-softmax"), encoding="utf-8")
    with pytest.raises(PassError, match="QG215: two passes of the pipeline have the name 'pin-softmax'") as caught:
        parsed(f"plan,{file}")
    assert caught.value.why == f"one comes from qatgraph.passes.pin_softmax.PinSoftmax and one from {file}"
    assert names(parsed("fold-gelu,fold-gelu")) == ["fold-gelu"] * 2


WRONG: dict[str, tuple[str, str]] = {
    "fold-gellu": ("QG201", "did you mean 'fold-gelu'?"),
    "fold-gelu,canonicalise": ("QG201", "there is no pass 'canonicalise'"),
    "canonicalize{a=1}": ("QG201", "there is no pass 'canonicalize'"),
    "no/such/file.py": ("QG201", "there is no file of passes"),
    "fold-gelu{eps=1}": ("QG202", "'fold-gelu' has no option 'eps'; it has none"),
    "pin-small-embeddings{min_byts=1}": ("QG202", "no option 'min_byts'; did you mean 'min_bytes'?"),
    "pin-small-embeddings{min_bytes=1": ("QG202", "it does not end in }"),
    "fold-silu,pin-small-embeddings{min_bytes='1": ("QG202", "pin-small-embeddings"),
    "pin-small-embeddings{min_bytes=1}fold-gelu": ("QG202", "it does not end in }"),
    "pin-small-embeddings{min_bytes='x'}": ("QG202", "int"),
    "{min_bytes=1}": ("QG201", "there is no pass ''"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_text_that_names_no_pass_or_a_wrong_option(text: str) -> None:
    code, sentence = WRONG[text]
    with pytest.raises(PassError) as caught:
        parsed(text)
    assert caught.value.code == code
    assert sentence in str(caught.value)
    assert caught.value.todo


# ---------------------------------------------------------------- the pipeline of a target


def pinned(pipeline: str) -> set[str]:
    """The nodes that a plan pins, for ONNX Runtime with another planning pipeline."""
    table = load_target("ort-cpu").model_copy(update={"pipeline": pipeline})
    return {p.node for p in qg.plan(captured("encoder"), table).predictions if p.pinned}


def test_a_target_says_which_planning_passes_are_asked() -> None:
    norms = {n for n in pinned("plan") if n.endswith("layer_norm")}
    assert norms != set()
    assert pinned("pin-layer-norm,share-through-shape-ops,derive-bias") == norms
    assert norms.isdisjoint(pinned("pin-attention,share-through-shape-ops,derive-bias"))


@pytest.mark.parametrize(
    ("pipeline", "code", "what"),
    [
        ("plan,fold-gelu", "QG402", "the pipeline of the target 'ort-cpu' holds 'fold-gelu', which changes graphs"),
        ("pin-layer-nrom", "QG201", "there is no pass 'pin-layer-nrom'"),
    ],
)
def test_a_pipeline_that_cannot_plan_is_refused(pipeline: str, code: str, what: str) -> None:
    with pytest.raises(QatgraphError, match=what) as caught:
        pinned(pipeline)
    assert caught.value.code == code
