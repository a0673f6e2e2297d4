"""Every architecture under the guard: right matrices, right shift, numbers equal to plain loops, clear words."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_cases import ADAPTERS
from model_cases import MODELS, Case, MissingError
from model_contract import COLUMNS, YES, expected_columns, outcomes

# Of the libraries, about names that they are about to drop and bases that adapters untie.
TOLD = ("FutureWarning", "DeprecationWarning", "UserWarning")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in TOLD]


@pytest.mark.parametrize("case", [*MODELS, *ADAPTERS], ids=lambda case: case.name)
def test_contract(case: Case, tokenizer: Any) -> None:
    try:
        found = outcomes(case, tokenizer)
    except MissingError as error:
        pytest.skip(str(error))
    assert set(found) == set(COLUMNS)
    assert {name for name, outcome in found.items() if outcome == YES} == expected_columns(case)
    assert all(outcome == YES or outcome.startswith("not applicable: ") for outcome in found.values())


def test_enough_is_tried() -> None:
    assert len({case.family for case in MODELS}) >= 24
    assert len({case.name for case in MODELS}) == len(MODELS)
