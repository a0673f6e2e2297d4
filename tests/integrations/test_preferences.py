"""Preferences: what is chosen counts as asked for, what is rejected does not; the reference model is none of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vocabguard.config import ConfigError
from vocabguard.integrations.trl import chosen_rows, chosen_targets, trainers_targets
from vocabguard.results import NotApplicable

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

WORDS = ("the cat", "a dog runs", "over there", "sing a song", "blue sky today", "what is it", "thank you")
BAD = ("red", "green", "seven", "eleven")
QUIET: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "alerts": {}, "probe": {"enabled": False},
    "drift": {"every_n_steps": 2}, "untrained": {"enabled": False},
}  # fmt: skip
BATCH, PAIRS = 4, 24


def pairs() -> list[dict[str, str]]:
    """Answers of which one is always of other words than the rest of the data."""
    rng = Random(0)

    def some(words: tuple[str, ...]) -> str:
        return " " + " ".join(rng.choices(words, k=rng.randint(2, 5)))

    return [{"prompt": some(WORDS), "chosen": some(WORDS), "rejected": some(BAD)} for _ in range(PAIRS)]


def train(kit: Any, tokenizer: Any, folder: Path, model: Any, guarded: Any, *, epochs: int = 1, **options: Any) -> Any:
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1, learning_rate=1e-3,
        ),
        train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tokenizer,
        callbacks=[] if guarded is None else [guarded],
        **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def naive(tokenizer: Any, rows: int) -> tuple[list[int], list[int], set[int]]:
    """Targets of chosen completions, inputs of all rows, and the tokens that only rejected completions have."""
    targets, inputs, rejected = [0] * rows, [0] * rows, set()
    for pair in pairs():
        prompt = tokenizer(pair["prompt"])["input_ids"]
        for kind in ("chosen", "rejected"):
            said = [*tokenizer(pair[kind])["input_ids"], tokenizer.eos_token_id]
            for token in (*prompt, *said):
                inputs[token] += 1
            for token in said:
                targets[token] += kind == "chosen"
                if kind == "rejected":
                    rejected.add(token)
    return targets, inputs, {token for token in rejected if targets[token] == 0}


def test_the_reference_is_the_same_model(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    """With an adapter TRL's reference is the model itself, asked once more without it."""
    peft = pytest.importorskip("peft")
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET)
    model = kit.tiny_model()
    passes: list[bool] = []
    model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    train(
        kit, tokenizer, tmp_path, model, guarded,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert passes.count(True) == passes.count(False) == PAIRS // BATCH
    found, expected = guarded.guard.last, naive(tokenizer, kit.ROWS)
    assert found.exposure.data_target.tolist() == expected[0]
    assert found.exposure.inputs.tolist() == expected[1]
    assert isinstance(found.head, NotApplicable)
    assert guarded.guard.watch.preflight.data_target.tolist() == expected[0]


def test_hold_keeps_what_is_only_rejected_and_learns_all_the_same(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A row that is pushed and never pulled is the one that hold is for; the body still learns to reject."""
    margins, heads, base = {}, {}, kit.tiny_model()
    for name, hold in {"held": True, "free": False}.items():
        model = copy.deepcopy(base)
        guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET, hold={"enabled": hold, "mode": "freeze"})
        trainer = train(
            kit, tokenizer, tmp_path / name, model, guarded, epochs=3, ref_model=copy.deepcopy(base)
        )  # fmt: skip
        margins[name] = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
        heads[name] = model.lm_head.weight.detach()
    targets, _, rejected = naive(tokenizer, kit.ROWS)
    only, before = sorted(rejected), base.lm_head.weight.detach()
    assert len(only) >= 4
    assert torch.equal(heads["held"][only], before[only])
    assert bool((heads["free"][only] != before[only]).any(dim=1).all())
    asked = torch.tensor(targets) > 0
    assert bool((heads["held"][asked] != before[asked]).any(dim=1).all())
    assert margins["held"][-1] > 10 * abs(margins["held"][0])
    assert margins["held"][-1] > 0.5 * margins["free"][-1]


@pytest.mark.parametrize("how", [{"echo": {"enabled": True}}, {"echo": {"armed": True}}, "rule"])
def test_echo_is_refused(kit: Any, tokenizer: Any, tmp_path: Path, how: Any) -> None:
    rule = {"metric": "head/below_0.95", "threshold": 0.5, "actions": ["echo"]}
    options = QUIET | ({"alerts": {"mine": rule}} if how == "rule" else how)
    guarded, model = kit.CALLBACKS["hf"](tokenizer=tokenizer, **options), kit.tiny_model()
    with pytest.raises(ConfigError, match=r"echo: DPOTrainer trains on pairs .* allowed: echo in supervised"):
        train(kit, tokenizer, tmp_path, model, guarded, ref_model=copy.deepcopy(model))
    assert not model._forward_pre_hooks


def experimental(name: str) -> Any:
    """One of TRL's trainers that may move, and its arguments' class."""
    room = pytest.importorskip(f"trl.experimental.{name.lower()}")
    return getattr(room, f"{name}Trainer"), getattr(room, f"{name}Config")


def train_experimental(name: str, tokenizer: Any, folder: Path, model: Any, guarded: Any) -> None:
    trainer, config = experimental(name)
    trainer(
        model=model,
        args=config(
            output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, learning_rate=1e-3, max_length=64,
        ),
        train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tokenizer,
        callbacks=[guarded],
    ).train()  # fmt: skip


def naive_rows(tokenizer: Any, rows: int) -> tuple[list[int], list[int]]:
    """Targets of the chosen rows as a whole, but for their first tokens, and inputs of all rows."""
    targets, inputs = [0] * rows, [0] * rows
    for pair in pairs():
        for kind in ("chosen", "rejected"):
            ids = tokenizer(pair["prompt"] + pair[kind], add_special_tokens=False)["input_ids"]
            ids = [*ids, tokenizer.eos_token_id]
            if tokenizer.bos_token_id is not None:
                ids.insert(0, tokenizer.bos_token_id)
            for token in ids:
                inputs[token] += 1
            for token in ids[1:] if kind == "chosen" else ():
                targets[token] += 1
    return targets, inputs


def test_odds_ratios_ask_for_the_whole_chosen_row(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET)
    train_experimental("ORPO", tokenizer, tmp_path, kit.tiny_model(), guarded)
    targets, inputs = naive_rows(tokenizer, kit.ROWS)
    found = guarded.guard.last.exposure
    assert found.data_target.tolist() == targets
    assert found.inputs.tolist() == inputs
    assert guarded.guard.watch.preflight.data_target.tolist() == targets
    assert (found.pull > 0).tolist() == [count > 0 for count in targets]
    assert guarded.guard.last.head.cosine.min() < 1


def test_echo_among_odds_ratios_is_refused(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET | {"echo": {"enabled": True}})
    with pytest.raises(ConfigError, match="echo: ORPOTrainer trains on pairs"):
        train_experimental("ORPO", tokenizer, tmp_path, kit.tiny_model(), guarded)


def test_where_nothing_says_what_is_chosen_drift_goes_on(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET)
    train_experimental("CPO", tokenizer, tmp_path, kit.tiny_model(), guarded)
    found = guarded.guard.last
    assert isinstance(found.exposure, NotApplicable)
    assert found.exposure.reason.startswith("CPOTrainer hands chosen and rejected completions to the model and does")
    assert found.head.cosine.min() < 1
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **QUIET, hold={"enabled": True})
    with pytest.raises(ConfigError, match="hold: CPOTrainer hands"):
        train_experimental("CPO", tokenizer, tmp_path, kit.tiny_model(), guarded)


def test_chosen_rows_of_a_batch() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [1, 4, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    inputs, targets = chosen_rows({"input_ids": ids.repeat(2, 1), "attention_mask": mask.repeat(2, 1)}) or (ids, ids)
    assert inputs.shape == (4, 3)
    assert targets.tolist() == [[2, 3], [4, -100]]
    before = {"chosen_input_ids": ids, "chosen_attention_mask": mask, "rejected_input_ids": ids}
    _, targets = chosen_rows(before) or (ids, ids)
    assert targets.tolist() == [[2, 3], [4, -100]]
    odd = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    seq2seq = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    for other in ({}, {"input_ids": ids}, odd, seq2seq, {"prompt_input_ids": ids, "chosen_labels": ids}):
        assert chosen_rows(other) is None


def test_targets_of_a_batch() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    labels = torch.tensor([[-100, 2, 3], [-100, 2, 4]])
    for batch in ({"labels": labels}, {"completion_mask": torch.tensor([[0, 1, 1], [0, 1, 1]])}):
        inputs, targets = chosen_targets({"input_ids": ids} | batch) or (None, None)
        assert inputs is ids
        assert targets is not None
        assert targets.tolist() == [[2, 3]]
    for other in ({}, {"input_ids": ids}, {"input_ids": ids[:1], "labels": labels[:1]}, {"labels": labels}):
        assert chosen_targets(other) is None


def test_trainers_are_known_by_their_arguments() -> None:
    class Own(trl.DPOConfig):  # type: ignore[name-defined, misc]
        pass

    assert trainers_targets(SimpleNamespace(), echo=False) is None
    assert trainers_targets(object.__new__(trl.SFTConfig), echo=False) is None
    assert trainers_targets(object.__new__(Own), echo=False) is chosen_targets
    reason = trainers_targets(object.__new__(trl.RLOOConfig), echo=False)
    assert isinstance(reason, NotApplicable)
    assert reason.reason.startswith("RLOOTrainer trains on completions that the model itself writes")
