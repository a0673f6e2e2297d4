"""Every trainer under the guard: nothing changes, numbers equal plain loops, clear words where something is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import MissingError
from model_contract import YES
from support import ROOT, mark, published
from trainer_cases import BATCH, DOCS, PRECISIONS, TRAINERS, Job, TrainerCase, kit, row_docs, scaled
from trainer_contract import CHECKS, QUIET, Trial, drift, expected_columns, exposure, outcomes, push_pull, untouched

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
    published_marks = published((ROOT / "integrations" / "README.md").read_text(encoding="utf-8"))["Trainers"][
        case.name
    ]
    assert published_marks == {name: mark(outcome) for name, outcome in found.items()}


@pytest.mark.parametrize("case", PRECISIONS, ids=lambda case: case.name)
def test_mixed_precision(case: TrainerCase, tmp_path: Path) -> None:
    """Gradients are those that the optimizer uses: averaged, unscaled, clipped."""
    trial = Trial(case, tmp_path)
    untouched(trial)
    assert {check(trial) for check in (drift, exposure, push_pull)} == {YES}


def test_steps_that_a_scaler_leaves_out(tmp_path: Path) -> None:
    """Their targets count, and no gradient of theirs is read."""
    found = scaled(Job(tmp_path, QUIET | {"exposure": {"push_every_n_steps": 1}}), scale=2.0**20)
    skipped = DOCS // BATCH - len(found.optimizer.gradients)
    assert 0 < skipped < DOCS // BATCH
    exposure = found.guard.last.exposure
    kit.assert_counts(exposure, kit.naive_counts([{"input_ids": i, "labels": n} for i, n in row_docs()], BATCH))
    norms = torch.stack([gradient.norm(dim=1) for gradient in found.optimizer.gradients]).sum(dim=0)
    torch.testing.assert_close(exposure.pull + exposure.push, norms)
