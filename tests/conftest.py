"""What all tests share: one thread, and golden texts (``--golden-write`` writes them anew)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="write the golden texts anew; review the diff")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def compare_golden(path: Path, text: str, *, write: bool) -> None:
    if write:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"there is no {path.name}: run `make golden` and review it"
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs: if that is meant, run `make golden`"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden(name, text)`` compares a text with ``tests/golden/NAME.txt``, or writes it there."""
    write = bool(request.config.getoption("--golden-write"))
    return lambda name, text: compare_golden(GOLDEN / f"{name}.txt", text, write=write)
