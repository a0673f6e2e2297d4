"""Echo, wired to a run: which plan holds, when it is switched on and off, and how rows get into batches."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.config import ConfigError, EchoConfig, GuardConfig
from vocabguard.guard.watched import Watched
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.batches import add_rows
from vocabguard.protect.collator import RowMaker, data_targets
from vocabguard.protect.feed import EchoFeed
from vocabguard.protect.plan import (
    BY_NEED,
    Mode,
    adjusted_dose,
    allowed_ids,
    balanced,
    by_recall,
    foreseen,
    ids_in,
    least_exposed,
    lists_at_a_time,
    next_plan,
)
from vocabguard.protect.prompts import render_echo
from vocabguard.results import CheckResult, EchoPlan, Exposure, ProbeResult, RowDrift

_NO_LENGTH = (
    "echo.targets_per_live_token needs the number of planned steps, which is not known; allowed: null, and a dose"
)

_LIMITED = (
    "vocabguard: the echo settings need %.0f echo targets a batch; there are at most %.0f, since echo.dose_limit "
    "allows %g for each data target. Train longer, lower echo.targets_per_live_token, or raise echo.dose_limit"
)

logger = logging.getLogger("vocabguard")


class EchoSource:
    """What a dataloader's workers need: the shared plans and the maker of rows. Made once a guard.

    Args:
        tokenizer: renders the instructions.

    Raises:
        ConfigError: without a tokenizer, or for an instruction that its chat template does not render.
    """

    def __init__(self, config: GuardConfig, tokenizer: Any, *, seq2seq: bool) -> None:
        if tokenizer is None:
            raise ConfigError(
                "echo needs the model's tokenizer; pass `tokenizer=tokenizer` to the guard, or "
                "`processing_class=tokenizer` to a Hugging Face Trainer"
            )
        texts = enumerate(config.echo.instructions)
        try:
            prompts = [render_echo(tokenizer, f"echo.instructions[{place}]", text) for place, text in texts]
        except ValueError as error:
            raise ConfigError(str(error)) from error
        wanted = config.echo
        self.feed = EchoFeed(len(tokenizer), wanted.dose_limit)
        self.maker = RowMaker(
            prompts, list_tokens=wanted.list_tokens, fill=wanted.fill, seed=config.seed, seq2seq=seq2seq
        )
        self._pad = int(tokenizer.pad_token_id or 0)

    def join(self, batch: Any, ids: list[int], *, number: int, rank: int) -> Tensor | None:
        """Append the echo rows of some ids to a batch of tensors, in place, none longer than the batch's if they fit.

        Ids that the dose's limit has no room for are left out.

        Returns:
            (B + n,) bool, True at echo rows; None if there is no room for any.

        Raises:
            EchoError: if the batch cannot take them; it is not changed then.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            ids = ids[: self.feed.room(number, data_targets(labels, seq2seq=self.maker.seq2seq))]
        if not ids:
            return None
        width = batch["input_ids"].shape[1] if isinstance(batch, Mapping) and "input_ids" in batch else 0
        return add_rows(batch, self.maker(ids, batch=number, rank=rank, length=width), self._pad)


@dataclass(frozen=True)
class Pace:
    """What turns a dose into tokens a batch.

    Attributes:
        data_per_batch: data targets of a batch and process, if known.
        batches: planned batches of a process, if known.
        lag: batches that may have been made beyond the one in training.
        running: whether some may have been made before the first plan.
        row_tokens: tokens of a batch's row, padding too, if known.
    """

    data_per_batch: float | None
    batches: int | None
    lag: int
    running: bool = False
    row_tokens: float | None = None


