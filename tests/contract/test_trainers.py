"""Every trainer under the guard: nothing changes, numbers equal plain loops, clear words where something is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_cases import MissingError
from model_contract import YES
from trainer_cases import TRAINERS, TrainerCase
from trainer_contract import CHECKS, expected_columns, outcomes

# Of the libraries, about each other and about what they are about to drop.
TOLD = ("FutureWarning", "DeprecationWarning", "UserWarning")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in TOLD]


SLOW = ("packing", "padding-free", "assistant-only loss")


def cases() -> list[Any]:
    """All trainers; variants of one that is run anyway are slow tests."""
    named = [(case, case.name.strip("-` ")) for case in TRAINERS]
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for case, name in named]


@pytest.mark.parametrize("case", cases())
def test_contract(case: TrainerCase, tmp_path: Path) -> None:
    try:
        found = outcomes(case, tmp_path)
    except MissingError as error:
        pytest.skip(str(error))
    assert set(found) == set(CHECKS)
    assert {name for name, outcome in found.items() if outcome == YES} == expected_columns(case)
