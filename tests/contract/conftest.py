"""The contract's cases are shared with the script that writes the support table: both import them as neighbours."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))
collect_ignore = [path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")]


@pytest.fixture(scope="session", autouse=True)
def tables(shared_tables: None) -> None:
    """The table of the vocabulary is the same for all cases."""