class EchoControl:
    """Decides on plans and publishes them.

    Args:
        watch: (w,) int64, the watch list.
        counter: whose counts say how many data targets a batch has, where no preflight told.

    Raises:
        ConfigError: for an exclusion that is no token, a watch list of which nothing may be echoed, or a number of
            targets without a number of steps.

    Attributes:
        plan: the newest plan; None before the first.
        dose: echo targets per data target that is aimed at.
    """

    def __init__(
        self, config: GuardConfig, source: EchoSource, watched: Watched, watch: Tensor, pace: Pace,
        counter: ExposureCounter,
    ) -> None:  # fmt: skip
        self.config: EchoConfig = config.echo
        self.source, self.pace = source, pace
        self.on = False
        self.plan: EchoPlan | None = None
        self.dose = config.echo.dose
        self._seed, self._counter = config.seed, counter
        try:
            self.allowed = allowed_ids(watched.table, watched.tokenizer, self.config.exclude)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._ids = ids_in(watch, self.allowed) if self.config.mode == "watch" else self.allowed
        if len(self._ids) == 0:
            raise ConfigError("echo.mode is 'watch', but none of probe.watch may be echoed; allowed: live tokens")
        if self.config.targets_per_live_token is not None and pace.batches is None:
            raise ConfigError(_NO_LENGTH)
        self._waiting = self._limited = False
        # Batches seen when a plan was last tried, the first one that a plan may hold from, and the step to try again.
        self._seen = self._first = self._retry = 0
        source.feed.clear()
        # Processes with the same rows of data must add the same rows to them.
        self._replicas = watched.replicas
        source.feed.place(self._replicas.number, self._replicas.count)

    def describe(self) -> str:
        """Which tokens are echoed and how often, in words."""
        wanted = self.config.targets_per_live_token
        often = f"{wanted:g} times each by the end" if wanted is not None else f"{self.dose:g} for each data target"
        if (share := self._share()) < 1:
            often += f", of which echo.dose_limit leaves {100 * share:.2g} % at most"
        return f"{len(self._ids):,} tokens ({self.config.mode.replace('_', ' ')}), {often}"

    def _share(self) -> float:
        """How much of what is asked for the limit leaves, as far as is known before the run."""
        data = 1.0 if self.config.targets_per_live_token is None else self.pace.data_per_batch
        asked = 0.0 if data is None else self._asked(data)
        return 1.0 if not asked or data is None else self.config.dose_limit * data / asked

    # -- switching ---------------------------------------------------------------------------------------------------

    def switch(self, on: bool) -> None:
        """Echo from the next batch that can still be changed on, or no more."""
        if on != self.on:
            self.on = on
            self._publish()

    def catch_up(self, step: int) -> None:
        """Make the plan that waited for the first counts, or for the plan before it to come into force.

        All processes try in the same steps, and only in those in which it may have: others have no message for it.
        """
        if self._waiting and step >= self._retry:
            self._publish()
            # The same on all processes: of steps, and of batches that were agreed on.
            in_step = max(1.0, self._seen / max(1, self._counter.steps))
            self._retry = step + max(1, math.ceil((self._first - self._seen) / in_step)) if self._waiting else 0

    def revise(self, found: CheckResult, base: ProbeResult | None, batches: int) -> None:
        """Follow a check: the dose by its probe, the ids by its counts."""
        if self.config.auto.enabled and found.probe is not None and base is not None and found.probe is not base:
            auto = self.config.auto
            rise = probe_loss(found.probe, base) - probe_loss(base, base)
            self.dose = adjusted_dose(self.dose, rise, tolerated=auto.tolerated, least=auto.least, most=auto.most)
        if not self.on or self.plan is None or self._waiting:
            return
        if self.config.mode in BY_NEED and isinstance(found.exposure, Exposure):
            self._publish(self._neediest(found, found.exposure, batches))
        elif self.config.auto.enabled:
            self._publish()

    def _neediest(self, found: CheckResult, exposure: Exposure, batches: int) -> Tensor:
        """The ids that the batches until the next plan should echo, as they will stand when this plan holds."""
        assert self.plan is not None
        seen, world = self._counter.batches, self._replicas.count
        exposure = foreseen(exposure, self.plan, range(seen, seen + self.pace.lag), world, found.step)
        # Enough until the plan after this one holds, which prefetched batches delay.
        wanted = round(self.plan.rate * (batches + self.pace.lag) * world) + self.plan.list_tokens * world
        if self.config.mode == "least_exposed":
            cosine = found.head.cosine if isinstance(found.head, RowDrift) else None
            return least_exposed(self.allowed, exposure, cosine, wanted, found.step)
        if self.config.mode == "recall":
            nats = found.recall.nats if found.recall is not None and found.recall.ranks else None
            return by_recall(self.allowed, exposure, nats, wanted, self.config.boost, self._seed + self.plan.version)
        return balanced(self.allowed, exposure, wanted, self.config.boost, self._seed + self.plan.version)

    def start_epoch(self, skipped: int) -> None:
        """The collate function will be called for the batch after those seen, less those that it makes once more."""
        self.source.feed.start_epoch(self._counter.batches - skipped)

    # -- batches -----------------------------------------------------------------------------------------------------

    def join(self, batch: Any) -> Tensor | None:
        """Append echo rows to the batch that comes next, in place.

        Returns:
            (B + n,) bool echo mask; None where no rows were due.

        Raises:
            EchoError: if the batch cannot take them; it is not changed then.
        """
        if self.plan is None or (not self.on and self.plan.rate == 0):
            return None
        began, number = time.perf_counter(), self._counter.batches
        ids = self.source.feed.ids(number)
        if not ids:
            return None
        mask = self.source.join(batch, ids, number=number, rank=self._replicas.number)
        self.source.feed.spend(time.perf_counter() - began)
        return mask

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plans in force and to come, as plain values and V-sized vectors."""
        feed, seen = self.source.feed, self._counter.batches
        plans = {plan.version: plan for plan in (feed.plan_at(seen), self.plan) if plan is not None}
        return {
            "on": self.on,
            "dose": self.dose,
            "waiting": self._waiting,
            "retry": self._retry,
            "plans": [asdict(plan) for _, plan in sorted(plans.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plans of an earlier run."""
        self.on, self.dose, self._waiting = state["on"], state["dose"], state["waiting"]
        self._retry = state.get("retry", 0)
        for saved in state["plans"]:
            self.plan = EchoPlan(**saved)
            self.source.feed.publish(self.plan)

    # -- plans -------------------------------------------------------------------------------------------------------

    def _rate(self, seen: int) -> float:
        """Echo tokens a batch and process; 0 where data targets a batch are not known yet."""
        asked = self._data_per_batch(seen) or 0.0
        rate, most = self._asked(asked), self.config.dose_limit * asked
        if rate > most and asked and not self._limited:
            self._limited = True
            logger.warning(_LIMITED, rate, most, self.config.dose_limit)
        return min(rate, most)

    def _asked(self, data: float) -> float:
        """Echo tokens that the settings ask for, a batch and process that has so many data targets."""
        if self.config.targets_per_live_token is None:
            return self.dose * data
        assert self.pace.batches is not None
        return self.config.targets_per_live_token * len(self._ids) / (self.pace.batches * self._replicas.count)

    def _data_per_batch(self, seen: int) -> float | None:
        if self.pace.data_per_batch is not None:
            return self.pace.data_per_batch
        if seen == 0:
            return None
        targets = collective.total(torch.tensor(self._counter.data_targets))
        return float(targets) / (seen * self._replicas.count)

    def _at_a_time(self, rate: float, seen: int) -> int:
        """Echo tokens that a batch gets together."""
        tokens, length, data = self.config.list_tokens, self.pace.row_tokens, self._data_per_batch(seen)
        if length is None or data is None:
            return tokens
        to_come = None if self.pace.batches is None else max(0, self.pace.batches - seen)
        in_a_row = self.source.maker.lists_in_row(length)
        return tokens * lists_at_a_time(in_a_row, tokens, rate=rate, data=data, batches=to_come)

    def _publish(self, ids: Tensor | None = None) -> None:
        """The next plan, from the first batch that no worker has made yet; rank 0's, everywhere."""
        plan, seen = self.plan, collective.agree(self._counter.batches)
        self._seen, self._first, self._retry = seen, 0 if plan is None else plan.first_batch, 0
        rate = self._rate(seen) if self.on else 0.0
        # A plan to come still waits for its first batch: its slot must not be lost. Without data targets a batch to
        # go by, the first counts are waited for.
        unknown = self.on and self._data_per_batch(seen) is None
        self._waiting = unknown or (plan is not None and plan.first_batch > seen)
        if self._waiting:
            return
        first = seen + self.pace.lag if seen or plan is not None or self.pace.running else 0
        tokens = self._at_a_time(rate, seen)
        if plan is None:
            mode = cast(Mode, self.config.mode)
            chosen = self._ids[torch.randperm(len(self._ids), generator=torch.Generator().manual_seed(self._seed))]
            self.plan = EchoPlan(
                0, first, mode, 0.0, rate, tokens, chosen, cycle=0, offset=0, owed=0.0, seed=self._seed
            )
        else:
            world = self._replicas.count
            self.plan = next_plan(plan, first_batch=first, rate=rate, world=world, ids=ids, list_tokens=tokens)
        per_batch = self._data_per_batch(seen)
        dose = rate / per_batch if per_batch else 0.0
        self.plan = collective.agree(EchoPlan(**{**vars(self.plan), "dose": dose}))
        self.source.feed.publish(self.plan)


def probe_loss(found: ProbeResult, base: ProbeResult) -> float:
    """Mean -log p in nats of the probed tokens that the base could say in at least one context."""
    known = base.emitted.any(dim=1)
    if not bool(known.any()):
        return 0.0
    return float(-found.probability[known].clamp(min=torch.finfo(torch.float32).tiny).log().mean())
