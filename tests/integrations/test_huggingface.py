"""The Hugging Face callback in real training runs: metrics, refusals, files, resuming, the trainer's own options."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, TrainerCallback

from vocabguard.config import ConfigError
from vocabguard.results import NotApplicable
from vocabguard.runlog import RunLog

HEAD = "lm_head.weight"
KEY = "eval_vocabguard/head/below_0.95"
SMALL = {"probe": {"enabled": False}, "preflight": {"enabled": False}}


class HeadPutBack(TrainerCallback):
    """Undoes all drift of the head at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.base = model.lm_head.weight.detach().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            model.lm_head.weight.data.copy_(self.base)


class StopAt(TrainerCallback):
    """Ends training early, as a killed process would, after its checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def guard_for(kit: Any, tokenizer: Any, **options: Any) -> Any:
    return kit.CALLBACKS["hf"](tokenizer=tokenizer, **({"drift": {"every_n_steps": 2}} | SMALL | kit.QUIET | options))


def best_model_arguments(every: int) -> dict[str, Any]:
    return {
        "eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every,
        "metric_for_best_model": KEY, "greater_is_better": False, "load_best_model_at_end": True,
    }  # fmt: skip


def test_best_model_is_the_one_that_drifted_least(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    # Checks are never due between evaluations: each evaluation brings its own.
    guarded = guard_for(kit, tokenizer, drift={"every_n_steps": 100})
    run = kit.run_hf(
        kit.tiny_model(), kit.random_rows(48), tokenizer, tmp_path, steps=12, callbacks=(HeadPutBack(9), guarded),
        **best_model_arguments(3),
    )  # fmt: skip
    live = guarded.guard.table.live
    naive = {}
    for step in (3, 6, 9, 12):
        weights = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        naive[step] = kit.naive_below(run.base[HEAD], weights[HEAD], live)
    assert sorted(naive.values())[1] > naive[9]
    told = {entry["step"]: entry for entry in run.trainer.state.log_history if "eval_loss" in entry}
    assert list(told) == list(naive)
    evaluated = [
        check["scalars"]["vocabguard/head/below_0.95"] for check in RunLog.open(guarded.guard.run_dir).checks()
    ]
    assert evaluated == pytest.approx([0.0, *naive.values()], abs=1e-4)
    assert run.trainer.state.best_metric == pytest.approx(naive[9], abs=1e-4)
    assert Path(run.trainer.state.best_model_checkpoint).name == "checkpoint-9"
    best = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    assert torch.equal(run.model.state_dict()[HEAD], best[HEAD])
    # The last step's check stands, though the best weights have come back; evaluating once more adds none.
    assert guarded.guard.last.step == 12
    metrics = run.trainer.evaluate()
    assert metrics[KEY] == pytest.approx(naive[12], abs=1e-4)


def test_every_evaluation_carries_every_key(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    seen = []

    class Collect(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            seen.append((state.global_step, dict(metrics)))

    guarded = guard_for(
        kit,
        tokenizer,
        drift={"every_n_steps": 3},
        probe={"sample": 8, "contexts": {"list": {"k": 4}}, "every_n_steps": 6},
    )
    kit.run_hf(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded, Collect()),
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    # The probe's keys stay at every evaluation, from the last probe on.
    for key in (
        KEY,
        "eval_vocabguard/exposure/never",
        "eval_vocabguard/probe/probability_mean",
        "eval_vocabguard/head/ja/below_0.95",
        "eval_vocabguard/alerts/head_degraded",
    ):
        assert all(key in metrics for _, metrics in seen), key
    never = [metrics["eval_vocabguard/exposure/never"] for _, metrics in seen]
    assert never == sorted(never, reverse=True)
    assert never[0] > never[-1]


def test_early_stopping(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer)
    run = kit.run_hf(
        kit.tiny_model(), kit.random_rows(48), tokenizer, tmp_path, steps=12,
        callbacks=(HeadPutBack(6), guarded, EarlyStoppingCallback(early_stopping_patience=1)),
        **best_model_arguments(3),
    )  # fmt: skip
    # At 6 the head is as at the base, so 9 is the first evaluation that is worse than the one before.
    assert run.trainer.state.global_step == 9
    assert Path(run.trainer.state.best_model_checkpoint).name == "checkpoint-6"


@pytest.mark.parametrize("case", ["no labels", "unknown key", "threshold out of range"])
def test_refused_before_the_first_step(kit: Any, tokenizer: Any, tmp_path: Path, case: str) -> None:
    rows = kit.random_rows(24)
    model = kit.tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"log": {"console": False}}
    expected = {
        "no labels": "no labels: a training batch holds the keys",
        "unknown key": "unknown key 'drift.every_step'.*every_n_steps",
        "threshold out of range": "threshold",
    }
    if case == "no labels":
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    if case == "unknown key":
        options["drift"] = {"every_step": 3}
    if case == "threshold out of range":
        options["alerts"] = {"mine": {"metric": "head/below_0.95", "threshold": 2.0}}
    with pytest.raises(ConfigError, match=expected[case]):
        kit.run_hf(model, rows, tokenizer, tmp_path, callbacks=(kit.CALLBACKS["hf"](tokenizer=tokenizer, **options),))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model._forward_pre_hooks


def test_files_lie_beside_the_trainers_own(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = guard_for(kit, tokenizer)
    kit.run_hf(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,), report_to="tensorboard"
    )
    ours = tmp_path / "vocabguard"
    assert guarded.guard.run_dir == ours
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    assert ours in folders
    (theirs,) = folders - {ours}
    tags = {folder: scalars_in(folder) for folder in (ours, theirs)}
    assert "train/loss" in tags[theirs]
    assert not [tag for tag in tags[theirs] if tag.startswith("vocabguard/")]
    assert tags[ours]["vocabguard/head/below_0.95"] == [0, 2, 4, 6]
    log = RunLog.open(ours)
    assert [check["step"] for check in log.checks()] == [0, 2, 4, 6]
    assert torch.equal(log.rows()["exposure/data_target"], guarded.guard.last.exposure.data_target)


def scalars_in(folder: Path) -> dict[str, list[int]]:
    """Steps of every scalar tag in a folder's event files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


