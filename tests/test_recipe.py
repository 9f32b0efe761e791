"""Recipes: what a user writes, which line wins, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import qatgraph as qg
from qatgraph.errors import PlanError
from qatgraph.planning.constraints import Author, Constraint, Port, pin
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe, load_recipe
from qatgraph.planning.target import Row, load_target
from qatgraph.specs import QuantSpec
from tests.models import captured

TOY = str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml")
NORM, UP, DOWN = "norm:layer_norm", "up:linear", "down:linear"  # of the model "mlp"


def planned(*lines: Override, target: str | qg.Target = "ort-cpu", **kwargs: Any) -> Plan:
    return qg.plan(captured("mlp"), target, Recipe(override=lines), **kwargs)


def refusal(*lines: Override, **kwargs: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        planned(*lines, **kwargs)
    assert caught.value.todo
    return caught.value


def place(plan: Plan, node: str) -> str:
    return plan.placement(node).placement


def decided(plan: Plan, node: str) -> str:
    return str(next(d.author for d in plan.decisions if d.subject == node))


def with_int8_norm() -> qg.Target:
    """ort-cpu, if it had an int8 LayerNormalization."""
    table = load_target("ort-cpu")
    grid = QuantSpec.parse("u8 affine per-tensor")
    row = Row(id="layer_norm.int8", op="layer_norm", placement="int8", kernel="QLayerNorm", x=(grid,), why="{shape}")
    return table.model_copy(update={"name": "norm-npu", "row": (row, *table.row)})


# the file


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ('observr = "mse"', "observr", "did you mean 'observer'?"),
        ('[[override]]\nselect = "up:linear"\nplce = "float"', "override.0.plce", "did you mean 'place'?"),
        ('[[overide]]\nselect = "up:linear"', "overide", "did you mean 'override'?"),
        ('observer = "mean"', "observer", "moving-average"),
        ('[[override]]\nplace = "float"', "override.0.select", "required"),
        ('[[override]]\nselect = "up:linear"\nweight = "s9"', "override.0.weight", "is not a grid"),
        ("observer = mse", "line 1", ""),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, key: str, hint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        load_recipe(str(path))
    assert caught.value.code == "QG303"
    assert caught.value.where == "mine.toml"
    assert key in caught.value.why
    assert hint in caught.value.why


def test_a_good_file_says_the_same_as_python(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nobserver = "minmax"\n'
        '[[override]]\nselect = "*:linear"\nweight = "s8 symmetric per-tensor pair-safe"\nwhy = "so"\n',
        encoding="utf-8",
    )
    line = Override(select="*:linear", weight=QuantSpec.parse("s8 symmetric per-tensor pair-safe"), why="so")
    assert load_recipe(str(path)) == Recipe(name="mine", observer="minmax", override=(line,))
    assert load_recipe(str(path)).hash() != Recipe().hash()


@pytest.mark.parametrize("source", ["int9", "no/such/recipe.toml"])
def test_a_recipe_that_is_not_there(source: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_recipe(source)
    assert caught.value.code == "QG302"
    assert source in caught.value.what


# selectors


@pytest.mark.parametrize(
    ("selector", "hint"), [("up:lineer", UP), ("up:linear.weight", UP), ("*own:lineer", DOWN), ("nothing", "show")]
)
def test_a_selector_that_matches_nothing(selector: str, hint: str) -> None:
    error = refusal(Override(select=UP, place="float"), Override(select=selector, place="float"))
    assert error.code == "QG301"
    assert f"'{selector}'" in error.what
    assert "override 2" in error.where
    assert hint in error.todo


def test_a_selector_of_an_observer_must_match_too() -> None:
    assert refusal(Override(select="up:lineer", observer="minmax")).code == "QG301"


def test_a_glob_means_every_match_and_a_name_only_itself() -> None:
    assert place(planned(Override(select="*:linear", place="float")), DOWN) == "engine-float"
    assert place(planned(Override(select=DOWN, place="float")), UP) == "int8"


# precedence: a line that names the node > pin > a glob line > row


NAMED_FLOAT, NAMED_INT8 = Override(select=UP, place="float"), Override(select=UP, place="int8")
GLOB_FLOAT, GLOB_INT8 = Override(select="*p:linear", place="float"), Override(select="*p:linear", place="int8")


@dataclass(frozen=True)
class PinUp(qg.PlanningPass):
    name = "pin-up"

    def state(self, graph: qg.Graph, context: Any) -> Iterator[Constraint]:
        yield pin(UP, by=self.name, why=f"'{UP}' is pinned by the test")


@pytest.mark.parametrize(
    ("lines", "pinned", "want", "author"),
    [
        ((), False, "int8", "row linear.gemm-int32-bias"),
        ((GLOB_FLOAT,), False, "engine-float", "recipe int8 (override 1, '*p:linear')"),
        ((), True, "engine-float", "pass pin-up"),
        ((GLOB_INT8,), True, "engine-float", "pass pin-up"),
        ((NAMED_INT8,), True, "int8", "row linear.gemm-int32-bias"),
        ((GLOB_FLOAT, NAMED_INT8), False, "int8", "row linear.gemm-int32-bias"),
        ((GLOB_FLOAT, NAMED_INT8), True, "int8", "row linear.gemm-int32-bias"),
        ((GLOB_INT8, NAMED_FLOAT), False, "engine-float", "recipe int8 (override {}, 'up:linear')"),
        ((GLOB_INT8, NAMED_FLOAT), True, "engine-float", "recipe int8 (override {}, 'up:linear')"),
    ],
)
def test_precedence(lines: tuple[Override, ...], pinned: bool, want: str, author: str) -> None:
    for order in permutations(lines):
        plan = planned(*order, passes=[PinUp()] if pinned else [])
        assert place(plan, UP) == want
        assert decided(plan, UP) == author.format(order.index(NAMED_FLOAT) + 1 if NAMED_FLOAT in order else 0)
        assert place(plan, DOWN) == "int8"


PER_TENSOR, PER_CHANNEL = (QuantSpec.parse(f"s8 symmetric {g} pair-safe") for g in ("per-tensor", "per-channel(0)"))


@pytest.mark.parametrize("first", ["glob", "name"])
def test_a_line_that_names_the_node_wins_for_grids_and_biases_too(first: str) -> None:
    lines = (
        Override(select="*:linear", weight=PER_TENSOR, bias="vector"),
        Override(select=UP, weight=PER_CHANNEL, bias="int32"),
    )
    plan = planned(*(lines if first == "glob" else lines[::-1]))
    weight = plan.quantizer_at(Port(UP, "weight"))
    assert weight is not None
    assert weight.spec == PER_CHANNEL
    assert (place(plan, UP), place(plan, DOWN)) == ("int8", "engine-float")


@pytest.mark.parametrize("select", [UP, "*:linear"])
def test_the_later_of_two_equal_lines_wins(select: str) -> None:
    for a, b in ((PER_TENSOR, PER_CHANNEL), (PER_CHANNEL, PER_TENSOR)):
        weight = planned(Override(select=select, weight=a), Override(select=select, weight=b)).quantizer_at(
            Port(UP, "weight")
        )
        assert weight is not None
        assert weight.spec == b
    plan = planned(Override(select=select, bias="int32"), Override(select=select, bias="vector"))
    assert place(plan, UP) == "engine-float"


def test_the_tenth_line_comes_after_the_second() -> None:
    lines = [Override(select=UP, weight=PER_TENSOR)] * 9 + [Override(select=UP, weight=PER_CHANNEL)]
    weight = planned(*lines).quantizer_at(Port(UP, "weight"))
    assert weight is not None
    assert weight.spec == PER_CHANNEL


# pins and what lifts them


def test_a_named_line_lifts_a_pin_only_where_there_is_an_int8_row() -> None:
    line = Override(select=NORM, place="int8")
    error = refusal(line)
    assert error.code == "QG305"
    assert f"'{NORM}'" in error.what
    assert "ort-cpu" in error.what
    assert "override 1" in error.where
    assert "no int8 row" in error.why
    plan = planned(line, target=with_int8_norm())
    assert place(plan, NORM) == "int8"
    assert plan.quantizer_at(Port(NORM, "x")) is not None


def test_without_the_line_the_pin_holds_although_there_is_a_row() -> None:
    plan = planned(target=with_int8_norm())
    prediction = plan.prediction(NORM)
    assert prediction is not None
    assert prediction.pinned
    assert not prediction.int8
    assert decided(plan, NORM) == "pass pin-layer-norm"
    glob = planned(Override(select="*norm", place="int8"), target=with_int8_norm())
    assert place(glob, NORM) == "engine-float"


def test_a_wish_that_loses_is_in_lost() -> None:
    """A glob line against a pin: the plan says that it was heard, and why it lost."""
    plan = planned(Override(select="*norm", place="int8"), target=with_int8_norm())
    decision = next(d for d in plan.decisions if d.subject == NORM)
    assert any(a.author.kind == "recipe" and a.why_lost for a in decision.lost)


def test_an_int8_line_that_names_a_node_is_kept_or_refused_never_dropped() -> None:
    """The sum of a host value cannot be int8 on the toy NPU: its operand is not on the device."""
    error = refusal(Override(select="Mlp:residual_add", place="int8"), target=TOY)
    assert error.code == "QG305"
    assert "'Mlp:residual_add'" in error.what
    assert "is not int8" in error.why


def test_a_recipe_pin_bears_its_author_and_reason() -> None:
    plan = planned(Override(select=UP, place="float", why="the first layer sees raw values"))
    decision = next(d for d in plan.decisions if d.subject == UP)
    assert decision.author == Author("recipe", "int8", f"override 1, '{UP}'")
    assert decision.why == "the first layer sees raw values"
    assert "linear.gemm-int32-bias" in {a.author.id for a in decision.lost}
    assert plan.quantizer_at(Port(UP, "x")) is None


# hard against hard


def test_two_named_lines_that_contradict_each_other() -> None:
    for order in permutations((NAMED_FLOAT, NAMED_INT8)):
        error = refusal(*order)
        assert error.code == "QG305"
        assert f"'{UP}'" in error.what
        assert {f"override {i}, '{UP}'" in error.where for i in (1, 2)} == {True}


@dataclass(frozen=True)
class WantUp(qg.PlanningPass):
    name = "want-up"

    def state(self, graph: qg.Graph, context: Any) -> Iterator[Constraint]:
        yield Constraint("int8", (Port(UP, "out"),), Author("pass", self.name), "it is worth it")


def test_two_passes_that_contradict_each_other() -> None:
    for order in permutations((PinUp(), WantUp())):
        error = refusal(passes=order)
        assert error.code == "QG305"
        assert "pass pin-up" in error.where
        assert "pass want-up" in error.where


def test_agreement_is_no_conflict() -> None:
    assert place(planned(NAMED_FLOAT, passes=[PinUp()]), UP) == "engine-float"
    assert place(planned(NAMED_INT8, passes=[WantUp()]), UP) == "int8"


# observers


def observers(*lines: Override) -> dict[str, str]:
    return {q.name: q.observer for q in planned(*lines).quantizers if q.observer}


def test_observers() -> None:
    assert observers() == {f"{UP}.x": "mse", f"{DOWN}.x": "mse"}
    assert observers(Override(select=DOWN, observer="minmax")) == {f"{UP}.x": "mse", f"{DOWN}.x": "minmax"}
    lines = Override(select="*:linear", observer="minmax"), Override(select="*:linear", observer="moving-average")
    assert set(observers(*lines).values()) == {"moving-average"}
    assert {q.observer for q in qg.plan(captured("mlp"), recipe=Recipe(observer="minmax")).quantizers} == {"", "minmax"}


def test_an_observer_line_that_names_the_node_wins() -> None:
    named, glob = Override(select=UP, observer="minmax"), Override(select="*:linear", observer="moving-average")
    for order in permutations((named, glob)):
        assert observers(*order) == {f"{UP}.x": "minmax", f"{DOWN}.x": "moving-average"}


@pytest.mark.parametrize(
    ("wish", "text"),
    [({"weight": PER_TENSOR}, str(PER_TENSOR)), ({"bias": "vector"}, "vector"), ({"place": "int8"}, "int8")],
)
def test_a_wish_that_a_pin_makes_void_is_lost_with_its_reason(wish: dict[str, Any], text: str) -> None:
    plan = planned(Override(select="u*:linear", **wish), passes=[PinUp()])
    assert place(plan, UP) == "engine-float"
    lost = next(d for d in plan.decisions if d.subject == UP).lost
    assert [(a.choice, a.why_lost) for a in lost if a.author.kind == "recipe"] == [
        (text, "pass pin-up holds the node in float")
    ]
