"""What protection adds to a step of a real model: blocks with and without it, in turn, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real.train import QUIET, short_run
from transformers import TrainerCallback

from vocabguard.integrations.huggingface import VocabGuardCallback

BLOCK, SETTLE = 12, 4
"""Steps of a block, and how many of them are left out: rows that were made before a switch."""


class Switcher(TrainerCallback):
    """Switches protection on and off from block to block, and times the steps by the process's own clock."""

    def __init__(self, guarded: VocabGuardCallback, kinds: Sequence[str]) -> None:
        self._guarded, self._kinds, self._began = guarded, kinds, 0.0
        self.blocks: list[list[float]] = [[]]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.blocks[-1].append(time.process_time() - self._began)
        if state.global_step % BLOCK == 0:
            for kind in self._kinds:
                self._guarded.guard.switch(kind, len(self.blocks) % 2 == 1)  # type: ignore[arg-type]
            self.blocks.append([])


def step_time(cache: Path, name: str, overrides: Sequence[str], pairs: int = 5) -> dict[str, Any]:
    """Mean seconds of a step with over without protection, for pairs of neighbouring blocks.

    Args:
        cache: the bench's folder.
        name: of a recipe.
        overrides: settings of the guard that arm what is switched: ``echo.armed=true``, ``hold.armed=true``.
        pairs: of blocks.

    Returns:
        ``ratios`` of the pairs, their ``median``, and the mean CPU ``seconds`` of a step without protection.
    """
    steps = BLOCK * 2 * pairs
    kinds = [kind for kind in ("echo", "hold") if f"{kind}.armed=true" in overrides]
    quiet = ("probe.enabled=false", "drift.every_n_steps=1000000", "log.console=false")
    guarded = VocabGuardCallback("watch", overrides=[*quiet, *overrides], **QUIET)
    switcher = Switcher(guarded, kinds)
    short_run(cache, name, [guarded, switcher], steps=steps, planned=steps)
    means = [statistics.fmean(block[SETTLE:]) for block in switcher.blocks if len(block) == BLOCK]
    ratios = [means[at + 1] / means[at] for at in range(0, len(means) - 1, 2)]
    return {
        "recipe": name, "overrides": list(overrides), "seconds": statistics.fmean(means[::2]), "ratios": ratios,
        "median": statistics.median(ratios),
    }  # fmt: skip
