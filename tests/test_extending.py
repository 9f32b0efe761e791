"""A target of one's own that extends another: rows changed by id, left out and added."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.errors import TargetError
from qatgraph.planning.target import Target, load_target

BASE = load_target("ort-cpu")
IDS = [r.id for r in BASE.row]
HEAD = 'name = "mine"\ndescription = "ONNX Runtime in another build"\nextends = "ort-cpu"\n'
OWN_ROW = '[[row]]\nid = "silu.own"\nop = "silu"\nplacement = "engine-float"\nkernel = "Silu"\nwhy = "{shape}"\n'


def load(folder: Path, text: str, name: str = "mine.toml") -> Target:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_target(str(path))


def why(folder: Path, text: str) -> str:
    with pytest.raises(TargetError) as caught:
        load(folder, text)
    assert caught.value.code == "QG402"
    return caught.value.why


def test_nothing_but_a_name_of_its_own_gives_the_same_table(tmp_path: Path) -> None:
    table = load(tmp_path, HEAD)
    assert (table.name, table.description) == ("mine", "ONNX Runtime in another build")
    same = table.model_copy(update={"name": BASE.name, "description": BASE.description, "extends": ""})
    assert same == BASE


def test_a_row_left_out_is_gone_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    table = load(tmp_path, HEAD + 'without = ["matmul.qlinear"]\n')
    assert table.row == tuple(r for r in BASE.row if r.id != "matmul.qlinear")


def test_a_row_with_an_id_of_the_base_gives_the_keys_that_change(tmp_path: Path) -> None:
    table = load(tmp_path, HEAD + '[[row]]\nid = "conv.qlinear"\nkernel = "MyConv"\ndeviation = 1\n')
    (before,), (after,) = ([r for r in t.row if r.id == "conv.qlinear"] for t in (BASE, table))
    assert after == before.model_copy(update={"kernel": "MyConv", "deviation": 1})
    assert [r.id for r in table.row] == IDS


def test_a_row_of_its_own_stands_in_front(tmp_path: Path) -> None:
    table = load(tmp_path, HEAD + OWN_ROW)
    assert [r.id for r in table.rows("silu")] == ["silu.own", "silu.float"]


def test_settings_are_taken_over_unless_they_are_given(tmp_path: Path) -> None:
    free = HEAD.replace('"ort-cpu"', '"ort-cpu-vnni"')
    assert load(tmp_path, free).requires == "vnni"
    assert load(tmp_path, free + 'requires = ""\nopset = 24\n').requires == ""
    assert load(tmp_path, free + "opset = 24\n").opset == 24


def test_a_file_beside_it_can_be_extended_and_a_package_text_reads_alike(tmp_path: Path) -> None:
    load(tmp_path, HEAD + 'without = ["silu.float"]\n', "base.toml")
    table = load(tmp_path, HEAD.replace('"ort-cpu"', '"base.toml"') + 'without = ["gelu.float"]\n')
    assert [r.id for r in table.row] == [i for i in IDS if i not in ("silu.float", "gelu.float")]


def test_a_target_in_python_extends_in_the_same_words() -> None:
    table = Target.model_validate(
        {"name": "mine", "description": "-", "extends": "ort-cpu", "without": ["silu.float"], "row": []}
    )
    assert table.row == tuple(r for r in BASE.row if r.id != "silu.float")


def test_a_table_that_extends_none_reads_as_it_is_written_out() -> None:
    assert Target.model_validate(BASE.model_dump(mode="json")) == BASE


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(IDS), max_size=len(IDS) - 1))
def test_what_is_written_out_reads_as_the_same_table(without: set[str]) -> None:
    table = Target.model_validate(
        {"name": "mine", "description": "-", "extends": "ort-cpu", "without": sorted(without)}
    )
    assert [r.id for r in table.row] == [i for i in IDS if i not in without]
    assert Target.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('without = ["conv.qlinaer"]\n', "has no such row, did you mean 'conv.qlinear'?"),
        ('[[row]]\nid = "conv.qlinaer"\nkernel = "K"\n', "without an op changes nothing"),
        ('[[row]]\nid = "conv.qlinaer"\nkernel = "K"\n', "did you mean 'conv.qlinear'?"),
        ('[[row]]\nkernel = "K"\n', "without an op changes nothing"),
        (OWN_ROW + OWN_ROW, "the row 'silu.own' stands twice"),
        ('without = ["silu.float"]\n[[row]]\nid = "silu.float"\nkernel = "K"\n', "is changed and left out"),
        ('requires = "vnmi"\n', "requires"),
        ('without = "silu.float"\n', "without"),
        ('row = "none"\n', "row"),
        ('[[row]]\nid = "conv.qlinear"\nkernal = "K"\n', "did you mean 'kernel'?"),
        ('[[row]]\nid = "conv.qlinear"\nweight = ["s8 symmetric per-channel(1)"]\n', "cannot leave the sum over them"),
        ("without = " + str(IDS) + "\n", "row"),
    ],
)
def test_a_change_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in why(tmp_path, HEAD + text)


def test_a_base_that_is_not_there_is_the_error_of_that_name(tmp_path: Path) -> None:
    for base, code in (("ort-cpp", "QG401"), ("nowhere.toml", "QG401")):
        with pytest.raises(TargetError) as caught:
            load(tmp_path, HEAD.replace('"ort-cpu"', f'"{base}"'))
        assert caught.value.code == code
        assert base in caught.value.what


def test_files_that_extend_one_another_are_refused(tmp_path: Path) -> None:
    load(tmp_path, HEAD, "a.toml")
    (tmp_path / "a.toml").write_text(HEAD.replace('"ort-cpu"', '"b.toml"'), encoding="utf-8")
    (tmp_path / "b.toml").write_text(HEAD.replace('"ort-cpu"', '"a.toml"'), encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(str(tmp_path / "a.toml"))
    assert "extends itself" in caught.value.why
