"""Labels that a trainer takes out of the batch before the model sees it: counted all the same, and nothing changes."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from vocabguard.guard.batches import LABELS_KEY, LabelCarrier

SMALL: dict[str, Any] = {
    "probe": {"enabled": False}, "drift": {"every_n_steps": 2}, "exposure": {"push_every_n_steps": 2}, "alerts": {},
}  # fmt: skip
SMOOTH = {"label_smoothing_factor": 0.1}
# Older trainers have a switch of their own for it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
    else {"group_by_length": True}
)
STEPS = 6


class Stream(IterableDataset[Any]):
    """The rows in order, without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Half of the usual loss."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / num_items_in_batch / 2


def run(
    kit: Any, tokenizer: Any, folder: Path, rows: Any, *callbacks: Any, kind: str = "gpt2", loss: Any = None,
    resume: bool = False, steps: int = STEPS, **options: Any,
) -> Any:  # fmt: skip
    """A run in which labels are hidden; GPT-2 has dropout, so that a draw of random numbers would show."""
    model = kit.tiny_model(kind)
    optimizer = kit.RecordingAdamW(model)
    kit.set_seed(1)
    common: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": kit.BATCH, "use_cpu": True,
        "max_grad_norm": kit.CLIP, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    of_kind: Any = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if kind == "t5" else (Trainer, TrainingArguments)
    ordered = not isinstance(rows, Stream) and not BY_LENGTH.items() <= options.items()
    trainer = type("Ordered", ((kit.OrderedTrainer, of_kind[0]) if ordered else (of_kind[0],)), {})(
        model=model,
        args=of_kind[1](**(common | options)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model if kind == "t5" else None),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)),
        compute_loss_func=loss,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return kit.Run(model, optimizer, losses, trainer=trainer)


def guard_for(kit: Any, tokenizer: Any, **options: Any) -> Any:
    return kit.CALLBACKS["hf"](tokenizer=tokenizer, **(SMALL | kit.QUIET | options))


