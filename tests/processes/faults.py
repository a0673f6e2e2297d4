"""Two processes train with a guard that fails on one of them, in every place where it works.

    faults.py FOLDER TRAINER     trainers: hf, lightning

Each rank writes to ``rank-<rank>.pt`` for each case what its guard said, and the losses and weights of its training.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import conftest as kit
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoTokenizer

from vocabguard.guard import watched

RANK = int(os.environ["RANK"])
STEPS = 6
# Where it fails, on which rank. Rank 0 alone writes files and runs actions.
FAULTS: dict[str, tuple[str, int]] = {
    "finding the matrices": ("vocabguard.guard.watched.find_matrices", 1),
    "copying the baseline": ("vocabguard.guard.watched.copy_baseline", 0),
    "making the folder": ("vocabguard.runlog.RunWriter.start", 0),
    "counting a batch": ("vocabguard.measure.exposure.ExposureCounter.observe", 1),
    "reading a gradient": ("vocabguard.measure.exposure.ExposureCounter.observe_gradient", 1),
    "closing a step": ("vocabguard.measure.exposure.ExposureCounter.end_step", 0),
    "measuring": ("vocabguard.guard.checks.measuring", 1),
    "packing counts": ("vocabguard.measure.exposure.too_large", 1),
    "adding steps": ("vocabguard.measure.exposure.ExposureCounter._add_steps", 0),
    "working out residuals": ("vocabguard.measure.drift._Pass.of_all_processes", 1),
    "summing up": ("vocabguard.guard.summary.scalars_of", 0),
    "the alerts": ("vocabguard.alerts.machine.AlertMachine.update", 1),
    "writing a check": ("vocabguard.runlog.RunWriter.check", 0),
    "holding rows": ("vocabguard.guard.hold.rows_to_hold", 1),
    "keeping rows": ("vocabguard.protect.hold.RowKeeper.keep", 1),
    "telling of a check": ("vocabguard.runlog.RunWriter.check", 0),
    "making a plan": ("vocabguard.guard.echo.next_plan", 1),
    "the last rows": ("vocabguard.runlog.RunWriter.rows", 0),
}
LATER = {"counting a batch": 3, "reading a gradient": 3, "closing a step": 3, "measuring": 3, "packing counts": 2,
         "adding steps": 2, "working out residuals": 3, "summing up": 2,
         "the alerts": 2, "writing a check": 2, "holding rows": 3, "keeping rows": 4,
         "telling of a check": 2, "making a plan": 1}  # fmt: skip
PROTECTS = {"holding rows", "keeping rows", "telling of a check", "making a plan"}


class OnPurposeError(RuntimeError):
    """What is raised."""


@contextmanager
def failing(case: str) -> Iterator[None]:
    """The place fails on its rank, from its n-th call on."""
    target, rank = FAULTS[case]
    if rank != RANK:
        yield
        return
    owner_name, _, name = target.rpartition(".")
    owner = _found(owner_name)
    real, calls = getattr(owner, name), [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] >= LATER.get(case, 1):
            raise OnPurposeError(f"broken on purpose ({case})")
        return real(*args, **kwargs)

    with patch.object(owner, name, broken):
        yield


def _found(dotted: str) -> Any:
    import importlib

    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise LookupError(dotted)


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def train(trainer: str, case: str | None, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """One training run of both processes; a guard only where there is a case ("none" for a sound one)."""
    rows = kit.random_rows(2 * STEPS * kit.BATCH, seed=3)
    arguments: dict[str, Any] = {"ddp_backend": "gloo"}
    if trainer == "lightning":
        arguments = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    callbacks: tuple[Any, ...] = ()
    if case is not None:
        options: dict[str, Any] = {"drift": {"every_n_steps": 2}, "probe": {"enabled": False}}
        if case in PROTECTS:
            options |= {"echo": {"enabled": True, "dose": 0.5, "list_tokens": 4, "mode": "balanced"}}
            options |= {"hold": {"enabled": True}}
        log = {"console": False, "tensorboard": False}
        callbacks = (kit.CALLBACKS[trainer](tokenizer=tokenizer, log=log, **options),)
    told, logger = Told(), logging.getLogger("vocabguard")
    logger.addHandler(told)
    with ExitStack() as stack:
        if case in FAULTS:
            stack.enter_context(failing(case))
        run = kit.RUNS[trainer](
            kit.tiny_model(), rows, tokenizer, folder / str(case).replace(" ", "-"), steps=STEPS, callbacks=callbacks,
            **arguments,
        )  # fmt: skip
    logger.removeHandler(told)
    guard = callbacks[0].guard if callbacks else None
    return {
        "losses": run.losses,
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "reason": None if guard is None else guard.failure,
        "told": [said for said in told.said if "disabled itself" in said],
        "last": None if guard is None or guard.last is None else guard.last.step,
    }


def main() -> None:
    folder, trainer = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    watched.build_table = cache(watched.build_table)  # the same for all runs
    found = {str(case): train(trainer, case, folder, tokenizer) for case in (None, "none", *FAULTS, "again")}
    torch.save(found, folder / f"rank-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
