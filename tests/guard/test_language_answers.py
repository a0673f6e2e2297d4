"""Answers in many languages: greedy, counted by script, harmless to training, and standing down by themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vocabguard import ConfigError, RunLog, VocabGuard
from vocabguard.config import ConfusionConfig
from vocabguard.guard import evaluations as confusing
from vocabguard.guard.evaluations import Confuser, choose_confuser, greedy_answers
from vocabguard.measure.languages import count_answers, summarise_confusion
from vocabguard.results import NotApplicable

FEW: dict[str, Any] = {"enabled": True, "per_language": 2, "max_new_tokens": 8, "batch_prompts": 5}
SMALL: dict[str, Any] = {"preflight": {"enabled": False}, "probe": {"enabled": False}}


@pytest.fixture
def base(kit: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()


def confuser_of(model: Any, tokenizer: Any, **settings: Any) -> Confuser:
    found = choose_confuser(model, ConfusionConfig(**(FEW | settings)), tokenizer)
    assert isinstance(found, Confuser)
    return found


@torch.no_grad()
def naive_answer(model: Any, prompt: tuple[int, ...], stops: tuple[int, ...], most: int) -> list[int]:
    """One prompt at a time, the whole sequence for every token."""
    model.eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best in stops:
            break
        ids.append(best)
    return ids[len(prompt) :]


def test_answers_are_those_of_a_greedy_loop(base: Any, tokenizer: Any) -> None:
    confuser = confuser_of(base, tokenizer)
    prompts = [question.ids for question in confuser.questions]
    expected = [naive_answer(base, prompt, confuser.stops, 8) for prompt in prompts]
    assert list(greedy_answers(base, prompts, confuser.stops, 8)) == expected
    assert any(len(answer) < 8 for answer in expected), "some end by themselves"
    assert any(len(answer) == 8 for answer in expected), "some are cut"
    pairs = [
        (question.language, tokenizer.decode(answer, skip_special_tokens=True))
        for question, answer in zip(confuser.questions, expected, strict=True)
    ]
    counts = count_answers(pairs, confuser.languages)
    found = confuser.ask(base)
    assert torch.equal(found.counts, counts.counts)
    assert torch.equal(found.into, counts.into)
    assert len(found.languages) >= 12


def test_questions_are_users_turns_of_the_chat_template(base: Any, tokenizer: Any) -> None:
    confuser = confuser_of(base, tokenizer, languages=["ja"], per_language=1)
    text = "今日の朝ごはんは何を食べましたか。"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    assert confuser.questions[0].ids == tuple(tokenizer.encode(rendered, add_special_tokens=False))
    assert tokenizer.eos_token_id in confuser.stops


def test_scripts_that_are_allowed(base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"ja": "はい、iPhone です。", "ko": "네, 韓國 입니다.", "ru": "Да, это iPhone и 韓國."}
    asked = confuser_of(base, tokenizer, languages=list(said), per_language=1).questions
    texts = {question.ids: said[question.language] for question in asked}

    def answers(_model: Any, prompts: Any, *_: Any) -> list[list[int]]:
        return [tokenizer.encode(texts[prompt], add_special_tokens=False) for prompt in prompts]

    monkeypatch.setattr(confusing, "greedy_answers", answers)
    for allow, foreign in (
        ({}, {"ja": 0, "ko": 1, "ru": 1}),
        ({"ja": []}, {"ja": 1, "ko": 1, "ru": 1}),
        ({"ko": ["latin", "zh"], "ru": ["zh"]}, {"ja": 0, "ko": 0, "ru": 1}),
    ):
        confuser = confuser_of(base, tokenizer, languages=list(said), per_language=1, allow=allow)
        counts = confuser.ask(base)
        assert dict(zip(counts.languages, counts.counts[:, 1].tolist(), strict=True)) == foreign, allow


def test_the_model_is_left_as_it_was(base: Any, tokenizer: Any) -> None:
    base.train()
    base.lm_head.eval()
    modes = [module.training for module in base.modules()]
    weights, config = {k: v.clone() for k, v in base.state_dict().items()}, base.config.to_dict()
    generation, state = base.generation_config.to_dict(), torch.random.get_rng_state()
    confuser_of(base, tokenizer).ask(base)
    assert [module.training for module in base.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert base.config.to_dict() == config
    assert base.generation_config.to_dict() == generation
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in base.parameters())


class Wrapped(nn.Module):
    """As DistributedDataParallel keeps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_wrapped_model_answers_too(base: Any, tokenizer: Any) -> None:
    confuser = confuser_of(Wrapped(base), tokenizer, languages=["hi", "el"])
    assert torch.equal(confuser.ask(Wrapped(base)).into, confuser.ask(base).into)


