"""Echo rows in real training runs: the right rows and gradient, the same under workers, none in evaluation."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vocabguard import VocabGuard
from vocabguard.config import ConfigError
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.protect.prompts import render_echo
from vocabguard.runlog import RunLog

HEAD = "lm_head.weight"
ECHO = {"enabled": True, "dose": 0.5, "list_tokens": 4}
SMALL: dict[str, Any] = {"probe": {"enabled": False}, "drift": {"every_n_steps": 2}}


def long_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 30 to 40 tokens over few ids, the first part of each masked."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        ids = [300 + int(rng.paretovariate(0.6)) % 500 for _ in range(rng.randint(30, 40))]
        masked = rng.randint(0, 9)
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


class Tape:
    """Keeps every training batch that reaches the model, as the model sees it, and the evaluation batches apart."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept = {key: value.detach().clone() for key, value in kwargs.items() if isinstance(value, Tensor)}
        (self.batches if module.training else self.evaluated).append(kept)


class TapeLast(TrainerCallback):
    """Begins to tape when all hooks of the guard are set, so that the tape sees what the model sees."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.tape = Tape(model)


def guard_for(kit: Any, trainer: str, tokenizer: Any, **options: Any) -> Any:
    return kit.CALLBACKS[trainer](tokenizer=tokenizer, **(SMALL | kit.QUIET | {"echo": ECHO} | options))


def unpadded(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row without its padding."""
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        rows.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
    return rows


@torch.enable_grad()
def naive_losses(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, int]:
    """Sum of the cross entropies and number of targets, row by row and target by target."""
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place, label in enumerate(labels[1:]):
            if label != -100:
                total = total - logits[place].log_softmax(-1)[label]
                count += 1
    return total, count


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (3, 2)])
def test_gradient_is_the_sum_of_cross_entropies_over_the_number_of_targets(
    kit: Any, tokenizer: Any, tmp_path: Path, accumulation: int, workers: int
) -> None:
    steps = 3
    data = long_rows(steps * kit.BATCH * accumulation)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)
    run = kit.run_hf(
        kit.tiny_model(), data, tokenizer, tmp_path, steps=steps, accumulation=accumulation,
        callbacks=(guarded, tape), dataloader_num_workers=workers,
    )  # fmt: skip
    batches = tape.tape.batches
    assert len(batches) == steps * accumulation
    assert not any(ECHO_KEY in batch for batch in batches)
    # A naive loop over the rows that the model saw, one by one, gives the same gradients.
    naive = kit.tiny_model()
    optimizer = kit.RecordingAdamW(naive)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    echoed = torch.zeros(kit.ROWS, dtype=torch.int64)
    for step in range(steps):
        rows = []
        for number, batch in enumerate(batches[step * accumulation : (step + 1) * accumulation]):
            found = unpadded(batch)
            place = (step * accumulation + number) * kit.BATCH
            # The data's rows come first, as they are.
            assert found[: kit.BATCH] == [(row["input_ids"], row["labels"]) for row in data[place : place + kit.BATCH]]
            assert max(len(ids) for ids, _ in found[: kit.BATCH]) == batch["input_ids"].shape[1]
            for ids, labels in found[kit.BATCH :]:
                asked = [label for label in labels if label != -100]
                assert asked
                # What is asked for stands once more in the question, and the answer is that copy.
                assert all(ids.count(token) >= 2 * asked.count(token) for token in asked)
                echoed += torch.bincount(torch.tensor(asked), minlength=kit.ROWS)
            rows += found
        total, count = naive_losses(naive, rows)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), kit.CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch.testing.assert_close(run.optimizer.gradients[step], optimizer.gradients[-1], atol=1e-6, rtol=1e-4)
    exposure = guarded.guard.last.exposure
    assert exposure.echo_target.tolist() == echoed.tolist()
    assert exposure.data_target.sum() == sum(label != -100 for row in data for label in row["labels"][1:])
    live = guarded.guard.table.live
    assert not echoed[~live].any()
    assert echoed.sum() > 0


