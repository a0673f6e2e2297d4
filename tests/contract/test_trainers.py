"""Every trainer under the guard: nothing changes, numbers equal plain loops, clear words where something is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_cases import MissingError
from model_contract import YES
from trainer_cases import TRAINERS, TrainerCase
from trainer_contract import CHECKS, expected_columns, outcomes

# Of the libraries, about each other and about what they are about to drop.
TOLD = ("FutureWarning", "DeprecationWarning", "UserWarning")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in TOLD]


@pytest.mark.parametrize("case", TRAINERS, ids=lambda case: case.name.strip("-` "))
def test_contract(case: TrainerCase, tmp_path: Path) -> None:
    try:
        found = outcomes(case, tmp_path)
    except MissingError as error:
        pytest.skip(str(error))
    assert set(found) == set(CHECKS)
    assert {name for name, outcome in found.items() if outcome == YES} == expected_columns(case)
