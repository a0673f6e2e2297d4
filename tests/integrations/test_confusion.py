"""Real trainers let the model answer at every evaluation, and train as if they had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from vocabguard import RunLog

FEW = {"enabled": True, "languages": ["ja", "ru"], "per_language": 2, "max_new_tokens": 4}
SMALL: dict[str, Any] = {"probe": {"enabled": False}, "preflight": {"enabled": False}}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "hf": {"eval_strategy": "steps", "eval_steps": 2},
    "lightning": {"validate": True, "val_check_interval": 2, "check_val_every_n_epoch": None},
}


def run(kit: Any, name: str, tokenizer: Any, folder: Path, callbacks: tuple[Any, ...], **arguments: Any) -> Any:
    return kit.RUNS[name](
        kit.tiny_model("gpt2"), kit.random_rows(24), tokenizer, folder, callbacks=callbacks, **EVALUATIONS[name],
        **arguments,
    )  # fmt: skip


def test_answers_at_every_evaluation(kit: Any, trainer_name: str, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS[trainer_name](
        tokenizer=tokenizer, confusion=FEW, drift={"every_n_steps": 4}, **SMALL, **kit.QUIET
    )
    found = run(kit, trainer_name, tokenizer, tmp_path / "guarded", (guarded,))
    bare = run(kit, trainer_name, tokenizer, tmp_path / "bare", ())
    assert found.losses == bare.losses
    assert all(torch.equal(value, bare.model.state_dict()[name]) for name, value in found.model.state_dict().items())
    notes = RunLog.open(guarded.guard.run_dir).notes("confusion")
    assert [line["step"] for line in notes] == [2, 4, 6]
    assert all(line["answers"] == {"ja": 2, "ru": 2} for line in notes)
    assert guarded.guard.latest["vocabguard/confusion/ja"] == notes[-1]["shares"]["ja"]


def test_the_trainers_metrics_carry_them(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS["hf"](tokenizer=tokenizer, confusion=FEW, **SMALL, **kit.QUIET)
    run(kit, "hf", tokenizer, tmp_path, (guarded,), metric_for_best_model="eval_vocabguard/confusion/foreign",
        save_strategy="best", greater_is_better=False)  # fmt: skip
    assert 0 <= guarded.guard.latest["vocabguard/confusion/foreign"] <= 1


def test_lightnings_loggers_get_them(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    alerts = {"answers": {"metric": "confusion/line_pass", "op": "<", "threshold": 0.5}}
    guarded = kit.CALLBACKS["lightning"](tokenizer=tokenizer, confusion=FEW, alerts=alerts, **SMALL, **kit.QUIET)
    logger = CSVLogger(str(tmp_path))
    run(kit, "lightning", tokenizer, tmp_path, (guarded,), logger=logger)
    written = (Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8")
    assert "vocabguard/confusion/ja" in written.splitlines()[0]
    assert "vocabguard/alerts/answers" in written.splitlines()[0]


@pytest.mark.parametrize("name", ["hf", "lightning"])
def test_nothing_is_answered_unless_asked_for(kit: Any, name: str, tokenizer: Any, tmp_path: Path) -> None:
    guarded = kit.CALLBACKS[name](tokenizer=tokenizer, **SMALL, **kit.QUIET)
    run(kit, name, tokenizer, tmp_path, (guarded,))
    log = RunLog.open(guarded.guard.run_dir)
    assert log.notes("confusion") == log.notes("neighbors") == []