class Spy(TrainerCallback):
    """Names of what reaches the model when all hooks of the guard have been at it."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        hook = model.register_forward_pre_hook(lambda _, args, kwargs: self.names.update(kwargs), with_kwargs=True)
        self.remove = hook.remove

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.remove()


WAYS: dict[str, dict[str, Any]] = {
    "label smoothing": SMOOTH,
    "accumulation and workers": SMOOTH | {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
    "a loss of one's own": {"loss": own_loss},
    "by length": SMOOTH | BY_LENGTH,
    "a stream": SMOOTH | {"stream": True},
    "a stream with workers": SMOOTH | {"stream": True, "dataloader_num_workers": 2},
    "Seq2SeqTrainer": SMOOTH | {"kind": "t5"},
    "bf16": SMOOTH | {"bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_counted_and_nothing_changes(kit: Any, tokenizer: Any, tmp_path: Path, way: str) -> None:
    options = dict(WAYS[way])
    # Workers each read the whole of a stream that does not know of them.
    rows = kit.random_rows(STEPS * kit.BATCH * options.get("gradient_accumulation_steps", 1))
    data = Stream(rows) if options.pop("stream", False) else rows
    if options.get("kind") == "t5":
        rows = data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][::-1]} for row in rows]
    guarded = guard_for(kit, tokenizer, hidden_labels=options.get("loss") is not None)
    spy = Spy()
    found = run(kit, tokenizer, tmp_path / "guarded", data, guarded, spy, **options)
    bare = run(kit, tokenizer, tmp_path / "bare", data, **options)
    assert "input_ids" in spy.names
    assert spy.names.isdisjoint({"labels", LABELS_KEY})
    assert bare.losses == found.losses
    for name, value in bare.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name
    read = rows
    if way == "a stream with workers":
        read = [row for start in range(0, len(rows) // 2, kit.BATCH) for row in rows[start : start + kit.BATCH] * 2]
    size = len(read) // STEPS
    targets, inputs, last = kit.naive_counts(read, size, shift=options.get("kind") != "t5")
    exposure = guarded.guard.last.exposure
    assert exposure.data_target.tolist() == targets
    assert exposure.inputs.tolist() == inputs
    assert sum(targets) > 100
    loader = found.trainer.callback_handler.train_dataloader
    assert not isinstance(loader.base_dataloader.collate_fn, LabelCarrier)
    assert not found.model._forward_pre_hooks
    if way == "by length":
        return
    assert exposure.last_target.tolist() == last
    pull = torch.zeros(kit.ROWS)
    for step, gradient in enumerate(found.optimizer.gradients):
        first = 0 if options.get("kind") == "t5" else 1
        asked = {label for row in read[step * size : (step + 1) * size] for label in row["labels"][first:]} - {-100}
        for token in asked:
            pull[token] += gradient[token].norm()
    torch.testing.assert_close(exposure.pull, pull)


def test_with_echo_and_its_losses(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Echo rows are told from the data's though neither labels nor loss come by the model."""
    rows = kit.random_rows(STEPS * kit.BATCH)
    echo = {"enabled": True, "dose": 0.5, "list_tokens": 4}
    guarded = guard_for(kit, tokenizer, echo=echo, hidden_labels=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append((outputs["logits"].detach(), labels))
        return own_loss(outputs, labels, num_items_in_batch)

    run(kit, tokenizer, tmp_path, rows, guarded, loss=loss, kind="llama")
    exposure, latest = guarded.guard.last.exposure, guarded.guard.latest
    assert exposure.data_target.tolist() == kit.naive_counts(rows, kit.BATCH)[0]
    echoed = torch.zeros(kit.ROWS, dtype=torch.int64)
    for _, labels in seen:
        asked = labels[kit.BATCH :]
        echoed += torch.bincount(asked[asked != -100], minlength=kit.ROWS)
    assert exposure.echo_target.tolist() == echoed.tolist()
    assert echoed.sum() > 20
    # The last check looks back at two steps.
    for name, part in (("data", slice(0, kit.BATCH)), ("echo", slice(kit.BATCH, None))):
        losses = [
            -logits[row, place].log_softmax(0)[label]
            for logits, labels in seen[-2:]
            for row in range(len(labels))[part]
            for place, label in enumerate(labels[row, 1:].tolist())
            if label != -100
        ]
        assert latest[f"vocabguard/loss/{name}"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


class StopAt(TrainerCallback):
    """Ends training early, after its checkpoint is written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed(kit: Any, tokenizer: Any, tmp_path: Path, workers: int) -> None:
    rows = kit.random_rows(STEPS * kit.BATCH)
    options = SMOOTH | {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}
    run(kit, tokenizer, tmp_path, rows, guard_for(kit, tokenizer), StopAt(), **options)
    guarded = guard_for(kit, tokenizer)
    run(kit, tokenizer, tmp_path, rows, guarded, resume=True, **options)
    kit.assert_counts(guarded.guard.last.exposure, kit.naive_counts(rows, kit.BATCH))


def test_a_guard_that_stands_down_leaves_the_run_alone(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = kit.random_rows(STEPS * kit.BATCH)
    guarded = guard_for(kit, tokenizer, on_error="warn")

    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                monkeypatch.setattr(guarded.guard._observer, "batch", lambda batch: 1 / 0)

    found = run(kit, tokenizer, tmp_path / "guarded", rows, guarded, Breaks(), **SMOOTH)
    assert guarded.guard.failure is not None
    bare = run(kit, tokenizer, tmp_path / "bare", rows, **SMOOTH)
    assert bare.losses == found.losses
    assert not found.model._forward_pre_hooks


def test_said_once_where_nobody_tells(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = guard_for(kit, tokenizer)
    with caplog.at_level(logging.WARNING, "vocabguard"):
        run(kit, tokenizer, tmp_path, kit.random_rows(24), guarded, loss=own_loss)
    assert guarded.guard.last.step == STEPS
    assert not guarded.guard.last.exposure.data_target.any()
    assert guarded.guard.last.head.cosine.nan_to_num(1.0).min() < 0.999
    said = [record.getMessage() for record in caplog.records if record.name == "vocabguard"]
    assert len([message for message in said if "a training pass got no labels" in message]) == 1
    assert "hidden_labels=True" in "".join(said)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("loss", [None, own_loss])
def test_trl_that_passes_each_batch_twice(kit: Any, tokenizer: Any, tmp_path: Path, loss: Any) -> None:
    """`SFTTrainer` computes such losses without labels, and its metrics in a second pass with them."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a cat and a dog"}, {"text": "good morning, how are you?"}] * 8)
    guarded, keys = guard_for(kit, tokenizer, hidden_labels=loss is not None), []
    model = kit.tiny_model()
    model.register_forward_pre_hook(lambda _, args, kwargs: keys.append(sorted(kwargs)), with_kwargs=True)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, report_to="none", bf16=False,
            save_strategy="no", disable_tqdm=True, use_cpu=True, label_smoothing_factor=0.0 if loss else 0.1,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        compute_loss_func=loss,
        callbacks=[guarded],
    )  # fmt: skip
    trainer.train()
    assert len(keys) == 8
    assert all(LABELS_KEY in names for names in keys)
    assert ["labels" in names for names in keys] == [False, True] * 4
    ids = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in data]
    expected = kit.naive_counts([{"input_ids": row, "labels": row} for row in ids], 4)
    assert guarded.guard.last.exposure.data_target.tolist() == expected[0]
