"""A matrix resized in mid-run: rows in common are measured on, new ones raise no alarm, nothing disables itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import DataCollatorForSeq2Seq

from vocabguard import VocabGuard

RULE = {"metric": "head/cosine_min", "op": "<", "threshold": 0.0}


def resize(model: Any, rows: int) -> None:
    model.resize_token_embeddings(rows, mean_resizing=False)


@pytest.mark.parametrize("rows", [70, 60])
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_goes_on_after_a_resize(kit: Any, tmp_path: Path, rows: int, tied: bool) -> None:
    model, data = kit.llama(tied=tied), kit.batches(4)
    optimizer, base = kit.sgd(model, lr=0.05), kit.copy_of(model)["lm_head.weight"]
    options = kit.QUIET | {"log": {"console": False, "top_k": 100, "rows_every_n_checks": 1}}
    guard = VocabGuard(drift={"every_n_steps": 1}, exposure={"push_every_n_steps": 1}, alerts={"low": RULE}, **options)
    guard.attach(model, optimizer, total_steps=4, run_dir=tmp_path)
    kit.loop(guard, model, optimizer, data[:2])
    resize(model, rows)
    model.lm_head.weight.data[64:] *= -1
    # A new token is asked for; a loop after a resize makes a new optimizer.
    data[2]["input_ids"][0, 5] = data[2]["labels"][0, 5] = min(rows - 1, 66)
    model.train()(**data[2]).loss.backward()
    optimizer = kit.sgd(model, lr=0.05)
    guard._observer.hook_optimizers([optimizer])
    optimizer.step()
    asked = guard._observer.counter.targets_now()
    assert asked[min(rows - 1, 66)]
    guard.step(3)
    kit.loop(guard, model, kit.sgd(model, lr=0.05), data[3:], first=4)
    log = guard.finish()

    assert guard.failure is None
    found = guard.last
    kept = min(rows, 64)
    now = model.lm_head.weight.detach()
    cosine = cosine_similarity(base[:kept].double(), now[:kept].double(), dim=1)
    torch.testing.assert_close(found.head.cosine[:kept].double(), cosine, atol=1e-6, rtol=0)
    assert found.head.cosine[kept:].isnan().all()
    assert found.head.bad.nonzero().flatten().tolist() == list(range(64, rows))
    expected = kit.naive_counts(data, 70)
    assert found.exposure.data_target.tolist() == expected["data_target"][:rows]
    assert found.exposure.last_target.tolist() == expected["last_target"][:rows]
    assert found.exposure.pull[min(rows - 1, 66)] > 0
    assert found.scalars["vocabguard/head/nonfinite_rows"] == 0, "a row without a baseline is not a broken one"
    assert not {"low", "broken_rows"} & set(found.firing)
    assert len(found.worst) == kept
    assert log.row_steps == (0, 1, 2, 3, 4)
    assert [len(log.rows(step)["live"]) for step in (2, 3)] == [64, rows]
    assert guard.table.live.sum() == kept


def test_a_resumed_run_after_a_resize(kit: Any) -> None:
    model = kit.llama()
    base = kit.copy_of(model)["lm_head.weight"]
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model)
    resize(model, 80)
    guard.step(1)
    guard.check()
    state = guard.state_dict()
    other = VocabGuard(**kit.QUIET)
    model.lm_head.weight.data.add_(0.05)
    other.attach(model, resumed=state)
    found = other.check()
    cosine = cosine_similarity(base, model.lm_head.weight.detach()[:64], dim=1)
    torch.testing.assert_close(found.head.cosine[:64], cosine, atol=1e-6, rtol=0)
    assert other.table.live.sum() == 64


def test_new_tokens_of_the_tokenizer_are_named(kit: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    model = kit.llama(kit.TOKENIZER_ROWS)
    guard = VocabGuard(tokenizer=tokenizer, probe={"sample": 8}, drift={"every_n_steps": 1}, **kit.QUIET)
    watch = guard.attach(model, total_steps=2, run_dir=tmp_path)
    added = [f"glimmerfax{number}" for number in range(40)]
    tokenizer.add_tokens(added)
    resize(model, len(tokenizer))
    assert len(tokenizer) == 8200
    guard.step(1)
    table = guard.table
    assert table.text(8190) == added[30]
    assert not table.live[8192:].any()
    assert table.live[:8160].sum() == watch.live
    guard.step(2)
    guard.finish()
    assert guard.failure is None
    assert guard.last.probe is not None


def test_a_tied_pair_that_comes_apart(kit: Any) -> None:
    """As adapters do with it: the copy has the same baseline."""
    model = kit.llama(tied=True)
    base = kit.copy_of(model)["lm_head.weight"]
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model)
    model.lm_head.weight = torch.nn.Parameter(base + 0.05)
    guard.step(1)
    found = guard.check()
    torch.testing.assert_close(found.embedding.cosine, torch.ones(kit.ROWS))
    torch.testing.assert_close(found.head.cosine, cosine_similarity(base, base + 0.05), atol=1e-6, rtol=0)


@pytest.mark.parametrize("inject", ["collate", "batch"])
def test_echo_asks_for_no_row_that_was_cut_off(kit: Any, tokenizer: Any, inject: Any) -> None:
    """Echo rows of ids that are gone, until a check has seen the cut: an embedding would end the run."""
    rows: Any = [{"input_ids": list(range(100, 130)), "labels": list(range(100, 130))}] * 24
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = kit.sgd(model)
    guard = VocabGuard(
        tokenizer=tokenizer, probe={"enabled": False}, echo={"enabled": True, "dose": 2.0, "dose_limit": 4.0},
        drift={"every_n_steps": 100}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, optimizer, total_steps=12, dataloader=loader, inject=inject)
    widths = []
    for step, batch in enumerate(loader, start=1):
        if step == 4:
            model.resize_token_embeddings(300, mean_resizing=False)
        guard.observe_batch(batch)
        widths.append(len(batch["input_ids"]))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(step)
    assert max(widths) > 2, "echo rows came"
    assert len(model.get_input_embeddings().weight) == 300