@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_dose_is_met_and_every_live_token_gets_its_turn(kit: Any, tokenizer: Any, tmp_path: Path, trainer: str) -> None:
    data = long_rows(10 * kit.BATCH)
    echo = {"enabled": True, "targets_per_live_token": 1.0, "list_tokens": 8, "dose_limit": 100}
    guarded = guard_for(kit, trainer, tokenizer, echo=echo, drift={"every_n_steps": 5})
    kit.RUNS[trainer](kit.tiny_model(), data, tokenizer, tmp_path, steps=10, callbacks=(guarded,))
    found = guarded.guard.last
    live = guarded.guard.table.live
    counts = found.exposure.echo_target[live]
    # A whole pass but for a last list that was not full.
    assert counts.max() == 1
    assert counts.sum() >= int(live.sum()) - 8
    assert found.scalars["vocabguard/echo/targets_per_live_token"] == pytest.approx(1.0, abs=0.01)
    dose = int(found.exposure.echo_target.sum()) / int(found.exposure.data_target.sum())
    assert found.scalars["vocabguard/echo/dose"] == pytest.approx(dose)
    assert found.exposure.data_target[live].sum() < counts.sum()
    # Exact accounting in the run log.
    logged = RunLog.open(guarded.guard.run_dir)
    line = logged.checks()[-1]["echo"]
    assert line["targets"] == sum(line["by_class"].values()) == int(found.exposure.echo_target.sum())
    assert sum(line["by_group"].values()) == line["targets"]
    assert line["on"]
    assert line["seconds"] > 0
    assert logged.rows()["exposure/echo_target"].tolist() == found.exposure.echo_target.tolist()


