"""Trainings that begin more than once: a batch that does not fit, and several calls of ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, TrainingArguments

EVERY_STEP = {"drift": {"every_n_steps": 1}, "probe": {"enabled": False}}


def test_a_batch_size_that_is_found(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    class OutOfMemoryOnce(kit.OrderedTrainer):  # type: ignore[misc, name-defined]
        """Says that the first step's batches of four do not fit, after it has been made."""

        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(model, inputs, *args)
            if self.state.global_step == 1 and len(inputs["labels"]) == 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

    rows, guarded = kit.random_rows(24), kit.CALLBACKS["hf"](tokenizer=tokenizer, **EVERY_STEP, **kit.QUIET)
    model = kit.tiny_model()
    trainer = OutOfMemoryOnce(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, auto_find_batch_size=True,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
        callbacks=[guarded],
    )  # fmt: skip
    trainer.train()
    size = trainer._train_batch_size
    assert size < 4
    found = guarded.guard.last
    assert found.step == 6
    assert guarded.guard.failure is None
    # Only the training that went through counts, not the step before it.
    kit.assert_counts(found.exposure, kit.naive_counts(rows[: 6 * size], size))
    assert len(model._forward_pre_hooks) == 0


def test_several_fits_are_runs_of_their_own(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows, guarded = kit.random_rows(24), kit.CALLBACKS["lightning"](tokenizer=tokenizer, **EVERY_STEP, **kit.QUIET)
    model = kit.tiny_model()
    folders = set()
    for _ in range(2):
        run = kit.run_lightning(model, rows, tokenizer, tmp_path, steps=3, callbacks=(guarded,))
        found = guarded.guard.last
        assert found.step == 3
        kit.assert_counts(found.exposure, kit.naive_counts(rows[: 3 * kit.BATCH], kit.BATCH))
        naive = kit.naive_cosine(run.base["lm_head.weight"], model.lm_head.weight.detach())
        torch.testing.assert_close(found.head.cosine.double(), naive, rtol=0, atol=1e-6)
        folders.add(guarded.guard.run_dir)
    assert len(folders) == 2
