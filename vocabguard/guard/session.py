"""`VocabGuard`: one guard over one model's fine-tune. It knows no trainer; adapters translate hooks into its calls."""

from __future__ import annotations

import logging
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
from vocabguard.guard.probing import Prober, build_prober
from vocabguard.guard.report import Reporter, free_folder
from vocabguard.measure.exposure import ExposureCounter, exposure_classes
from vocabguard.measure.probe import probe_applicable
from vocabguard.results import CheckResult, NotApplicable, Preflight, Watch
from vocabguard.runlog import RunLog
from vocabguard.settings import GuardConfig

logger = logging.getLogger("vocabguard")


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

        Returns:
            What is watched and what is not; None if the guard stood down.

        Raises:
            ConfigError: for settings that do not fit the model, the tokenizer or the data. Nothing is changed then.
        """
        self._resumed = resumed or self._resumed
        self._silent = False
        with self.faults.contain("attach"):
            self.cadence.total = total_steps
            watched = setup.watch_model(model, self.tokenizer, self.config, self._resumed)
            shift = self.config.exposure.shift_labels
            shift = predicts_next(model) if shift is None else shift
            flight = self._preflight(dataloader, watched.rows, shift, need_labels=hook_model)
            prober = self._prober(model, watched, flight)
            self._observe(model, optimizer, watched, shift, hook_model)
            self.run_dir = self._choose_run_dir(run_dir)
            self.watch = self._describe(watched, flight, prober)
            self.checker = Checker(
                model,
                watched,
                self.observer.counter if self.observer else None,
                prober if isinstance(prober, Prober) else None,
                AlertMachine(self.rules),
                self.config.drift.chunk_rows,
                self.config.log.top_k,
            )
            self._reporter = Reporter(self.config, watched.table, self.rules, self.run_dir, writer)
            self._reporter.watch(self.watch)
            self._timer.start(self.faults)
            if self._resumed:
                state.restore(self, self._resumed)
            else:
                self.steps = 0
                self._check(0)
        # Another `attach` is another run.
        self._resumed = {}
        return self.watch

    def _preflight(
        self, dataloader: Any, rows: int, shift: bool, *, need_labels: bool
    ) -> Preflight | NotApplicable:
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

    def _prober(
        self, model: nn.Module, watched: setup.Watched, flight: Preflight | NotApplicable
    ) -> Prober | NotApplicable:
        if not self.config.probe.enabled:
            return NotApplicable("the probe is off")
        if self.tokenizer is None:
            return NotApplicable("the probe needs a tokenizer")
        if (reason := probe_applicable(model)) is not None:
            return reason
        expected = exposure_classes(flight.data_target) if isinstance(flight, Preflight) else None
        return build_prober(self.config.probe, self.tokenizer, watched.table, expected, self.config.seed)

    def _observe(self, model: nn.Module, optimizer: Any, watched: setup.Watched, shift: bool, hook: bool) -> None:
        if not self.config.exposure.enabled:
            return
        self.observer = Observer(
            ExposureCounter(watched.rows, next(model.parameters()).device, watched.tied),
            watched.gradient_matrix,
            shift=shift,
            push_every=self.config.exposure.push_every_n_steps,
            faults=self.faults,
            targets=self.targets,
        )
        if optimizer is not None:
            self.observer.hook_optimizers([optimizer] if hasattr(optimizer, "param_groups") else optimizer)
        if hook:
            self.observer.hook_model(model)

    def _choose_run_dir(self, suggested: str | Path | None) -> Path | None:
        if self._resumed.get("run_dir"):
            return Path(self._resumed["run_dir"])
        folder = self.config.run_dir or suggested
        return None if folder is None else collective.agree(free_folder(Path(folder)))

    def _describe(
        self, watched: setup.Watched, flight: Preflight | NotApplicable, prober: Prober | NotApplicable
    ) -> Watch:
        notes = [] if self.tokenizer is not None else ["no tokenizer: tokens have no groups and no texts"]
        return Watch(
            head=watched.describe("head"),
            embedding=watched.describe("embedding"),
            probe=prober if isinstance(prober, NotApplicable) else None,
            preflight=flight,
            live=int(watched.table.live.sum()),
            never_trained=int((~watched.table.trained).sum()),
            run_dir=None if self.run_dir is None else str(self.run_dir),
            notes=tuple(notes),
        )

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

    def step(self, step: int) -> CheckResult | None:
        """Tell the guard that optimizer step number `step` (counted from 1) is done.

        Returns:
            The check, if one was due.
        """
        if self.checker is None or self.faults.down:
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

    def _check(self, step: int) -> CheckResult:
        assert self.checker is not None
        assert self._reporter is not None
        with_probe = step == 0 or self.cadence.probe_due(step)
        if with_probe:
            self.cadence.last_probe = step
        overhead = self._timer.overhead(self.faults)
        self.last = self.checker.run(step, with_probe=with_probe, overhead=overhead)
        self.latest.update(self.last.scalars)
        self._reporter.check(self.last)
        self._warn_if_silent(self.last)
        return self.last

    def _warn_if_silent(self, found: CheckResult) -> None:
        """Say once that training goes on and no target was ever counted: the labels go another way."""
        exposure = found.exposure
        if found.step == 0 or self._silent or isinstance(exposure, NotApplicable):
            return
        if not bool((exposure.data_target + exposure.echo_target).any()):
            self._silent = True
            logger.warning(
                "vocabguard: no target has been counted by step %d: the labels do not pass through the model's forward "
                "(label smoothing and a loss of one's own take them out) and no `targets=` or `observe` tells them; "
                "every token looks as if it never was a target",
                found.step,
            )

    def _heed_faults(self) -> None:
        if self.faults.down and self.observer is not None:
            self.observer.remove()

    # -- the end -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: V-sized vectors, plain values, references to baselines.

        It survives ``torch.load(weights_only=True)``. A baseline in memory is written to the run folder once.
        """
        return {} if self.checker is None or self.faults.down else state.collect(self)

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
            if self.observer is not None:
                self.observer.remove()
            if self._reporter is not None:
                log = self._reporter.finish(self.last)
                self._reporter = None
        return log
