"""The watch list by text and by id, and which tokens are probed besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard import ConfigError, VocabGuard
from vocabguard.config import ProbeConfig
from vocabguard.guard.probe import probed_ids, watched_ids
from vocabguard.vocabulary.table import build_table

CONTEXTS = {"list": {"k": 4}}


@pytest.fixture(scope="session")
def table(tokenizer: Any) -> Any:
    return build_table(tokenizer, 8192)


def base_model(kit: Any) -> Any:
    """The example's base model, which can repeat its tokens."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()


def test_watched_tokens_are_reported_and_alert_when_lost(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    word, number = " you", 3884
    token = tokenizer.encode(word, add_special_tokens=False)
    assert len(token) == 1
    guard = VocabGuard(
        tokenizer=tokenizer,
        probe={"sample": 32, "watch": [word, number, token[0]], "contexts": CONTEXTS},
        drift={"every_n_steps": 1},
        **kit.QUIET,
    )
    guard.attach(model, total_steps=1, run_dir=tmp_path)
    base = guard.last
    assert [report.id for report in base.watched] == [token[0], number], "each once, in the order given"
    assert base.watched[0].text.strip() == word.strip()
    assert base.scalars["vocabguard/probe/watch"] == 1.0
    assert base.scalars["vocabguard/probe/retained"] == 1.0
    assert "watched_forgotten" not in base.firing
    with torch.no_grad():
        model.lm_head.weight[token[0]] = 0
    guard.step(1)
    log = guard.finish()
    lost, kept = guard.last.watched
    assert guard.last.scalars["vocabguard/probe/watch"] == 0.5
    assert "watched_forgotten" in guard.last.firing
    assert lost.probability < 0.01
    assert kept.probability > 0.5
    assert lost.said_instead is not None
    assert lost.said_instead.strip() != word.strip()
    assert [line["id"] for line in log.checks()[-1]["watched"]] == [token[0], number]
    assert log.scalar("probe/watch") == ([0, 1], [1.0, 0.5])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("two words", "'two words' is not one token"),
        (8192, "8192 is out of range; allowed: 0 to 8191"),
        (-1, "-1 is out of range"),
        ("", "is not one token"),
        (1.5, "1.5; allowed: token ids"),
        (True, "True; allowed: token ids"),
        (["a"], r"\['a'\]; allowed: token ids"),
    ],
)
def test_a_bad_entry_is_refused(tokenizer: Any, entry: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^probe.watch.*{said}"):
        watched_ids(tokenizer, [700, entry], 8192)


def test_the_sample_is_of_live_tokens_and_holds_every_class(table: Any) -> None:
    classes = torch.zeros(8192, dtype=torch.uint8)
    classes[table.live.nonzero().flatten()[::50]] = 2
    watched = torch.tensor([8170])
    ids = probed_ids(ProbeConfig(sample=256), table, classes, watched, seed=0)
    assert len(ids) == 257
    assert torch.equal(ids, ids.unique())
    assert table.live[ids[ids != 8170]].all()
    assert (classes[ids] == 2).sum() > 20
    groups = set(table.group[table.live].tolist())
    assert set(table.group[ids[ids != 8170]].tolist()) == groups
    assert torch.equal(ids, probed_ids(ProbeConfig(sample=256), table, classes, watched, seed=0))
    assert not torch.equal(ids, probed_ids(ProbeConfig(sample=256), table, classes, watched, seed=1))


def test_the_whole_vocabulary(table: Any) -> None:
    none = torch.empty(0, dtype=torch.int64)
    ids = probed_ids(ProbeConfig(whole_vocabulary=True), table, None, none, seed=0)
    assert torch.equal(ids, table.live.nonzero().flatten())


def test_a_context_that_does_not_fit_the_model_stands_down_or_raises(kit: Any, tokenizer: Any) -> None:
    guard = VocabGuard(tokenizer=tokenizer, probe={"contexts": {"long": {"k": 60}}, "sample": 64}, **kit.QUIET)
    with pytest.raises(ValueError, match=r"probe.contexts.*takes at most 64"):
        guard.attach(kit.llama(kit.TOKENIZER_ROWS))


def test_preflight_tells_the_probe_which_classes_to_draw(kit: Any, tokenizer: Any) -> None:
    rows = [{"labels": torch.full((8,), token)} for token in range(1000, 1030)]
    guard = VocabGuard(tokenizer=tokenizer, probe={"sample": 128, "contexts": CONTEXTS}, **kit.QUIET)
    guard.attach(kit.llama(kit.TOKENIZER_ROWS), dataloader=torch.utils.data.DataLoader(rows))
    blind = VocabGuard(tokenizer=tokenizer, probe={"sample": 128, "contexts": CONTEXTS}, **kit.QUIET)
    blind.attach(kit.llama(kit.TOKENIZER_ROWS))
    asked = torch.arange(1000, 1030)
    found, without = (int(torch.isin(one.last.probe.ids, asked).sum()) for one in (guard, blind))
    assert found > without


def test_processes_with_data_of_their_own_probe_the_same_tokens(together: Any, tmp_path: Path) -> None:
    together("probing.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("ddp", "fsdp"):
        one, other = (rank[kind] for rank in ranks)
        assert not torch.equal(one["own"], other["own"]), "each by itself would ask for other tokens"
        assert torch.equal(one["ids"], one["own"])
        assert torch.equal(other["ids"], one["own"])
        assert 42 in one["ids"]
        torch.testing.assert_close(one["probability"], other["probability"], rtol=1e-5, atol=1e-9)
        assert one["scalars"] == other["scalars"]
