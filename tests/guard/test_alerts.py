"""Alerts of a guarded run: sinks, stories, rules over answers, requests, and what is refused before step 1."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vocabguard import ConfigError, RunLog, VocabGuard
from vocabguard.guard import evaluations as confusing
from vocabguard.guard.summary import lowest
from vocabguard.results import Transition
from vocabguard.text import visible

SMALL: dict[str, Any] = {"preflight": {"enabled": False}, "probe": {"enabled": False}}
MOVED = {"metric": "head/cosine_min", "op": "<", "threshold": 0.999999, "level": "critical"}
STEPS = 6


def run(kit: Any, guard: VocabGuard, folder: Path, **attach: Any) -> Any:
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard.attach(model, optimizer, total_steps=STEPS, run_dir=folder, **attach)
    return kit.loop(guard, model, optimizer, kit.batches(STEPS))


def test_news_reach_a_webhook_and_the_run_folder_alike(kit: Any, receiver: Any, tmp_path: Path) -> None:
    with receiver() as server:
        sinks = {"webhook": {"url": server.url}}
        guard = VocabGuard(drift={"every_n_steps": 2}, alerts={"moved": MOVED}, sinks=sinks, **SMALL, **kit.QUIET)
        run(kit, guard, tmp_path / "run")
        log = guard.finish()
        bodies = [json.loads(body) for _, body, _ in server.seen]
    told = [change for change in log.alerts() if change.level != "info"]
    assert [(body["rule"], body["state"], body["step"]) for body in bodies] == [
        (one.rule, one.state, one.step) for one in told
    ]
    [sent] = [body for body in bodies if body["rule"] == "moved"]
    [kept] = [one for one in told if one.rule == "moved"]
    assert sent["run"] == str(tmp_path / "run")
    assert sent["text"].splitlines() == [kept.message, *kept.story.lines]
    assert tuple(sent["story"]["tokens"]) == kept.story.tokens
    written = (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert '"url": "127.0.0.1/..."' in written
    assert "secret" not in written


def test_an_address_may_come_from_the_environment(kit: Any, receiver: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with receiver() as server:
        monkeypatch.setenv("ALERTS_TO", server.url)
        guard = VocabGuard(alerts={"moved": MOVED}, sinks={"webhook": {"url_env": "ALERTS_TO"}}, **SMALL, **kit.QUIET)
        run(kit, guard, tmp_path / "run")
        guard.finish()
        assert server.seen
    assert "127.0.0.1" not in (tmp_path / "run" / "run.json").read_text(encoding="utf-8")


def test_a_dead_receiver_slows_no_step_and_changes_nothing(kit: Any, receiver: Any, tmp_path: Path) -> None:
    bare = kit.loop(None, model := kit.llama(), kit.sgd(model), kit.batches(STEPS))
    with receiver((200, {}, 60)) as server:
        sinks = {"webhook": {"url": server.url, "timeout": 0.2, "retries": 9}, "finish_seconds": 0.3}
        guard = VocabGuard(drift={"every_n_steps": 1}, alerts={"moved": MOVED}, sinks=sinks, **SMALL, **kit.QUIET)
        losses = run(kit, guard, tmp_path / "run")
        began = time.perf_counter()
        guard.finish()
        assert time.perf_counter() - began < 3.0
    assert losses == bare
    assert guard.last.seconds < 0.2


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        ({"webhook": {"url": "localhost/hook"}}, r"sinks.webhook.url is no address; allowed: http://"),
        ({"webhook": {"url": "file:///etc/passwd"}}, "sinks.webhook.url is no address"),
        ({"webhook": {"url": "http://[::1"}}, "sinks.webhook.url is no address"),
        ({"webhook": {"url_env": "NOT_SET_HERE"}}, "url_env is 'NOT_SET_HERE'; allowed: a variable that is set"),
        ({"webhook": {"url": "http://a/", "url_env": "HOME"}}, "has a url and a url_env; allowed: one of them"),
        ({"webhook": {"url_env": "HOME"}}, r"\$HOME \(sinks.webhook.url_env\) is no address"),
        ({"webhook": {"timeout": 0.0}}, "sinks.webhook.timeout is 0.0; allowed: at least 0.01"),
        ({"webhook": {"retries": 21}}, "sinks.webhook.retries is 21; allowed: 0 to 20"),
        ({"least_level": "loud"}, "sinks.least_level is 'loud'; allowed: one of"),
        ({"mail": {}}, "unknown key .*mail.*allowed"),
    ],
)
def test_bad_sinks_are_refused(sinks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VocabGuard(sinks=sinks)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"metric": "head/*/below_0.95", "change": "ratio", "threshold": 2.0}, "'mine': floor is None; allowed"),
        ({"metric": "head/below_0.95", "op": "missing"}, r"alerts.mine.op is 'missing'; allowed: one of .*'absent'"),
        (
            {"metric": "confusion/ja", "threshold": 0.1},
            "no questions are asked; allowed with it: confusion.enabled",
        ),
        ({"metric": "head/below_0.95", "threshold": 0.1, "remind_steps": -1}, "alerts.mine.remind_steps is -1"),
    ],
)
def test_bad_rules_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VocabGuard(alerts={"mine": rule})


def test_rules_about_languages_that_are_asked_in() -> None:
    rule = {"metric": "confusion/de", "threshold": 0.1}
    asked = {"enabled": True, "languages": ["de", "ja"]}
    VocabGuard(alerts={"mine": rule}, confusion=asked)
    with pytest.raises(ConfigError, match=r"'mine': metric is 'confusion/de'; no part 'de'. Allowed: ja"):
        VocabGuard(alerts={"mine": rule}, confusion=asked | {"languages": ["ja"]})


def test_rules_over_answers_are_followed_at_evaluations(
    kit: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def in_russian(_model: Any, prompts: Any, *_: Any) -> list[list[int]]:
        return [tokenizer.encode("Я не знаю.", add_special_tokens=False) for _ in prompts]

    monkeypatch.setattr(confusing, "greedy_answers", in_russian)
    seen: list[Transition] = []
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = kit.sgd(model)
    rule = {"metric": "confusion/*", "op": ">=", "threshold": 0.5, "actions": ["tell", "hold", "stop"]}
    guard = VocabGuard(
        tokenizer=tokenizer, drift={"every_n_steps": 10}, alerts={"answers": rule}, actions={"tell": seen.append},
        confusion={"enabled": True, "languages": ["ja", "ru"], "per_language": 2, "max_new_tokens": 6},
        on_error="raise", log={"tensorboard": False}, **SMALL,
    )  # fmt: skip
    guard.attach(model, optimizer, total_steps=10, run_dir=tmp_path)
    kit.loop(guard, model, optimizer, kit.batches(3))
    assert not guard._protection.holder.on
    guard.check(at="evaluation")
    [change] = seen
    assert [guard.latest[f"vocabguard/confusion/{part}"] for part in ("ja", "ru")] == [1.0, 0.0]
    assert change.parts == {"ja": 1.0}
    assert change.step == 3
    assert change.story.advice[0].startswith("see in confusion.jsonl")
    assert guard.latest["vocabguard/alerts/firing"] == len(guard._checker.alerts.firing) > 0
    assert guard._protection.holder.on
    assert guard.take_requests() == ("stop",)
    assert guard.take_requests() == ()
    assert change.message in capsys.readouterr().out.replace("\n", " ").replace("vocabguard ", "")
    guard.finish()
    assert [one.message for one in RunLog.open(tmp_path).alerts() if one.rule == "answers"] == [change.message]


def test_what_the_trainer_is_asked_is_in_the_result_too(kit: Any, tmp_path: Path) -> None:
    rule = MOVED | {"actions": ["stop", "checkpoint"], "for_checks": 2}
    guard = VocabGuard(drift={"every_n_steps": 2}, alerts={"moved": rule}, **SMALL, **kit.QUIET)
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard.attach(model, optimizer, total_steps=STEPS)
    asked = {}
    for step, batch in enumerate(kit.batches(STEPS), start=1):
        kit.loop(None, model, optimizer, [batch])
        result = guard.step(step)
        asked[step] = (None if result is None else result.requests, guard.take_requests())
    both = ("checkpoint", "stop")
    assert asked == {1: (None, ()), 2: ((), ()), 3: (None, ()), 4: (both, both), 5: (None, ()), 6: ((), ())}
    guard.finish()
    assert guard.take_requests() == ()


def test_what_nobody_took_is_gone_at_the_end(kit: Any, tmp_path: Path) -> None:
    guard = VocabGuard(alerts={"moved": MOVED | {"actions": ["stop"]}}, **SMALL, **kit.QUIET)
    run(kit, guard, tmp_path / "run")
    guard.finish()
    assert guard.last.requests == ("stop",)
    assert guard.take_requests() == ()


def test_the_worst_tokens_of_a_story_are_those_concerned(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    guard = VocabGuard(
        tokenizer=tokenizer, exposure={"enabled": False}, forecast={"enabled": False}, drift={"every_n_steps": 1},
        alerts={"groups": {"metric": "head/*/below_0.95", "threshold": 0.3}}, **SMALL, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, run_dir=tmp_path)
    table = guard.table
    ja, ko = (table.live & table.mask(name) for name in ("ja", "ko"))
    with torch.no_grad():
        # All of ja turns, more and more; one row of ko turns further than any of them.
        rows = ja.nonzero().flatten()
        noise = torch.randn(len(rows), 16) * model.lm_head.weight[rows].norm(dim=1, keepdim=True) / 4
        model.lm_head.weight[rows] += noise * torch.linspace(1.0, 3.0, len(rows))[:, None]
        model.lm_head.weight[int(ko.nonzero()[0])] *= -1
    result = guard.step(1)
    [change] = [one for one in result.transitions if one.rule == "groups"]
    assert list(change.parts) == ["ja"]
    cosine = result.head.cosine
    assert change.story.rows == int((cosine[ja] < 0.95).sum())
    assert change.story.share == pytest.approx(change.story.rows / int(ja.sum()))
    worst = sorted(rows.tolist(), key=lambda token: float(cosine[token]))[:5]
    assert change.story.tokens == tuple(visible(table.text(token)) for token in worst)
    guard.finish()


def test_forgotten_tokens_of_a_story(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()
    guard = VocabGuard(
        tokenizer=tokenizer, drift={"every_n_steps": 1}, preflight={"enabled": False},
        probe={"every_n_steps": 1, "sample": 40, "watch": ["and"]}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, run_dir=tmp_path)
    token = tokenizer.convert_tokens_to_ids("and")
    with torch.no_grad():
        model.lm_head.weight[token] *= -1
    changes = {one.rule: one for one in guard.step(1).transitions}
    assert changes["watched_forgotten"].story.tokens == ("and",)
    guard.finish()


def test_lowest() -> None:
    values = torch.tensor([0.5, float("nan"), 0.1, -1.0, float("-inf"), 0.2])
    assert lowest(values, torch.tensor([True, True, True, False, True, True]), 2).tolist() == [2, 5]
    assert lowest(values, torch.zeros(6, dtype=torch.bool), 5).tolist() == []


def test_the_logger_gets_the_story(kit: Any, tmp_path: Path, caplog: Any) -> None:
    guard = VocabGuard(alerts={"moved": MOVED}, **SMALL, **kit.QUIET)
    with caplog.at_level(logging.INFO, "vocabguard.alerts"):
        run(kit, guard, tmp_path / "run")
        guard.finish()
    [record] = [one for one in caplog.records if one.getMessage().startswith("moved")]
    assert record.levelno == logging.CRITICAL
    assert "\nSince " in record.getMessage()


def test_without_a_tokenizer_the_only_group_is_not_told_beside_the_whole(kit: Any, tmp_path: Path) -> None:
    guard = VocabGuard(drift={"every_n_steps": 2}, **SMALL, **kit.QUIET)
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard.attach(model, optimizer, total_steps=4, run_dir=tmp_path / "run")
    with torch.no_grad():
        model.get_output_embeddings().weight[:32].neg_()
    guard.step(1)
    guard.step(2)
    assert guard.last is not None
    assert guard.last.scalars["vocabguard/head/other/below_0.95"] == 0.5
    assert {"head_degraded", "head_severe"} <= set(guard.last.firing)
    assert "group_degraded" not in guard.last.firing
    guard.finish()


def test_zero_counts_while_training_runs_are_an_alert_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that never shows its batches; other alerts do not blame the data for what nobody has counted."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    guard = VocabGuard(log={"console": False, "tensorboard": False}, drift={"every_n_steps": 1}, on_error="raise")
    guard.attach(model, optimizer, total_steps=3, hook_model=False)
    ids = torch.tensor([[1, 5, 5, 7]])
    fired = {}
    for step in (1, 2, 3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        result = guard.step(step)
        assert result is not None
        fired |= {change.rule: change for change in result.transitions if change.state == "firing"}
    story = fired["no_targets"].story
    assert story is not None
    assert story.what.startswith("No target has been counted in 1 step")
    assert any("guard.observe_batch(batch)" in sentence for sentence in story.advice)
    assert not any("never been a target" in line for one in fired.values() if one.story for line in one.story.advice)
    guard.finish()
