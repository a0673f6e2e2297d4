"""What was asked for by name and is not to be had is refused before step 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from vocabguard import ConfigError, GuardConfig, VocabGuard
from vocabguard.integrations.huggingface import VocabGuardCallback


@pytest.mark.parametrize(
    ("keys", "options", "why"),
    [
        (["head/belwo_0.95"], {}, "'head/belwo_0.95', which is never logged.*head/below_0.95"),
        (["vocabguard/probe/lost", "overhead"], {"probe": {"enabled": False}}, "probe.enabled is false"),
        (["probe/*/retained"], {"probe": {"enabled": False}}, "probe.enabled is false"),
        (["reference/nll"], {"probe": {"enabled": False}}, "the reference text is off"),
        (["recall/nats"], {"probe": {"enabled": False}}, "estimated from the probe"),
        (["confusion/ja"], {}, "confusion.enabled=true"),
        (["loss/data"], {}, "echo is not part of this run"),
        (["hold/share"], {}, "hold is not part of this run"),
        (["alerts/moved"], {}, "alerts/ and the name of a rule"),
    ],
)
def test_keys_that_no_measure_gives(keys: list[str], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        VocabGuard(log={"keys": keys}, **options)


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (GuardConfig().log.keys, {"probe": {"enabled": False}}),
        ("all", {}),
        (["loss/*", "hold/share", "alerts/*", "alerts/firing"], {"echo": {"armed": True}, "hold": {"enabled": True}}),
        (["alerts/moved"], {"alerts": {"moved": {"metric": "head/cosine_min", "op": "<", "threshold": 0.5}}}),
        (["recall/nats", "recall/*/nats", "recall/agreement"], {}),
        (["head/*/below_0.95", "embedding/cosine_min", "exposure/1-4", "forecast/*"], {}),
    ],
)
def test_keys_that_are_given(keys: Any, options: dict[str, Any]) -> None:
    assert VocabGuard(log={"keys": keys}, **options).config.log.keys == keys


def test_every_key_that_a_run_logs_may_be_asked_for(tmp_path: Path) -> None:
    from vocabguard.guard.wanted import require_keys

    weights = torch.nn.ModuleDict({"wte": torch.nn.Embedding(32, 8), "lm_head": torch.nn.Linear(8, 32, bias=False)})
    guard = VocabGuard(
        matrices={"head": "lm_head", "embedding": "wte"}, log={"console": False, "tensorboard": False},
        run_dir=str(tmp_path), hold={"enabled": True}, on_error="raise",
    )  # fmt: skip
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    guard.attach(weights, optimizer, total_steps=2, hook_model=False)
    for step in (1, 2):
        guard.observe(None, torch.tensor([[1, 2, 3]]))
        weights["lm_head"](weights["wte"](torch.tensor([1, 2]))).sum().backward()
        optimizer.step()
        guard.step(step)
    guard.finish()
    assert len(guard.latest) > 30
    for key in guard.latest:
        config = GuardConfig(hold=guard.config.hold)
        config.log.keys = [key]
        require_keys(config, guard._rules)


def test_watched_words_without_a_probe(tmp_path: Path) -> None:
    weights = torch.nn.ModuleDict({"wte": torch.nn.Embedding(32, 8), "lm_head": torch.nn.Linear(8, 32, bias=False)})
    guard = VocabGuard(matrices={"head": "lm_head"}, probe={"watch": ["name"]}, log={"console": False})
    with pytest.raises(ConfigError, match=r"probe\.watch names words, but the probe needs a tokenizer"):
        guard.attach(weights, torch.optim.SGD(weights.parameters(), lr=0.1), hook_model=False)


def test_a_trainer_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"trainer is of type str, which has no log\(\)"):
        VocabGuardCallback(trainer="mine")
    assert VocabGuardCallback(trainer=object.__new__(Trainer)).guard is not None


def test_hidden_labels_without_a_collate_function(tmp_path: Path) -> None:
    callback = VocabGuardCallback(hidden_labels=True, log={"console": False})

    class Batches:
        """A dataloader that is none of torch's."""

    guard = VocabGuard(matrices={"head": "lm_head"}, log={"console": False})
    weights = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 32, bias=False)})
    guard.attach(weights, torch.optim.SGD(weights.parameters(), lr=0.1), hook_model=False)
    callback.guard = guard
    with pytest.raises(ConfigError, match="hidden_labels: the training dataloader is a Batches"):
        callback._carry_labels(weights, Batches())
    guard.finish(check=False)
