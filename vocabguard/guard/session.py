"""`VocabGuard`: one guard over one model's fine-tune. It knows no trainer; adapters translate hooks into its calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.config import ConfigSource, load_config
from vocabguard.guard import setup, state
from vocabguard.guard.cadence import Cadence, StepTimer
from vocabguard.guard.check import Checker
from vocabguard.guard.faults import Faults
from vocabguard.guard.observe import Observer, Targets, predicts_next
from vocabguard.guard.preflight import preflight
from vocabguard.guard.probing import Prober, choose_prober
from vocabguard.guard.report import Reporter, free_folder
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.results import CheckResult, NotApplicable, Preflight, Watch
from vocabguard.runlog import RunLog
from vocabguard.settings import GuardConfig

logger = logging.getLogger("vocabguard")

_BEGINS_LATE = (
    "vocabguard: %d steps are done and no saved state of a guard is there: drift and counts begin here, not at the base"
)
_NO_TARGETS = (
    "vocabguard: no target has been counted by step %d, so every token looks as if it never was one. The labels do not "
    "reach the model's forward pass (label smoothing and a custom loss take them out); tell them by `targets=`"
)


class VocabGuard:
    """Watches the vocabulary rows of a model while it is fine-tuned.

    Args:
        config: a preset's name, a YAML file, a mapping, a `GuardConfig`, or None for the defaults.
        tokenizer: the model's tokenizer; without it there are no groups, no texts and no probe.
        overrides: dotted settings, e.g. ``("drift.every_n_steps=50",)``.
        targets: takes (inputs or None, targets) out of a batch, where batches have no ``labels``.
        actions: callables that rules may name in their ``actions``.
        **options: sections and settings of the configuration by keyword, e.g. ``probe={"watch": ["word"]}``.

    Raises:
        ConfigError: for a setting that cannot be used.

    Attributes:
        config: the merged configuration.
        watch: what `attach` set up; None before.
        last: the latest check; None before the first.
        latest: the latest value of every logged key; a probe's stay until the next probe.
    """

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        tokenizer: Any = None,
        overrides: Iterable[str] = (),
        targets: Targets | None = None,
        actions: Mapping[str, setup.Action] | None = None,
        **options: Any,
    ) -> None:
        self.config: GuardConfig = load_config(config, overrides, options)
        self.tokenizer = tokenizer
        self.targets = targets
        self.rules = setup.build_rules(self.config, actions or {})
        self.faults = Faults(self.config.on_error)
        self.cadence = Cadence.of(self.config)
        self.watch: Watch | None = None
        self.last: CheckResult | None = None
        self.observer: Observer | None = None
        self.checker: Checker | None = None
        self.run_dir: Path | None = None
        self.latest: dict[str, float] = {}
        self.steps = 0
        self._silent = False
        self._reporter: Reporter | None = None
        self._resumed: Mapping[str, Any] = {}
        self._timer = StepTimer()

    # -- the start ---------------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        *,
        total_steps: int | None = None,
        run_dir: str | Path | None = None,
        resumed: Mapping[str, Any] | None = None,
        dataloader: Any = None,
        writer: Any = None,
        hook_model: bool = True,
        steps_done: int = 0,
    ) -> Watch | None:
        """Begin to guard: take the baseline, count targets of the data to come, probe the base, set hooks.

        Args:
            model: the model that is trained, before its first step.
            optimizer: the optimizer or optimizers that hold its parameters; None reads no gradients.
            total_steps: planned optimizer steps, if known: the last one gets a check.
            run_dir: folder of the run log, where the configuration names none.
            resumed: a state from `state_dict`, to go on from it.
            dataloader: the training dataloader, for preflight; it is not iterated.
            writer: a TensorBoard ``SummaryWriter`` to share.
            hook_model: see batches in the model's forward pass; False where `observe` or `observe_batch` is called.
            steps_done: optimizer steps that the trainer has behind it. With no state to resume the base is what the
                model is now, and a warning says so.

        Returns:
            What is watched and what is not; None if the guard stood down.

        Raises:
            ConfigError: for settings that do not fit the model, the tokenizer or the data. Nothing is changed then.
        """
        self._begin_anew()
        self._resumed = resumed or self._resumed
        if steps_done > 0 and not self._resumed:
            logger.warning(_BEGINS_LATE, steps_done)
        self.cadence.total = total_steps
        attached = False
        try:
            with self.faults.contain("attach"):
                state.require_known(self._resumed)
                watched = setup.watch_model(model, self.tokenizer, self.config, self._resumed)
                shift = self.config.exposure.shift_labels
                shift = predicts_next(model) if shift is None else shift
                flight = self._preflight(dataloader, watched.rows, shift, need_labels=hook_model)
                prober = choose_prober(model, self.config, self.tokenizer, watched.table, flight)
                self._put_together(model, watched, prober if isinstance(prober, Prober) else None, shift)
                self.run_dir = self._choose_run_dir(run_dir)
                self.watch = setup.describe(watched, flight, prober, self.run_dir)
                self._reporter = Reporter(self.config, watched.table, self.rules, self.run_dir, writer)
                self._reporter.watch(self.watch)
                self._hook(model if hook_model else None, optimizer)
                if not self._resumed:
                    self.steps = steps_done
                    self._check(steps_done, first=True)
                attached = True
        finally:
            if not attached:
                self._let_go()
        self._resumed = {}  # another `attach` is another run
        # Only now, since the work of attaching is booked when it ends.
        self._timer.start(self.faults)
        return self.watch if attached else None

    def _begin_anew(self) -> None:
        """Forget an earlier run of this guard: its hooks, its faults, its numbers."""
        self.finish(check=False)
        self.faults = Faults(self.config.on_error)
        self.cadence = Cadence.of(self.config)
        self.watch = self.last = self.observer = self.checker = self.run_dir = None
        self.latest, self.steps, self._silent, self._timer = {}, 0, False, StepTimer()

    def _preflight(self, dataloader: Any, rows: int, shift: bool, *, need_labels: bool) -> Preflight | NotApplicable:
        wanted = self.config.preflight
        if not (wanted.enabled and self.config.exposure.enabled):
            return NotApplicable("preflight is off")
        if dataloader is None:
            return NotApplicable("preflight needs the training dataloader")
        return preflight(
            dataloader,
            rows=rows,
            shift=shift,
            targets=self.targets,
            max_batches=wanted.max_batches,
            max_seconds=wanted.max_seconds,
            seed=self.config.seed,
            need_labels=need_labels,
        )

    def _put_together(self, model: nn.Module, watched: setup.Watched, prober: Prober | None, shift: bool) -> None:
        """What counts and what checks, gone on from the state that is resumed; nothing is hooked or written yet."""
        if self.config.exposure.enabled:
            self.observer = Observer(
                ExposureCounter(watched.rows, next(model.parameters()).device, watched.tied),
                watched.gradient_matrix,
                shift=shift,
                push_every=self.config.exposure.push_every_n_steps,
                faults=self.faults,
                targets=self.targets,
            )
        self.checker = Checker(
            model,
            watched,
            self.observer.counter if self.observer else None,
            prober,
            AlertMachine(self.rules),
            self.config.drift.chunk_rows,
            self.config.log.top_k,
        )
        if self._resumed:
            state.restore(self, self._resumed)

    def _choose_run_dir(self, suggested: str | Path | None) -> Path | None:
        if self._resumed.get("run_dir"):
            return Path(self._resumed["run_dir"])
        folder = self.config.run_dir or suggested
        return None if folder is None else collective.agree(free_folder(Path(folder)))

    def _hook(self, model: nn.Module | None, optimizer: Any) -> None:
        if self.observer is None:
            return
        if optimizer is not None:
            self.observer.hook_optimizers([optimizer] if hasattr(optimizer, "param_groups") else optimizer)
        if model is not None:
            self.observer.hook_model(model)

    # -- while training runs -----------------------------------------------------------------------------------------

    def observe(self, inputs: Tensor | None, labels: Tensor, echo_mask: Tensor | None = None) -> None:
        """Count one micro-batch, where no hook on the model sees it.

        Args:
            inputs: (B, T) int64 token ids, or None.
            labels: (B, T) int64, -100 where there is no target; shifted here as the model shifts them.
            echo_mask: (B,) or (B, T) bool, True at echo rows.
        """
        if self.observer is not None and not self.faults.down:
            with self.faults.contain("counting a batch"):
                self.observer.observe(inputs, labels, echo_mask=echo_mask)
        self._heed_faults()

    def observe_batch(self, batch: Any) -> None:
        """Count a training batch by its ``labels`` or the ``targets=`` extractor.

        At the first batch that has neither, the model's forward pass is hooked, and from then on only that is counted.
        Call it before the batch reaches the model.
        """
        if self.observer is None or self.checker is None or self.faults.down or self.observer.hooked:
            return
        with self.faults.contain("counting a batch"):
            if not self.observer.batch(batch):
                self.observer.hook_model(self.checker.model)
        self._heed_faults()

    def step(self, step: int) -> CheckResult | None:
        """Tell the guard that optimizer step number `step` (counted from 1) is done.

        Returns:
            The check, if one was due.
        """
        if self.checker is None or self._reporter is None or self.faults.down:
            self._heed_faults()
            return None
        result = None
        with self.faults.contain("step"):
            self.steps = step
            if self.observer is not None:
                self.observer.counter.end_step(step)
            self._timer.step(self.faults)
            if not self.cadence.chosen and self._timer.steps >= self.cadence.settle_steps:
                self.cadence.choose(self._timer.median(), self.checker.check_seconds, self.checker.probe_seconds)
            if self.cadence.due(step):
                result = self._check(step)
        self._heed_faults()
        return result

    def check(self) -> CheckResult | None:
        """Check now, whatever the cadence says; the last result again if no step has come since."""
        if self._reporter is not None and not self.faults.down and (self.last is None or self.last.step != self.steps):
            with self.faults.contain("check"):
                self._check(self.steps)
            self._heed_faults()
        return self.last

    def _check(self, step: int, *, first: bool = False) -> CheckResult:
        assert self.checker is not None
        assert self._reporter is not None
        with_probe = first or self.cadence.probe_due(step)
        if with_probe:
            self.cadence.last_probe = step
        overhead = self._timer.overhead(self.faults)
        self.last = self.checker.run(step, with_probe=with_probe, overhead=overhead)
        self.latest.update(self.last.scalars)
        began = time.perf_counter()
        self._reporter.check(self.last, self.checker.watched.table)
        # To say what was found is a part of what a check costs.
        self.checker.check_seconds += time.perf_counter() - began
        if not first:
            self._warn_if_silent(self.last)
        return self.last

    def _warn_if_silent(self, found: CheckResult) -> None:
        """Say once that training goes on and no target was ever counted: the labels go another way."""
        exposure = found.exposure
        if self._silent or isinstance(exposure, NotApplicable):
            return
        if not bool((exposure.data_target + exposure.echo_target).any()):
            self._silent = True
            logger.warning(_NO_TARGETS, found.step)

    def _heed_faults(self) -> None:
        if self.faults.down:
            self._let_go()

    def _let_go(self) -> None:
        if self.observer is not None:
            self.observer.remove()

    # -- the end -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: V-sized vectors, plain values, references to baselines.

        It survives ``torch.load(weights_only=True)``. A baseline in memory is written to the run folder once.
        """
        saved: dict[str, Any] = {}
        if self.checker is not None and not self.faults.down:
            with self.faults.contain("state_dict"):
                saved = state.collect(self)
            self._heed_faults()
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from `saved` at the next `attach`."""
        self._resumed = dict(saved)

    def finish(self, *, check: bool = True) -> RunLog | None:
        """End the run: a last check, the closing tables, hooks off.

        Args:
            check: False where the weights are no longer those of the last step (best weights loaded back).

        Returns:
            The run log, opened for reading; None where none was written.
        """
        if check:
            self.check()
        log = None
        with self.faults.contain("finish"):
            self._let_go()
            if self._reporter is not None:
                reporter, self._reporter = self._reporter, None
                log = reporter.finish(self.last)
        return log
