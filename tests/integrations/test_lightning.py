"""The Lightning callback in real training runs: monitoring, loggers, kinds of batches and modules, resuming."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorForSeq2Seq

from vocabguard.config import ConfigError
from vocabguard.runlog import RunLog

HEAD = "lm_head.weight"
KEY = "vocabguard/head/below_0.95"
SMALL = {"probe": {"enabled": False}, "preflight": {"enabled": False}}


def guard_for(kit: Any, tokenizer: Any, targets: Any = None, **options: Any) -> Any:
    settings = {"drift": {"every_n_steps": 2}} | SMALL | kit.QUIET | options
    return kit.CALLBACKS["lightning"](tokenizer=tokenizer, targets=targets, **settings)


class KeepHeads(lightning.Callback):
    """Copies the head after every optimizer step."""

    def __init__(self) -> None:
        self.heads: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.heads[trainer.global_step] = pl_module.model.lm_head.weight.detach().clone()


def naive_shares(kit: Any, keeper: KeepHeads, run: Any, guard: Any) -> dict[int, float]:
    live = guard.table.live
    return {step: kit.naive_below(run.base[HEAD], head, live) for step, head in keeper.heads.items()}


@pytest.mark.parametrize("every", [1, 2])
def test_early_stopping_stops_at_the_first_check_over_its_threshold(
    kit: Any, tokenizer: Any, tmp_path: Path, every: int
) -> None:
    keeper, guarded = KeepHeads(), guard_for(kit, tokenizer, drift={"every_n_steps": every})
    limit = 0.3
    stopping = EarlyStopping(
        monitor=KEY, mode="min", patience=100, divergence_threshold=limit, check_on_train_epoch_end=False
    )
    run = kit.run_lightning(
        kit.tiny_model(), kit.random_rows(80), tokenizer, tmp_path, steps=20, callbacks=(guarded, keeper, stopping),
        validate=True, val_check_interval=1,
    )  # fmt: skip
    naive = naive_shares(kit, keeper, run, guarded.guard)
    over = [step for step, share in naive.items() if share > limit and step % every == 0]
    assert over == [run.trainer.global_step]
    assert 2 < run.trainer.global_step < 20
    assert stopping.stopped_epoch == 0
    assert guarded.guard.last.step == run.trainer.global_step


def test_model_checkpoint_follows_a_key(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    keeper, guarded = KeepHeads(), guard_for(kit, tokenizer)
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", monitor=KEY, mode="max", save_top_k=2, every_n_train_steps=2)
    run = kit.run_lightning(
        kit.tiny_model(), kit.random_rows(32), tokenizer, tmp_path, steps=8, callbacks=(guarded, keeper, keep),
        enable_checkpointing=True,
    )  # fmt: skip
    naive = naive_shares(kit, keeper, run, guarded.guard)
    scores = {int(Path(path).stem.removeprefix("step=")): float(score) for path, score in keep.best_k_models.items()}
    best = sorted((2, 4, 6, 8), key=lambda step: naive[step])[-2:]
    assert scores == pytest.approx({step: naive[step] for step in best}, abs=1e-4)
    assert keep.best_model_path.endswith(f"step={best[-1]}.ckpt")
    assert naive[best[0]] < naive[best[1]]


def test_tensorboard_logger_shares_its_writer(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    kit.run_lightning(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,), logger=logger,
        validate=True, val_check_interval=3, log_every_n_steps=1,
    )  # fmt: skip
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    assert folders == {Path(logger.log_dir)}
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars(KEY)] == [0, 2, 4, 6]
    shown = {tag.replace("-detail-", "/").replace("-detail/", "/") for tag in tags["scalars"]}
    assert set(guarded.guard.last.scalars) <= shown
    assert "val_loss" in tags["scalars"]
    assert "vocabguard/head/cosine" in tags["histograms"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("vocabguard") and tag.endswith(("_step", "_epoch"))]
    assert guarded.guard.run_dir == Path(logger.log_dir) / "vocabguard"


def test_csv_logger_gets_the_keys(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer)
    logger = CSVLogger(tmp_path, name="run", version="one")
    kit.run_lightning(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,), logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    log = RunLog.open(tmp_path / "run" / "one" / "vocabguard")
    with (tmp_path / "run" / "one" / "metrics.csv").open() as file:
        logged = {int(line["step"]): float(line[KEY]) for line in csv.DictReader(file) if line[KEY]}
    assert logged == pytest.approx(dict(zip(*log.scalar(KEY), strict=True)))
    assert list(logged) == [0, 2, 4, 6]
    assert logged[6] > 0


RULES = {
    "moves": {"metric": "head/cosine_min", "op": "<", "threshold": 0.99999, "for_checks": 2},
    "calm": {"metric": "head/cosine_min", "op": "<", "threshold": -0.9},
}
STANDS = {"moves": [0.0, 0.5, 1.0, 1.0], "calm": [0.0, 0.0, 0.0, 0.0]}


def test_csv_logger_gets_where_each_rule_stands(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer, alerts=RULES)
    logger = CSVLogger(tmp_path, name="run", version="one")
    kit.run_lightning(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,), logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    with (tmp_path / "run" / "one" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    for rule, expected in STANDS.items():
        key = f"vocabguard/alerts/{rule}"
        assert [float(line[key]) for line in lines if line[key]] == expected


def test_tensorboard_gets_it_once_a_check(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer, alerts=RULES)
    logger = TensorBoardLogger(tmp_path)
    kit.run_lightning(kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,), logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for rule, expected in STANDS.items():
        found = [(event.step, event.value) for event in events.Scalars(f"vocabguard-detail-alerts/{rule}")]
        assert found == list(zip([0, 2, 4, 6], expected, strict=True))


def test_no_logger(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = guard_for(kit, tokenizer)
    run = kit.run_lightning(kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(guarded,))
    assert run.trainer.callback_metrics[KEY].item() == pytest.approx(guarded.guard.latest[KEY])
    log = RunLog.open(tmp_path / "vocabguard")
    assert [check["step"] for check in log.checks()] == [0, 2, 4, 6]


@pytest.mark.parametrize("validate", [False, True])
def test_monitored_keys_when_an_epoch_ends(kit: Any, tokenizer: Any, tmp_path: Path, validate: bool) -> None:
    seen: dict[int, float] = {}

    class Read(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen[trainer.global_step] = float(trainer.callback_metrics[KEY])

    guarded = guard_for(kit, tokenizer)
    kit.run_lightning(
        kit.tiny_model(), kit.random_rows(12), tokenizer, tmp_path, steps=9, callbacks=(guarded, Read()),
        validate=validate,
    )  # fmt: skip
    told = dict(zip(*RunLog.open(tmp_path / "vocabguard").scalar(KEY), strict=True))
    # The latest check's: of step 2 at the end of step 3, of 6 at 6, of 9, the last, at 9.
    assert seen == pytest.approx({3: told[2], 6: told[6], 9: told[9]})
    assert 0 < seen[3] < seen[6] < seen[9]


def rows_by_step(kit: Any, tokenizer: Any, rows: Any) -> Any:
    collate = DataCollatorForSeq2Seq(tokenizer)

    class RowsByStep(kit.Module):
        """Takes its rows by the step: a plain DataLoader begins anew when Lightning resumes."""

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            start = self.trainer.global_step * kit.BATCH
            return collate(rows[start : start + kit.BATCH])

    return RowsByStep


class StopAfterFirstEpoch(lightning.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def test_resume_equals_an_uninterrupted_run(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = kit.random_rows(32)
    options = {
        "exposure": {"push_every_n_steps": 3},
        "probe": {"sample": 8, "every_n_steps": 4},
        "alerts": {"moved": {"metric": "head/cosine_mean", "op": "<", "threshold": 0.9999, "for_checks": 3}},
    }

    def run(folder: str, *callbacks: Any, checkpoint: str | None = None) -> Any:
        guarded = guard_for(kit, tokenizer, **options)
        keep = ModelCheckpoint(tmp_path / folder / "kept", "{step}", save_top_k=-1)
        done = kit.run_lightning(
            kit.tiny_model(), rows[:16], tokenizer, tmp_path / folder, steps=8, callbacks=(guarded, *callbacks, keep),
            enable_checkpointing=True, checkpoint=checkpoint, module=rows_by_step(kit, tokenizer, rows),
        )  # fmt: skip
        return done, guarded.guard

    _, expected = run("whole")
    first, stopped = run("parts", StopAfterFirstEpoch())
    assert stopped.last.step == 4
    assert stopped._checker.alerts.state_dict()["moved"]["checks"] == 2
    second, resumed = run("parts", checkpoint=str(tmp_path / "parts" / "kept" / "step=4.ckpt"))
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


def test_monitored_keys_are_there_right_after_a_resume(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = kit.random_rows(16)

    def run(*callbacks: Any, checkpoint: str | None = None) -> Any:
        # No check is due between the resume and the first validation.
        guarded = guard_for(kit, tokenizer, drift={"every_n_steps": 4})
        stopping = EarlyStopping(monitor=KEY, mode="min", patience=100, check_on_train_epoch_end=False)
        keep = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        return kit.run_lightning(
            kit.tiny_model(), rows, tokenizer, tmp_path, steps=6, callbacks=(guarded, *callbacks, stopping, keep),
            enable_checkpointing=True, checkpoint=checkpoint, validate=True, val_check_interval=1,
        )  # fmt: skip

    run(StopAfterFirstEpoch())
    (checkpoint,) = (tmp_path / "kept").glob("step=4*.ckpt")
    assert run(checkpoint=str(checkpoint)).trainer.global_step == 6


@pytest.mark.parametrize("case", ["unknown key", "threshold out of range"])
def test_refused_before_the_first_step(kit: Any, tokenizer: Any, tmp_path: Path, case: str) -> None:
    model = kit.tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {
        "unknown key": {"drift": {"every_step": 3}},
        "threshold out of range": {"alerts": {"mine": {"metric": "head/below_0.95", "threshold": 2.0}}},
    }[case]
    expected = {"unknown key": "every_n_steps", "threshold out of range": "threshold"}
    with pytest.raises(ConfigError, match=expected[case]):
        kit.run_lightning(
            model, kit.random_rows(24), tokenizer, tmp_path,
            callbacks=(kit.CALLBACKS["lightning"](tokenizer=tokenizer, log={"console": False}, **options),),
        )  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_key_that_a_check_cannot_compute_is_nan(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Kill(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                with torch.no_grad():
                    pl_module.model.get_output_embeddings().weight.fill_(math.nan)

    guarded = guard_for(kit, tokenizer, drift={"every_n_steps": 2})
    run = kit.run_lightning(
        kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(Kill(), guarded)
    )  # fmt: skip
    assert math.isnan(float(run.trainer.callback_metrics[KEY]))
    assert math.isnan(guarded.guard.latest[KEY])
