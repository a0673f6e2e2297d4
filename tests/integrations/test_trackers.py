"""The chosen keys in `log_history` and in trackers: wandb (offline), MLflow and trackio themselves where installed."""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modelcard import parse_log_history

from vocabguard.config import GuardConfig, load_config
from vocabguard.config.loading import ConfigError
from vocabguard.integrations.huggingface import VocabGuardCallback
from vocabguard.integrations.trackers import ActiveRuns
from vocabguard.runlog import RunLog

KEY = "vocabguard/head/below_0.95"
OPTIONS: dict[str, Any] = {
    "drift": {"every_n_steps": 2}, "probe": {"enabled": False}, "preflight": {"enabled": False},
    "log": {"console": False, "tensorboard": False, "report": False}, "on_error": "raise",
}  # fmt: skip


def trainer_of(
    kit: Any, tokenizer: Any, folder: Path, *callbacks: Any, kind: type[Trainer] = Trainer, **given: Any
) -> Trainer:
    arguments = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "report_to": "none"} | given
    rows = kit.random_rows(24)
    return kind(
        model=kit.tiny_model(),
        args=TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
            save_strategy="no", **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=kit.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )  # fmt: skip


def checks_of(callback: VocabGuardCallback) -> dict[int, dict[str, float]]:
    """The run folder's scalars by step."""
    assert callback.guard.run_dir is not None
    return {check["step"]: check["scalars"] for check in RunLog.open(callback.guard.run_dir).checks()}


def chosen(scalars: dict[str, float]) -> dict[str, float]:
    """What the default of `log.keys` takes of them, by a plain loop."""
    return {f"vocabguard/{key}": scalars[f"vocabguard/{key}"] for key in GuardConfig().log.keys
            if f"vocabguard/{key}" in scalars}  # fmt: skip


