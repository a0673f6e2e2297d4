"""Two processes train under a rule that asks for a checkpoint and a stop; in one run rank 0 fails as it fires.

    alerts.py FOLDER TRAINER     trainers: hf, lightning

Each rank writes to ``rank-<rank>.pt`` for each run where its training ended, and what its guard said.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import conftest as kit
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoTokenizer

from vocabguard.results import CheckResult
from vocabguard.runlog import RunWriter

RANK = int(os.environ["RANK"])
STEPS = 8
RULE = {"metric": "head/cosine_mean", "op": "<", "threshold": 0.9999, "for_checks": 2}


def train(trainer: str, folder: Path, tokenizer: Any, *, broken: bool) -> dict[str, Any]:
    """One training run of both processes."""
    arguments: dict[str, Any] = {"ddp_backend": "gloo"}
    if trainer == "lightning":
        arguments = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    seen: list[str] = []
    callback = kit.CALLBACKS[trainer](
        tokenizer=tokenizer, log={"console": False, "tensorboard": False}, drift={"every_n_steps": 2},
        probe={"enabled": False}, alerts={"moved": RULE | {"actions": ["checkpoint", "stop", "tell"]}},
        actions={"tell": lambda change: seen.append(change.state)},
    )  # fmt: skip
    write = RunWriter.check

    def fails_as_it_fires(writer: RunWriter, result: CheckResult) -> None:
        if broken and "moved" in result.firing:
            raise RuntimeError("broken on purpose")
        write(writer, result)

    with patch.object(RunWriter, "check", fails_as_it_fires):
        run = kit.RUNS[trainer](
            kit.tiny_model(), kit.random_rows(2 * STEPS * kit.BATCH, seed=3), tokenizer, folder, steps=STEPS,
            callbacks=(callback,), **arguments,
        )  # fmt: skip
    guard = callback.guard
    pattern = "checkpoint-*" if trainer == "hf" else "**/*step=*.ckpt"
    return {
        "step": run.trainer.state.global_step if trainer == "hf" else run.trainer.global_step,
        "checkpoints": sorted(path.name for path in folder.glob(pattern)),
        "seen": seen,
        "reason": guard.failure,
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
    }


def main() -> None:
    folder, trainer = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    found = {
        str(broken): train(trainer, folder / f"broken-{broken}", tokenizer, broken=broken) for broken in (False, True)
    }
    torch.save(found, folder / f"rank-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
