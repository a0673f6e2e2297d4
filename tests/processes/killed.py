"""A run that is killed in mid-run and goes on, and one that is left alone.

    killed.py FOLDER TRAINER PHASE     trainers: hf, lightning; phases: whole, first (is killed), second (goes on)

Each rank writes what its run ended with to ``<phase>-<rank>.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conftest as kit
import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoTokenizer, TrainerCallback

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS, SAVED, KILLED = 10, 5, 7
GUARDED: dict[str, Any] = {
    "drift": {"every_n_steps": 2},
    "exposure": {"push_every_n_steps": 3},
    "probe": {"enabled": False},
    "echo": {"enabled": True, "dose": 0.5, "list_tokens": 4, "mode": "balanced"},
    "hold": {"enabled": True},
    "alerts": {"moved": {"metric": "head/cosine_min", "op": "<", "threshold": 0.9999, "for_checks": 3}},
    "log": {"console": False, "tensorboard": False},
    "on_error": "raise",
}


class KillHF(TrainerCallback):
    """Ends the process as nothing else does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


class KillLightning(lightning.Callback):
    """The same."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def run_hf(folder: Path, phase: str, guarded: Any, tokenizer: Any) -> Any:
    """With a checkpoint in mid-epoch."""
    return kit.run_hf(
        kit.tiny_model(), data(SAVED + 2), tokenizer, folder, steps=STEPS, shuffle=True, save_strategy="steps",
        save_steps=SAVED, callbacks=(guarded, *([KillHF()] if phase == "first" else [])), resume=phase == "second",
        **({"ddp_backend": "gloo"} if WORLD > 1 else {}),
    )  # fmt: skip


def run_lightning(folder: Path, phase: str, guarded: Any, tokenizer: Any) -> Any:
    """With a checkpoint between epochs: Lightning's own dataloader begins each anew."""
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    spread = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": WORLD} if WORLD > 1 else {}
    return kit.run_lightning(
        kit.tiny_model(), data(SAVED), tokenizer, folder, steps=STEPS, enable_checkpointing=True,
        callbacks=(guarded, saves, *([KillLightning()] if phase == "first" else [])),
        checkpoint=str(folder / f"step={SAVED}.ckpt") if phase == "second" else None, **spread,
    )  # fmt: skip


def data(batches: int) -> list[dict[str, list[int]]]:
    """So many batches an epoch, of rows that are long enough for echo rows beside them."""
    short = kit.random_rows(4 * batches * WORLD * kit.BATCH, seed=5)
    joined = [[token for row in short[at : at + 4] for token in row["input_ids"]] for at in range(0, len(short), 4)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in joined]


def main() -> None:
    folder, trainer, phase = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    guarded = kit.CALLBACKS[trainer](tokenizer=tokenizer, **GUARDED)
    run = {"hf": run_hf, "lightning": run_lightning}[trainer](
        folder / ("whole" if phase == "whole" else "parts"), phase, guarded, tokenizer
    )
    guard = guarded.guard
    found, echo = guard.last, guard._protection.echo
    torch.save(
        {
            "step": found.step, "exposure": vars(found.exposure), "head": vars(found.head),
            "embedding": vars(found.embedding), "firing": sorted(found.firing),
            "alerts": guard._checker.alerts.state_dict(), "held": guard._protection.holder.held,
            "plan": asdict(echo.plan), "on": echo.on, "every": guard._cadence.every,
            "batches": guard._observer.counter.batches, "losses": run.losses,
            "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
            "rng": torch.get_rng_state(),
        },
        folder / f"{phase}-{RANK}.pt",
    )  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
