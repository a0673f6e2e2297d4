"""Rules that ask a real trainer to checkpoint and to stop, and tell a webhook of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard import RunLog

SMALL: dict[str, Any] = {"probe": {"enabled": False}, "preflight": {"enabled": False}}
BOTH = ["checkpoint", "stop"]
MOVED = {"metric": "head/cosine_mean", "op": "<", "threshold": 0.9999, "for_checks": 2, "actions": BOTH}
STEPS = 12
# Four batches an epoch: Lightning warns of resuming within one.
ROWS = 16


def steps_of(run: Any) -> int:
    return (
        getattr(run.trainer, "state", run.trainer).global_step
        if hasattr(run.trainer, "args")
        else run.trainer.global_step
    )


def checkpoints(folder: Path, trainer: str) -> list[Path]:
    """What a resumed run is given."""
    pattern = "checkpoint-*" if trainer == "hf" else "**/vocabguard-step=*.ckpt"
    return sorted(folder.glob(pattern))


def state_in(checkpoint: Path, trainer: str) -> dict[str, Any]:
    """The guard's state in a checkpoint."""
    if trainer == "hf":
        return torch.load(checkpoint / "vocabguard.pt", weights_only=True)
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]
    return next(value for key, value in saved.items() if "VocabGuard" in key)


def test_a_rule_checkpoints_and_stops_and_the_run_can_go_on(
    kit: Any, receiver: Any, tokenizer: Any, tmp_path: Path, trainer_name: str
) -> None:
    def guarded(url: str) -> Any:
        return kit.CALLBACKS[trainer_name](
            tokenizer=tokenizer, drift={"every_n_steps": 2}, alerts={"moved": MOVED}, sinks={"webhook": {"url": url}},
            **SMALL, **kit.QUIET,
        )  # fmt: skip

    with receiver() as server:
        callback = guarded(server.url)
        run = kit.RUNS[trainer_name](
            kit.tiny_model(), kit.random_rows(ROWS), tokenizer, tmp_path, steps=STEPS, callbacks=(callback,)
        )
        sent = [json.loads(body) for _, body, _ in server.seen]
    # Over the threshold at steps 2 and 4.
    assert steps_of(run) == callback.guard.last.step == 4
    [checkpoint] = checkpoints(tmp_path, trainer_name)
    state = state_in(checkpoint, trainer_name)
    assert state["step"] == 4
    assert state["alerts"]["moved"]["state"] == "firing"
    told = [(one["rule"], one["state"], one["step"]) for one in sent if one["rule"] == "moved"]
    assert told == [("moved", "firing", 4)]
    alerts = RunLog.open(callback.guard.run_dir).alerts()
    assert [(one.rule, one.step) for one in alerts if one.rule == "moved"] == [("moved", 4)]

    with receiver() as server:
        again = guarded(server.url)
        resume = {"resume": str(checkpoint)} if trainer_name == "hf" else {"checkpoint": str(checkpoint)}
        resumed = kit.RUNS[trainer_name](
            kit.tiny_model(), kit.random_rows(ROWS), tokenizer, tmp_path, steps=STEPS, callbacks=(again,), **resume
        )
    # Who resumes has decided: a rule that fires already does not stop the run once more.
    assert steps_of(resumed) == again.guard.last.step == STEPS
    assert "moved" in again.guard.last.firing
    uninterrupted = kit.RUNS[trainer_name](
        kit.tiny_model(), kit.random_rows(ROWS), tokenizer, tmp_path / "bare", steps=STEPS
    )
    assert all(
        torch.equal(value, uninterrupted.model.state_dict()[name]) for name, value in resumed.model.state_dict().items()
    )


def test_a_forecast_stops_a_run_before_the_loss(kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str) -> None:
    rule = {
        "metric": "forecast/*/below_0.95",
        "threshold": 0.5,
        "min_rows": 20,
        "actions": ["stop"],
        "level": "critical",
    }
    callback = kit.CALLBACKS[trainer_name](
        tokenizer=tokenizer, drift={"every_n_steps": 1}, alerts={"soon": rule}, **SMALL, **kit.QUIET
    )
    run = kit.RUNS[trainer_name](
        kit.tiny_model(), kit.random_rows(ROWS), tokenizer, tmp_path, steps=STEPS, callbacks=(callback,)
    )
    [change] = [one for one in RunLog.open(callback.guard.run_dir).alerts() if one.rule == "soon"][:1]
    # Where it fires before the first step, the first step is still made.
    assert steps_of(run) == max(1, change.step) < STEPS
    lost = float((callback.guard.last.head.cosine < 0.95).float().mean())
    assert change.story.share > 0.5 > lost
    assert f"at the end (step {STEPS})" in change.story.what


def test_answers_stop_a_run_at_an_evaluation(kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str) -> None:
    evaluations: dict[str, Any] = {
        "hf": {"eval_strategy": "steps", "eval_steps": 3},
        "lightning": {"validate": True, "val_check_interval": 3, "check_val_every_n_epoch": None},
    }[trainer_name]
    rule = {"metric": "confusion/*/line_pass", "op": "<=", "threshold": 0.99, "actions": BOTH}
    asked = {"enabled": True, "languages": ["ja", "ru"], "per_language": 2, "max_new_tokens": 12}
    callback = kit.CALLBACKS[trainer_name](
        tokenizer=tokenizer, drift={"every_n_steps": 5}, alerts={"answers": rule}, confusion=asked, **SMALL, **kit.QUIET
    )
    run = kit.RUNS[trainer_name](
        kit.tiny_model("gpt2"), kit.random_rows(ROWS), tokenizer, tmp_path, steps=STEPS, callbacks=(callback,),
        **evaluations,
    )  # fmt: skip
    [change] = [one for one in RunLog.open(callback.guard.run_dir).alerts() if one.rule == "answers"]
    assert steps_of(run) == change.step == 3
    assert len(checkpoints(tmp_path, trainer_name)) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_a_lightning_checkpoint_lies_with_the_trainers_own(
    kit: Any, tokenizer: Any, tmp_path: Path, enabled: bool
) -> None:
    callback = kit.CALLBACKS["lightning"](
        tokenizer=tokenizer, drift={"every_n_steps": 2}, alerts={"moved": MOVED}, **SMALL, **kit.QUIET
    )
    run = kit.run_lightning(
        kit.tiny_model(), kit.random_rows(ROWS), tokenizer, tmp_path, steps=STEPS, callbacks=(callback,),
        enable_checkpointing=enabled,
    )  # fmt: skip
    [checkpoint] = checkpoints(tmp_path, "lightning")
    assert checkpoint.parent == tmp_path / "checkpoints"
    if enabled:
        assert Path(run.trainer.checkpoint_callback.dirpath) == checkpoint.parent
