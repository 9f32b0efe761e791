"""Tables on a narrow terminal: long names fold, and nothing of a row is cut."""

from __future__ import annotations

import pytest

from qatgraph.cli.common import NAME, WORD, least_widths, print_table

COLUMNS = ("product", "kernel", "K", "could", "pairs", "outputs", "worst")
ROW = ("net._blocks.12._depthwise_conv.second.0:conv2d", "QLinearConv", "144", "100.0%", "10.0%", "14.2%", "115:37%")


@pytest.mark.parametrize("width", [64, 80, 200])
def test_nothing_of_a_row_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("title", COLUMNS, [ROW])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert [cell for cell in (*COLUMNS, *ROW[1:]) if cell not in printed] == []
    name = "".join(line.split()[0] for line in printed.splitlines()[2:] if line[:1] != " ")
    assert name == ROW[0]


def test_a_sentence_folds_at_its_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("title", ("name", "what it does"), [("fold-batch-norm", "Fold the batch norm behind a convolution")])
    assert "convolution" in capsys.readouterr().out


def test_the_name_gives_way_to_the_rest() -> None:
    assert least_widths(COLUMNS, [ROW], 200)[0] == NAME
    assert least_widths(COLUMNS, [ROW], 80)[0] < NAME
    assert least_widths(("name", "path"), [("a", "x" * 99)], 80) == [4, WORD]
