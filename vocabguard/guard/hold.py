"""Hold, wired to the optimizer's step: which rows keep still is decided by the counts of that very step."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.config import ConfigError, HoldConfig
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.hold import HoldMode, RowKeeper, hold_rows, hold_shard, rows_to_hold
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.sharding import local_rows


def unheld(matrix: VocabMatrix) -> str | None:
    """Why the rows of a matrix cannot be put back after a step, as its engine spreads it; None where they can."""
    if (held := matrix.held) is not None:
        return f"{held.engine} has the output rows in parts of its own"
    if hasattr(matrix.weight, "_hp_mapping"):
        return "DeepSpeed steps copies of the output rows, of which each process has a part (ZeRO)"
    shard = matrix.shard
    if shard is not None and shard.partial:
        return "the output matrix is split by columns, so no process has a whole row"
    return None


class Holder:
    """Keeps the rows before a step and puts the held ones back after it.

    Of a matrix whose rows are spread over processes, each holds its own; see `unheld` for what cannot be held.

    Raises:
        ConfigError: for rows that an adapter makes.

    A step has one message: the rows that a process sets free, by the training's own process group. A guard that has
    failed goes on to send that all are, so that no process waits for it, and none holds what others do not, until the
    guards meet at a check.

    Attributes:
        on: whether rows are held.
        absent: whether this guard only answers the others.
        held: (V,) bool, the rows held in the last step; None before the first.
    """

    def __init__(self, config: HoldConfig, matrix: VocabMatrix, counter: ExposureCounter) -> None:
        if (adapter := matrix.adapter) is not None:
            raise ConfigError(
                f"hold: {adapter.kind} makes the output rows, so none can be put back by itself; allowed: a head that "
                "is trained as a whole (modules_to_save)"
            )
        self.on = False
        self.absent = False
        self.held: Tensor | None = None
        self._config, self._matrix, self._counter = config, matrix, counter
        self._keeper = RowKeeper(on_host=config.anchor == "host")
        self._kept = self._told = False
        self._last: Tensor | None = None

    def describe(self) -> str:
        """Which rows are held, and how, in words."""
        window = self._config.window_steps
        which = "that were never a data target" if window is None else f"without a data target in {window:,} steps"
        how = "keep still" if self._config.mode == "freeze" else "move by their common mean only"
        return f"output rows {which} {how}"

    def switch(self, on: bool) -> None:
        """Hold from the next step on, or no more. For all processes to call.

        Raises:
            PeerFaultError: if the guard of another process has failed; nothing is switched then.
        """
        if on == self.on:
            return
        # Steps have a message only while it is on: no process may take it to be on alone.
        collective.raise_if_peer_failed()
        self.on, self._last = on, None

    # -- steps -------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Keep the rows as they are before the step; once more where it begins anew, since a step may be skipped."""
        self._told = False
        if self.on:
            self._keeper.keep(local_rows(self._matrix.weight.detach()))
            self._kept = True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back the rows that are to be held by all processes' targets.

        Args:
            optimizer: whose step it was; moments of held rows are cleared or levelled.
        """
        if self.on and self._kept:
            self._kept = False
            self._put_back(optimizer)
        # A guard that hears of another's fault between two steps answers in the next one.
        self._told = False

    def _put_back(self, optimizer: torch.optim.Optimizer) -> None:
        weight, mode = self._matrix.weight, cast(HoldMode, self._config.mode)
        state: Any = optimizer.state.get(weight, {})
        shard, before, rows = self._matrix.shard, self._keeper.rows, local_rows(weight.detach())
        own = {key: local_rows(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        self.held = ~self._any_process(self._free())
        held = self.held.to(weight.device)
        if shard is None:
            hold_rows(weight, before, held, mode, state)
            return
        # All processes know the whole mask, so they agree on whether there is anything to add up.
        if mode == "freeze" or bool(held.any()):
            speaks = shard.owner
            hold_shard(
                rows, before, held[shard.part], mode, own, held.sum(),
                lambda sums: collective.sum_in_step(sums if speaks else torch.zeros_like(sums)),
            )  # fmt: skip

    def _free(self) -> Tensor:
        """(V,) bool: the rows that this process's own targets set free.

        A row is held if no process sets it free: by its targets of this step, or by those of the data so far. A process
        that has seen no target of the data at all sets all of them free: it may be blind.
        """
        counter = self._counter
        step = counter.steps + 1
        if self._last is None or self._last.shape != counter.last_data_target.shape:
            self._last = counter.last_data_target
        self._last = torch.where(counter.data_targets_now(), step, self._last.to(counter.device))
        inputs = counter.inputs_now() if counter.tied else None
        held = rows_to_hold(self._last, counter.targets_now(), inputs, step, self._config.window_steps)
        return ~(held & (self._last >= 0).any())

    def _any_process(self, free: Tensor) -> Tensor:
        """The step's one message. What may fail comes before it: rows put back by some processes only would differ."""
        self._told = True
        return collective.any_in_step(free)

    # -- faults ------------------------------------------------------------------------------------------------------

    @property
    def takes_part(self) -> bool:
        """Whether a step has a message: the same on all processes."""
        return self.on or self.absent

    def leave(self) -> None:
        """This guard has failed, or another's has. Until all know, its steps go on to have their message."""
        self.on, self.absent = False, self.takes_part and collective.world_size() > 1

    def close(self) -> None:
        """All know, or there are no more steps."""
        self.on = self.absent = False

    def answer(self) -> None:
        """The message of a step in which this guard has failed, or of one after: all rows are free, everywhere."""
        # No step of a failed guard begins anew, so what was told in this one must not count for the next.
        told, self._told = self._told, False
        if self.takes_part and not told and collective.world_size() > 1:
            collective.any_in_step(torch.ones(self._counter.rows, dtype=torch.bool, device=self._counter.device))

    def share(self, live: Tensor) -> float:
        """Share in [0, 1] of the live rows that were held in the last step. `live`: (V,) bool on the CPU."""
        if not self.on or self.held is None or len(self.held) != len(live):
            return 0.0
        return float(self.held.cpu()[live].float().mean())
