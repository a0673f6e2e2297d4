"""The parts of one guarded run, put together before anything is hooked or written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule
from vocabguard.guard.arming import Run, arm
from vocabguard.guard.check import Checker
from vocabguard.guard.echoing import EchoSource
from vocabguard.guard.extras import Extras
from vocabguard.guard.faults import Faults
from vocabguard.guard.observe import Observer, Targets
from vocabguard.guard.probing import Prober
from vocabguard.guard.protection import Protection
from vocabguard.guard.setup import Watched
from vocabguard.measure.counter import ExposureCounter
from vocabguard.results import NotApplicable
from vocabguard.settings import GuardConfig


@dataclass(frozen=True)
class Parts:
    """What works while training runs.

    Attributes:
        observer: counts; None where exposure is off.
        checker: measures.
        protection: echo and hold; None where neither is configured.
    """

    observer: Observer | None
    checker: Checker
    protection: Protection | None

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the parts before step 1."""
        told = self.protection.notes() if self.protection is not None else ()
        return told + (self.checker.extras.notes() if self.checker.extras is not None else ())

    def hook(self, optimizer: Any, faults: Faults, *, hook_model: bool) -> None:
        """Set all hooks.

        Args:
            optimizer: one, several, or None.
            faults: contains exceptions.
            hook_model: whether batches are counted in the model's forward pass.
        """
        if self.observer is None:
            return
        if optimizer is not None:
            self.observer.hook_optimizers([optimizer] if hasattr(optimizer, "param_groups") else optimizer)
        if self.protection is not None:
            # First, so that the echo mask is out of the batch before anything else sees it.
            self.protection.hook_model(self.checker.model, faults)
        if hook_model:
            self.observer.hook_model(self.checker.model)


def put_together(
    config: GuardConfig,
    rules: Iterable[AlertRule],
    run: Run,
    watched: Watched,
    *,
    prober: Prober | None,
    faults: Faults,
    targets: Targets | NotApplicable | None,
    source: EchoSource | None,
) -> Parts:
    """Build the parts.

    Args:
        config: all settings.
        rules: of alerts.
        run: what is known of the run.
        watched: matrices, baselines and table.
        prober: None where the probe does not apply.
        faults: contains exceptions.
        targets: the user's extractor, if any, or why labels are no targets of the data here.
        source: of echo rows, where `VocabGuard.collator` was called.

    Raises:
        ConfigError: where echo or hold would be wrong, or questions cannot be asked.
    """
    rules = tuple(rules)
    uncounted = targets if isinstance(targets, NotApplicable) else None
    observer = None
    if (
        config.exposure.enabled
        and not isinstance(targets, NotApplicable)
        and (run.shift is not None or targets is not None)
    ):
        observer = Observer(
            ExposureCounter(watched.rows, next(run.model.parameters()).device, watched.tied),
            watched.gradient_matrix,
            shift=bool(run.shift),
            push_every=config.exposure.push_every_n_steps,
            faults=faults,
            targets=targets,
        )
    counter = observer.counter if observer else None
    protection = arm(config, rules, run, watched, counter, source, uncounted)
    if observer is not None:
        observer.protection = protection
    checker = Checker(
        run.model,
        watched,
        counter,
        prober,
        AlertMachine(rules),
        config.drift.chunk_rows,
        config.log.top_k,
        protection=protection,
        uncounted=uncounted,
        extras=Extras(config, run.model, watched.tokenizer),
    )
    return Parts(observer, checker, protection)
