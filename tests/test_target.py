"""Targets as tables: every row, every refusal, and the rows that speak only when asked."""

from __future__ import annotations

import string
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from qatgraph.errors import QatgraphError, TargetError
from qatgraph.ops import BY_NAME, REFINED
from qatgraph.planning.facts import NodeFact, ParameterFact
from qatgraph.planning.predict import UNASKED, Wants, blocked
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.solver import solve
from qatgraph.planning.target import Row, Target, load_target, target_names
from qatgraph.specs import QuantSpec

TOY = Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml"
ORT_TEXT = (resources.files("qatgraph.backends") / "ort_cpu.toml").read_text(encoding="utf-8")
TEXTS = {"ort-cpu": ORT_TEXT, "toy-npu": TOY.read_text(encoding="utf-8")}
TABLES = {"ort-cpu": load_target("ort-cpu"), "toy-npu": load_target(str(TOY))}
ROWS = [pytest.param(t, r, id=r.id) for t in TABLES.values() for r in t.row]

ONE_ROW = """
name = "tiny"
description = "one row"
[[row]]
id = "linear.one"
op = "linear"
placement = "int8"
kernel = "K"
x = ["u8 affine per-tensor"]
weight = ["s8 symmetric per-tensor"]
bias = ["none", "row"]
why = "{name} over {shape}"
"""


def node(kind: str, rank: int = 3, *, dynamic: bool = True) -> NodeFact:
    shape = (("batch" if dynamic else 2), *(5,) * (rank - 2), 16)
    weight = ParameterFact("weight", "m.weight", "m.weight", (12, 16), 12 * 16 * 4)
    bias = ParameterFact("bias", "m.bias", "m.bias", (12,), 12 * 4)
    parameters = (weight, bias) if kind in ("linear", "layer_norm") else (weight,) * (kind == "embedding")
    return NodeFact(
        name=f"m:{kind}",
        kind=kind,
        module="m",
        region="",
        source="",
        inputs=(("x", "x"),),
        parameters=parameters,
        shape=shape,
        x_shape=shape,
        readers=(),
        bytes=4,
    )


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines_without(*keys: str) -> list[str]:
    return [line for line in ONE_ROW.splitlines() if line.partition(" ")[0] not in keys]


def refusal(tmp_path: Path, text: str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        load_target(written(tmp_path, text))
    assert caught.value.todo
    return caught.value


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_read_and_means_what_its_text_says(name: str) -> None:
    table, raw = TABLES[name], tomllib.loads(TEXTS[name])
    assert [r.id for r in table.row] == [r["id"] for r in raw["row"]]
    assert table.name == name
    for row, text in zip(table.row, raw["row"], strict=True):
        for key in ("x", "weight", "out"):
            assert [str(s) for s in getattr(row, key)] == text.get(key, [])
        assert {k: v for k, v in text.items() if isinstance(v, str)}.items() <= row.model_dump(mode="json").items()


def test_the_built_in_targets_are_the_tables_beside_the_backends() -> None:
    assert target_names() == ("openvino-cpu", "ort-cpu", "ort-cpu-vnni")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_speak_of_operations_that_exist(table: Target) -> None:
    assert {op for r in table.row for op in r.op.split("|")} <= {*BY_NAME, *REFINED}


def unfilled(row: Row, fact: NodeFact) -> list[str]:
    """What keeps the sentences of a row from being sentences about this node."""
    found = []
    for key, text in (("why", row.why), ("remedy", row.remedy)):
        unknown = {w for _, w, _, _ in string.Formatter().parse(text) if w is not None} - set(fact.words())
        found += [f"{key}: no word '{w}'" for w in sorted(unknown)]
    if found:
        return found
    why = row.why.format(**fact.words())
    return (
        [] if any(fact.words()[w] in why for w in ("shape", "weight", "name")) else ["why: names nothing of the node"]
    )


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_the_sentences_of_every_row_fill(table: Target, row: Row) -> None:
    assert unfilled(row, node(row.op)) == []


def test_a_sentence_with_a_foreign_word_or_none_at_all_is_found() -> None:
    row = TABLES["ort-cpu"].row[0]
    assert unfilled(row.model_copy(update={"why": "over {shpe}"}), node("linear")) == ["why: no word 'shpe'"]
    assert unfilled(row.model_copy(update={"why": "it is so"}), node("linear")) == ["why: names nothing of the node"]


@pytest.mark.parametrize("sentence", ["over {shpe}", "over {}", "over {shape"])
@pytest.mark.parametrize("key", ["why", "remedy"])
def test_a_table_whose_sentence_cannot_be_filled_is_refused(tmp_path: Path, key: str, sentence: str) -> None:
    """Or the first plan for it ends in a bare KeyError."""
    text = ONE_ROW.replace('why = "{name} over {shape}"', f'why = "ok {{shape}}"\n{key}2 = ""').replace(
        f'{key}2 = ""', ""
    )
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} =")] + [f'{key} = "{sentence}"']
    error = refusal(tmp_path, "\n".join(lines))
    assert error.code == "QG402"
    assert key in error.text()


