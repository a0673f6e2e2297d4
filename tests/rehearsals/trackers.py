"""What arrives in each tracker, read back from it: ``python tests/rehearsals/trackers.py``

Real trackers without a network: wandb offline, MLflow's file store, trackio's local database, TensorBoard's files, an
offline experiment of Comet. Each gets two runs of the Hugging Face Trainer: the callback alone, which finds the
tracker's active run, and `VocabGuardCallback.add_to`, which goes through the trainer's own reporter.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "integrations"))

import inputs  # noqa: E402
from test_trackers import wandb_history  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from vocabguard import GuardConfig  # noqa: E402
from vocabguard.integrations.huggingface import VocabGuardCallback  # noqa: E402

STEPS = 4
Values = dict[str, dict[int, float]]
"""Key, as the tracker has it, -> step -> value."""


def train(folder: Path, tracker: str, through: bool) -> VocabGuardCallback:
    """One run."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows: Any = [{"input_ids": ids} for ids in tokenizer([str(chat) for chat in inputs.chats(32)])["input_ids"]]
    out = folder / f"{tracker}-{through}"
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(
            str(out), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, logging_steps=1, save_strategy="no",
            report_to=tracker, disable_tqdm=True, run_name="run", project=f"vocabguard-{through}",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )  # fmt: skip
    options: dict[str, Any] = {"probe": {"enabled": False}, "drift": {"every_n_steps": 1}, "log": {"console": False}}
    if through:
        callback = VocabGuardCallback.add_to(trainer, **options)
    else:
        callback = VocabGuardCallback(**options)
        trainer.add_callback(callback)
    trainer.train()
    return callback


def wandb(folder: Path, _through: bool) -> tuple[Values, bool, bool]:
    """Read an offline run's file."""
    import wandb as package

    package.finish()
    package.teardown()
    [run] = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)[-1:]
    [file] = run.glob("run-*.wandb")
    found: Values = {}
    for row in wandb_history(file):
        for key, value in row.items():
            if "vocabguard/" in key and isinstance(value, float | int):
                found.setdefault(key.removeprefix("train/"), {})[int(row["train/global_step"])] = float(value)
    table = any(run.glob("files/media/table/vocabguard/worst_tokens_*.table.json"))
    return found, table, b"vocabguard-report-" in file.read_bytes()


def mlflow(_folder: Path, _through: bool) -> tuple[Values, bool, bool]:
    """Ask the client for the newest run."""
    import mlflow as package

    client = package.MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    [run] = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    found = {
        key: {one.step: one.value for one in client.get_metric_history(run.info.run_id, key)}
        for key in run.data.metrics
        if "vocabguard/" in key
    }
    kept = {one.path for one in client.list_artifacts(run.info.run_id, "vocabguard")}
    table = f"vocabguard/worst_tokens-{STEPS}.json" in kept
    return found, table, "vocabguard/report.html" in kept


def trackio(_folder: Path, through: bool) -> tuple[Values, bool, bool]:
    """Read its data base; its reporter counts steps of its own, so values are in their order."""
    import trackio as package

    with contextlib.suppress(Exception):
        package.finish()
    project = f"vocabguard-{through}"
    [run] = package.Api().runs(project)
    storage = package.sqlite_storage.SQLiteStorage
    found: Values = {}
    for key in GuardConfig().log.keys:
        for name in (f"vocabguard/{key}", f"train/vocabguard/{key}"):
            if read := storage.get_metric_values(project, run.name, name):
                found[f"vocabguard/{key}"] = {number: entry["value"] for number, entry in enumerate(read)}
    return found, bool(storage.get_metric_values(project, run.name, "vocabguard/worst_tokens")), False


def tensorboard(folder: Path, through: bool) -> tuple[Values, bool, bool]:
    """Read the trainer's own files, or with the callback alone those of the guard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Values = {}
    table = False
    for path in (folder / f"tensorboard-{through}").rglob("events.out.tfevents*"):
        board = EventAccumulator(str(path)).Reload()
        own = path.parent.name == "vocabguard"
        table |= own and any("vocabguard/worst" in tag for tag in board.Tags()["tensors"])
        for tag in board.Tags()["scalars"] if own != through else ():
            name = tag.removeprefix("train/")
            if name.startswith("vocabguard/"):
                found[name] = {one.step: one.value for one in board.Scalars(tag)}
    return found, table, False


def comet_ml(folder: Path, _through: bool) -> tuple[Values, bool, bool]:
    """End the experiment, and read the archive that it leaves to be uploaded."""
    import comet_ml as package

    if (experiment := package.get_running_experiment()) is not None:
        experiment.end()
    [newest] = sorted(folder.glob("comet/*.zip"), key=lambda path: path.stat().st_mtime)[-1:]
    with zipfile.ZipFile(newest) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    found: Values = {}
    assets = set()
    for message in messages:
        told = message["payload"]
        if message["type"] == "metric_msg":
            key = told["metric"]["metricName"].removeprefix("train/")
            found.setdefault(key, {})[told["metric"]["step"]] = float(told["metric"]["metricValue"])
        assets.add((told.get("additional_params") or {}).get("fileName"))
    return found, f"worst_tokens-{STEPS}.csv" in assets, "vocabguard-report.html" in assets


READ = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio, "tensorboard": tensorboard, "comet_ml": comet_ml}
PACKAGES = {"mlflow": ("mlflow", "mlflow-skinny"), "comet_ml": ("comet-ml", "comet_ml")}


def version(name: str) -> str | None:
    """Of the installed package; None where there is none."""
    for package in PACKAGES.get(name, (name,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def read_back(folder: Path, name: str, through: bool) -> dict[str, Any]:
    """One run, and what its tracker has of it."""
    callback = train(folder, name, through)
    values, table, page = READ[name](folder, through)
    last = callback.guard.last
    assert last is not None
    chosen = {f"vocabguard/{key}" for key in GuardConfig().log.keys}
    newest = {key: of[max(of)] for key, of in values.items() if key in chosen}
    wanted = {key: value for key, value in last.scalars.items() if key in chosen}
    return {
        "keys": sorted(newest),
        "checks": max((len(of) for key, of in values.items() if key in chosen), default=0),
        "last_value_right": bool(wanted)
        and all(abs(newest.get(key, 9e9) - value) < 1e-6 for key, value in wanted.items()),
        "worst_tokens": table,
        "report_page": page,
    }


def main() -> None:
    """Rehearse all trackers that are installed."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ.update(
            WANDB_MODE="offline", WANDB_DIR=scratch, WANDB_SILENT="true", WANDB_WATCH="false",
            MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_TRACKING_URI=(folder / "mlruns").as_uri(),
            TRACKIO_DIR=str(folder / "trackio"),
            COMET_START_ONLINE="False", COMET_OFFLINE_DIRECTORY=str(folder / "comet"),
        )  # fmt: skip
        inputs.write(folder)
        for name in READ:
            if (found := version(name)) is None:
                results[name] = {"installed": None}
                continue
            results[name] = {
                "installed": found,
                "alone": read_back(folder, name, through=False),
                "through_trainer": read_back(folder, name, through=True),
            }
    text = json.dumps(results, indent=1, sort_keys=True)
    (HERE / "results" / "trackers.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
