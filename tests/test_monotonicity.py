"""On every table, taking int8 away from a node never gives a better row to another (design, section 6).

The solver demotes all that fails at once; only on such tables is its result free of order. Recipe lines that ask for a
grid are outside of it: they can set two readers of one value against each other, on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.ops import roles_of
from qatgraph.planning.constraints import pin
from qatgraph.planning.facts import NodeFact, ParameterFact, Size
from qatgraph.planning.solver import solve
from qatgraph.planning.target import Row, Target, builtin_names, load_target
from qatgraph.specs import QuantSpec
from tests.nets import S8, U8, clashing, net, op

ROOT = Path(__file__).parents[1]
TOMLS = (*ROOT.glob("examples/**/*.toml"), *ROOT.glob("tests/plugin/**/*.toml"))
FILES = [f for f in TOMLS if "[[row]]" in f.read_text(encoding="utf-8")]
TABLES = {t.name: t for t in map(load_target, [*builtin_names(), *map(str, sorted(FILES))])}


def ranks(facts: tuple[NodeFact, ...], table: Target, forced: Sequence[str]) -> dict[str, int]:
    """The position of each node's row among the rows of its kind; 0 is the best."""
    solution = solve(facts, table, [pin(n, by="force", why="the test says so") for n in forced])
    return {
        n: next((i for i, (row, _) in enumerate(c.rows) if row is c.row), len(c.rows))
        for n, c in solution.choices.items()
    }


def improvements(facts: tuple[NodeFact, ...], table: Target) -> list[str]:
    """Every case where forcing one more node to float moved another node to a better row."""
    names = [f.name for f in facts]
    subsets = {mask: [n for i, n in enumerate(names) if mask >> i & 1] for mask in range(1 << len(names))}
    found = {mask: ranks(facts, table, forced) for mask, forced in subsets.items()}
    return [
        f"with {names[i]} in float besides {subsets[mask]}, {other} goes from row {found[mask][other]} to {rank}"
        for mask in subsets
        for i in range(len(names))
        if not mask >> i & 1
        for other, rank in found[mask | 1 << i].items()
        if other != names[i] and rank < found[mask][other]
    ]


# ---------------------------------------------------------------- nets of what a table has rows for


@dataclass(frozen=True)
class Word:
    """A kind of node: with a weight of its own, one that all share, or none; and the form of its bias."""

    kind: str
    weight: str = ""
    bias: str = ""

    @property
    def binary(self) -> bool:
        return "y" in roles_of(self.kind)

    def node(self, i: int, sources: Sequence[str]) -> NodeFact:
        name = f"n{i}"
        parameters: list[ParameterFact] = []
        if self.bias == "constant":
            parameters.append(ParameterFact("bias", f"{name}.bias", f"{name}.bias", (16,), 64))
        if self.weight:
            storage = "table" if self.weight == "shared" else f"{name}.weight"
            parameters.append(ParameterFact("weight", f"{name}.weight", storage, (16, 16), 1024))
        fact = op(name, self.kind, *sources)
        computed = (("bias", sources[-1]),) if self.bias == "computed" else ()
        return replace(fact, parameters=tuple(parameters), inputs=fact.inputs + computed)


WORDS_ONLY = {
    "id",
    "least_terms",
    "op",
    "kernel",
    "why",
    "remedy",
    "form",
    "deviation",
    "accumulator",
    "k_order",
    "versions",
    "source",
}


def behaviour(table: Target, kind: str) -> str:
    """All that the solver asks about a kind: what its rows want, how many operands it has, and what takes it in."""
    takes = [kind in r.fuses_after for r in table.row]
    return str(["y" in roles_of(kind), takes, *(r.model_dump(exclude=WORDS_ONLY) for r in table.rows(kind))])


def vocabulary(table: Target, *, biases: Sequence[str] = ("",)) -> list[Word]:
    """Every kind that can be int8, those that must not read its result, a mover, and a kind without rows.

    Of kinds that the solver cannot tell from each other the first stands for all.
    """
    words: list[Word] = []
    int8 = dict.fromkeys(op for r in table.row if r.placement == "int8" for op in r.op.split("|"))
    for kind in {behaviour(table, kind): kind for kind in reversed(int8)}.values():
        rows = table.rows(kind)
        weights = ("own", "shared") if any(r.weight for r in rows) else ("",)
        forms = biases if any(r.bias for r in rows) else ("",)
        words += [Word(kind, weight, bias) for weight in weights for bias in forms]
    others = {kind for r in table.row for kind in r.not_read_by} | {"reshape", "cumsum"}
    return words + [Word(kind) for kind in sorted(others - {w.kind for w in words})]


def wirings(word: Word, values: Sequence[str]) -> list[tuple[str, ...]]:
    return list(combinations_with_replacement(values, 2)) if word.binary else [(v,) for v in values]


def all_nets(words: Sequence[Word], size: int) -> Iterator[tuple[NodeFact, ...]]:
    values = ["x", *(f"n{i}" for i in range(size))]
    for chosen in product(words, repeat=size):
        for wires in product(*(wirings(w, values[: i + 1]) for i, w in enumerate(chosen))):
            yield net(*(w.node(i, s) for i, (w, s) in enumerate(zip(chosen, wires, strict=True))))


SHAPES: list[tuple[Size, ...]] = [
    (4, 16), ("batch", 16), (4, 5, 16), ("batch", 5, 16), (1, 2, 5, 16), (1, 16, 4, 4, 4),
]  # fmt: skip