RESUMING = {
    "exposure": {"push_every_n_steps": 3},
    "probe": {"sample": 8, "every_n_steps": 4},
    "alerts": {"moved": {"metric": "head/cosine_mean", "op": "<", "threshold": 0.9999, "for_checks": 3}},
}


def test_resume_equals_an_uninterrupted_run(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = kit.random_rows(32)

    def run(folder: str, *callbacks: Any, **arguments: Any) -> Any:
        guarded = guard_for(kit, tokenizer, **RESUMING)
        done = kit.run_hf(
            kit.tiny_model(), rows, tokenizer, tmp_path / folder, steps=8, callbacks=(guarded, *callbacks),
            save_strategy="steps", save_steps=4, **arguments,
        )  # fmt: skip
        return done, guarded.guard

    whole, expected = run("whole")
    first, stopped = run("parts", StopAt(4))
    assert stopped.last.step == 4
    assert stopped._checker.alerts.state_dict()["moved"]["checks"] == 2
    second, resumed = run("parts", resume=True)
    assert second.losses[-4:] == whole.losses[-4:]
    kit.assert_same_findings(resumed.last, expected.last)
    kit.assert_counts(resumed.last.exposure, kit.naive_counts(rows, kit.BATCH))
    cosine = kit.naive_cosine(first.base[HEAD], second.model.state_dict()[HEAD])
    torch.testing.assert_close(resumed.last.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert resumed._checker.alerts.state_dict() == expected._checker.alerts.state_dict()
    assert "moved" in resumed.last.firing
    logs = [RunLog.open(tmp_path / folder / "vocabguard") for folder in ("whole", "parts")]
    told = [[(check["step"], check["probed"], check["firing"]) for check in log.checks()] for log in logs]
    assert told[0] == told[1]
    assert [(alert.rule, alert.step) for alert in logs[0].alerts()] == [(a.rule, a.step) for a in logs[1].alerts()]


def test_resume_of_a_checkpoint_without_a_guard(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": 3}
    kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(StopAt(3),), **saving)
    start = load_file(tmp_path / "checkpoint-3" / "model.safetensors")[HEAD]
    guarded = guard_for(kit, tokenizer)
    with caplog.at_level(logging.WARNING, "vocabguard"):
        run = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,), resume=True, **saving)
    said = [record.getMessage() for record in caplog.records if record.name == "vocabguard"]
    assert len(said) == 1
    assert said == ["vocabguard: no saved vocabguard state: drift and counts restart from this checkpoint (step 3)"]
    found = guarded.guard.last
    assert found.step == 6
    kit.assert_counts(found.exposure, kit.naive_counts(rows[3 * kit.BATCH :], kit.BATCH, first_step=4))
    cosine = kit.naive_cosine(start, run.model.state_dict()[HEAD])
    torch.testing.assert_close(found.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert [check["step"] for check in RunLog.open(guarded.guard.run_dir).checks()] == [3, 4, 6]


def test_resume_without_a_guard_against_the_base_on_disk(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": 3}
    base = kit.tiny_model()
    base.save_pretrained(tmp_path / "base")
    start = base.state_dict()[HEAD].clone()
    kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path / "run", callbacks=(StopAt(3),), **saving)
    guarded = guard_for(kit, tokenizer, snapshot={"source": str(tmp_path / "base")})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        run = kit.run_hf(
            kit.tiny_model(), rows, tokenizer, tmp_path / "run", callbacks=(guarded,), resume=True, **saving
        )
    said = [record.getMessage() for record in caplog.records if record.name == "vocabguard"]
    assert len(said) == 1
    assert "counts restart from this checkpoint (step 3), drift is measured against snapshot.source" in said[0]
    cosine = kit.naive_cosine(start, run.model.state_dict()[HEAD])
    torch.testing.assert_close(guarded.guard.last.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    kit.assert_counts(guarded.guard.last.exposure, kit.naive_counts(rows[3 * kit.BATCH :], kit.BATCH, first_step=4))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_train_is_another_run(kit: Any, tokenizer: Any, tmp_path: Path, resumed: bool) -> None:
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": 3}
    if resumed:
        first = guard_for(kit, tokenizer)
        kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(first, StopAt(3)), **saving)
    guarded = guard_for(kit, tokenizer)
    run = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,), resume=resumed, **saving)
    start = run.model.state_dict()[HEAD].clone()
    assert guarded.guard.run_dir == tmp_path / "vocabguard"
    run.trainer.train()
    assert guarded.guard.run_dir == tmp_path / "vocabguard-2"
    found = guarded.guard.last
    kit.assert_counts(found.exposure, kit.naive_counts(rows, kit.BATCH))
    cosine = kit.naive_cosine(start, run.model.state_dict()[HEAD])
    torch.testing.assert_close(found.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert cosine.min() < 0.999
    assert [check["step"] for check in RunLog.open(guarded.guard.run_dir).checks()] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpointing": True},
        {"bf16": True},
        {"dataloader_num_workers": 2, "accumulation": 2},
        {"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_counts_and_cosines_under_the_trainers_options(
    kit: Any, tokenizer: Any, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    size = kit.BATCH * arguments.get("accumulation", 1)
    rows = kit.random_rows(4 * size)
    guarded = guard_for(kit, tokenizer, preflight={"enabled": True})
    model = kit.tiny_model()
    if arguments.get("checkpointing"):
        # The trainer's argument has changed its name, and so has the model's method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    arguments = {name: value for name, value in arguments.items() if name != "checkpointing"}
    run = kit.run_hf(model, rows, tokenizer, tmp_path, steps=4, callbacks=(guarded,), **arguments)
    assert_run_equals_naive(kit, run, guarded.guard, rows, size)
    assert guarded.guard.watch.preflight.data_target.tolist() == kit.naive_counts(rows, size)[0]


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", False), ("gpt2", True), ("bert", True), ("t5", True)])
def test_other_models(kit: Any, tokenizer: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    rows = kit.random_rows(4 * kit.BATCH)
    model = kit.tiny_model(kind, tied=tied)
    guarded = guard_for(kit, tokenizer, preflight={"enabled": True}, probe={"sample": 8})
    run = kit.run_hf(model, rows, tokenizer, tmp_path, steps=4, callbacks=(guarded,))
    shift = kind == "gpt2"
    assert_run_equals_naive(kit, run, guarded.guard, rows, kit.BATCH, shift=shift)
    watch = guarded.guard.watch
    assert watch.preflight.data_target.tolist() == kit.naive_counts(rows, kit.BATCH, shift=shift)[0]
    assert watch.head.tied is tied
    assert watch.head.bias is (kind == "bert")
    assert isinstance(watch.probe, NotApplicable) is (kind != "gpt2")
    assert ("vocabguard/probe/probability_mean" in guarded.guard.latest) is (kind == "gpt2")


def assert_run_equals_naive(kit: Any, run: Any, guard: Any, rows: Any, size: int, *, shift: bool = True) -> None:
    found = guard.last
    kit.assert_counts(found.exposure, kit.naive_counts(rows, size, shift=shift))
    head = next(
        name for name, value in run.model.named_parameters(remove_duplicate=False)
        if value is run.model.get_output_embeddings().weight
    )  # fmt: skip
    cosine = kit.naive_cosine(run.base[head], run.model.get_output_embeddings().weight.detach())
    usable = ~found.head.zero
    torch.testing.assert_close(found.head.cosine[usable].double(), cosine[usable], atol=1e-6, rtol=0)
    assert cosine.min() < 0.99995
    assert found.exposure.pull.sum() > 0


def test_counted_labels_are_not_warned_of(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def targets(batch: Any) -> Any:
        return batch["input_ids"], batch["labels"][:, 1:]

    rows = kit.random_rows(24)
    guarded = guard_for(kit, tokenizer, targets=targets, preflight={"enabled": True})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path, callbacks=(guarded,))
    kit.assert_counts(guarded.guard.last.exposure, kit.naive_counts(rows, kit.BATCH))
    assert guarded.guard.watch.preflight.data_target.tolist() == kit.naive_counts(rows, kit.BATCH)[0]
    assert [record for record in caplog.records if record.name == "vocabguard"] == []


@pytest.mark.parametrize(("dies", "best"), [(1, None), (4, "checkpoint-3")])
def test_a_dead_model_is_never_the_best(kit: Any, tokenizer: Any, tmp_path: Path, dies: int, best: str | None) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == dies:
                with torch.no_grad():
                    model.get_output_embeddings().weight.fill_(math.nan)

    guarded = guard_for(kit, tokenizer, drift={"every_n_steps": 100})
    run = kit.run_hf(
        kit.tiny_model(), kit.random_rows(48), tokenizer, tmp_path, steps=9, callbacks=(Kill(), guarded),
        **best_model_arguments(3),
    )  # fmt: skip
    found = run.trainer.state.best_model_checkpoint
    assert (None if found is None else Path(found).name) == best
    assert math.isnan(guarded.guard.latest["vocabguard/head/below_0.95"])
    assert guarded.guard.latest["vocabguard/head/nonfinite_rows"] > 0
