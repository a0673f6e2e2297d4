"""Counts what a Hugging Face trainer is about to train on, by plain loops, without anything of the guard's.

On ``PYTHONPATH`` of a client's process. At each training step, before the trainer prepares the batch, labels that are
no -100 and have a token before them are counted, those of echo rows apart; at exit ``$SPY`` gets what was seen and the
trainer's log, one file a process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import sys
from typing import Any

MASK = "vocabguard_echo"
SEEN: dict[str, Any] = {"data": {}, "echo": {}, "steps": 0, "trainer": None}


def count(inputs: Any) -> None:
    """Add one micro-batch."""
    labels, mask = inputs["labels"].tolist(), inputs.get(MASK)
    mask = None if mask is None else mask.tolist()
    for row, line in enumerate(labels):
        for place in range(1, len(line)):
            if line[place] == -100:
                continue
            joined = mask is not None and isinstance(mask[0], list)
            echo = mask is not None and (mask[row][place] if joined else mask[row])
            of = SEEN["echo" if echo else "data"]
            of[line[place]] = of.get(line[place], 0) + 1


def spy_on(module: Any) -> None:
    """Wrap the trainer's step."""
    original = module.Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        SEEN["trainer"] = self
        SEEN["steps"] += 1
        if "labels" in inputs:
            count(inputs)
        return original(self, model, inputs, *arguments, **options)

    module.Trainer.training_step = training_step


class Finder:
    """Waits for the module of the trainer."""

    busy = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "transformers.trainer" or self.busy:
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        self.busy = False
        execute = spec.loader.exec_module

        def then(module: Any) -> None:
            execute(module)
            spy_on(module)

        spec.loader.exec_module = then
        return spec


def tell() -> None:
    trainer = SEEN.pop("trainer")
    if trainer is None:
        return
    SEEN["history"] = trainer.state.log_history
    SEEN["global_step"] = trainer.state.global_step
    SEEN["kind"] = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
    path = f"{os.environ['SPY']}-{os.environ.get('RANK', '0')}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(SEEN, file)


if __name__ == "sitecustomize" and os.environ.get("SPY"):
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    atexit.register(tell)
