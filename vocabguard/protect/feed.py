"""How plans reach the workers of a dataloader: a few tensors in shared memory, written by the training process."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vocabguard.protect.plan import MODES, batch_ids, most_targets
from vocabguard.results import EchoPlan

_SLOTS = 2
_VERSION, _FIRST, _OFFSET, _COUNT, _CYCLE, _SEED, _LIST, _MODE = range(8)
_EPOCH, _BASE, _RANK, _WORLD, _FAILED, _RUN = range(6)
# One for the training process and 256 for workers; more of them share.
_CLOCKS = 257
_NO_LIMIT = 2**31


class EchoFeed:
    """The plans in force and to come, readable in every worker.

    There is room for two plans. The next one may be written once the current one holds for every batch that the model
    has seen, so no worker can still need the plan that it replaces.

    Args:
        capacity: most ids in a plan.
        dose_limit: echo targets per data target, at most, in every batch.

    Example:
        >>> feed, ids = EchoFeed(capacity=3), torch.tensor([7, 8, 9])
        >>> at = {"version": 0, "first_batch": 5, "cycle": 0, "offset": 0, "owed": 0.0, "seed": 0}
        >>> feed.publish(EchoPlan(mode="balanced", dose=0.1, rate=2.0, list_tokens=2, ids=ids, **at))
        >>> [feed.ids(batch) for batch in (4, 5, 6)]  # the plan holds from batch 5 on
        [[], [7, 8], [9, 7]]
    """

    def __init__(self, capacity: int, dose_limit: float = math.inf) -> None:
        self._limit = dose_limit
        self._numbers = _shared(torch.full((_SLOTS, 8), -1, dtype=torch.int64))
        self._floats = _shared(torch.zeros(_SLOTS, 3, dtype=torch.float64))
        self._ids = _shared(torch.zeros(_SLOTS, capacity, dtype=torch.int64))
        self._control = _shared(torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.int64))
        self._seconds = _shared(torch.zeros(_CLOCKS, dtype=torch.float64))
        self._read: dict[int, EchoPlan] = {}
        self._run = 0
        self._epoch, self._local = -1, 0

    # -- the training process writes ---------------------------------------------------------------------------------

    def publish(self, plan: EchoPlan) -> None:
        """Make a plan known; it replaces the one before the last. A ValueError if it has too many ids."""
        if len(plan.ids) > self._ids.shape[1]:
            raise ValueError(f"the plan has {len(plan.ids)} ids; allowed: at most {self._ids.shape[1]}")
        slot = plan.version % _SLOTS
        self._numbers[slot, _VERSION] = -1  # unreadable until it is whole
        self._ids[slot, : len(plan.ids)] = plan.ids
        self._floats[slot] = torch.tensor([plan.rate, plan.dose, plan.owed], dtype=torch.float64)
        values = [plan.first_batch, plan.offset, len(plan.ids), plan.cycle, plan.seed, plan.list_tokens]
        self._numbers[slot, _FIRST:] = torch.tensor([*values, MODES.index(plan.mode)])
        self._numbers[slot, _VERSION] = plan.version

    def clear(self) -> None:
        """Forget all plans: batches pass through untouched."""
        self._numbers[:, _VERSION] = -1
        self._control[_FAILED] = 0
        self._control[_RUN] += 1

    def place(self, rank: int, world: int) -> None:
        """Tell workers, where torch.distributed is not set up, which process they serve."""
        self._control[_RANK], self._control[_WORLD] = rank, world

    def start_epoch(self, first_batch: int) -> None:
        """An epoch begins, before its dataloader is iterated; its first batch has this number."""
        self._control[_BASE] = first_batch
        self._control[_EPOCH] += 1

    @property
    def failed(self) -> bool:
        """Whether a collator has given up."""
        return bool(self._control[_FAILED])

    @property
    def seconds(self) -> float:
        """Time that making rows has taken, all workers together."""
        return float(self._seconds.sum())

    # -- workers read ------------------------------------------------------------------------------------------------

    def next_batch(self) -> int:
        """The number of the batch that is collated now; each call is the next batch of this worker.

        A dataloader hands batches to its workers in turn, so worker w of W collates batches w, w + W, ... of an epoch.
        """
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self._epoch != int(self._control[_EPOCH]):
            self._epoch, self._local = int(self._control[_EPOCH]), 0
        number = int(self._control[_BASE]) + first + workers * self._local
        self._local += 1
        return number

    def ids(self, batch: int) -> list[int]:
        """The ids to echo in a batch; empty where no plan holds."""
        plan = self.plan_at(batch)
        if plan is None or plan.rate == 0 or self.failed:
            return []
        return batch_ids(plan, batch, self.rank, int(self._control[_WORLD]))

    def room(self, batch: int, data_targets: int) -> int:
        """Echo targets that a batch with so many data targets may get at most; see `most_targets`."""
        plan = self.plan_at(batch)
        # Without a plan nothing is echoed but what is tried out before step 1.
        if plan is None or math.isinf(self._limit):
            return _NO_LIMIT
        return most_targets(plan, data_targets, self._limit)

    @property
    def rank(self) -> int:
        """The process that this feed serves."""
        return int(self._control[_RANK])

    def plan_at(self, batch: int) -> EchoPlan | None:
        """The newest plan that holds for a batch."""
        best = -1
        for slot in range(_SLOTS):
            version, first = int(self._numbers[slot, _VERSION]), int(self._numbers[slot, _FIRST])
            if version > best and first <= batch:
                best = version
        if best < 0:
            return None
        if self._run != int(self._control[_RUN]):
            # Another run numbers its plans from 0 again.
            self._run, self._read = int(self._control[_RUN]), {}
        if best not in self._read:
            kept = {version: plan for version, plan in self._read.items() if version == best - 1}
            self._read = {**kept, best: self._load(best % _SLOTS)}
        return self._read[best]

    def fail(self) -> None:
        """Give up: from now on every worker passes batches through."""
        self._control[_FAILED] = 1

    def spend(self, seconds: float) -> None:
        """Book time, each worker in a place of its own."""
        worker = get_worker_info()
        self._seconds[0 if worker is None else 1 + worker.id % (_CLOCKS - 1)] += seconds

    def _load(self, slot: int) -> EchoPlan:
        numbers = self._numbers[slot].tolist()
        rate, dose, owed = self._floats[slot].tolist()
        ids: Tensor = self._ids[slot, : numbers[_COUNT]].clone()
        return EchoPlan(
            version=numbers[_VERSION], first_batch=numbers[_FIRST], mode=MODES[numbers[_MODE]], dose=dose, rate=rate,
            list_tokens=numbers[_LIST], ids=ids, cycle=numbers[_CYCLE], offset=numbers[_OFFSET], owed=owed,
            seed=numbers[_SEED],
        )  # fmt: skip


def _shared(tensor: Tensor) -> Tensor:
    """The tensor, moved to memory that worker processes see."""
    shared: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return shared
