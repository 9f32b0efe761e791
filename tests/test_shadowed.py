"""A row that can never be chosen, or contradicts another, is refused; and what is called so really never is chosen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.shadowed import never_chosen, takes_all_of
from qatgraph.planning.solver import solve
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.specs import QuantSpec
from tests.nets import S8, U8, net, op

PER_CHANNEL = QuantSpec.parse("s8 symmetric per-channel(0)")
DYNAMIC, BLOCKS = map(QuantSpec.parse, ("u8 affine per-tensor dynamic", "s8 symmetric per-block(8)"))
ALONG_K = QuantSpec.parse("s8 symmetric per-channel(1)")
FLOAT = Row(id="gelu.float", op="gelu", placement="engine-float", kernel="F", why="{name}")


def linear(name: str, **fields: Any) -> Row:
    made = {"id": name, "op": "linear", "placement": "int8", "kernel": "K", "why": "{name}", "x": (U8,)}
    return Row(**(made | fields))


def table(*rows: Row) -> Target:
    return Target(name="t", description="t", row=rows)


@pytest.mark.parametrize(
    ("front", "behind", "says"),
    [
        ({"kernel": "A"}, {"kernel": "B"}, "the rows 'a' and 'b' contradict each other: one and the same linear"),
        ({}, {"placement": "engine-float"}, ""),
        ({"placement": "engine-float"}, {}, "the row 'b' is never chosen for a linear: 'a' stands in front of it"),
        ({"placement": "engine-float"}, {"placement": "host", "rank": (2,)}, "never chosen"),
        ({}, {"rank": (2,)}, "never chosen"),
        ({"rank": (2, 3)}, {"rank": (3,)}, "never chosen"),
        ({"rank": (2,)}, {"rank": (2, 3)}, ""),
        ({"dynamic": True}, {"dynamic": False}, ""),
        ({"dynamic": True}, {}, ""),
        ({"not_read_by": ("relu",)}, {}, ""),
        ({}, {"not_read_by": ("relu",)}, "never chosen"),
        ({"reads": 2}, {"reads": 1}, ""),
        ({"depthwise": True}, {}, ""),
        ({"bias": ("int32",)}, {"bias": ("int32", "none")}, ""),
        ({"bias": ("int32", "none")}, {"bias": ("none",)}, "never chosen"),
        ({"bias": ("none",)}, {}, ""),
        ({"weight": (S8,)}, {"weight": (PER_CHANNEL, S8)}, ""),
        ({"weight": (PER_CHANNEL, S8)}, {"weight": (S8,)}, "never chosen"),
        ({}, {"weight": (S8,)}, ""),
        ({"x": (U8,)}, {"x": (S8,)}, ""),
        ({"x": (U8, S8)}, {"x": (S8,)}, "never chosen"),
        ({"x": ()}, {}, ""),
        ({"x": (DYNAMIC, U8)}, {}, ""),
        ({"x": (DYNAMIC, U8)}, {"x": (DYNAMIC,)}, "never chosen"),
        ({"weight": (S8, BLOCKS)}, {"weight": (S8,)}, ""),
        ({"needs": "between-int8"}, {"needs": "inputs-int8"}, ""),
        ({"needs": "inputs-int8"}, {"needs": "between-int8"}, "never chosen"),
        ({"needs": "readers-int8"}, {"needs": "readers-int8", "fuses_after": ("relu",)}, ""),
        ({"out": (U8,)}, {}, ""),
        ({"placement": "engine-float", "bias": ("vector",)}, {"placement": "engine-float"}, ""),
    ],
)
def test_a_row_behind_one_that_takes_all_of_it_is_refused(
    front: dict[str, Any], behind: dict[str, Any], says: str
) -> None:
    rows = linear("a", **front), linear("b", **behind)
    assert says in never_chosen(rows)
    assert bool(says) == bool(never_chosen(rows))
    if says:
        with pytest.raises(ValidationError, match="leave one out"):
            table(*rows)
    else:
        table(*rows)


def test_one_of_several_kinds_is_enough() -> None:
    both = linear("b", op="linear|gelu")
    assert "'b' is never chosen for a gelu" in never_chosen((FLOAT, both))
    assert never_chosen((linear("a", op="conv2d"), both)) == ""


def test_a_contradiction_planted_in_the_table_of_an_engine_is_named() -> None:
    ort = load_target("ort-cpu")
    for row in ort.row:
        twin = row.model_copy(update={"id": "twin", "kernel": "Another"})
        assert f"the rows 'twin' and '{row.id}' contradict each other" in never_chosen((twin, *ort.row)) or (
            "'twin' stands in front" in never_chosen((twin, *ort.row))
        )
        assert "'twin'" in never_chosen((*ort.row, twin))
    assert never_chosen(ort.row) == ""


THIRD = QuantSpec.parse("s8 affine per-tensor")
GRIDS = [(U8,), (S8,), (U8, S8), (S8, THIRD), (U8, THIRD), (U8, S8, THIRD)]
VALUES: dict[str, list[Any]] = {
    "placement": ["int8", "engine-float", "host"],
    "rank": [(2,), (3,), (2, 3)],
    "dynamic": [True, False],
    "reads": [1, 2],
    "depthwise": [True, False],
    "beyond": [True, False],
    "batched": [True],
    "least_terms": [16, 17],
    "not_read_by": [("gelu",), ("relu",), ("gelu", "relu")],
    "bias": [("none",), ("int32",), ("vector",), ("none", "int32"), ("vector", "int32")],
    "weight": [(S8,), (PER_CHANNEL,), (ALONG_K,), (S8, PER_CHANNEL), (BLOCKS,), (S8, BLOCKS)],
    "x": [(), *GRIDS, (DYNAMIC,), (DYNAMIC, U8)],
    "out": [(), *GRIDS],
    "needs": ["inputs-int8", "readers-int8", "between-int8", "inside"],
    "fuses_after": [("relu",)],
    "fuses_before": [("pad",)],
}
CONDITIONS: dict[str, list[dict[str, Any]]] = {
    **{name: [{name: value} for value in values] for name, values in VALUES.items()},
    "moves": [{"requant": way, "x": GRIDS[2], "out": GRIDS[2]} for way in ("", "moved")],
    "on_request": [{"x": (DYNAMIC, U8)}, {"weight": (S8, BLOCKS)}],
    "dynamic_x": [{"x": x, "weight": (BLOCKS,)} for x in ((U8,), (DYNAMIC, U8))],
}
AUTHOR = Author("pass", "test")
PAIRS = 3000
WANTS: list[list[Constraint]] = [
    [],
    [Constraint("float", (Port("layer", "x"),), AUTHOR, "test")],
    [Constraint("want", (Port("layer", "bias"),), AUTHOR, "test", form="int32")],
    *([Constraint("want", (Port("layer", "weight"),), AUTHOR, "test", specs=(w,))] for w in (PER_CHANNEL, BLOCKS)),
    *([Constraint("want", (Port("layer", "x"),), AUTHOR, "test", specs=(x,))] for x in (S8, DYNAMIC)),
]


def around(draw: random.Random) -> tuple[tuple[NodeFact, ...], list[Row]]:
    """A layer between others: padding in front or none, a value that shares a grid with its result, a ReLU, readers."""
    pad, relu, joined, bias, flat = (draw.random() < share for share in (0.3, 0.4, 0.7, 0.5, 0.5))
    made = [op("first", "tanh", "input"), op("other", "silu", "input")]
    made += [op("padded", "pad", "first")] if pad else []
    layer = op("layer", "linear", "padded" if pad else "first", bias=bias)
    made.append(replace(layer, kind=draw.choice(["linear", "conv1d"])))
    made += [op("act", "relu", "layer")] if relu else []
    made += [op("joined", "cat", "other", made[-1].name)] if joined else []
    facts = net(*made, op("last", "gelu", made[-1].name))
    every = {"x": GRIDS[-1], "out": GRIDS[-1]}
    ends = {"tanh": "out", "silu": "out", "gelu": "x"}
    rows = [linear(kind, op=kind, **(every | {role: draw.choice(GRIDS)})) for kind, role in ends.items()]
    rows += [linear("cat", op="cat", requant="moved", **every)]
    rows += [linear("relu.in", op="relu", x=(), needs="inside"), linear("pad.in", op="pad", x=(), needs="before")]
    return tuple(replace(f, x_shape=(5, 16)) if flat else f for f in facts), rows


def pair(draw: random.Random, condition: str) -> tuple[Row, Row]:
    """Two rows that differ in one condition, if at all, so that one often takes all that the other takes."""
    base = linear("a", op="linear|conv1d", x=draw.choice(GRIDS), out=draw.choice(GRIDS))
    for other in draw.choices(list(CONDITIONS), k=draw.randrange(3)):
        base = base.model_copy(update=draw.choice(CONDITIONS[other]))
    one, two = (draw.choice([{}, *CONDITIONS[condition]]) for _ in range(2))
    return base.model_copy(update=one), base.model_copy(update={"id": "b", **two})


def never_sees_the_second(shadows: Callable[[Row, Row], bool], condition: str) -> None:
    draw = random.Random(condition)
    for _ in range(PAIRS):
        front, behind = pair(draw, condition)
        (facts, rows), asked = around(draw), draw.choice([[], draw.choice(WANTS)])
        if not shadows(front, behind):
            continue
        target = table(FLOAT).model_copy(update={"row": (front, behind, *rows)})
        chosen = solve(facts, target, asked).choices["layer"].row
        assert chosen is None or chosen.id != "b", (front, asked)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_stands_behind_is_never_chosen(condition: str) -> None:
    never_sees_the_second(takes_all_of, condition)


class Blind:
    """A row in front, which says of one condition what the row behind says: so it cannot count."""

    def __init__(self, front: Row, row: Row, ignored: str) -> None:
        self.front, self.row, self.ignored = front, row, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.row if name == self.ignored else self.front, name)


@pytest.mark.parametrize("ignored", CONDITIONS)
def test_a_check_that_ignores_a_condition_is_found_out(ignored: str) -> None:
    def careless(front: Row, row: Row) -> bool:
        blind: Any = Blind(front, row, ignored)
        return takes_all_of(blind, row)

    with pytest.raises(AssertionError):
        never_sees_the_second(careless, ignored)


def test_no_condition_is_left_out() -> None:
    """Of two equal rows every condition is asked."""

    class Asked(Blind):
        names: ClassVar[set[str]] = set()

        def __getattr__(self, name: str) -> Any:
            self.names.add(name)
            return super().__getattr__(name)

    for x in (U8, DYNAMIC):
        row = linear("a", weight=(S8,), bias=("int32",), out=(U8,)).model_copy(update={"x": (x,)})
        asked: Any = Asked(row, row, "")
        assert takes_all_of(asked, row)
    assert Asked.names == set(CONDITIONS)
