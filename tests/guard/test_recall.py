"""Estimated recall in a run: which tokens it names, where it is kept, how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard import RunLog, VocabGuard
from vocabguard.measure.recall import LogitMoments
from vocabguard.report.data import run_data

ASKS = {
    "probe": {"every_n_steps": 1, "sample": 256, "asks": 2},
    "reference": {"max_tokens": 1000},
    "drift": {"every_n_steps": 1},
    "preflight": {"enabled": False},
}


def base_model(kit: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()


def attached(kit: Any, tokenizer: Any, model: Any, **rest: Any) -> Any:
    guard = VocabGuard(tokenizer=tokenizer, **ASKS, **kit.QUIET)
    guard.attach(model, total_steps=4, **rest)
    return guard


@torch.no_grad()
def pushed(model: Any, size: float = 15) -> torch.Tensor:
    """(V,) bool: a third of the rows, which are pushed away from what hidden states share where lists are repeated."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    lists = torch.randint(500, 8000, (8, 12), generator=torch.Generator().manual_seed(5))
    model(input_ids=torch.cat([lists, lists, lists], 1))
    hook.remove()
    shared = seen[0][:, 12:].flatten(0, 1).mean(0)
    rows = model.get_output_embeddings().weight
    chosen = torch.arange(len(rows)) % 3 == 0
    rows[chosen] -= size * shared / shared.square().sum()
    return chosen


def test_tokens_that_no_probe_asked_for_are_named_if_they_are_pushed(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    guard = attached(kit, tokenizer, model, run_dir=str(tmp_path))
    before = guard.last
    chosen = pushed(model)
    found = guard.step(1)
    assert found is not None
    assert found.recall is not None
    # At the base nothing differs that could be named, and then rows are ranked by cosine.
    assert before.recall is None or not before.recall.ranks
    assert found.recall.ranks
    unasked = guard.table.live.clone()
    unasked[found.probe.ids] = False
    nats = found.recall.nats
    hit, kept = nats[unasked & chosen], nats[unasked & ~chosen]
    assert float((hit[:, None] < kept).double().mean()) > 0.9
    assert all(bool(chosen[one.id]) for one in found.worst)
    assert [one.recall for one in found.worst] == pytest.approx(nats[[one.id for one in found.worst]].tolist())
    scalars = found.scalars
    assert scalars["vocabguard/recall/agreement"] == pytest.approx(found.recall.agreement)
    assert scalars["vocabguard/recall/nats"] == pytest.approx(float(nats[guard.table.live].double().mean()))
    assert scalars["vocabguard/recall/never/nats"] == pytest.approx(scalars["vocabguard/recall/nats"])
    guard.finish(check=False)
    log = RunLog.open(tmp_path)
    assert torch.equal(log.rows()["recall/nats"], nats)
    assert log.checks()[-1]["worst"][0]["recall"] == pytest.approx(found.worst[0].recall)
    page = run_data(log)
    lost = set(found.probe.ids.tolist())
    listed = [line.report for line in page.tokens if line.report.id not in lost]
    assert listed
    assert all(bool(chosen[one.id]) for one in listed)


def test_a_check_without_a_probe_ranks_by_the_latest_one(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    guard = VocabGuard(tokenizer=tokenizer, **{**ASKS, "probe": {**ASKS["probe"], "every_n_steps": 2}}, **kit.QUIET)
    guard.attach(model, total_steps=8)
    pushed(model)
    seen = [guard.step(step) for step in (1, 2, 3)]
    assert [one.probe is not None for one in seen] == [False, True, False]
    assert seen[2].recall is seen[1].recall
    assert [one.id for one in seen[2].worst] == [one.id for one in seen[1].worst]
    assert "vocabguard/recall/nats" not in seen[2].scalars
    assert guard.latest["vocabguard/recall/nats"] == seen[1].scalars["vocabguard/recall/nats"]


def test_a_resumed_run_estimates_alike(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    whole = attached(kit, tokenizer, model)
    state = whole.state_dict()
    pushed(model)
    expected = whole.step(1)
    later = base_model(kit)
    later.load_state_dict(model.state_dict())
    resumed = VocabGuard(tokenizer=tokenizer, **ASKS, **kit.QUIET)
    resumed.attach(later, total_steps=4, resumed=state)
    found = resumed.step(1)
    assert torch.equal(found.recall.nats, expected.recall.nats)
    # A state of a version that estimated nothing begins at the next probe.
    resumed = VocabGuard(tokenizer=tokenizer, **ASKS, **kit.QUIET)
    resumed.attach(later, total_steps=4, resumed={key: value for key, value in state.items() if key != "recall"})
    assert resumed.step(1).recall.nats.shape == expected.recall.nats.shape


def test_without_a_text_the_asks_alone_are_used(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    guard = VocabGuard(tokenizer=tokenizer, **{**ASKS, "reference": {"enabled": False}}, **kit.QUIET)
    guard.attach(model, total_steps=4)
    chosen = pushed(model, 10)
    found = guard.step(1)
    nats, live = found.recall.nats, guard.table.live
    assert float((nats[live & chosen][:, None] < nats[live & ~chosen]).double().mean()) > 0.8


def test_a_model_of_nans_estimates_nothing(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    guard = attached(kit, tokenizer, model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    found = guard.step(1)
    assert found.recall is None
    assert json.dumps([one.recall for one in found.worst]) in ("[]", json.dumps([None] * len(found.worst)))


def test_moments_take_little_of_a_probe(kit: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of asks and text is added once, and nothing else is asked of the model."""
    places, calls = 0, 0
    add = LogitMoments.add

    def counted(self: LogitMoments, logits: torch.Tensor, wanted: torch.Tensor) -> None:
        nonlocal places
        places += len(logits)
        add(self, logits, wanted)

    model = base_model(kit)
    guard = attached(kit, tokenizer, model)
    monkeypatch.setattr(LogitMoments, "add", counted)

    def heard(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_hook(heard)
    found = guard.step(1)
    with_moments, calls = calls, 0
    monkeypatch.setattr(LogitMoments, "add", lambda *_: None)
    monkeypatch.setattr("vocabguard.guard.recall.moment_features", lambda kinds: torch.zeros(8192, 2 * len(kinds)))
    guard.step(2)
    hook.remove()
    assert calls == with_moments
    asked = sum(-(-len(found.probe.ids) // 16) * 16 for _ in found.probe.contexts)
    assert places == asked + int(found.scalars["vocabguard/reference/targets"])