def test_the_remedy_is_filled_in_the_plan(tmp_path: Path) -> None:
    from qatgraph.planning.build import PlanningContext, build_plan

    lines = lines_without("placement", "weight", "bias")
    lines += ['placement = "engine-float"', 'remedy = "make {shape} smaller"']
    table = load_target(written(tmp_path, "\n".join(lines)))
    plan = build_plan(PlanningContext(table, Recipe(), (node("linear"),)), [], {})
    assert plan.predictions[0].remedy == "make [batch, 5, 16] smaller"


def test_unknown_target_says_what_was_meant() -> None:
    with pytest.raises(TargetError) as caught:
        load_target("ort-cpp")
    assert caught.value.code == "QG401"
    assert "did you mean 'ort-cpu'?" in caught.value.why
    with pytest.raises(TargetError) as caught:
        load_target("abacus")
    assert caught.value.code == "QG401"
    assert "ort-cpu" in caught.value.why


def test_a_target_file_that_is_not_there() -> None:
    with pytest.raises(TargetError) as caught:
        load_target("no/such/target.toml")
    assert caught.value.code == "QG401"
    assert "no/such/target.toml" in caught.value.what


@pytest.mark.parametrize(
    ("old", "new", "key", "hint"),
    [
        ('kernel = "K"', 'kernal = "K"', "row.0", ""),
        ('kernel = "K"', 'kernel = "K"\nkernal = "K"', "row.0.kernal", "did you mean 'kernel'?"),
        ('name = "tiny"', 'name = "tiny"\nbackent = "ort_cpu"', "backent", "did you mean 'backend'?"),
        ('kernel = "K"', "", "row.0.kernel", ""),
        ('placement = "int8"', 'placement = "int9"', "row.0.placement", "int8"),
        ('"u8 affine per-tensor"', '"u8 affine"', "row.0.x.0", "is not a grid"),
        ('"u8 affine per-tensor"', '"u9 affine per-tensor"', "row.0.x.0", "u9"),
        ('["none", "row"]', '["none", "column"]', "row.0.bias.1", "row"),
        ('op = "linear"', "op = 3", "row.0.op", ""),
        ("[[row]]", "[[roww]]", "row", ""),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, old: str, new: str, key: str, hint: str) -> None:
    assert old in ONE_ROW
    error = refusal(tmp_path, ONE_ROW.replace(old, new))
    assert error.code == "QG402"
    assert key in error.why
    assert hint in error.why
    assert error.where == "tiny.toml"


def test_the_table_that_is_mutated_above_is_valid(tmp_path: Path) -> None:
    assert load_target(written(tmp_path, ONE_ROW)).row[0].id == "linear.one"


def test_malformed_toml_says_where(tmp_path: Path) -> None:
    error = refusal(tmp_path, ONE_ROW.replace('"tiny"', "tiny"))
    assert error.code == "QG402"
    assert "line 2" in error.why


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"name = \xff\xfe")
    with pytest.raises(QatgraphError) as caught:
        load_target(str(path))
    assert caught.value.code in ("QG401", "QG402")


def test_a_row_twice(tmp_path: Path) -> None:
    row = ONE_ROW[ONE_ROW.index("[[row]]") :]
    error = refusal(tmp_path, ONE_ROW + row)
    assert error.code == "QG402"
    assert "'linear.one' stands twice" in error.what


def test_a_table_without_rows(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'name = "t"\ndescription = "d"\nrow = []\n')
    assert error.code == "QG402"
    assert "row" in error.why


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    """A notebook plans, the table is mended, the notebook plans again."""
    assert load_target(written(tmp_path, ONE_ROW)).row[0].kernel == "K"
    assert load_target(written(tmp_path, ONE_ROW.replace('"K"', '"L"'))).row[0].kernel == "L"


def wants_of(row: Row) -> Wants:
    """What somebody must ask for before this row may speak."""
    return Wants(weight=row.weight, bias=row.bias[0] if row.bias else None)


def speaks_unasked(row: Row, fact: NodeFact) -> bool:
    return not blocked(row, fact, Wants())


NEGATIVE = [
    pytest.param(r, id=r.id)
    for t in TABLES.values()
    for r in t.row
    if r.placement != "int8" and (r.bias or r.weight) and r.op == "linear"
]


@pytest.mark.parametrize("row", NEGATIVE)
def test_a_negative_row_waits_until_it_is_asked(row: Row) -> None:
    fact = node("linear", rank=(row.rank or (3,))[0], dynamic=row.dynamic is not False)
    assert not speaks_unasked(row, fact)
    assert blocked(row, fact, Wants()).startswith(UNASKED)
    assert blocked(row, fact, wants_of(row)) == ""