class Reads(TrainerCallback):
    """Reads ``log_history[-1]`` as many scripts do, and every ``on_log``."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            assert "loss" in state.log_history[-1] or "eval_loss" in state.log_history[-1]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert "eval_loss" in state.log_history[-1]


def test_log_history_and_on_log_get_the_chosen_keys(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    reads = Reads()
    trainer = trainer_of(kit, tokenizer, tmp_path, logging_steps=1)
    callback = VocabGuardCallback.add_to(trainer, tokenizer=tokenizer, **OPTIONS)
    trainer.add_callback(reads)
    trainer.train()
    checks = checks_of(callback)
    assert list(checks) == [0, 2, 3, 4, 6]  # step 3 is an evaluation's
    history = trainer.state.log_history
    found = {entry["step"]: entry for entry in history if any(key.startswith("vocabguard/") for key in entry)}
    assert list(found) == list(checks)
    for step, scalars in checks.items():
        assert {key: value for key, value in found[step].items() if key.startswith("vocabguard/")} == chosen(scalars)
    assert 5 <= len(chosen(checks[6])) <= 12
    assert [entry["step"] for entry in history if f"eval_{KEY}" in entry] == [3, 6]
    # Everything that would be there without the guard still is, in its order.
    losses = [entry["step"] for entry in history if "loss" in entry]
    assert losses == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]
    assert "train_loss" in history[-1]
    assert [logs[KEY] for logs in reads.logs if KEY in logs] == [scalars[KEY] for scalars in checks.values()]


def test_the_losses_are_logged_as_without_the_guard(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    plain = trainer_of(kit, tokenizer, tmp_path / "plain", logging_steps=2)
    plain.train()
    guarded = trainer_of(kit, tokenizer, tmp_path / "guarded", logging_steps=2)
    VocabGuardCallback.add_to(guarded, tokenizer=tokenizer, **OPTIONS)
    guarded.train()
    # A log of ours in `on_step_end` must not count as the one that the step has asked for.
    told = [
        [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (plain, guarded)
    ]
    assert told[0] == told[1]
    assert [step for step, _ in told[0]] == [2, 4, 6]
    _, lines, _ = parse_log_history(guarded.state.log_history)  # of the model card
    _, expected, _ = parse_log_history(plain.state.log_history)
    assert [line["Training Loss"] for line in lines] == [line["Training Loss"] for line in expected]
    assert [set(line) for line in lines] == [set(line) for line in expected]


@pytest.mark.filterwarnings("ignore")
def test_metrics_that_a_trl_trainer_gathers_stay_with_its_loss(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def train(folder: str, guarded: bool) -> list[dict[str, float]]:
        rows = [{"input_ids": row["input_ids"]} for row in kit.random_rows(24)]
        trainer = trl.SFTTrainer(
            model=kit.tiny_model(),
            args=trl.SFTConfig(
                str(tmp_path / folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
                report_to="none", logging_steps=3, save_strategy="no", max_length=16,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        if guarded:
            VocabGuardCallback.add_to(trainer, **OPTIONS)
        trainer.train()
        assert not guarded or [entry["step"] for entry in trainer.state.log_history if KEY in entry] == [0, 2, 4]
        kept = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "step")
        return [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history if "loss" in entry]

    assert train("guarded", True) == train("plain", False)


def test_an_early_end_reaches_the_history_and_begins_no_new_run(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    after: list[bool] = []

    class Ended(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            after.append(True)

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert not after  # MLflow's would begin a run here

    trainer = trainer_of(kit, tokenizer, tmp_path, Ended(), Stop(), eval_strategy="no")
    VocabGuardCallback.add_to(trainer, tokenizer=tokenizer, **OPTIONS)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if KEY in entry] == [0, 2, 4, 5]
    assert "train_loss" in trainer.state.log_history[-1]


def test_a_callback_that_cannot_take_the_keys_ends_neither_training_nor_guard(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Strict(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if KEY in logs:
                raise KeyError("loss")

    trainer = trainer_of(kit, tokenizer, tmp_path, Strict())
    callback = VocabGuardCallback.add_to(trainer, tokenizer=tokenizer, **OPTIONS | {"on_error": "warn"})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        trainer.train()
    assert callback.guard.failure is None
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]
    said = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("vocabguard: the trainer's log refuses the logged keys (KeyError")


# -- real trackers, by their own active run ----------------------------------------------------------------------------


def wandb_history(path: Path) -> list[dict[str, float]]:
    """The rows that an offline run has written: a file of LevelDB's log format that holds Protocol Buffers."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Offline, in a folder of the test's own."""
    found = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_WATCH", "false")
    return found


def history_of(wandb: Any, folder: Path) -> list[dict[str, float]]:
    wandb.finish()
    wandb.teardown()  # its process has written all of the file then
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    return wandb_history(path)


def test_wandb_gets_them_without_an_argument(kit: Any, tokenizer: Any, tmp_path: Path, wandb: Any) -> None:
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS)
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", callback, report_to="wandb")
    trainer.train()
    rows = history_of(wandb, tmp_path)
    checks = checks_of(callback)
    found = {row["train/global_step"]: row for row in rows if KEY in row}
    assert list(found) == list(checks)
    for step, scalars in checks.items():
        assert {key: found[step][key] for key in chosen(scalars)} == pytest.approx(chosen(scalars))
        assert "vocabguard/head/cosine_mean" not in found[step]
    assert [row["train/global_step"] for row in rows if f"eval_{KEY}" in row] == [3, 6]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [3, 6]


def test_what_the_trainer_reports_comes_once(kit: Any, tokenizer: Any, tmp_path: Path, wandb: Any) -> None:
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", report_to="wandb")
    callback = VocabGuardCallback.add_to(trainer, tokenizer=tokenizer, **OPTIONS)
    trainer.train()
    rows = history_of(wandb, tmp_path)
    found = {row["train/global_step"]: row[f"train/{KEY}"] for row in rows if f"train/{KEY}" in row}
    assert found == pytest.approx({step: scalars[KEY] for step, scalars in checks_of(callback).items()})
    assert [row["train/global_step"] for row in rows if f"eval/{KEY}" in row] == [3, 6]
    assert not [row for row in rows if KEY in row or f"eval_{KEY}" in row]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    found.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield found
    found.end_run()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_them_without_an_argument(kit: Any, tokenizer: Any, tmp_path: Path, mlflow: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS)
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", callback, Stop(), report_to="mlflow", eval_strategy="no")
    trainer.train()
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    [run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    checks = checks_of(callback)
    assert list(checks) == [0, 2, 4, 5]  # the last one when the reporter had ended its run
    read = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, KEY)}
    assert read == pytest.approx({step: scalars[KEY] for step, scalars in checks.items()})
    assert set(chosen(checks[4])) <= set(run.data.metrics)


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_them_without_an_argument(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS)
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", callback)
    trackio.init(project="rows", name="one", embed=False)
    trainer.train()
    trackio.finish()
    [run] = trackio.Api().runs("rows")
    checks = checks_of(callback)
    read = {entry["step"]: entry["value"] for entry in trackio.sqlite_storage.SQLiteStorage.get_metric_values(
        "rows", run.name, KEY)}  # fmt: skip
    assert list(read.values()) == pytest.approx([scalars[KEY] for scalars in checks.values()])


def stub(name: str, **members: Any) -> Any:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


def test_other_versions_of_the_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: of Comet (not installed), of MLflow's and trackio's functions."""
    told: list[Any] = []
    experiment = types.SimpleNamespace(log_metrics=lambda values, step: told.append(("comet", values, step)))
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    active: list[Any] = [run]
    stubs = {
        "comet_ml": stub("comet_ml", get_running_experiment=lambda: experiment),
        "mlflow": stub(
            "mlflow", active_run=lambda: active[0],
            log_metrics=lambda values, step, run_id: told.append((run_id, values, step)),
        ),
        "trackio": stub(
            "trackio", context_vars=types.SimpleNamespace(current_run=types.SimpleNamespace(get=lambda: True)),
            log=lambda values: told.append(("trackio", values)),
        ),
    }  # fmt: skip
    runs = ActiveRuns(raises=True)
    runs.log({"a": 1.0}, 3)  # nothing is imported, and nothing begun
    assert not told
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    runs.log({"vocabguard/exposure/20+": 1.0}, 3)
    active[0] = None
    runs.log({"a": 2.0}, 4, without={"trackio", "comet_ml"})
    assert told == [
        ("r1", {"vocabguard/exposure/20_": 1.0}, 3),
        ("trackio", {"vocabguard/exposure/20+": 1.0, "train/global_step": 3}),
        ("comet", {"vocabguard/exposure/20+": 1.0}, 3),
        ("r1", {"a": 2.0}, 4),
    ]
    monkeypatch.setitem(sys.modules, "wandb", stub("wandb", run=None))
    ActiveRuns(raises=True).log({"a": 1.0}, 1, without=set(stubs))