@st.composite
def nets(draw: st.DrawFn, words: Sequence[Word], size: int) -> tuple[NodeFact, ...]:
    """With all forms of bias, ranks, and sizes that move or not."""
    values, facts = ["x"], []
    shape: st.SearchStrategy[tuple[Size, ...]] = st.sampled_from(SHAPES)
    for i in range(size):
        word = draw(st.sampled_from(words))
        facts.append(replace(word.node(i, draw(st.sampled_from(wirings(word, values)))), x_shape=draw(shape)))
        values.append(f"n{i}")
    return net(*facts)


def check_all_nets(table: Target, sizes: Sequence[int] = (2, 3)) -> None:
    for size in sizes:
        for facts in all_nets(vocabulary(table), size):
            assert improvements(facts, table) == []


def on_larger_nets(table: Target, look: Callable[[tuple[NodeFact, ...]], None]) -> None:
    """Look at a hundred nets of six nodes."""

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(nets(vocabulary(table, biases=("", "constant", "computed")), 6))
    def run(facts: tuple[NodeFact, ...]) -> None:
        look(facts)

    run()


def check_larger_nets(table: Target) -> None:
    def check(facts: tuple[NodeFact, ...]) -> None:
        assert improvements(facts, table) == []

    on_larger_nets(table, check)


LARGE = {"openvino-cpu", "ort-cpu", "ort-cpu-vnni"}  # so many kinds that all nets of three nodes take a minute


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_monotone_on_all_nets_of_two(name: str) -> None:
    check_all_nets(TABLES[name], (2,))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in TABLES])
def test_every_table_is_monotone_on_all_nets_of_three(name: str) -> None:
    check_all_nets(TABLES[name], (3,))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_monotone_on_larger_nets(name: str) -> None:
    check_larger_nets(TABLES[name])


def test_the_tables_are_all_that_the_project_holds() -> None:
    assert {"ort-cpu", "toy-npu", "mini-npu", "ort-swish"} <= set(TABLES)
    assert len(TABLES) == len(FILES) + len(builtin_names())


@pytest.mark.parametrize("name", TABLES)
def test_the_nets_reach_every_int8_row_of_a_table(name: str) -> None:
    """Else nothing would be said of the others."""
    table, reached = TABLES[name], set[str]()

    def collect(facts: tuple[NodeFact, ...]) -> None:
        reached.update(c.row.id for c in solve(facts, table, []).choices.values() if c.row)

    on_larger_nets(table, collect)
    for facts in between_two_alike(vocabulary(table)):
        collect(facts)
    kinds = {w.kind for w in vocabulary(table)}
    wanted = {r.id for r in table.row if r.placement == "int8" and not r.on_request and kinds & set(r.op.split("|"))}
    assert reached >= wanted - NEVER_FIRST


def between_two_alike(words: Sequence[Word]) -> Iterator[tuple[NodeFact, ...]]:
    """Every kind between two nodes of every kind, in every shape: some rows want integers on both sides."""
    for outer, inner, shape in product(words, words, SHAPES):
        wires = (wirings(outer, ["x"]), wirings(inner, ["n0"]), wirings(outer, ["n1"]))
        nodes = (w.node(i, s[0]) for i, (w, s) in enumerate(zip((outer, inner, outer), wires, strict=True)))
        yield net(*(replace(n, x_shape=shape) for n in nodes))


# the row before it takes every node that it takes, unless a recipe asks for another form of bias; and no net has a
# filter of its own for each channel, which the solver does not look at
NEVER_FIRST = {"linear.matmul-vector-bias", "conv.depthwise"}


# ---------------------------------------------------------------- planted tables, which are not monotone


def planted(*rows: tuple[str, dict[str, tuple[QuantSpec, ...]]]) -> Target:
    """Each kind has an int8 row with these grids, and a float row."""
    made: list[Row] = []
    for kind, grids in rows:
        made.append(Row(id=f"{kind}.int8", op=kind, placement="int8", kernel="K", why="{shape}", **grids))  # type: ignore[arg-type]
        made.append(Row(id=f"{kind}.float", op=kind, placement="engine-float", kernel="F", why="{shape}"))
    return Target(name="planted", description="not monotone", row=tuple(made))


CHANNEL = QuantSpec.parse("s8 symmetric per-channel(0)")
PLANTED = {
    "two kinds read one value on two grids": clashing("linear", "gelu"),
    "what one kind writes, another reads on another grid": planted(
        ("relu", {"x": (U8,), "out": (U8,)}), ("gelu", {"x": (S8,)})
    ),
    "two kinds hold one weight on two grids": planted(
        ("linear", {"x": (U8,), "weight": (CHANNEL,)}), ("embedding", {"weight": (S8,)})
    ),
}


@pytest.mark.parametrize("check", [check_all_nets, check_larger_nets])
@pytest.mark.parametrize("name", PLANTED)
def test_a_table_is_seen_on_which(name: str, check: Callable[[Target], None]) -> None:
    with pytest.raises(AssertionError, match="in float besides"):
        check(PLANTED[name])


def test_the_counterexample_says_who_gave_way_to_whom() -> None:
    facts = net(op("a", "linear", "x"), op("b", "gelu", "x"))
    assert improvements(facts, clashing("linear", "gelu")) == ["with a in float besides [], b goes from row 1 to 0"]
