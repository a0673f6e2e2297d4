"""Labels and logits that a trainer trims to what the loss needs, as ms-swift does: echo and data are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

from vocabguard.guard.batches import mask_of_labels
from vocabguard.integrations.huggingface import VocabGuardCallback
from vocabguard.protect.collator import ECHO_KEY

ECHO = {"enabled": True, "dose": 0.5, "list_tokens": 4}


def trimmed(labels: Tensor) -> tuple[Tensor, Any]:
    """The labels of one row that are no -100, or the end of several rows; and the logits that are wanted for them."""
    if len(labels) == 1:
        asked = labels[0] != -100
        kept = torch.cat([asked[1:], torch.tensor([True])])
        return torch.cat([torch.tensor([[-100]]), labels[:, asked]], dim=1), kept
    width = labels.shape[1] - int((labels != -100).any(0).int().argmax()) + 1
    return labels[:, -width:], width


class Trims(Trainer):
    """Trims the batches on their way into the model, and counts what the data and echo ask for before it does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.data, self.echo, self.narrowed = [0] * 8192, [0] * 8192, 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        labels, mask = inputs["labels"], inputs.get(ECHO_KEY)
        for row, line in enumerate(labels.tolist()):
            for place, label in enumerate(line[1:], start=1):
                if label != -100:
                    echo = mask is not None and bool(mask[row, place] if mask.ndim == 2 else mask[row])
                    (self.echo if echo else self.data)[label] += 1
        inputs["labels"], inputs["logits_to_keep"] = trimmed(labels)
        self.narrowed += inputs["labels"].shape[1] < labels.shape[1]
        return inputs


def train(kit: Any, tokenizer: Any, folder: Path, collator: Any, **options: Any) -> tuple[Any, Trims]:
    rows = [
        {"input_ids": row["input_ids"] * 5, "labels": [-100] * 6 + (row["input_ids"] * 5)[6:-3] + [-100] * 3}
        for row in kit.random_rows(32)
    ]
    callback = VocabGuardCallback(
        tokenizer=tokenizer, probe={"enabled": False}, drift={"every_n_steps": 2}, **kit.QUIET, **options
    )
    arguments = TrainingArguments(
        str(folder), max_steps=4, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    trainer = Trims(
        model=kit.tiny_model(), args=arguments, train_dataset=rows, data_collator=collator, callbacks=[callback],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return callback.guard, trainer


@pytest.mark.parametrize("collator", ["joined", "padded"])
@pytest.mark.parametrize("echo", [False, True])
def test_counts_and_losses(kit: Any, tokenizer: Any, tmp_path: Path, collator: str, echo: bool) -> None:
    collate: Any = DataCollatorWithFlattening() if collator == "joined" else DataCollatorForSeq2Seq(tokenizer)
    guard, trainer = train(kit, tokenizer, tmp_path, collate, **({"echo": ECHO} if echo else {}))
    assert trainer.narrowed == 4
    found = guard.last.exposure
    assert guard.failure is None
    assert found.data_target.tolist() == trainer.data
    assert found.echo_target.tolist() == trainer.echo
    assert sum(trainer.data) > 200
    assert (sum(trainer.echo) > 20) == echo
    if echo:
        assert {"vocabguard/loss/data", "vocabguard/loss/echo"} <= guard.last.scalars.keys()
        # Inputs are the data's alone, whatever its labels are.
        assert int(found.inputs.sum()) == sum(5 * len(row["input_ids"]) for row in kit.random_rows(32)[:16])


def test_labels_that_are_no_inputs_are_refused() -> None:
    ids, mask = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[False, False, True, True]])
    for labels, kept in (([[-100, 9]], 2), ([[-100, 5, 6]], torch.tensor([True, True, False, True, True]))):
        with pytest.raises(ValueError, match="cannot be told apart"):
            mask_of_labels(mask, ids, torch.tensor(labels), kept)
    with pytest.raises(ValueError, match="cannot be told apart"):
        mask_of_labels(mask, ids, torch.tensor([[4, 5, 6, 7, 8]]), None)
