"""Adapters in real `Trainer.train()` runs: what can move is followed as the forward pass uses it, the rest is named."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from vocabguard.config import ConfigError
from vocabguard.integrations.huggingface import VocabGuardCallback
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.results import NotApplicable, RowDrift
from vocabguard.runlog import RunLog

peft = pytest.importorskip("peft")
# Libraries about names that they are about to drop, and about bases that adapters untie.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

STEPS, BATCH = 4, 4
SMALL: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "drift": {"every_n_steps": 2},
    "exposure": {"push_every_n_steps": 1}, "untrained": {"enabled": False}, "probe": {"sample": 16},
}  # fmt: skip
ENDS = ("head", "embedding")


def rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 20 to 30 tokens over few ids, the first part of each masked."""
    rng, found = Random(0), []
    for _ in range(count):
        ids = [300 + int(rng.paretovariate(0.6)) % 500 for _ in range(rng.randint(20, 30))]
        masked = rng.randint(1, 9)
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


class Keep(TrainerCallback):
    """Keeps what the model sees: the batches, and a copy of the model before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.start = copy.deepcopy(model)
        self.batches: list[dict[str, Tensor]] = []
        self.handle = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.batches.append({name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.handle.remove()


def adapted(kit: Any, *, tied: bool = False, **options: Any) -> Any:
    base = kit.tiny_model(tied=tied)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def train(
    model: Any, tokenizer: Any, folder: Path, *, resume: bool = False, steps: int = STEPS, **options: Any
) -> tuple[Any, Keep]:
    """Train under a guard: the guard, and what was kept."""
    guarded, keep = VocabGuardCallback(tokenizer=tokenizer, **(SMALL | options)), Keep()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(STEPS * BATCH),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[guarded, keep],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return guarded.guard, keep


def merged_rows(model: Any, name: str) -> Tensor:
    plain = copy.deepcopy(model).merge_and_unload()
    end = plain.get_output_embeddings() if name == "head" else plain.get_input_embeddings()
    return end.weight.detach().double()


def assert_drift_is_that_of_merged_copies(guard: Any, keep: Keep, model: Any, *names: str) -> None:
    for name in ENDS:
        found = getattr(guard.last, name)
        before, now = merged_rows(keep.start, name), merged_rows(model, name)
        if name not in names:
            assert isinstance(found, NotApplicable)
            assert torch.equal(before, now), "what is not applicable did not move"
            continue
        assert isinstance(found, RowDrift)
        expected = cosine_similarity(before, now, dim=1)
        assert expected.min() < 0.99, "the run moves rows"
        torch.testing.assert_close(found.cosine[1:].double(), expected[1:], atol=2e-6, rtol=0)
        moved = (now - before).norm(dim=1)
        torch.testing.assert_close(found.l2.double(), moved, atol=1e-6, rtol=1e-4)


def assert_counts_are_those_of_the_data(guard: Any, keep: Keep) -> None:
    targets, inputs = torch.zeros(8192, dtype=torch.int64), torch.zeros(8192, dtype=torch.int64)
    assert len(keep.batches) == STEPS
    for batch in keep.batches:
        for line in range(len(batch["labels"])):
            for place, label in enumerate(batch["labels"][line].tolist()):
                if place > 0 and label != -100:
                    targets[label] += 1
                if batch["attention_mask"][line, place]:
                    inputs[int(batch["input_ids"][line, place])] += 1
    assert torch.equal(guard.last.exposure.data_target, targets)
    assert torch.equal(guard.last.exposure.inputs, inputs)


def test_attention_only(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(kit)
    guard, keep = train(model, tokenizer, tmp_path)
    for name in ENDS:
        assert "frozen (requires_grad is False), so its rows cannot move" in getattr(guard.watch, name).reason
    assert "the probe still tells what the model can say" in guard.watch.head.reason
    assert_drift_is_that_of_merged_copies(guard, keep, model)
    assert_counts_are_those_of_the_data(guard, keep)
    # Nothing that could be taken for "no drift" is logged; what the model says is.
    assert not [key for key in guard.latest if "/head/" in key or "/embedding/" in key or "push" in key]
    assert guard.last.exposure.pull.isnan().all()
    assert guard.watch.probe is None
    assert "vocabguard/probe/probability_mean" in guard.latest
    assert not torch.equal(guard.last.probe.probability, guard.last.base_probe.probability)
    assert guard.last.worst == ()


@pytest.mark.parametrize(
    ("options", "moves", "kind"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, ("head",), "LoRA"),
        ({"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True}, ENDS, "LoRA"),
        ({"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}, ENDS, "DoRA"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, ("head",), "LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.1}, ("embedding",), "LoRA"),
        ({"trainable_token_indices": {"lm_head": [300, 301, 8000]}}, ("head",), "trainable tokens"),
    ],
    ids=["head", "rslora", "dora", "pissa", "embedding", "tokens"],
)
def test_adapted_rows(
    kit: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any], moves: tuple[str, ...], kind: str
) -> None:
    model = adapted(kit, **options)
    guard, keep = train(model, tokenizer, tmp_path)
    if kind == "trainable tokens":
        untouched = torch.ones(8192, dtype=torch.bool)
        untouched[[300, 301, 8000]] = False
        assert (guard.last.head.l2[untouched] == 0).all()
        assert (guard.last.head.l2[~untouched] > 0).all()
    assert_drift_is_that_of_merged_copies(guard, keep, model, *moves)
    assert_counts_are_those_of_the_data(guard, keep)
    (note,) = [note for note in guard.watch.notes if note.startswith(f"{kind} makes the {moves[0]} rows")]
    if "head" in moves:
        assert note.endswith("pull and push are not applicable.")
    assert guard.last.exposure.pull.isnan().all()
    assert guard.last.exposure.push_samples == 0
    assert "vocabguard/exposure/push_share" not in guard.latest


def test_saved_modules(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(kit, modules_to_save=["lm_head", "embed_tokens"])
    guard, keep = train(model, tokenizer, tmp_path)
    assert_drift_is_that_of_merged_copies(guard, keep, model, *ENDS)
    assert_counts_are_those_of_the_data(guard, keep)
    assert guard.last.exposure.push_samples == STEPS
    assert (guard.last.exposure.pull[guard.last.exposure.data_target > 0] > 0).all()
    assert not [note for note in guard.watch.notes if "makes the" in note or "unties" in note]


def test_a_saved_head_unties_the_base(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(kit, tied=True, modules_to_save=["lm_head"])
    guard, keep = train(model, tokenizer, tmp_path)
    assert not guard.watch.head.tied
    assert [note for note in guard.watch.notes if "ties head and input embedding, and the adapter unties them" in note]
    assert_drift_is_that_of_merged_copies(guard, keep, model, "head")
    assert guard.last.exposure.input_only.sum() == 0


@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head"]}], ids=["attention", "head"])
def test_echo(kit: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(kit, **options)
    echo = {"enabled": True, "dose": 0.5, "list_tokens": 4}
    guard, keep = train(model, tokenizer, tmp_path, echo=echo)
    data, asked = rows(STEPS * BATCH), torch.zeros(8192, dtype=torch.int64)
    for batch in keep.batches:
        assert ECHO_KEY not in batch
        assert len(batch["labels"]) > BATCH
        for label in batch["labels"][BATCH:, 1:].flatten().tolist():
            asked[label] += label != -100
    exposure = guard.last.exposure
    assert torch.equal(exposure.echo_target, asked)
    assert int(exposure.data_target.sum()) == sum(label != -100 for row in data for label in row["labels"][1:])
    assert guard.last.scalars["vocabguard/echo/dose"] == pytest.approx(0.5, abs=0.1)


def test_hold_is_refused_where_an_adapter_makes_the_rows(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hold: LoRA makes the output rows.*modules_to_save"):
        train(adapted(kit, target_modules=["lm_head"]), tokenizer, tmp_path, hold={"enabled": True})


def test_hold_holds_a_saved_head(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(kit, modules_to_save=["lm_head"])
    guard, keep = train(model, tokenizer, tmp_path, hold={"enabled": True, "mode": "freeze"})
    never = guard.last.exposure.data_target == 0
    before, now = merged_rows(keep.start, "head"), merged_rows(model, "head")
    assert torch.equal(before[never], now[never])
    assert (before[~never] != now[~never]).any(dim=1).all()


def test_a_frozen_head_needs_no_hold(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(adapted(kit), tokenizer, tmp_path, hold={"enabled": True})
    assert "hold has nothing to do: the head is frozen" in caplog.text


def test_a_resumed_run_measures_against_the_first_start(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "gaussian"}
    whole, _ = train(adapted(kit, **options), tokenizer, tmp_path / "whole")
    train(adapted(kit, **options), tokenizer, tmp_path / "parts", steps=2)
    again, _ = train(adapted(kit, **options), tokenizer, tmp_path / "parts", resume=True)
    assert again.last.step == whole.last.step == STEPS
    assert again.last.head.cosine.min() < 0.99
    torch.testing.assert_close(again.last.head.cosine, whole.last.head.cosine, atol=2e-6, rtol=0, equal_nan=True)
    log = RunLog.open(again.run_dir)
    assert [check["step"] for check in log.checks()] == [0, 2, 4]
