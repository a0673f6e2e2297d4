"""The watch list by text and by id, and which tokens are probed besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard import ConfigError, VocabGuard
from vocabguard.config import ProbeConfig
from vocabguard.guard.probe import FREQUENT, Population, Prober, build_prober
from vocabguard.guard.words import watched_ids, watched_words
from vocabguard.results import NotApplicable, Preflight
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
        (8192, "8192 is out of range; allowed: 0 to 8191"),
        (-1, "-1 is out of range"),
        ("", "''; allowed: token ids"),
        (1.5, "1.5; allowed: token ids"),
        (True, "True; allowed: token ids"),
        (["a"], r"\['a'\]; allowed: token ids"),
    ],
)
def test_a_bad_entry_is_refused(tokenizer: Any, entry: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^probe.watch.*{said}"):
        watched_ids(tokenizer, [700, entry], 8192)


def flight_of(counts: torch.Tensor, *, batches: int = 10, tokens: int = 1000) -> Preflight:
    return Preflight(counts, batches, 10, False, 0.1, tokens)


def test_the_sample_is_of_live_tokens_and_holds_every_class(table: Any) -> None:
    counts = torch.zeros(8192, dtype=torch.int64)
    counts[table.live.nonzero().flatten()[::50]] = 4
    population = Population.of(table, flight_of(counts), whole=False)
    ids = population.draw(256, 0)
    assert len(ids) == 256
    assert torch.equal(ids, ids.unique())
    assert table.live[ids].all()
    assert (counts[ids] > 0).sum() > 20
    assert set(table.group[ids].tolist()) == set(table.group[table.live].tolist())
    assert torch.equal(ids, population.draw(256, 0))
    assert not torch.equal(ids, population.draw(256, 1))
    assert not len(population.frequent), "4 targets are not often"


def test_in_a_short_run_those_of_five_targets_fill_up_the_frequent_ones(table: Any) -> None:
    counts = torch.zeros(8192, dtype=torch.int64)
    live = table.live.nonzero().flatten()
    counts[live[:10]], counts[live[100:200]], counts[live[300:400]] = 30, torch.arange(100) % 15 + 5, 4
    found = counts[Population.of(table, flight_of(counts), whole=False).frequent]
    assert len(found) == FREQUENT
    assert int((found == 30).sum()) == 10
    assert found.tolist() == sorted(counts.tolist(), reverse=True)[:FREQUENT]
    assert int(found.min()) >= 5


def test_the_whole_vocabulary(table: Any) -> None:
    nothing = NotApplicable("off")
    assert torch.equal(Population.of(table, nothing, whole=True).draw(5, 0), table.live.nonzero().flatten())


def prober_of(tokenizer: Any, table: Any, flight: Any = None, to_train: float = float("nan"), **options: Any) -> Prober:
    config = ProbeConfig(**options)
    return build_prober(config, tokenizer, table, flight or NotApplicable("off"), 0, to_train)


def test_frequent_and_watched_tokens_are_asked_beside_the_sample_and_stand_for_nothing(
    kit: Any, tokenizer: Any, table: Any
) -> None:
    counts = torch.zeros(8192, dtype=torch.int64)
    often = table.live.nonzero().flatten()[torch.arange(100) * 40]
    counts[often] = torch.arange(20, 120)
    prober = prober_of(tokenizer, table, flight_of(counts), sample=200, watch=[8170])
    assert set(prober.population.frequent.tolist()) == set(often[-64:].tolist()), "those of most targets"
    assert torch.isin(prober.population.frequent, prober.ids).all()
    assert 8170 in prober.ids
    assert float(prober.weights.sum()) == pytest.approx(int(table.live.sum()), rel=1e-5)
    assert float(prober.weights[prober.ids == 8170]) == 0.0
    sample = prober.sample(torch.zeros(8192, dtype=torch.uint8))
    assert set(prober.ids[sample.frequent].tolist()) == set(prober.population.frequent.tolist())


def test_the_base_chooses_contexts_and_they_are_kept(kit: Any, tokenizer: Any, table: Any) -> None:
    """A pool in which some contexts are nonsense: the base follows the others, and a resumed run asks in those."""
    contexts = {
        "list": {"k": 8}, "copy": {"text": "Copy exactly: {tokens}", "k": 8},
        "nonsense": {"text": "Say no: {tokens} never", "k": 8},
        "noise": {"text": "{tokens} blue seven", "k": 8, "chat": False},
    }  # fmt: skip
    from vocabguard.config import load_config

    config = load_config({"probe": {"contexts": contexts, "asks": 2, "sample": 64}}).probe
    prober = build_prober(config, tokenizer, table, NotApplicable("off"), 0)
    model = base_model(kit)
    told: list[str] = []
    prober.tell_through(told.append)
    prober.run(model)
    assert {one.name for one in prober.contexts} == {"list", "copy"}
    assert set(prober.shares) == set(contexts)
    assert len(told) == 1
    assert told[0].startswith("Probe: 64 of ")
    assert "2 asks each" in told[0]
    again = build_prober(config, tokenizer, table, NotApplicable("off"), 0)
    again.load_state_dict(prober.state_dict())
    assert again.contexts == prober.contexts
    assert torch.equal(again.ids, prober.ids)
    assert torch.equal(again.weights, prober.weights)
    found = again.run(model)
    assert again.looks == 1
    assert torch.equal(found.emitted, prober.base.emitted)  # type: ignore[union-attr]


def test_a_short_run_asks_for_fewer_tokens(kit: Any, tokenizer: Any, table: Any) -> None:
    model = base_model(kit)
    sizes = {}
    for tokens in (1e3, 1e12):
        prober = prober_of(tokenizer, table, to_train=tokens, sample=256)
        prober.run(model)
        sizes[tokens] = len(prober.ids)
    assert sizes == {1e3: 128, 1e12: 256}


def test_words_of_several_tokens_have_one_verdict(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = watched_words(tokenizer, [" you", " yellow submarine", 3884, " you"], 8192)
    assert [word.text for word in words] == [" you", " yellow submarine", "3884"]
    several = words[1].ids
    assert len(several) > 1
    assert tokenizer.decode(list(several)) == " yellow submarine"
    assert set(several) < set(watched_ids(tokenizer, [" yellow submarine", 7], 8192).tolist())
    model = base_model(kit)
    guard = VocabGuard(
        tokenizer=tokenizer,
        probe={"sample": 32, "watch": [" you", " yellow submarine"], "contexts": {"list": {"k": 12}}},
        drift={"every_n_steps": 1}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, total_steps=1, run_dir=tmp_path)
    assert guard.last.scalars["vocabguard/probe/watch_known"] == 2
    with torch.no_grad():
        model.lm_head.weight[several[-1]] = 0  # one of its pieces
    guard.step(1)
    guard.finish()
    assert guard.last.scalars["vocabguard/probe/watch"] == 0.5
    (fired,) = (change for change in guard.last.transitions if change.rule == "watched_forgotten")
    assert fired.story is not None
    assert fired.story.what == "1 of 2 watched words that the base repeats are lost."
    assert [word.strip("␣ ") for word in fired.story.tokens] == [
        "yellow submarine".replace(" ", "␣")
    ] or fired.story.tokens
    long = " ".join(["yellow"] * 20)
    with pytest.raises(ConfigError, match=r"probe.watch holds .* tokens; allowed: 16, a list's k"):
        VocabGuard(tokenizer=tokenizer, probe={"watch": [long]}, **kit.QUIET).attach(model)


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
