"""A row that can never be chosen, or contradicts another, is refused; and what is called so really never is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.planning.shadowed import never_chosen, takes_all_of
from qatgraph.planning.solver import solve
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.specs import QuantSpec
from tests.nets import S8, U8, net, op

PER_CHANNEL = QuantSpec.parse("s8 symmetric per-channel(0)")
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


SPECS = st.sampled_from([(U8,), (S8,), (U8, S8)])
VALUES: dict[str, list[Any]] = {
    "placement": ["int8", "engine-float", "host"],
    "rank": [(2,), (3,), (2, 3)],
    "dynamic": [True, False],
    "not_read_by": [("gelu",), ("relu",), ("gelu", "relu")],
    "reads": [1, 2],
    "bias": [("none",), ("int32",), ("vector",), ("none", "int32"), ("vector", "int32")],
    "weight": [(S8,), (PER_CHANNEL,), (ALONG_K,), (S8, PER_CHANNEL)],
    "x": [(), (U8,), (S8,), (U8, S8)],
    "out": [(U8,), (S8,), (U8, S8)],
    "needs": ["inputs-int8", "readers-int8", "between-int8", "inside"],
    "fuses_after": [("relu",)],
}
FIELDS = st.lists(st.sampled_from([(k, v) for k, values in VALUES.items() for v in values]), max_size=3).map(dict)
WANTS = st.sampled_from([None, "float", "weight", "bias"])


@settings(max_examples=1000, phases=[Phase.generate], deadline=None, derandomize=True)
@given(FIELDS, st.data(), SPECS, st.booleans(), st.booleans(), st.booleans(), WANTS)
def never_sees_the_second(
    shadows: Callable[[Row, Row], bool],
    more: dict[str, Any],
    data: st.DataObject,
    grid: tuple[QuantSpec, ...],
    bias: bool,
    flat: bool,
    relu: bool,
    want: Any,
) -> None:
    """The second row is the first, of which some fields changed, so that one often takes all of the other."""
    base = linear("a").model_copy(update=more)
    behind = base.model_copy(update={"id": "b", **data.draw(FIELDS)})
    if not shadows(base, behind):
        return
    around = Row(id="gelu", op="gelu", placement="int8", kernel="G", why="{name}", x=grid, out=(U8, S8))
    activation = linear("relu.in", op="relu", x=(), needs="inside")
    rows = (base, behind, around, activation)
    chain = [op("first", "gelu", "input"), op("layer", "linear", "first", bias=bias)]
    chain += [op("act", "relu", "layer")] if relu else []
    facts = net(*chain, op("last", "gelu", chain[-1].name))
    facts = tuple(replace(f, x_shape=(5, 16)) if flat else f for f in facts)
    author = Author("pass", "test")
    asked = {
        "float": Constraint("float", (Port("layer", "x"),), author, "test"),
        "weight": Constraint("want", (Port("layer", "weight"),), author, "test", specs=(PER_CHANNEL,)),
        "bias": Constraint("want", (Port("layer", "bias"),), author, "test", form="int32"),
    }
    solution = solve(facts, table(FLOAT).model_copy(update={"row": rows}), [asked[want]] if want else [])
    chosen = solution.choices["layer"].row
    assert chosen is None or chosen.id != "b"


def test_what_stands_behind_is_never_chosen() -> None:
    never_sees_the_second(takes_all_of)


@pytest.mark.parametrize("ignored", ["needs", "weight", "placement", "not_read_by"])
def test_a_check_that_ignores_a_field_is_found_out(ignored: str) -> None:
    def careless(front: Row, row: Row) -> bool:
        return takes_all_of(front.model_copy(update={ignored: getattr(row, ignored)}), row)

    with pytest.raises(AssertionError):
        never_sees_the_second(careless)
