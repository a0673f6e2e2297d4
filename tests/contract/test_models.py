"""Every architecture under the guard: right matrices, right shift, numbers equal to plain loops, clear words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_cases import ADAPTERS
from model_cases import MODELS, ROWS, Case, MissingError, frozen
from model_contract import COLUMNS, OPTIONS, YES, expected_columns, loss_of, outcomes, text_batches
from torch.nn.functional import cosine_similarity

from vocabguard import VocabGuard

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


RESIZED = ("llama", "gpt2", "gemma3", "t5", "bart", "llava", "falcon", "mixtral")


@pytest.mark.parametrize("rows", [ROWS + 64, ROWS - 64])
@pytest.mark.parametrize("case", [case for case in MODELS if case.name in RESIZED], ids=lambda case: case.name)
def test_resized_in_mid_run(case: Case, rows: int) -> None:
    """Rows in common are measured against their start, new ones raise no alarm, counts go on."""
    model = frozen(case.build()).train()
    base = {name: case.rows_of(model, name) for name in ("head", "embedding")}
    guard = VocabGuard(**OPTIONS)
    guard.attach(model, hook_model=True)
    expected = torch.zeros(rows, dtype=torch.int64)
    for step, batch in enumerate(map(case.batch, text_batches(4)), start=1):
        if step == 3:
            model.resize_token_embeddings(rows, mean_resizing=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        labels = batch["labels"][:, 1:] if case.shift else batch["labels"]
        expected += torch.bincount(labels[labels != -100], minlength=rows)
        guard.step(step)
    guard.finish()
    kept = min(rows, ROWS)
    assert guard.last is not None
    assert torch.equal(guard.last.exposure.data_target, expected)
    for name, before in base.items():
        found, now = getattr(guard.last, name), case.rows_of(model, name)
        assert now is not None
        assert len(found.cosine) == len(now) == rows
        cosine = cosine_similarity(before[:kept].double(), now[:kept].double(), dim=1)
        usable = before[:kept].norm(dim=1) > 0
        torch.testing.assert_close(found.cosine[:kept][usable].double(), cosine[usable], atol=2e-6, rtol=0)
        assert found.cosine[kept:].isnan().all()
    assert guard.latest["vocabguard/head/nonfinite_rows"] == 0


def test_enough_is_tried() -> None:
    assert len({case.family for case in MODELS}) >= 24
    assert len({case.name for case in MODELS}) == len(MODELS)
