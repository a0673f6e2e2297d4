"""A run that stops and resumes in mid-epoch goes on with the same echo rows and the same held rows."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

HEAD = "lm_head.weight"
PROTECTED: dict[str, Any] = {
    "probe": {"enabled": False},
    "drift": {"every_n_steps": 2},
    "echo": {"enabled": True, "dose": 0.5, "list_tokens": 4},
    "hold": {"enabled": True, "mode": "shared"},
}


def rows_of(count: int) -> list[dict[str, list[int]]]:
    rng = Random(0)
    rows = []
    for _ in range(count):
        ids = [300 + int(rng.paretovariate(0.6)) % 500 for _ in range(rng.randint(30, 40))]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


class StopAfter(TrainerCallback):
    """Ends training once a checkpoint is written, as a killed process would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


class StopLightningAfter(lightning.Callback):
    """The same."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop |= trainer.global_step == self.step


def assert_same_protection(found: Any, expected: Any) -> None:
    """Counts, plans and switches of two guards at the end of their runs."""
    assert found.last.step == expected.last.step
    for name in ("data_target", "echo_target", "inputs", "last_target"):
        one, other = getattr(found.last.exposure, name), getattr(expected.last.exposure, name)
        assert torch.equal(one, other), name
    one, other = found._protection.echo.plan, expected._protection.echo.plan
    assert {**vars(one), "ids": one.ids.tolist()} == {**vars(other), "ids": other.ids.tolist()}
    assert found._protection.holder.on == expected._protection.holder.on
    assert torch.equal(found._protection.holder.held, expected._protection.holder.held)


@pytest.mark.parametrize("mode", ["uniform", pytest.param("balanced", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 2)])
def test_hugging_face(kit: Any, tokenizer: Any, tmp_path: Path, mode: str, accumulation: int, workers: int) -> None:
    # Seven batches an epoch: the save falls into the middle of one.
    data = rows_of(7 * kit.BATCH)

    def train(folder: str, *callbacks: Any, **arguments: Any) -> Any:
        return kit.run_hf(
            kit.tiny_model(), data, tokenizer, tmp_path / folder, steps=9, callbacks=callbacks,
            accumulation=accumulation, shuffle=True, save_strategy="steps", save_steps=5,
            dataloader_num_workers=workers, **arguments,
        )  # fmt: skip

    if accumulation > 1:
        bare = train("bare")
        train("bare parts", StopAfter(5))
        if train("bare parts", resume=True).losses[-4:] != bare.losses[-4:]:
            pytest.skip("this version of the trainer does not itself resume accumulation in mid-epoch exactly")

    def run(folder: str, *callbacks: Any, **arguments: Any) -> Any:
        options = {**PROTECTED, "echo": {**PROTECTED["echo"], "mode": mode}}
        guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **(options | kit.QUIET))
        done = train(folder, guarded, *callbacks, **arguments)
        return done, guarded.guard

    whole, expected = run("whole")
    run("parts", StopAfter(5))
    second, resumed = run("parts", resume=True)
    assert second.losses[-4:] == whole.losses[-4:]
    assert_same_protection(resumed, expected)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert expected.last.exposure.echo_target.sum() > 0


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_collates_once_more_what_is_skipped(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = rows_of(10 * kit.BATCH)

    def run(folder: str, *callbacks: Any, resume: bool = False) -> Any:
        guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, **(PROTECTED | kit.QUIET))
        model = kit.tiny_model()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / folder), max_steps=8, per_device_train_batch_size=kit.BATCH, report_to="none",
                save_strategy="steps", save_steps=4, disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=Stream(data),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            callbacks=[guarded, *callbacks],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume or None)
        return model, guarded.guard

    whole, expected = run("whole")
    run("parts", StopAfter(4))
    second, resumed = run("parts", resume=True)
    assert_same_protection(resumed, expected)
    assert torch.equal(whole.state_dict()[HEAD], second.state_dict()[HEAD])
    assert expected.last.exposure.echo_target.sum() > 0


@pytest.mark.parametrize("mode", ["uniform", pytest.param("balanced", marks=pytest.mark.slow)])
def test_lightning(kit: Any, tokenizer: Any, tmp_path: Path, mode: str) -> None:
    data = rows_of(6 * kit.BATCH)

    def run(folder: str, *callbacks: Any, checkpoint: str | None = None) -> Any:
        options = {**PROTECTED, "echo": {**PROTECTED["echo"], "mode": mode}}
        guarded = kit.CALLBACKS["lightning"](tokenizer=tokenizer, **(options | kit.QUIET))
        keep = ModelCheckpoint(tmp_path / folder / "kept", "{step}", save_top_k=-1, every_n_train_steps=6)
        done = kit.run_lightning(
            kit.tiny_model(), data, tokenizer, tmp_path / folder, steps=10, callbacks=(guarded, keep, *callbacks),
            enable_checkpointing=True, checkpoint=checkpoint,
        )  # fmt: skip
        return done, guarded.guard

    whole, expected = run("whole")
    run("parts", StopLightningAfter(6))
    second, resumed = run("parts", checkpoint=str(tmp_path / "parts" / "kept" / "step=6.ckpt"))
    assert_same_protection(resumed, expected)
    assert torch.equal(whole.model.state_dict()[HEAD], second.model.state_dict()[HEAD])
    assert expected.last.exposure.echo_target.sum() > 0