def trained(kit: Any, tokenizer: Any, folder: Path, guarded: bool) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Ten steps with dropout, an evaluation after every third; answers at each, if guarded."""
    model = AutoModelForCausalLM.from_pretrained(kit.ASSETS, attention_dropout=0.1).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = None
    if guarded:
        guard = VocabGuard(tokenizer=tokenizer, confusion=FEW, neighbors={"k": 4}, **SMALL, **kit.QUIET)
        guard.attach(model, optimizer, total_steps=10, run_dir=folder)
    torch.manual_seed(5)
    losses = []
    for step in range(1, 11):
        ids = torch.randint(300, 8000, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if guard is not None:
            guard.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 3 == 0 and guard is not None:
            guard.check(at="evaluation")
    if guard is not None:
        guard.finish()
    return losses, model.state_dict(), guard


def test_training_is_bit_identical(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    bare, guarded = (trained(kit, tokenizer, tmp_path, guarded) for guarded in (False, True))
    assert guarded[0] == bare[0]
    assert all(torch.equal(value, bare[1][name]) for name, value in guarded[1].items())
    assert len({round(loss, 6) for loss in bare[0]}) == 10


def test_evaluations_are_logged(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    _, _, guard = trained(kit, tokenizer, tmp_path, guarded=True)
    log = RunLog.open(guard.run_dir)
    notes = log.notes("confusion")
    assert [line["step"] for line in notes] == [3, 6, 9]
    for line in notes:
        assert set(line["answers"].values()) == {2}
        for language, into in line["into"].items():
            assert line["shares"][language] >= max(into.values()) / 2
    last = notes[-1]["shares"]
    assert {key: guard.latest[f"vocabguard/confusion/{key}"] for key in last} == last
    assert not any(key.startswith("vocabguard/confusion") for check in log.checks() for key in check["scalars"])
    near = log.notes("neighbors")
    assert {line["step"] for line in near} == {10}
    assert len(near) == 10
    assert {len(line["now"]) for line in near} == {4}
    assert guard.timings.total > 0


def test_a_model_taught_to_mix_scripts_is_seen(base: Any, tokenizer: Any) -> None:
    """A head that always says one Cyrillic token makes every Japanese answer foreign and every Russian one fine."""
    confuser = confuser_of(base, tokenizer, languages=["ja", "ru", "en"])
    token = tokenizer.encode("да", add_special_tokens=False)[-1]
    bias = torch.zeros(len(base.lm_head.weight))
    bias[token] = 1e4
    hook = base.lm_head.register_forward_hook(lambda _m, _a, output: output + bias)
    try:
        shares = summarise_confusion(confuser.ask(base))
    finally:
        hook.remove()
    assert (shares["ja"], shares["ru"], shares["en"]) == (1.0, 0.0, 1.0)


# -- what cannot be asked --------------------------------------------------------------------------------------------


def test_off_unless_asked_for(kit: Any, tokenizer: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_confuser(base, ConfusionConfig(), tokenizer) == NotApplicable("confusion is off")
    monkeypatch.setattr(Confuser, "ask", lambda *_: pytest.fail("asked"))
    guard = VocabGuard(tokenizer=tokenizer, **SMALL, **kit.QUIET)
    guard.attach(base)
    guard.check(at="evaluation")
    guard.finish()


class NoGenerate(nn.Module):
    """Takes ids, gives logits, generates nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, 8)
        self.out = nn.Linear(8, rows)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(input_ids))


def test_models_that_cannot_answer_say_so_and_are_watched(kit: Any, tokenizer: Any) -> None:
    config = ConfusionConfig(enabled=True)
    for model, asked_with, said in (
        (kit.llama(kit.TOKENIZER_ROWS), None, "need a tokenizer"),
        (NoGenerate(8192), tokenizer, "NoGenerate has no generate()"),
    ):
        found = choose_confuser(model, config, asked_with)
        assert isinstance(found, NotApplicable)
        assert said in found.reason
    guard = VocabGuard(
        tokenizer=tokenizer, confusion={"enabled": True}, matrices={"head": "out", "embedding": "words"}, **SMALL,
        **kit.QUIET,
    )  # fmt: skip
    watch = guard.attach(NoGenerate(8192))
    assert any("no answers in many languages: NoGenerate has no generate()" in note for note in watch.notes)
    guard.check(at="evaluation")
    assert not any("confusion" in key for key in guard.latest)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 60}, r"confusion.max_new_tokens is 60; allowed: \d+, since the model takes 64 tokens"),
        ({"prompts": "klingon"}, "confusion.prompts: language is 'tlh'; allowed: .*ja"),
        ({"allow": {"tlh": ["latin"]}}, "confusion.allow: language is 'tlh'; allowed: .*ja"),
        ({"allow": {"ko": ["latin", "han"]}}, r"confusion.allow: allow has \['han'\]; allowed: .*zh"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    kit: Any, tokenizer: Any, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    if "prompts" in settings:
        (tmp_path / "own.yaml").write_text("tlh: [nuqneH]\n", encoding="utf-8")
        settings = {"prompts": str(tmp_path / "own.yaml")}
    guard = VocabGuard(tokenizer=tokenizer, confusion=FEW | settings, **SMALL, **kit.QUIET)
    with pytest.raises(ConfigError, match=said):
        guard.attach(kit.llama(kit.TOKENIZER_ROWS))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every answer fails; how often one was asked for."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Confuser, "ask", fail)
    return calls


def test_a_fault_stops_only_the_answers_and_is_said_once(
    kit: Any, tokenizer: Any, base: Any, failing: list[int], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    guard = VocabGuard(tokenizer=tokenizer, confusion=FEW, **SMALL, **{**kit.QUIET, "on_error": "warn"})
    guard.attach(base, run_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "vocabguard"):
        for step in (1, 2, 3):
            guard.step(step)
            guard.check(at="evaluation")
    said = [record.message for record in caplog.records if "disabled itself" in record.message]
    assert said == ["vocabguard: confusion disabled itself; the guard continues: RuntimeError: out of memory"]
    assert len(failing) == 1
    assert guard.failure is None
    assert guard.last.step == 3
    assert guard.finish() is not None


def test_a_fault_is_raised_where_faults_are(kit: Any, tokenizer: Any, base: Any, failing: list[int]) -> None:
    guard = VocabGuard(tokenizer=tokenizer, confusion=FEW, **SMALL, **kit.QUIET)
    guard.attach(base)
    with pytest.raises(RuntimeError, match="out of memory"):
        guard.check(at="evaluation")
    assert failing