def test_a_tracker_that_fails_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def log(values: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", stub("wandb", run=types.SimpleNamespace(log=log)))
    runs = ActiveRuns()
    runs.log({"a": 1.0}, 1)
    runs.log({"a": 1.0}, 2)
    [said] = caplog.messages
    assert "wandb refuses the logged keys (ConnectionError: no route)" in said
    with pytest.raises(ConnectionError):
        ActiveRuns(raises=True).log({"a": 1.0}, 1)


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [("all", r".*"), (["head/*/below_0.95", "vocabguard/overhead"], r"vocabguard/(head/.*/below_0\.95|overhead)")],
)
def test_all_keys_on_request_and_patterns(kit: Any, tokenizer: Any, tmp_path: Path, keys: Any, pattern: str) -> None:
    trainer = trainer_of(kit, tokenizer, tmp_path)
    callback = VocabGuardCallback.add_to(
        trainer, tokenizer=tokenizer, **OPTIONS | {"log": {**OPTIONS["log"], "keys": keys}}
    )
    trainer.train()
    scalars = checks_of(callback)[6]
    wanted = {key for key, value in scalars.items() if re.fullmatch(pattern, key) and math.isfinite(value)}
    [last] = [entry for entry in trainer.state.log_history if entry["step"] == 6 and "vocabguard/overhead" in entry]
    assert {key for key in last if key.startswith("vocabguard/")} == wanted
    assert len(wanted) > 5


@pytest.mark.parametrize("keys", ["some", 3, ["haed/below_0.95"], [3], {"a": 1}])
def test_keys_that_name_nothing_are_refused(keys: Any) -> None:
    with pytest.raises(ConfigError, match=r"log\.keys .*allowed: ('all'|a text or a list)"):
        load_config(None, options={"log": {"keys": keys}})
    assert load_config(None, ["log.keys=all"]).log.keys == "all"


