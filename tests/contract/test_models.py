"""Every architecture under the guard: right matrices, right shift, numbers equal to plain loops, clear words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_cases import ADAPTERS
from model_cases import MODELS, ROWS, Case, MissingError, frozen
from model_contract import COLUMNS, OPTIONS, YES, expected_columns, loss_of, outcomes, text_batches
from model_protection import all_outcomes, expected_protection
from support import IN_TWO_PROCESSES, ROOT, mark, published
from torch.nn.functional import cosine_similarity
from trainer_cases import TRAINERS

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


PUBLISHED = published((ROOT / "integrations" / "README.md").read_text(encoding="utf-8"))
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


QUICK = ("llama", "gpt2", "t5", "bert", "llava", "llama-classes", "lora-attention", "lora-head", "saved")
EVERY = [
    pytest.param(case, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.slow])
    for case in (*MODELS, *ADAPTERS)
]


@pytest.mark.parametrize("case", EVERY)
def test_what_protects_it_and_the_published_table(case: Case, tokenizer: Any) -> None:
    """Echo, hold and resume too; and the README's table says what came out."""
    try:
        found = all_outcomes(case, tokenizer)
    except MissingError as error:
        pytest.skip(str(error))
    assert {name for name, outcome in found.items() if outcome == YES} == expected_columns(case) | (
        expected_protection(case)
    )
    said = PUBLISHED["Adapters (PEFT)" if case in ADAPTERS else "Models"][case.family]
    for name, outcome in found.items():
        # Of several cases with one name the one that says least is published.
        assert said[name] == mark(outcome) or (said[name] == "no" and not _single(case)), name


def _single(case: Case) -> bool:
    return [other.family for other in (*MODELS, *ADAPTERS)].count(case.family) == 1


def test_every_row_is_published() -> None:
    names = {"Models": MODELS, "Adapters (PEFT)": ADAPTERS}
    for section, cases in names.items():
        assert set(PUBLISHED[section]) == {case.family for case in cases}
    assert list(PUBLISHED["Trainers"]) == [case.name for case in TRAINERS]
    assert list(PUBLISHED["Two processes"]) == list(IN_TWO_PROCESSES)
    assert not [cells for rows in PUBLISHED.values() for cells in rows.values() if "fails" in cells.values()]
