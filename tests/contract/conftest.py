"""The contract's cases are shared with the script that writes the support table: both import them as neighbours."""

import sys
from functools import cache
from pathlib import Path

import pytest

from vocabguard.guard import watched as setup

BUILD_TABLE = cache(setup.build_table)
HERE = Path(__file__).parent
sys.path.append(str(HERE))
collect_ignore = [path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")]


@pytest.fixture(autouse=True)
def one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the vocabulary is the same for all cases, so it is built once."""
    monkeypatch.setattr(setup, "build_table", BUILD_TABLE)