def test_a_callback_that_begins_with_training_gets_no_log_before_it_has_begun(
    kit: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """As ms-swift's progress bar, which stands behind the user's callbacks and sets its clock in `on_train_begin`."""

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seen = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            assert self.begun
            self.seen += KEY in logs

    clock = Clock()
    trainer = trainer_of(kit, tokenizer, tmp_path)
    callback = VocabGuardCallback.add_to(trainer, tokenizer=tokenizer, **OPTIONS)
    trainer.add_callback(clock)
    trainer.train()
    assert clock.seen == len(checks_of(callback))


def worst_of(callback: VocabGuardCallback) -> list[tuple[Any, ...]]:
    """What each tracker's table must hold: a row a token, worst first."""
    assert callback.guard.last is not None
    assert len(callback.guard.last.worst) == 20
    return [(one.id, one.text, one.data_target) for one in callback.guard.last.worst]


def test_wandb_keeps_the_worst_tokens_and_the_page(kit: Any, tokenizer: Any, tmp_path: Path, wandb: Any) -> None:
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS | {"log": {"console": False, "tensorboard": False}})
    trainer_of(kit, tokenizer, tmp_path / "out", callback, report_to="wandb").train()
    wandb.finish()
    wandb.teardown()
    [path] = tmp_path.glob("wandb/offline-run-*/files/media/table/vocabguard/worst_tokens_*.table.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["columns"][:2] == ["id", "text"]
    place = table["columns"].index("data_target")
    assert [(row[0], row[1], row[place]) for row in table["data"]] == worst_of(callback)
    [run] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"vocabguard-report-" in run.read_bytes()
    assert b"report.html" in run.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", [False, True])
def test_mlflow_keeps_the_worst_tokens_and_the_page(
    kit: Any, tokenizer: Any, tmp_path: Path, mlflow: Any, through: bool
) -> None:
    options = OPTIONS | {"log": {"console": False, "tensorboard": False}}
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", report_to="mlflow", eval_strategy="no")
    callback = VocabGuardCallback(tokenizer=tokenizer, trainer=trainer if through else None, **options)
    trainer.add_callback(callback)
    trainer.train()
    client = mlflow.MlflowClient()
    [run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    names = {one.path for one in client.list_artifacts(run.info.run_id, "vocabguard")}
    assert names == {"vocabguard/report.html", "vocabguard/worst_tokens-6.json"}
    table = mlflow.load_table("vocabguard/worst_tokens-6.json", run_ids=[run.info.run_id])
    assert list(zip(table["id"], table["text"], table["data_target"], strict=True)) == worst_of(callback)


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_the_worst_tokens_though_its_reporter_ends_first(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS)
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", callback, report_to="trackio", project="worst")
    trainer.train()
    [run] = trackio.Api().runs("worst")
    [entry] = trackio.sqlite_storage.SQLiteStorage.get_metric_values("worst", run.name, "vocabguard/worst_tokens")
    rows = [(row["id"], row["text"], row["data_target"]) for row in entry["value"]["_value"]]
    assert rows == worst_of(callback)


def test_comet_keeps_the_worst_tokens_and_the_page(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}

    class Experiment:
        def log_metrics(self, values: Any, step: int) -> None:
            kept["step"] = step

        def log_table(self, name: str, tabular_data: Any, headers: Any) -> None:
            kept[name] = [dict(zip(headers, row, strict=True)) for row in tabular_data]

        def log_asset(self, path: str, file_name: str, step: int) -> None:
            kept[file_name] = Path(path).read_text(encoding="utf-8")

    monkeypatch.setitem(sys.modules, "comet_ml", stub("comet_ml", get_running_experiment=Experiment))
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS | {"log": {"console": False, "tensorboard": False}})
    trainer_of(kit, tokenizer, tmp_path, callback).train()
    rows = kept["worst_tokens-6.csv"]
    assert [(row["id"], row["text"], row["data_target"]) for row in rows] == worst_of(callback)
    assert "</html>" in kept["vocabguard-report.html"]


def test_lightnings_runs_keep_them_too(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}

    class Experiment:
        def log_table(self, name: str, tabular_data: Any, headers: Any) -> None:
            kept[name] = len(tabular_data)

        def log_asset(self, path: str, file_name: str, step: int) -> None:
            kept[file_name] = step

    monkeypatch.setitem(sys.modules, "comet_ml", stub("comet_ml", get_running_experiment=Experiment))
    callback = kit.CALLBACKS["lightning"](**OPTIONS | {"log": {"console": False, "tensorboard": False}})
    kit.run_lightning(kit.tiny_model(), kit.random_rows(24), tokenizer, tmp_path, callbacks=(callback,))
    assert kept == {"worst_tokens-6.csv": 20, "vocabguard-report.html": 6}


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_the_page_in_a_run_of_the_scripts_own(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    callback = VocabGuardCallback(tokenizer=tokenizer, **OPTIONS | {"log": {"console": False, "tensorboard": False}})
    trainer = trainer_of(kit, tokenizer, tmp_path / "out", callback)
    trackio.init(project="pages", name="one", embed=False)
    trainer.train()
    kept = trackio.use_artifact("vocabguard-report").download(tmp_path / "kept")
    trackio.finish()
    assert "</html>" in (Path(kept) / "report.html").read_text(encoding="utf-8")