def test_there_are_negative_rows_and_the_check_would_see_one_that_does_not_wait() -> None:
    assert {p.id for p in NEGATIVE} == {"linear.scale-on-k", "linear.gemm-vector-bias", "linear.static-vector-bias"}
    vector = next(r for r in TABLES["ort-cpu"].row if r.id == "linear.gemm-vector-bias")
    assert speaks_unasked(vector.model_copy(update={"placement": "int8"}), node("linear", rank=2))


def test_no_negative_row_wins_over_an_int8_row_unless_asked() -> None:
    for rank in (2, 3, 4, 5):
        for dynamic in (True, False):
            fact = node("linear", rank=rank, dynamic=dynamic)
            chosen = solve((fact,), TABLES["ort-cpu"], []).choices[fact.name].row
            assert chosen is not None
            assert chosen.placement == "int8"


def disorder(table: Target) -> list[str]:
    """Kinds whose rows do not go from int8 to an unconditional fallback: such a node could end without any row.

    A kind that has only int8 rows ends in a float kernel about which the table says nothing.
    """
    found = []
    for op in {op for r in table.row for op in r.op.split("|") if any(o.placement != "int8" for o in table.rows(op))}:
        rows = table.rows(op)
        places = [r.placement == "int8" for r in rows]
        last = rows[-1]
        conditional = last.placement == "int8" or last.rank or last.bias or last.weight or last.dynamic is not None
        if places != sorted(places, reverse=True) or conditional:
            found.append(op)
    return found


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_stand_best_first_and_end_in_a_fallback(table: Target) -> None:
    assert disorder(table) == []


def test_a_table_upside_down_is_seen() -> None:
    table = TABLES["ort-cpu"]
    assert "linear" in disorder(table.model_copy(update={"row": table.row[::-1]}))


def test_the_hash_changes_with_any_cell() -> None:
    table = TABLES["ort-cpu"]
    first, *rest = table.row
    cells: dict[str, object] = {k: v + "'" for k, v in first if isinstance(v, str)}
    cells |= {"rank": (7,), "dynamic": True, "x": first.weight, "weight": first.x, "bias": ("row",)}
    rows = [first.model_copy(update={key: value}) for key, value in cells.items()]
    hashes = {table.model_copy(update={"row": (row, *rest)}).hash() for row in (first, *rows)}
    assert len(hashes) == 1 + len(cells)
    assert table.hash() in hashes


# ---------------------------------------------------------------- grids that no quantizer makes


UNTRAINABLE: dict[str, tuple[str, str]] = {
    "an activation by channel": ('x = ["u8 affine per-channel(2)"]', "an activation has one scale"),
    "a result by channel": (
        'out = ["u8 affine per-tensor", "u8 affine per-channel(0)"]',
        "an activation has one scale",
    ),
    "a pair-safe activation": ('x = ["u8 affine per-tensor pair-safe"]', "pair-safe is a rule for weights"),
    "an affine weight": ('weight = ["s8 affine per-tensor"]', "weights are s8 symmetric"),
    "an unsigned weight": ('weight = ["u8 symmetric per-tensor"]', "weights are s8 symmetric"),
    "a weight of 32 bits": ('weight = ["s32 symmetric per-tensor"]', "that is the grid of a bias"),
    "a table by row": ('op = "embedding"\nweight = ["s8 symmetric per-channel(0)"]', "share one scale"),
}


@pytest.mark.parametrize(("lines", "why"), UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_a_grid_that_no_quantizer_makes_is_refused(tmp_path: Path, lines: str, why: str) -> None:
    """Or the plan names a grid, and training and the file have another, or fail."""
    keys = [line.partition(" ")[0] for line in lines.splitlines()]
    text = "\n".join([*lines_without(*keys), lines])
    error = refusal(tmp_path, text)
    assert error.code == "QG402"
    assert f"row 'linear.one': no quantizer makes {keys[-1]} = '" in error.why
    assert why in error.why
    float_row = text.replace('placement = "int8"', 'placement = "engine-float"')  # says what is not done
    assert load_target(written(tmp_path, float_row)).row[0].placement == "engine-float"


def test_scales_along_an_axis_that_the_weight_lacks_block_the_row() -> None:
    row = Row.model_validate({**tomllib.loads(ONE_ROW)["row"][0], "weight": ["s8 symmetric per-channel(0)"]})
    row = row.model_copy(update={"weight": (QuantSpec.parse("s8 symmetric per-channel(2)"),)})
    assert blocked(row, node("linear"), Wants()) == "the row has scales along axis 2, the weight is [12, 16]"
    assert (
        blocked(
            row.model_copy(update={"weight": (QuantSpec.parse("s8 symmetric per-channel(1)"),)}),
            node("linear"),
            Wants(),
        )
        == ""
    )
