"""Tables of the documents are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_tables_of_the_real_models_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS.parent / "examples"))
    monkeypatch.syspath_prepend(str(TESTS / "benchmarks"))
    from real.summary import README, written

    assert README == TESTS / "README.md"
    assert written() == README.read_text(encoding="utf-8")