@pytest.mark.parametrize(("trainer", "workers"), [("hf", 2), ("lightning", 0)])
def test_in_long_batches_echo_comes_a_full_row_at_a_time(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer: str, workers: int
) -> None:
    """Every batch would have an almost empty row, padded to 200 tokens, where a list came at a time."""
    rng, steps = Random(0), 24
    data = [{"input_ids": (ids := [300 + rng.randrange(99) for _ in range(200)]), "labels": ids}]
    data = data * (steps * kit.BATCH)
    dose = 0.06
    echo = {"enabled": True, "dose": dose, "instructions": ["Repeat: {tokens}"], "dose_limit": 100, "fill": 1.0}
    guarded = guard_for(kit, trainer, tokenizer, echo=echo, preflight={"enabled": True})
    model = kit.tiny_model()
    tape = Tape(model)
    options = {"dataloader_num_workers": workers} if trainer == "hf" else {}
    kit.RUNS[trainer](model, data, tokenizer, tmp_path, steps=steps, callbacks=(guarded,), **options)
    extra = [batch["input_ids"][kit.BATCH :] for batch in tape.batches]
    counts = guarded.guard.last.exposure
    a_batch = int(counts.data_target.sum()) / steps
    lists = guarded.guard._protection.echo.plan.list_tokens // 16
    assert lists == min(200 // (2 * 16 + overhead(tokenizer)), int(dose * a_batch * steps / 16 // 16)) > 2
    assert {len(rows) for rows in extra} <= {0, 1}
    assert 0 < sum(map(len, extra)) < steps
    assert int(counts.echo_target.sum()) == 16 * lists * sum(map(len, extra))
    due = dose * a_batch * steps
    assert due - 16 * lists < int(counts.echo_target.sum()) <= due


def overhead(tokenizer: Any) -> int:
    return render_echo(tokenizer, "test", "Repeat: {tokens}").overhead


def test_a_short_run_is_not_drowned_in_echo(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    echo = {"enabled": True, "targets_per_live_token": 5.0, "list_tokens": 4, "dose_limit": 0.5}
    guarded = guard_for(kit, "hf", tokenizer, echo=echo)
    kit.run_hf(kit.tiny_model(), long_rows(16), tokenizer, tmp_path, steps=4, callbacks=(guarded,))
    assert guarded.guard.last.scalars["vocabguard/echo/dose"] == pytest.approx(0.5, abs=0.05)
    assert caplog.text.count("echo.dose_limit allows 0.5") == 1


@pytest.mark.parametrize(("trainer", "workers"), [("hf", 0), ("hf", 2), ("lightning", 0)])
def test_batches_of_short_answers_get_no_more_than_the_limit(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, trainer: str, workers: int
) -> None:
    """The first batches ask for a fifth of what the others do: the mean says nothing of a run of three steps."""
    short = [{**row, "labels": [-100] * 25 + row["labels"][25:]} for row in long_rows(3 * kit.BATCH)]
    data = short + long_rows(20 * kit.BATCH, seed=1)
    limit = 0.75
    echo = {"enabled": True, "mode": "balanced", "targets_per_live_token": 1.45, "dose_limit": limit}
    guarded = guard_for(kit, trainer, tokenizer, echo=echo, preflight={"enabled": True}, drift={"every_n_steps": 1})
    options = {"dataloader_num_workers": workers} if trainer == "hf" else {}
    kit.RUNS[trainer](kit.tiny_model(), data, tokenizer, tmp_path, steps=3, callbacks=(guarded,), **options)
    found = guarded.guard.last
    asked, echoed = int(found.exposure.data_target.sum()), int(found.exposure.echo_target.sum())
    assert asked == sum(label != -100 for row in short for label in row["labels"][1:])
    assert 0.9 * limit * asked < echoed <= limit * asked
    assert found.scalars["vocabguard/echo/dose"] == pytest.approx(echoed / asked)
    for check in RunLog.open(guarded.guard.run_dir).checks()[1:]:
        assert check["scalars"]["vocabguard/echo/dose"] <= limit
    assert caplog.text.count("echo.dose_limit allows 0.75") == 1
    notes = guarded.guard._protection.notes()
    assert "1.45 times each by the end, of which echo.dose_limit leaves" in notes[0]


def test_workers_give_the_same_rows(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(5 * kit.BATCH)
    found = {}
    # Two and a half epochs of five batches: an odd number for two workers.
    for name, options in {
        "0": {"dataloader_num_workers": 0},
        "2": {"dataloader_num_workers": 2},
        "kept": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    }.items():
        guarded = guard_for(kit, "hf", tokenizer)
        run = kit.run_hf(
            kit.tiny_model(), data, tokenizer, tmp_path / name, steps=12, shuffle=True, callbacks=(guarded,), **options
        )
        found[name] = (guarded.guard.last.exposure.echo_target, run.losses, run.model.state_dict()[HEAD])
    for name in ("2", "kept"):
        assert torch.equal(found["0"][0], found[name][0])
        assert found["0"][1] == found[name][1]
        assert torch.equal(found["0"][2], found[name][2])


def test_both_trainers_tell_the_same_story(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(6 * kit.BATCH)
    found = {}
    for trainer in ("hf", "lightning"):
        guarded = guard_for(kit, trainer, tokenizer, hold={"enabled": True})
        run = kit.RUNS[trainer](kit.tiny_model(), data, tokenizer, tmp_path / trainer, callbacks=(guarded,))
        found[trainer] = guarded.guard.last, run.model.state_dict()
    for name in ("echo_target", "data_target", "inputs", "last_target"):
        one, other = (getattr(check.exposure, name) for check, _ in found.values())
        assert torch.equal(one, other), name
    one, other = (check.scalars for check, _ in found.values())
    # Lightning's module divides by a batch's own targets, as the trainer does without accumulation.
    for key in ("loss/data", "loss/echo", "echo/dose", "hold/share", "head/cosine_mean"):
        assert one[f"vocabguard/{key}"] == pytest.approx(other[f"vocabguard/{key}"], rel=1e-5), key
    for name, value in found["hf"][1].items():
        torch.testing.assert_close(value, found["lightning"][1][name], atol=1e-6, rtol=1e-5)


def test_losses_are_told_apart(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(2 * kit.BATCH)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer, drift={"every_n_steps": 1})
    kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, steps=1, accumulation=2, callbacks=(guarded, tape))
    model, sums = kit.tiny_model(), {"data": [0.0, 0], "echo": [0.0, 0]}
    for batch in tape.tape.batches:
        rows = unpadded(batch)
        for name, part in (("data", rows[: kit.BATCH]), ("echo", rows[kit.BATCH :])):
            total, count = naive_losses(model, part)
            sums[name][0] += total.detach().item()
            sums[name][1] += count
    for name, (total, count) in sums.items():
        assert guarded.guard.last.scalars[f"vocabguard/loss/{name}"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_configured_but_never_triggered_changes_nothing(kit: Any, tokenizer: Any, tmp_path: Path, trainer: str) -> None:
    data = long_rows(24)

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.RUNS[trainer](
            kit.tiny_model("gpt2"), data, tokenizer, tmp_path / folder, shuffle=True, callbacks=callbacks
        )

    rule = {"metric": "head/below_0.90", "threshold": 0.99, "actions": ["log", "echo", "hold"]}
    guarded = guard_for(kit, trainer, tokenizer, echo={}, alerts={"far": rule})
    bare, watched = run("bare"), run("armed", guarded)
    assert guarded.guard._protection.has("echo")
    assert guarded.guard._protection.has("hold")
    assert bare.losses == watched.losses
    for name, value in bare.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert not guarded.guard.last.exposure.echo_target.any()


class Switch(TrainerCallback):
    """Switches echo at given steps, and keeps what is needed to go on from each step by hand."""

    def __init__(self, guarded: Any, at: dict[int, bool]) -> None:
        self.guarded, self.at = guarded, at
        self.kept: dict[int, Any] = {}

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        import copy

        if state.global_step in self.at:
            self.guarded.guard.switch("echo", self.at[state.global_step])
        inner = getattr(optimizer, "optimizer", optimizer)
        self.kept[state.global_step] = copy.deepcopy((model.state_dict(), inner.state_dict()))


def test_off_after_having_been_on_is_as_if_it_never_was(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(14 * kit.BATCH)
    guarded = guard_for(kit, "hf", tokenizer, echo={"armed": True, "dose": 0.5, "list_tokens": 4})
    switch, tape = Switch(guarded, {2: True, 6: False}), TapeLast()
    run = kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, steps=14, callbacks=(guarded, switch, tape))
    sizes = [len(batch["input_ids"]) for batch in tape.tape.batches]
    lag = guarded.guard._protection.echo.pace.lag
    with_echo = [number for number, size in enumerate(sizes) if size > kit.BATCH]
    assert with_echo[0] >= 2 + lag
    assert with_echo[-1] < 6 + lag
    quiet = 6 + lag
    assert quiet < 13
    # From the first quiet batch on, plain training from the weights of that step gives the same weights, bit by bit.
    model, optimizer_state = switch.kept[quiet]
    naive = kit.tiny_model()
    naive.load_state_dict(model)
    optimizer = kit.RecordingAdamW(naive)
    optimizer.load_state_dict(optimizer_state)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (step + quiet) / 100)
    collate = DataCollatorForSeq2Seq(tokenizer)
    for place in range(quiet * kit.BATCH, 14 * kit.BATCH, kit.BATCH):
        batch = collate([dict(row) for row in data[place : place + kit.BATCH]])
        naive.train()(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss.backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), kit.CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, value in naive.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name


@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_an_alert_switches_echo_and_hold_on_and_off(kit: Any, tokenizer: Any, tmp_path: Path, trainer: str) -> None:
    # All tokens are unasked at first; the rule resolves as the data goes on asking.
    rule = {"metric": "exposure/never", "threshold": 0.99, "actions": ["echo", "hold"]}
    other = {"metric": "head/cosine_min", "op": "<", "threshold": 0.9999, "actions": ["hold"]}
    guarded = guard_for(
        kit, trainer, tokenizer, echo={"dose": 0.5, "list_tokens": 4, "prefetch": 0},
        alerts={"unasked": rule, "moved": other}, drift={"every_n_steps": 1},
    )  # fmt: skip
    seen: list[tuple[bool, bool]] = []
    decide = guarded.guard.step

    def step(number: int, *optimizers: Any) -> Any:
        result = decide(number, *optimizers)
        seen.append((guarded.guard._protection.echo.on, guarded.guard._protection.holder.on))
        return result

    guarded.guard.step = step
    run = kit.RUNS[trainer](kit.tiny_model(), long_rows(24), tokenizer, tmp_path, callbacks=(guarded,))
    assert len(run.losses) >= 6
    log = RunLog.open(guarded.guard.run_dir)
    fired = [(alert.rule, alert.state) for alert in log.alerts()]
    assert ("unasked", "firing") in fired
    assert ("unasked", "resolved") in fired
    on = [check["echo"]["on"] for check in log.checks()]
    never = [check["scalars"]["vocabguard/exposure/never"] for check in log.checks()]
    # The report of a check is of before it: what a check decides shows in the next.
    assert [share > 0.99 for share in never[:-1]] == on[1:]
    assert True in on
    assert not on[-1]
    assert seen[-1] == (False, True)
    assert guarded.guard.last.exposure.echo_target.any()
    assert guarded.guard.last.scalars["vocabguard/hold/share"] > 0.5


def test_evaluation_gets_none(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(24)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)
    kit.run_hf(
        kit.tiny_model(), data, tokenizer, tmp_path, callbacks=(guarded, tape), eval_strategy="steps", eval_steps=2
    )
    assert tape.tape.evaluated
    for batch in tape.tape.evaluated:
        assert [ids for ids, _ in unpadded(batch)] == [row["input_ids"] for row in data[:4]]


# Older trainers have a switch of their own for it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
    else {"group_by_length": True}
)


@pytest.mark.parametrize("options", [{"dataloader_drop_last": True}, BY_LENGTH])
def test_ways_of_batching(kit: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    data = long_rows(26)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)
    kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, callbacks=(guarded, tape), shuffle=True, **options)
    whole = {tuple(row["input_ids"]) for row in data}
    for batch in tape.tape.batches:
        rows = unpadded(batch)
        assert all(tuple(ids) in whole for ids, _ in rows[: kit.BATCH])
        assert not any(tuple(ids) in whole for ids, _ in rows[kit.BATCH :])
    assert guarded.guard.last.exposure.echo_target.any()


class Stream(IterableDataset[Any]):
    """The rows in order, without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_of_examples(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(24)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)

    # No preflight can tell how many targets a batch has: the first counts do.
    trainer = Trainer(
        model=kit.tiny_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=kit.BATCH, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=Stream(data),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[guarded, tape],
    )  # fmt: skip
    trainer.train()
    sizes = [len(batch["input_ids"]) for batch in tape.tape.batches]
    assert sizes[0] == kit.BATCH
    assert sizes[-1] > kit.BATCH
    assert guarded.guard.last.exposure.echo_target.any()


def test_rows_joined_into_one(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = long_rows(8)
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)
    kit.run_hf(
        kit.tiny_model(), data, tokenizer, tmp_path, steps=2, callbacks=(guarded, tape),
        collator=DataCollatorWithFlattening(),
    )  # fmt: skip
    for number, batch in enumerate(tape.tape.batches):
        part = data[number * kit.BATCH : (number + 1) * kit.BATCH]
        size = sum(len(row["input_ids"]) for row in part)
        assert batch["input_ids"].shape[0] == 1
        assert batch["input_ids"][0, :size].tolist() == [token for row in part for token in row["input_ids"]]
        extra, labels = batch["input_ids"][0, size:], batch["labels"][0, size:]
        assert (labels != -100).sum() > 0
        assert torch.equal(labels[labels != -100], extra[labels != -100])
        assert (batch["position_ids"][0] == 0).sum() > kit.BATCH
    asked = sum(label != -100 for row in data for label in row["labels"][1:])
    assert guarded.guard.last.exposure.data_target.sum() == asked
    assert guarded.guard.last.exposure.echo_target.any()


def test_encoder_decoder(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = [{**row, "labels": row["input_ids"][:6]} for row in long_rows(24)]
    tape, guarded = TapeLast(), guard_for(kit, "hf", tokenizer)
    model = kit.tiny_model("t5")
    kit.run_hf(
        model, data, tokenizer, tmp_path, callbacks=(guarded, tape), collator=DataCollatorForSeq2Seq(tokenizer, model)
    )
    for number, batch in enumerate(tape.tape.batches):
        rows = unpadded({**batch, "labels": batch["input_ids"]})
        labels = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
        part = data[number * kit.BATCH : (number + 1) * kit.BATCH]
        assert labels[: kit.BATCH] == [row["labels"] for row in part]
        for (ids, _), asked in zip(rows[kit.BATCH :], labels[kit.BATCH :], strict=True):
            text = " ".join(map(str, ids))
            assert " ".join(map(str, asked)) in text
    assert guarded.guard.last.exposure.echo_target.any()


def test_a_loop_of_ones_own(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guard = VocabGuard(tokenizer=tokenizer, echo=ECHO, **(SMALL | kit.QUIET))
    data = long_rows(24)
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=kit.BATCH,
        collate_fn=guard.collator(DataCollatorForSeq2Seq(tokenizer)),
    )
    model = kit.tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard.attach(model, optimizer, total_steps=12, run_dir=tmp_path, dataloader=loader)
    step, sizes = 0, []
    for _ in range(2):
        guard.start_epoch()
        for batch in loader:
            step += 1
            sizes.append(len(batch["input_ids"]))
            model(**batch).loss.backward()
            optimizer.step()
            guard.step(step)
            optimizer.zero_grad()
    assert guard.last is not None
    assert sizes[0] == kit.BATCH  # the loader might have been running already
    assert sum(sizes) > 12 * kit.BATCH
    assert int(guard.last.exposure.echo_target.sum()) > 0  # type: ignore[union-attr]
    guard.finish()
    assert {len(batch["input_ids"]) for batch in loader} == {kit.BATCH}
    assert not any(ECHO_KEY in batch for batch in loader)


@pytest.mark.parametrize("mode", ["least_exposed", "watch"])
def test_which_tokens(kit: Any, tokenizer: Any, tmp_path: Path, mode: str) -> None:
    watch = [2000, 2001, 2002]
    echo = {"enabled": True, "dose": 0.5, "list_tokens": 4, "mode": mode, "exclude": [2001, "re:^a"]}
    guarded = guard_for(kit, "hf", tokenizer, echo=echo, probe={"enabled": False, "watch": watch})
    kit.run_hf(kit.tiny_model(), long_rows(24), tokenizer, tmp_path, callbacks=(guarded,))
    exposure, table = guarded.guard.last.exposure, guarded.guard.table
    echoed = exposure.echo_target.nonzero().flatten().tolist()
    assert not any(table.text(token).startswith("a") for token in echoed)
    if mode == "watch":
        assert set(echoed) == {2000, 2002}
    else:
        # Plans after the first check take tokens that the data never asked for, each at most once while some are left.
        assert guarded.guard._protection.echo.plan.version > 0
        assert (exposure.data_target[echoed] == 0).float().mean() > 0.9
        assert exposure.echo_target.max() <= 2


def test_automatic_dose_follows_the_probe(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    auto = {"enabled": True, "tolerated": 0.0, "least": 0.1, "most": 0.4}
    echo = {"enabled": True, "dose": 0.2, "list_tokens": 4, "auto": auto, "prefetch": 0}
    guarded = guard_for(
        kit, "lightning", tokenizer, echo=echo, drift={"every_n_steps": 2}, probe={"sample": 64, "every_n_steps": 2}
    )
    # A model that can say its tokens: a random one has nothing to lose.
    model = AutoModelForCausalLM.from_pretrained(kit.ASSETS).train()
    kit.run_lightning(model, long_rows(32), tokenizer, tmp_path, steps=8, callbacks=(guarded,))
    plans = [check["echo"]["plan"] for check in RunLog.open(guarded.guard.run_dir).checks()[1:]]
    doses = [plan["dose"] for plan in plans]
    assert all(0.1 - 1e-9 <= dose <= 0.4 + 1e-9 for dose in doses)
    assert len({round(dose, 6) for dose in doses}) > 1
    for before, after in pairwise(doses):
        ratio = after / before
        clamped = math.isclose(after, 0.1) or math.isclose(after, 0.4)
        assert clamped or any(math.isclose(ratio, factor, rel_tol=1e-6) for factor in (1.5, 0.8, 1.0))


def test_refused_before_step_one(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    preferences = [{"chosen_ids": [1, 2], "rejected_ids": [3]} for _ in range(8)]
    losses: list[float] = []

    def run(rows: Any, **options: Any) -> None:
        guarded = guard_for(kit, "hf", tokenizer, preflight={"enabled": False}, **options.pop("guard", {}))
        losses.extend(kit.run_hf(options.pop("model", kit.tiny_model()), rows, tokenizer, tmp_path,
                                 callbacks=(guarded,), remove_unused_columns=False, **options).losses)  # fmt: skip

    with pytest.raises(ConfigError, match=r"chosen_ids.*input_ids"):
        run(preferences)
    with pytest.raises(ConfigError, match="neither predicts next tokens nor decodes"):
        run(long_rows(8), model=kit.tiny_model("bert"))
    with pytest.raises(ConfigError, match=r"a batch holds the keys \['input_ids'\]"):
        run([{"input_ids": row["input_ids"][:30]} for row in long_rows(8)], collator=lambda rows: {
            "input_ids": torch.tensor([row["input_ids"] for row in rows])})  # fmt: skip
    with pytest.raises(ConfigError, match=r"echo\.exclude holds 're:\('"):
        run(long_rows(8), guard={"echo": {**ECHO, "exclude": ["re:("]}})
    with pytest.raises(ConfigError, match=r"exposure\.enabled is false"):
        run(long_rows(8), guard={"exposure": {"enabled": False}})
    assert losses == []


@pytest.mark.parametrize("kind", [tuple, list])
def test_lightning_refuses_batches_without_names(kit: Any, tokenizer: Any, tmp_path: Path, kind: type) -> None:
    guarded = guard_for(kit, "lightning", tokenizer, targets=lambda batch: (batch[0], batch[1]))

    class Pairs(kit.Module):  # type: ignore[name-defined, misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch[0], labels=batch[1]).loss

    def collate(rows: list[Any]) -> Any:
        batch = DataCollatorForSeq2Seq(tokenizer)(rows)
        return kind([batch["input_ids"], batch["labels"]])

    with pytest.raises(ConfigError, match=f"the batch is a {kind.__name__}"):
        kit.run_lightning(
            kit.tiny_model(), long_rows(8), tokenizer, tmp_path, callbacks=(guarded,), module=Pairs, collate=collate
        )


def test_a_batch_that_cannot_take_rows_ends_echo_and_not_the_run(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner, calls = DataCollatorForSeq2Seq(tokenizer), []

    def picky(rows: list[Any]) -> Any:
        calls.append(len(rows))
        if len(calls) > 8 and len(rows) != kit.BATCH:
            raise RuntimeError(f"{len(rows)} rows are too many for me")
        return inner(rows)

    guarded = guard_for(kit, "hf", tokenizer, preflight={"max_batches": 1}, on_error="warn")
    run = kit.run_hf(
        kit.tiny_model(), long_rows(60), tokenizer, tmp_path, steps=12, callbacks=(guarded,), collator=picky
    )
    assert len(run.losses) == 12
    assert "too many for me" in caplog.text
    assert guarded.guard.failure is None
    assert int(guarded.guard.last.exposure.echo_target.sum()) > 0
    assert guarded.guard.last.step == 12
