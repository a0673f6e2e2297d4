"""The Lightning callback with the batches, modules and options that users have: counts and cosines equal naive ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, DataCollatorForSeq2Seq

from vocabguard.results import NotApplicable, Preflight

HEAD = "lm_head.weight"
SMALL = {"probe": {"enabled": False}, "preflight": {"enabled": False}}


def guard_for(kit: Any, tokenizer: Any, targets: Any = None, **options: Any) -> Any:
    settings = {"drift": {"every_n_steps": 2}} | SMALL | kit.QUIET | options
    return kit.CALLBACKS["lightning"](tokenizer=tokenizer, targets=targets, **settings)


def assert_equals_naive(kit: Any, run: Any, guard: Any, rows: Any, size: int, **counting: Any) -> None:
    found = guard.last
    kit.assert_counts(found.exposure, kit.naive_counts(rows, size, **counting))
    cosine = kit.naive_cosine(run.base[HEAD], run.model.state_dict()[HEAD])
    torch.testing.assert_close(found.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert cosine.min() < 0.999
    assert found.exposure.pull.sum() > 0


def tuple_collate(kit: Any, tokenizer: Any) -> Any:
    inner = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows: Any) -> Any:
        batch = inner(rows)
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

    return collate


def unlabelled_collate(kit: Any, tokenizer: Any) -> Any:
    inner = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows: Any) -> Any:
        batch = dict(inner(rows))
        return batch | {"answers": batch.pop("labels")}

    return collate


def encoding_collate(kit: Any, tokenizer: Any) -> Any:
    inner = DataCollatorForSeq2Seq(tokenizer)
    return lambda rows: BatchEncoding(dict(inner(rows)))


def loss_outside(kit: Any) -> Any:
    class LossOutside(kit.Module):
        """Computes its loss from logits; the batch is a tuple."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            inputs, mask, labels = batch
            logits = self.model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    return LossOutside


def loss_inside(kit: Any) -> Any:
    class LossInside(kit.Module):
        """Hands its own labels to the model; the batch has none."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(batch["input_ids"], batch["attention_mask"], labels=batch["answers"]).loss

    return LossInside


def manual(kit: Any) -> Any:
    class Manual(kit.Module):
        """Steps its optimizer itself, at every second batch."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.model(**batch).loss / 2)
            if batch_idx % 2:
                self.clip_gradients(optimizer, gradient_clip_val=kit.CLIP, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    return Manual


def after_shift(batch: Any) -> Any:
    """Takes (inputs, targets) out of a tuple."""
    return batch[0], batch[2][:, 1:]


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_without_names_and_an_extractor(kit: Any, tokenizer: Any, tmp_path: Path, kind: type) -> None:
    collate = tuple_collate(kit, tokenizer)
    rows = kit.random_rows(24)
    # Without an attention mask padding would count as an input; here padding is the token 0.
    guarded = guard_for(kit, tokenizer, after_shift, preflight={"enabled": True})
    run = kit.run_lightning(
        kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,), module=loss_outside(kit),
        collate=lambda rows: kind(collate(rows)),
    )  # fmt: skip
    targets, inputs, last = kit.naive_counts(rows, kit.BATCH)
    found = guarded.guard.last
    assert found.exposure.data_target.tolist() == targets
    assert found.exposure.last_target.tolist() == last
    padding = tokenizer.pad_token_id
    assert [n for token, n in enumerate(found.exposure.inputs.tolist()) if token != padding] == [
        n for token, n in enumerate(inputs) if token != padding
    ]
    cosine = kit.naive_cosine(run.base[HEAD], run.model.state_dict()[HEAD])
    torch.testing.assert_close(found.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert guarded.guard.watch.preflight.data_target.tolist() == targets


def test_labels_that_only_the_model_sees(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.random_rows(24)
    guarded = guard_for(kit, tokenizer, preflight={"enabled": True})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        run = kit.run_lightning(
            kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,), module=loss_inside(kit),
            collate=unlabelled_collate(kit, tokenizer), accumulation=2, steps=3,
        )  # fmt: skip
    flight = guarded.guard.watch.preflight
    assert isinstance(flight, NotApplicable)
    assert "no labels" in flight.reason
    # The model is called with positional inputs and mask, so that padding cannot be told apart from inputs.
    targets, _, last = kit.naive_counts(rows, 2 * kit.BATCH)
    assert guarded.guard.last.exposure.data_target.tolist() == targets
    assert guarded.guard.last.exposure.last_target.tolist() == last
    assert guarded.guard.last.exposure.inputs.sum() > 0
    assert run.trainer.global_step == 3
    assert [record for record in caplog.records if record.name == "vocabguard"] == []
    assert not run.model._forward_pre_hooks


def test_no_labels_anywhere_is_said_once(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = guard_for(kit, tokenizer, preflight={"enabled": True})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        kit.run_lightning(
            kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,),
            module=loss_outside(kit), collate=tuple_collate(kit, tokenizer),
        )  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "no_targets" in record.getMessage()]
    assert len(said) == 1
    assert "exposure/targets stays at 0, since step 2" in said[0]
    assert guarded.guard.last.step == 6


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding"])
def test_kinds_of_batches(kit: Any, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    rows = kit.random_rows(24)
    guarded = guard_for(kit, tokenizer, preflight={"enabled": True})
    inner = DataCollatorForSeq2Seq(tokenizer)
    collate = encoding_collate(kit, tokenizer) if kind == "BatchEncoding" else lambda rows: dict(inner(rows))
    run = kit.run_lightning(
        kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,), collate=collate, validate=True,
        val_check_interval=2,
    )  # fmt: skip
    assert_equals_naive(kit, run, guarded.guard, rows, kit.BATCH)
    assert isinstance(guarded.guard.watch.preflight, Preflight)


@pytest.mark.parametrize(
    "arguments",
    [{"precision": "bf16-mixed"}, {"accumulation": 2, "gradient_clip_val": 0.01}, {"gradient_clip_algorithm": "value"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_counts_and_cosines_under_the_trainers_options(
    kit: Any, tokenizer: Any, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    size = kit.BATCH * arguments.get("accumulation", 1)
    rows = kit.random_rows(4 * size)
    guarded = guard_for(kit, tokenizer)
    run = kit.run_lightning(kit.tiny_model(), rows, tokenizer, tmp_path, steps=4, callbacks=(guarded,), **arguments)
    assert_equals_naive(kit, run, guarded.guard, rows, size)


def test_manual_optimisation(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = kit.random_rows(48)
    guarded = guard_for(kit, tokenizer, exposure={"push_every_n_steps": 1})
    run = kit.run_lightning(
        kit.tiny_model(), rows, tokenizer, tmp_path, steps=6, callbacks=(guarded,), module=manual(kit),
        gradient_clip_val=None,
    )  # fmt: skip
    assert_equals_naive(kit, run, guarded.guard, rows, 2 * kit.BATCH)
    assert guarded.guard.last.step == 6
    norms = torch.stack([gradient.norm(dim=1) for gradient in run.optimizer.gradients]).sum(dim=0)
    found = guarded.guard.last.exposure
    torch.testing.assert_close(found.pull + found.push, norms)
    assert all(gradient.norm() <= kit.CLIP * 1.001 for gradient in run.optimizer.gradients)
