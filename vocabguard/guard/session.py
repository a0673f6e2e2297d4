"""`VocabGuard`: one guard over one model's fine-tune. It knows no trainer; adapters translate hooks into its calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.config import ConfigError, ConfigSource, GuardConfig, load_config
from vocabguard.guard import state
from vocabguard.guard import watched as setup
from vocabguard.guard.batches import Observer, Targets
from vocabguard.guard.build import Parts, Route, Run, put_together
from vocabguard.guard.cadence import Cadence, StepTimer
from vocabguard.guard.checks import Checker, Moment
from vocabguard.guard.echo import EchoSource
from vocabguard.guard.failures import Faults
from vocabguard.guard.protection import Protection
from vocabguard.guard.reporting import Reporter, choose_folder
from vocabguard.protect.collator import EchoCollator
from vocabguard.results import CheckResult, NotApplicable, Watch
from vocabguard.runlog import RunLog


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
        self.targets: Targets | NotApplicable | None = targets
        self.rules = setup.build_rules(self.config, actions or {})
        self.faults = Faults(self.config.on_error)
        self.cadence = Cadence.of(self.config)
        self.watch: Watch | None = None
        self.last: CheckResult | None = None
        self.observer: Observer | None = None
        self.checker: Checker | None = None
        self.protection: Protection | None = None
        self.run_dir: Path | None = None
        self.latest: dict[str, float] = {}
        self.steps, self._batches_per_step = 0, 1
        self._source: EchoSource | None = None
        self._inject: Route | None = None
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
        schedule: Any = None,
        run_dir: str | Path | None = None,
        resumed: Mapping[str, Any] | None = None,
        dataloader: Any = None,
        writer: Any = None,
        hook_model: bool = True,
        steps_done: int = 0,
        inject: Route | None = None,
        batches_per_step: int = 1,
    ) -> Watch | None:
        """Begin to guard: take the baseline, count targets of the data to come, probe the base, set hooks.

        Args:
            model: the model that is trained, before its first step.
            optimizer: the optimizer or optimizers that hold its parameters; None reads no gradients.
            total_steps: planned optimizer steps, if known: the last one gets a check.
            schedule: torch scheduler, or rates of the steps to come; None where unknown, and nothing is forecast.
            run_dir: folder of the run log, where the configuration names none.
            resumed: a state from `state_dict`, to go on from it.
            dataloader: the training dataloader, for preflight; it is not iterated.
            writer: a TensorBoard ``SummaryWriter`` to share.
            hook_model: see batches in the model's forward pass; False where `observe` or `observe_batch` is called.
            steps_done: optimizer steps that the trainer has behind it. With no state to resume the base is what the
                model is now, and a warning says so.
            inject: how echo rows get into batches: ``collate`` wraps the dataloader's collate function, ``batch`` lets
                `observe_batch` append them; None where the dataloader has a collate function from `collator`.
            batches_per_step: micro-batches of this process in an optimizer step.

        Returns:
            What is watched and what is not; None if the guard stood down.

        Raises:
            ConfigError: for settings that do not fit the model, the tokenizer or the data. Nothing is changed then.
        """
        self._begin_anew()
        self._resumed = state.to_go_on(resumed or self._resumed, run_dir, steps_done, self.config.snapshot.source)
        self.cadence.total, self._batches_per_step, self._inject = total_steps, batches_per_step, inject
        attached = False
        try:
            with self.faults.contain("attach"):
                collective.open_line()
                state.require_known(self._resumed)
                parts = self._take(Run(model, dataloader, inject, total_steps, batches_per_step, schedule), hook_model)
                self.run_dir = choose_folder(self._resumed.get("run_dir"), self.config.run_dir or run_dir)
                self.watch = parts.describe(self.run_dir)
                table = parts.checker.watched.table
                self._reporter = Reporter(self.config, table, self.rules, self.run_dir, writer)
                self._reporter.watch(self.watch)
                parts.hook(optimizer, self.faults, hook_model=hook_model, steps_done=steps_done)
                if not self._resumed:
                    self.steps = steps_done
                    self._check(steps_done, first=True)
                elif self.protection is not None:
                    self.protection.decide(parts.checker.alerts.firing)
                self.start_epoch()
                attached = True
        finally:
            if not attached:
                self._let_go(for_good=True)
        self._resumed = {}  # another `attach` is another run
        self._timer.start(self.faults)  # only now, since the work of attaching is booked when it ends
        return self.watch if attached else None

    def _begin_anew(self) -> None:
        """Forget an earlier run of this guard: its hooks, its faults, its numbers."""
        self.finish(check=False)
        self.faults, self.cadence = Faults(self.config.on_error), Cadence.of(self.config)
        self.watch = self.last = self.observer = self.checker = self.run_dir = self.protection = None
        self.latest, self.steps, self._timer = {}, 0, StepTimer()

    def _take(self, run: Run, hook_model: bool) -> Parts:
        """The parts of the run, gone on from the state that is resumed."""
        parts = put_together(
            self.config, self.rules, run, self.tokenizer, self._resumed,
            hook_model=hook_model, faults=self.faults, targets=self.targets, source=self._source,
        )  # fmt: skip
        self.observer, self.checker, self.protection = parts.observer, parts.checker, parts.protection
        if self.protection is not None:
            self.cadence.fix()
        if self._resumed:
            state.restore(self, self._resumed)
        return parts

    # -- protection --------------------------------------------------------------------------------------------------

    def collator(self, inner: Callable[[list[Any]], Any], *, seq2seq: bool = False) -> EchoCollator:
        """A collate function that adds echo rows to the batches that `inner` makes, for dataloaders of one's own.

        Batches get the key ``vocabguard_echo``, which the guard takes out on their way into the model. With several
        workers that are started anew each epoch, call `start_epoch` before each epoch.

        Args:
            inner: takes examples with ``input_ids`` and makes a batch with ``labels``.
            seq2seq: whether the model is an encoder-decoder.

        Raises:
            ConfigError: without a tokenizer.
        """
        self._source = self._source or EchoSource(self.config, self.tokenizer, seq2seq=seq2seq)
        return EchoCollator(inner, self._source.feed, self._source.maker)

    def switch(self, kind: Literal["echo", "hold"], on: bool | None) -> None:
        """Switch echo or hold on or off, as soon as it can take effect.

        Args:
            kind: which.
            on: what is wanted; None leaves it to settings and rules again.

        Raises:
            ConfigError: if it is neither enabled nor armed nor named by a rule.
        """
        if self.protection is None or not self.protection.has(kind) or self.checker is None:
            raise ConfigError(f"{kind} is not part of this run; allowed: {kind}.armed: true before it begins")
        self.protection.ask(kind, on)
        self.protection.decide(self.checker.alerts.firing)

    def start_epoch(self, *, skipped: int = 0) -> None:
        """An epoch begins: call it before the dataloader is iterated.

        Args:
            skipped: batches that the collate function makes once more, only to be skipped, since the run is resumed.
        """
        if self.protection is not None:
            self.protection.start_epoch(skipped)

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
        if self.protection is not None:
            # Even when the guard is down: a mask that the model does not know must not reach it.
            with self.faults.contain("adding echo rows"):
                self.protection.join(batch, inject=not self.faults.down and self._inject == "batch")
        if self.observer is None or self.checker is None or self.faults.down or self.observer.hooked:
            return
        with self.faults.contain("counting a batch"):
            if not self.observer.batch(batch):
                self.observer.hook_model(self.checker.model)
        self._heed_faults()

    def step(self, step: int) -> CheckResult | None:
        """Tell the guard that optimizer step `step` (counted from 1) is done; gives the check, if one was due."""
        result = None
        if self.checker is not None and self._reporter is not None and not self.faults.down:
            with self.faults.contain("step"):
                self.steps = step
                if self.observer is not None:
                    self.observer.counter.end_step(step)
                self._timer.step(self.faults)
                if not self.cadence.chosen and self._timer.steps >= self.cadence.settle_steps:
                    self.cadence.choose(self._timer.median(), self.checker.check_seconds, self.checker.probe_seconds)
                if self.cadence.due(step):
                    result = self._check(step)
                if self.protection is not None:
                    self.protection.end_step()
        self._heed_faults()
        return result

    def check(self, *, at: Moment | None = None) -> CheckResult | None:
        """Check now, whatever the cadence says; the last result again if no step has come since.

        Args:
            at: look at what `confusion` (at an ``evaluation``) and `neighbors` (at the ``end``) ask for too.
        """
        if self._reporter is not None and self.checker is not None and not self.faults.down:
            with self.faults.contain("check"):
                last = self.last if self.last and self.last.step == self.steps else self._check(self.steps)
                self.latest.update(self._reporter.findings(self.checker.beside(at, last)))
            self._heed_faults()
        return self.last

    def take_requests(self) -> tuple[str, ...]:
        """What rules ask of the trainer since the last call: ``checkpoint``, ``stop``. For all processes to call."""
        asked: tuple[str, ...] = ()
        if self.checker is not None and self._reporter is not None and not self.faults.down:
            with self.faults.contain("asking the trainer"):
                asked = self.checker.take_requests()
            self._heed_faults()
        return asked

    def _check(self, step: int, *, first: bool = False) -> CheckResult:
        assert self.checker is not None
        assert self._reporter is not None
        with_probe = self.cadence.take_probe(step, first=first)
        self.last = self.checker.run(step, with_probe=with_probe, overhead=self._timer.overhead(self.faults))
        self.latest.update(self.last.scalars)
        began = time.perf_counter()
        self._reporter.check(self.last, self.checker.watched.table)
        # To say what was found is a part of what a check costs.
        self.checker.check_seconds += time.perf_counter() - began
        if self.protection is not None:
            base = self.checker.prober.base if self.checker.prober else None
            self.protection.follow(self.last, base, self._batches_per_step * (self.cadence.every or 1))
        return self.last

    def _heed_faults(self) -> None:
        if self.faults.down:
            self._let_go()

    def _let_go(self, *, for_good: bool = False) -> None:
        if self.observer is not None:
            self.observer.remove()
        if self.protection is not None:
            self.protection.stand_down()
            if for_good:
                self.protection.finish()

    # -- the end -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: V-sized vectors, plain values, references to baselines.

        For all processes to call. It survives ``torch.load(weights_only=True)``; rows go to the run folder once.
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
            self.check(at="end")
        log = None
        with self.faults.contain("finish"):
            self._let_go(for_good=True)
            if self._reporter is not None:
                reporter, self._reporter = self._reporter, None
                log = reporter.finish(self.last)
            collective.close_line()
        return log
