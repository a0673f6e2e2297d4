"""Hold, wired to the optimizer's step: which rows keep still is decided by the counts of that very step."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.config import ConfigError, HoldConfig
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.hold import HoldMode, RowKeeper, hold_rows, rows_to_hold
from vocabguard.rows.matrices import VocabMatrix


class Holder:
    """Keeps the rows before a step and puts the held ones back after it.

    Raises:
        ConfigError: for a matrix whose rows are spread over processes, or made by an adapter.

    Attributes:
        held: (V,) bool, the rows held in the last step; None before the first.
    """

    def __init__(self, config: HoldConfig, matrix: VocabMatrix, counter: ExposureCounter) -> None:
        if hasattr(matrix.weight, "to_local"):
            raise ConfigError("hold: the output matrix is sharded; allowed: a matrix that each process has whole")
        if (adapter := matrix.adapter) is not None:
            raise ConfigError(
                f"hold: {adapter.kind} makes the output rows, so none can be put back by itself; allowed: a head that "
                "is trained as a whole (modules_to_save)"
            )
        self.on = False
        self.held: Tensor | None = None
        self._config, self._matrix, self._counter = config, matrix, counter
        self._keeper = RowKeeper(on_host=config.anchor == "host")
        self._kept = False
        self._last: Tensor | None = None

    def describe(self) -> str:
        """Which rows are held, and how, in words."""
        window = self._config.window_steps
        which = "that were never a data target" if window is None else f"without a data target in {window:,} steps"
        how = "keep still" if self._config.mode == "freeze" else "move by their common mean only"
        return f"output rows {which} {how}"

    def switch(self, on: bool) -> None:
        """Hold from the next step on, or no more."""
        if on and not self.on:
            # Each process has counted its own batches only.
            self._last = collective.largest(self._counter.last_data_target)
        self.on = on

    def before_step(self) -> None:
        """Keep the rows as they are before the step; once more where it begins anew, since a step may be skipped."""
        if self.on:
            self._keeper.keep(self._matrix.weight)
            self._kept = True

    def after_step(self, optimizer: torch.optim.Optimizer, data: Tensor, asked: Tensor, inputs: Tensor | None) -> None:
        """Put the held rows back.

        Args:
            optimizer: whose step it was; moments of held rows are cleared or levelled.
            data: (V,) bool, targets of the data in this step, on any process.
            asked: (V,) bool, targets of data or echo.
            inputs: (V,) bool, inputs, where the matrix is tied.
        """
        if not self._kept or self._last is None:
            return
        self._kept = False
        counter, weight = self._counter, self._matrix.weight
        if len(self._last) != counter.rows:
            self._last = collective.largest(counter.last_data_target)
        step = counter.steps + 1
        self._last = torch.where(data, step, self._last)
        self.held = rows_to_hold(self._last, asked, inputs, step, self._config.window_steps)
        # Rows put back by some processes only would be different weights from here on: once more, is everyone well?
        collective.raise_if_peer_failed()
        mode = cast(HoldMode, self._config.mode)
        state: Any = optimizer.state.get(weight, {})
        hold_rows(weight, self._keeper.rows, self.held.to(weight.device), mode, state)

    def share(self, live: Tensor) -> float:
        """Share in [0, 1] of the live rows that were held in the last step. `live`: (V,) bool on the CPU."""
        if not self.on or self.held is None or len(self.held) != len(live):
            return 0.0
        return float(self.held.cpu()[live].float().mean())
