from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from vocabguard.cli.common import Column, Grid


def shown(grid: Grid, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(grid)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def grid() -> Grid:
    columns = [
        Column("id"),
        Column("token", words=True),
        Column("why", words=True, spare=1),
        Column("L2", spare=3),
        Column("cosine"),
    ]
    grid = Grid(columns)
    grid.add("12345", "[bold]トークン", "code and markup", "0.1234", "0.9876", end=True)
    grid.add("1", Text("a"), "latin", "10.0000", "1.0000", style="bold")
    return grid


def test_all_columns_where_there_is_room(grid: Grid) -> None:
    lines = shown(grid, 80)
    assert lines[1].split() == ["id", "token", "why", "L2", "cosine"]
    assert lines[3].split() == ["12345", "[bold]トークン", "code", "and", "markup", "0.1234", "0.9876"]
    assert len(lines) == 7, "a line between the rows, and none that wraps"


@pytest.mark.parametrize("width", range(32, 60))
def test_no_word_is_broken(grid: Grid, width: int) -> None:
    lines = shown(grid, width)
    words = " ".join(lines).split()
    assert {"12345", "[bold]トークン", "0.9876", "1.0000"} <= set(words)
    assert ("L2" in words) == ("10.0000" in words)
    if "why" in words:
        assert {"code", "and", "markup", "latin"} <= set(words)
        assert width >= 39
    assert ("L2" in words) <= ("why" in words), "the most spare one goes first"
