"""`VocabGuard`: one guard over one model's fine-tune. It knows no trainer; adapters translate hooks into its calls."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.compare.evidence import evidence_of_run
from vocabguard.config import ConfigError, ConfigSource, GuardConfig, Options, load_config
from vocabguard.files import one_line
from vocabguard.guard.batches import Observer, Targets, inner_optimizers
from vocabguard.guard.build import Parts, Route, Run, put_together
from vocabguard.guard.cadence import Cadence, StepTimer
from vocabguard.guard.called import Call
from vocabguard.guard.checks import Checker, Moment
from vocabguard.guard.echo import EchoSource
from vocabguard.guard.failures import Faults
from vocabguard.guard.origin import origin_of
from vocabguard.guard.protection import Protection, needed
from vocabguard.guard.reporting import Reporter, choose_folder
from vocabguard.guard.resume import STATE_VERSION, fit_state, moved_along, require_known, restart_reason, tell_restart
from vocabguard.guard.summary import outdated
from vocabguard.guard.wanted import require_keys
from vocabguard.guard.watched import Action, build_rules
from vocabguard.protect.collator import EchoCollator
from vocabguard.results import CheckResult, NotApplicable, Timings, Watch, facts_html
from vocabguard.runlog import RunLog
from vocabguard.vocabulary.table import VocabTable

logger = logging.getLogger("vocabguard")

_watching: weakref.WeakKeyDictionary[nn.Module, weakref.ref[VocabGuard]] = weakref.WeakKeyDictionary()
"""The guard that was attached to a model last."""


class VocabGuard:
    """Watches the vocabulary rows of a model while it is fine-tuned.

    Args:
        config: a preset's name, a YAML file, a mapping, a `GuardConfig`, or None for the defaults.
        tokenizer: the model's tokenizer; without it there are no groups, no texts and no probe.
        overrides: dotted settings, e.g. ``("drift.every_n_steps=50",)``.
        targets: takes (inputs or None, targets) out of a batch, where batches have no ``labels``.
        actions: callables that rules may name in their ``actions``.
        call: asks a model of your own for logits, where it is not called as ``model(input_ids=...).logits``: takes the
            model and (B, T) ids, gives (B, T, V) logits, e.g. ``lambda model, ids: model(ids)``.
        **options: sections and settings of the configuration by keyword, e.g. ``probe={"watch": ["word"]}``.

    Raises:
        ConfigError: for a setting that cannot be used.

    Attributes:
        config: the merged configuration.
        tokenizer: as given, or the trainer's once attached.
        watch: what `attach` set up; None before.
        last: the latest check; None before the first.
        latest: the latest value of every logged key; a probe's stay until the next probe. NaN where the latest check
            could not compute it.
        run_dir: folder of the run log; None where none is written.
        steps: optimizer steps seen.

    Example:
        Your own loop, with a model of 8 rows and SGD:

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = VocabGuard(log={"console": False, "tensorboard": False}, drift={"every_n_steps": 1})
        >>> watch = guard.attach(model, optimizer, total_steps=1)
        >>> ids = torch.tensor([[1, 5, 5, 7]])
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> check = guard.step(1)
        >>> check.exposure.data_target.tolist()
        [0, 0, 0, 0, 0, 2, 0, 1]
        >>> guard.finish(), guard.failure
        (None, None)
    """

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        tokenizer: Any = None,
        overrides: Iterable[str] = (),
        targets: Targets | None = None,
        actions: Mapping[str, Action] | None = None,
        call: Call | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.config: GuardConfig = load_config(config, overrides, options)
        _require_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self._targets, self._call = targets, call
        self._rules = build_rules(self.config, actions or {})
        require_keys(self.config, self._rules)
        self._faults = Faults(self.config.on_error)
        self._cadence = Cadence.of(self.config)
        self.watch: Watch | None = None
        self.last: CheckResult | None = None
        self._observer: Observer | None = None
        self._checker: Checker | None = None
        self._protection: Protection | None = None
        self.run_dir: Path | None = None
        self.latest: dict[str, float] = {}
        self.steps, self._batches_per_step, self._attached = 0, 1, False
        self._source: EchoSource | None = None
        self._inject: Route | None = None
        self._reporter: Reporter | None = None
        self._resumed: Mapping[str, Any] = {}
        self._timer = StepTimer()
        self._began = 0
        self._optimizers: tuple[Any, ...] = ()

    # -- what can be read --------------------------------------------------------------------------------------------

    @property
    def table(self) -> VocabTable | None:
        """Groups, texts and live rows of the vocabulary; None before `attach`."""
        return None if self._checker is None else self._checker.watched.table

    def _repr_html_(self) -> str:
        """What a notebook shows: whether it works, where it logs, and the latest values."""
        state = "disabled itself" if self.failure else "attached" if self._checker is not None else "not attached"
        facts = {
            "state": state,
            "steps": f"{self.steps:,}",
            "run folder": "none" if self.run_dir is None else str(self.run_dir),
        }
        if self.failure:
            facts["failure"] = self.failure
        if self.last is not None:
            facts["firing"] = ", ".join(self.last.firing) or "none"
        return facts_html("VocabGuard", facts, self.latest)

    @property
    def failure(self) -> str | None:
        """Why the guard has disabled itself; None while it works."""
        return self._faults.reason

    @property
    def timings(self) -> Timings:
        """What the guard's own work has taken so far."""
        prober = None if self._checker is None else self._checker.prober
        asked = (0, 0.0, 0.0) if prober is None else (prober.runs, prober.seconds, prober.cpu_seconds)
        cadence = self._cadence
        return Timings(self._faults.seconds, cadence.check_seconds, cadence.probe_seconds, self._timer.median(), *asked)

    @property
    def counting(self) -> bool:
        """Whether targets are counted in this run."""
        return self._observer is not None

    def wants(self, kind: Literal["echo", "hold"]) -> bool:
        """Whether echo or hold may be switched on in a run: enabled, armed, or named by a rule."""
        return needed(self.config, self._rules, kind)

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
        tokenizer: Any = None,
        targets: Targets | NotApplicable | None = None,
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
            tokenizer: the trainer's, where the guard was given none.
            targets: the trainer's way of reading targets, where the guard was given none; or why there are none.

        Returns:
            What is watched and what is not; None if the guard disabled itself.

        Raises:
            ConfigError: for settings that do not fit the model, the tokenizer or the data. Nothing is changed then.
        """
        self._begin_anew(total_steps)
        self._attached = True
        self.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer
        self._resumed = resumed or self._resumed
        self._batches_per_step, self._inject = batches_per_step, inject
        attached = False
        try:
            with self._faults.contain("attach", refuses=True):
                self._take_over(model, optimizer, steps_done)
                collective.init_group()
                self._find_state(run_dir, steps_done)
                run = Run(model, dataloader, inject, total_steps, batches_per_step, schedule)
                parts = self._take(run, hook_model, self._targets or targets, steps_done)
                self.run_dir = choose_folder(self._resumed.get("run_dir"), self.config.run_dir or run_dir)
                self.watch = parts.describe(self.run_dir)
                table = parts.checker.watched.table
                self._reporter = Reporter(self.config, table, self._rules, self.run_dir, writer)
                evidence = self._evidence(parts.checker)
                self._reporter.watch(self.watch, origin_of(model, dataloader, self.tokenizer), evidence)
                if parts.checker.prober is not None:
                    parts.checker.prober.tell_through(self._reporter.say)
                parts.hook(optimizer, self._faults, hook_model=hook_model, steps_done=steps_done)
                if not self._resumed:
                    self.steps = steps_done
                    self._check(steps_done, first=True)
                elif self._protection is not None:
                    self._protection.decide(parts.checker.alerts.firing)
                self.start_epoch()
                attached = True
        finally:
            if not attached:
                self._let_go(for_good=True)
        self._resumed = {}  # another `attach` is another run
        self._timer.start(self._faults)  # only now, since the work of attaching is booked when it ends
        return self.watch if attached else None

    def _evidence(self, checker: Checker) -> dict[str, Any] | None:
        """What the run folder keeps of tokenizer and base. For all processes to call; rank 0 has the folder."""
        if self.run_dir is None:
            return None
        found = evidence_of_run(checker.watched.baselines, self.tokenizer if collective.is_main() else None)
        # A lost baseline restarts from the checkpoint's rows, which are no evidence of the base.
        return {name: value for name, value in found.items() if name != "base" or not checker.watched.lost}

    def _begin_anew(self, total_steps: int | None) -> None:
        """Forget an earlier run of this guard: its hooks, its faults, its numbers."""
        self.finish(check=False)
        self._faults, self._cadence = Faults(self.config.on_error), Cadence.of(self.config, total_steps)
        self.watch = self.last = self._observer = self._checker = self.run_dir = self._protection = None
        self.latest, self.steps, self._timer = {}, 0, StepTimer()

    def _take_over(self, model: nn.Module, optimizer: Any, steps_done: int) -> None:
        """End the guard that an interrupted run has left on this model; refuse a second one on the same run.

        Raises:
            ConfigError: if another guard has just been attached to the same model and optimizer.
        """
        known = _watching.get(model)
        other = None if known is None else known()
        mine = tuple(map(weakref.ref, inner_optimizers(optimizer)))
        self._began, self._optimizers = steps_done, mine
        if other is not None and other is not self and other._reporter is not None and other.failure is None:
            # A guard that has not seen a step yet belongs to the run that begins here.
            if mine and mine == other._optimizers and other.steps == other._began == steps_done:
                raise ConfigError("another guard watches this model already; allowed: one VocabGuardCallback a run")
            logger.warning("vocabguard: the guard of an earlier run still watched this model; that run is closed now")
            other.finish(check=False)
        _watching[model] = weakref.ref(self)

    def _find_state(self, suggested: str | Path | None, steps_done: int) -> None:
        """Look for what can be gone on from; says so where there is nothing and the trainer is in mid-run."""
        why = restart_reason(self._resumed)
        # No process goes on alone while another's disk has lost its checkpoint.
        if bool(collective.any_of(torch.tensor([why is not None]))) and why is None:
            why = "another process has no saved vocabguard state"
        if why is not None:
            self._resumed = {}
            if steps_done > 0:
                tell_restart(why, steps_done, self.config.snapshot.source)
            return
        try:
            require_known(self._resumed)
            self._resumed = moved_along(self._resumed, suggested)
        except (LookupError, TypeError, AttributeError) as error:
            self._restart(error, steps_done)

    def _take(self, run: Run, hook_model: bool, targets: Targets | NotApplicable | None, steps_done: int) -> Parts:
        """The parts of the run, gone on from the state that is resumed, unless that turns out to be damaged."""
        if self._resumed:
            try:
                return self._build(run, hook_model, targets, steps_done)
            except (ConfigError, collective.PeerFaultError):
                raise
            except Exception as error:  # a damaged state may hold anything
                self._let_go(for_good=True)
                self._restart(error, steps_done)
        return self._build(run, hook_model, targets, steps_done)

    def _restart(self, error: Exception, steps_done: int) -> None:
        """Drop a state that cannot be used."""
        why = f"the saved vocabguard state cannot be used ({type(error).__name__}: {one_line(error, 100)})"
        tell_restart(why, steps_done, self.config.snapshot.source)
        self._resumed, self.latest, self.steps = {}, {}, 0
        self._cadence = Cadence.of(self.config, self._cadence.total)

    def _build(self, run: Run, hook_model: bool, targets: Targets | NotApplicable | None, steps_done: int) -> Parts:
        """The parts of the run, with the numbers of the state that is resumed."""
        parts = put_together(
            self.config, self._rules, run, self.tokenizer, self._resumed, hook_model=hook_model, faults=self._faults,
            targets=targets, source=self._source, steps_done=steps_done, call=self._call,
        )  # fmt: skip
        self._observer, self._checker, self._protection = parts.observer, parts.checker, parts.protection
        if self._protection is not None:
            self._cadence.fix()
        if self._resumed:
            self._restore(self._resumed)
        return parts

    # -- protection --------------------------------------------------------------------------------------------------

    def collator(self, inner: Callable[[list[Any]], Any], *, seq2seq: bool = False) -> EchoCollator:
        """A collate function that adds echo rows to the batches that `inner` makes, for dataloaders of one's own.

        Batches get the key ``vocabguard_echo``, which the guard takes out on their way into the model. With several
        workers that are started anew each epoch, call `start_epoch` before each epoch.

        Args:
            inner: takes examples with ``input_ids`` and makes a batch with ``labels``.

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
        if self._protection is None or not self._protection.has(kind) or self._checker is None:
            raise ConfigError(f"{kind} is not part of this run; allowed: {kind}.armed: true before it begins")
        self._protection.ask(kind, on)
        with self._faults.contain("switching"):
            self._protection.decide(self._checker.alerts.firing)
        self._heed_failures()

    def start_epoch(self, *, skipped: int = 0) -> None:
        """An epoch begins: call it before the dataloader is iterated.

        Args:
            skipped: batches that the collate function makes once more, only to be skipped, since the run is resumed.
        """
        if self._protection is not None:
            self._protection.start_epoch(skipped)

    # -- while training runs -----------------------------------------------------------------------------------------

    def observe(self, inputs: Tensor | None, labels: Tensor, echo_mask: Tensor | None = None) -> None:
        """Count one micro-batch, where no hook on the model sees it.

        Args:
            inputs: (B, T) int64 token ids, or None.
            labels: (B, T) int64, -100 where there is no target; shifted here as the model shifts them.
            echo_mask: (B,) or (B, T) bool, True at echo rows.
        """
        self._require_attached("observe")
        if self._observer is not None and not self._faults.down:
            with self._faults.contain("counting a batch"):
                self._observer.observe(inputs, labels, echo_mask=echo_mask)
        self._heed_failures()

    def observe_batch(self, batch: Any) -> None:
        """Count a training batch by its ``labels`` or the ``targets=`` extractor.

        At the first batch that has neither, the model's forward pass is hooked, and from then on only that is counted.
        Call it before the batch reaches the model.
        """
        self._require_attached("observe_batch")
        if self._protection is not None:
            # Even when the guard is down: a mask that the model does not know must not reach it.
            with self._faults.contain("adding echo rows"):
                self._protection.join(batch, inject=not self._faults.down and self._inject == "batch")
        if self._observer is None or self._checker is None or self._faults.down or self._observer.hooked:
            return
        with self._faults.contain("counting a batch"):
            if not self._observer.batch(batch):
                self._observer.hook_model(self._checker.model)
        self._heed_failures()

    def step(
        self, step: int, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None
    ) -> CheckResult | None:
        """Tell the guard that an optimizer step is done.

        Args:
            step: its number, counted from 1.
            optimizer: as for `attach`, where it may be another one by now; its gradients are read from here on.

        Returns:
            The check, if one was due.
        """
        result = None
        self._require_attached("step")
        if self._checker is not None and self._reporter is not None and not self._faults.down:
            with self._faults.contain("step"):
                self.steps = step
                if self._observer is not None:
                    self._observer.end_step(step, optimizer)
                self._timer.step(self._faults)
                if not self._cadence.chosen and self._timer.steps >= self._cadence.settle_steps:
                    self._cadence.choose(self._timer.median())
                if self._cadence.due(step):
                    result = self._check(step)
                if self._protection is not None:
                    self._protection.end_step(step)
        self._heed_failures()
        self._meet(step)
        return result

    def _meet(self, step: int) -> None:
        """While rows are held, all guards know of each other's faults after a check, those that have failed too."""
        protection = self._protection
        if protection is None or not protection.holds or not self._cadence.due(step) or not collective.meets():
            return
        with self._faults.contain("meeting"):
            collective.raise_if_peer_failed()
        self._heed_failures()
        protection.close()
        self._heed_failures()

    def check(self, *, at: Moment | None = None) -> CheckResult | None:
        """Check now, whatever the cadence says; the last result again if no step has come since.

        Args:
            at: look at what `confusion` (at an ``evaluation``) and `neighbors` (at the ``end``) ask for too.
        """
        if self._reporter is not None and self._checker is not None and not self._faults.down:
            with self._faults.contain("check"):
                last = self.last if self.last and self.last.step == self.steps else self._check(self.steps)
                self.latest.update(self._reporter.findings(self._checker.beside(at, last)))
            self._heed_failures()
        return self.last

    def take_requests(self) -> tuple[str, ...]:
        """What rules ask of the trainer since the last call: ``checkpoint``, ``stop``. For all processes to call."""
        asked: tuple[str, ...] = ()
        if self._checker is not None and self._reporter is not None and not self._faults.down:
            with self._faults.contain("asking the trainer"):
                asked = self._checker.take_requests()
            self._heed_failures()
        return asked

    @contextmanager
    def contain(self, what: str) -> Iterator[None]:
        """Run an adapter's own work so that its faults disable the guard, and never end the training.

        Raises:
            ConfigError: of `attach` inside; and, where faults are to be raised (``on_error``), whatever comes.
        """
        with self._faults.timed():
            try:
                yield
            except Exception as error:
                # Of the run that goes on: `attach` begins another one inside.
                self._faults.take(what, error, refuses=True)
        self._heed_failures()

    def _require_attached(self, what: str) -> None:
        """Refuse your own loop that forgot to attach: nothing would be guarded, and nobody told."""
        if not self._attached and not self._faults.down:
            raise ConfigError(f"{what}() before attach(); call guard.attach(model, optimizer, ...) first")

    def _check(self, step: int, *, first: bool = False) -> CheckResult:
        assert self._checker is not None
        assert self._reporter is not None
        with_probe = self._cadence.take_probe(step, first=first)
        self.last = self._checker.run(step, with_probe=with_probe, overhead=self._timer.overhead(self._faults))
        scalars = self.last.scalars
        self.latest.update(outdated(self.latest, scalars, probed=self.last.probe is not None) | dict(scalars))
        began = time.perf_counter()
        self._reporter.check(self.last, self._checker.watched.table)
        # To say what was found is a part of what a check costs.
        told = time.perf_counter() - began
        last = self.last
        self._cadence.record(check=last.seconds - last.probe_seconds + told, probe=last.probe_seconds or None)
        if self._protection is not None:
            base = self._checker.prober.base if self._checker.prober else None
            self._protection.follow(self.last, base, self._batches_per_step * (self._cadence.every or 1))
        return self.last

    def _heed_failures(self) -> None:
        if self._faults.down:
            self._let_go()

    def _let_go(self, *, for_good: bool = False) -> None:
        if self._protection is not None:
            self._protection.stand_down()
            if for_good:
                self._protection.finish()
        if self._observer is not None:
            self._observer.remove()

    # -- the end -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: V-sized vectors, plain values, references to baselines.

        For all processes to call. It survives ``torch.load(weights_only=True)``; rows go to the run folder once.
        """
        saved: dict[str, Any] = {}
        if self._checker is not None and not self._faults.down:
            with self._faults.contain("state_dict"):
                saved = self._collect(self._checker)
            self._heed_failures()
        return saved

    def _collect(self, checker: Checker) -> dict[str, Any]:
        """The parts' states by their names."""
        watched = checker.watched.state_dict(self.run_dir)
        return {
            "version": STATE_VERSION,
            "step": self.steps,
            "run_dir": None if self.run_dir is None else str(self.run_dir),
            **watched,
            **checker.state_dict(),
            "cadence": self._cadence.state_dict(),
            "latest": dict(self.latest),
            "protection": self._protection.state_dict() if self._protection is not None else {},
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """Give the parts the numbers of the run that goes on; baselines and table were read when it was attached."""
        assert self._checker is not None
        saved = fit_state(saved, self._checker.watched.rows)
        self.steps = int(saved["step"])
        self._checker.load_state_dict(saved)
        self._cadence.load_state_dict(saved["cadence"])
        self.latest.update(saved["latest"])
        if self._protection is not None and saved.get("protection"):
            self._protection.load_state_dict(saved["protection"])

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
        with self._faults.contain("finish"):
            self._let_go(for_good=True)
            if self._protection is not None:
                self._protection.close()
                self._let_go()
            if self._reporter is not None:
                reporter, self._reporter = self._reporter, None
                log = reporter.finish(self.last)
            collective.shutdown_group()
        return log


def _require_tokenizer(tokenizer: Any) -> None:
    if isinstance(tokenizer, (str, Path)):
        loaded = f"AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        raise ConfigError(f"tokenizer is {str(tokenizer)!r}; allowed: the tokenizer itself, such as {loaded}")
