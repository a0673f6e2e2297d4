"""The arithmetic on many hosts, against numbers by hand, and the table that stands in the README."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def many_hosts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("many_hosts")


@pytest.fixture
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "many_hosts.json").read_text(encoding="utf-8"))
    return found


def test_lines_follow_from_the_counts_and_the_constants(many_hosts: ModuleType, report: dict[str, Any]) -> None:
    assert report["constants"] == many_hosts.CONSTANTS
    assert report["before"] == json.loads(json.dumps(many_hosts.BEFORE))
    assert report["lines"] == many_hosts.model(report["traced"])
    # A flag and a mask of V bytes around a ring of 64, two waits, the mask down and up again.
    before = 2 * 126 * 50e-6 + 2 * (4 * 64 + 131_072) / 1.25e9 + 2 * 50e-6 + 2 * 131_072 / 8e9
    assert report["lines"][0]["before_ms"] == pytest.approx(before * 1e3)
    # A mask of V bytes over a tree of 512, and fourteen passes over the matrix.
    hold = 20e-6 + 18 * 5e-6 + 2 * 131_072 / 25e9 + 14 * 131_072 * 4096 * 2 / 3e12
    assert report["lines"][3]["now_ms"] == pytest.approx(hold * 1e3)


def test_what_was_traced_has_no_wait(report: dict[str, Any]) -> None:
    traced = report["traced"]
    assert traced["watching"]["step"] == []
    assert traced["hold"]["step"] == [["training's", 131, "torch.uint8"]]
    assert [traced[kind][what] for kind in ("watching", "hold") for what in ("waits", "bytes")] == [0, 0, 0, 0]


def test_a_check_sends_one_value_a_row_in_few_messages(report: dict[str, Any]) -> None:
    assert [line["check_values"] for line in report["lines"]] == [1.0] * 4
    assert [line["check_messages"] for line in report["lines"]] == [5, 5, 7, 7]
    # Four rings of 512 with what they carry, and the logged keys over a tree.
    masks, counts, flags = 101 * 131_072 / 8, 4 * 131_072, 2 * 8 * (512 + 3)
    ring = 4 * 2 * 511 * 50e-6 + 2 * (masks + counts + flags) / 1.25e9
    assert report["lines"][1]["check_ms"] == pytest.approx((ring + 9 * (50e-6 + 8192 / 1.25e9)) * 1e3)


def test_the_readme_has_the_table(many_hosts: ModuleType, report: dict[str, Any]) -> None:
    assert many_hosts.table(report) in (HERE.parent / "README.md").read_text(encoding="utf-8")
