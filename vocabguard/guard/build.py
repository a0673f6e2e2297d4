"""Before step 1: build what may protect the run, and refuse echo where it would be wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule
from vocabguard.config import ConfigError, GuardConfig
from vocabguard.guard.batches import BatchContext, Observer, Targets, inner_optimizers
from vocabguard.guard.called import Call, CalledModel
from vocabguard.guard.checks import Checker
from vocabguard.guard.echo import EchoControl, EchoSource, Pace
from vocabguard.guard.evaluations import Evaluations
from vocabguard.guard.failures import Faults
from vocabguard.guard.forecast import Forecaster
from vocabguard.guard.hold import Holder, unheld
from vocabguard.guard.loaders import first_examples, inner_loader, own_copy, untouched_rng
from vocabguard.guard.named import named_notes
from vocabguard.guard.preflight import wanted_preflight
from vocabguard.guard.probe import Prober, choose_prober
from vocabguard.guard.protection import Protection, needed
from vocabguard.guard.reference import Reader, choose_reader
from vocabguard.guard.watched import Watched, describe, watch_model
from vocabguard.guard.words import watched_ids
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.collator import ECHO_KEY, EchoCollator, EchoError
from vocabguard.results import NotApplicable, Preflight, Watch
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.models import is_encoder_decoder, no_tokens, predicts_next

logger = logging.getLogger("vocabguard")

Route = Literal["collate", "batch"]
"""How echo rows get in: through the dataloader's collate function, or appended to a batch of tensors."""


@dataclass(frozen=True)
class Run:
    """What is known of the run that is about to begin.

    Attributes:
        dataloader: of the training data, or None.
        route: how echo rows get in; None where only a collate function of the guard's can bring them.
        batches_per_step: micro-batches of a process in an optimizer step.
        schedule: a torch scheduler, or the learning rates of the steps to come; None if they are unknown.
        shift: whether the model shifts its labels; None where they are no tokens.
    """

    model: nn.Module
    dataloader: Any
    route: Route | None
    total_steps: int | None
    batches_per_step: int
    schedule: Any = None
    shift: bool | None = None
    flight: Preflight | NotApplicable = NotApplicable("nothing was counted yet")

    @property
    def loader(self) -> Any:
        """The dataloader inside accelerate's wrapper or Fabric's."""
        return inner_loader(self.dataloader)


def arm(
    config: GuardConfig, rules: Iterable[AlertRule], run: Run, watched: Watched, counter: ExposureCounter | None,
    source: EchoSource | None, context: BatchContext, uncounted: NotApplicable | None = None,
    refused: Collection[str] = (),
) -> Protection | None:  # fmt: skip
    """What may protect this run; nothing is switched on yet.

    Args:
        source: made by `VocabGuard.collator`, if it was called.
        uncounted: why labels are no targets of the data here, where they are not.
        refused: ``echo`` or ``hold``, where the engine does not let it be right: off then.

    Returns:
        None where neither echo nor hold is configured.

    Raises:
        ConfigError: where echo or hold would be wrong; the dataloader is as it was then.
    """
    rules = tuple(rules)
    wants_echo, wants_hold = needed(config, rules, "echo") or source is not None, needed(config, rules, "hold")
    wants_echo, wants_hold = wants_echo and "echo" not in refused, wants_hold and "hold" not in refused
    uncounted = uncounted or no_tokens(run.model)
    if counter is None and (wants_echo or wants_hold) and uncounted is not None:
        raise ConfigError(f"{'echo' if wants_echo else 'hold'}: {uncounted.reason}")
    if counter is None or not (wants_echo or wants_hold):
        return None
    holder = _holder(config, watched, counter) if wants_hold else None
    if not wants_echo:
        return Protection(config, rules, None, holder, context, shift=bool(run.shift))
    if not run.shift and not is_encoder_decoder(run.model):
        name = type(run.model).__name__
        raise ConfigError(f"echo: {name} neither predicts next tokens nor decodes; allowed: models that generate text")
    source = source or EchoSource(config, watched.tokenizer, seq2seq=is_encoder_decoder(run.model))
    _require_route(run)
    watch = watched_ids(watched.tokenizer, config.probe.watch, watched.rows)
    echo = EchoControl(config, source, watched, watch, _pace(config, run), counter)
    protection = Protection(config, rules, echo, holder, context, shift=bool(run.shift))
    if run.route is not None and not isinstance(run.loader.collate_fn, EchoCollator):
        joined = _try_once(run, source, echo.allowed)
        if run.route == "collate":
            protection.on_finish(_wrap(run.loader, source, joined))
    return protection


def refusals(
    config: GuardConfig, rules: Iterable[AlertRule], watched: Watched, *, collates: bool = False
) -> dict[str, str]:
    """What the engine does not let be right, and is off: ``echo``, ``hold`` or ``probe``, and why.

    Args:
        collates: whether a collate function of the guard's was made, so that echo is wanted.

    Raises:
        ConfigError: where faults are to be raised (``on_error``) and it was asked for.
    """
    rules, replicas, head = tuple(rules), watched.replicas, watched.matrices["head"]
    found: dict[str, str] = {}
    if replicas.split is not None:
        found["echo"] = f"{replicas.split} parallelism splits each sequence over processes after its batch is made"
    if replicas.split == "sequence":
        found["probe"] = "sequence parallelism wants a part of each sequence in every process, and prompts are whole"
    if replicas.refused is not None:
        found |= dict.fromkeys(("echo", "hold"), replicas.refused.reason)
    if isinstance(head, VocabMatrix) and (reason := unheld(head)) is not None:
        found["hold"] = reason
    wanted = {kind: needed(config, rules, kind) for kind in ("echo", "hold")}
    wanted = {"echo": wanted["echo"] or collates, "hold": wanted["hold"], "probe": config.probe.enabled}
    found = {kind: reason for kind, reason in found.items() if wanted[kind]}
    for kind, reason in found.items():
        if config.on_error == "raise":
            raise ConfigError(f"{kind}: {reason}; allowed: on_error: warn, which leaves {kind} off")
        if collective.is_main():
            logger.warning("vocabguard: %s is off: %s", kind, reason)
    return found


def _holder(config: GuardConfig, watched: Watched, counter: ExposureCounter) -> Holder | None:
    matrix = watched.matrices["head"]
    if isinstance(matrix, VocabMatrix):
        return Holder(config.hold, matrix, counter)
    logger.warning("vocabguard: hold has nothing to do: %s", matrix.reason)
    return None


def _pace(config: GuardConfig, run: Run) -> Pace:
    flight = run.flight
    per_batch = row_tokens = None
    if isinstance(flight, Preflight) and flight.batches > 0:
        per_batch = float(flight.data_target.sum()) / flight.batches
        row_tokens = flight.tokens / flight.rows if flight.tokens else None
    batches = None if run.total_steps is None else run.total_steps * run.batches_per_step
    lag = config.echo.prefetch
    collates = run.route == "collate" or isinstance(getattr(run.loader, "collate_fn", None), EchoCollator)
    if lag is None:
        lag = _prefetched(run) if collates else 0
    # Each process has looked at its own part of the data.
    running = collates and run.route != "collate"
    return collective.agree(Pace(per_batch, batches, lag, running=running, row_tokens=row_tokens))


def _prefetched(run: Run) -> int:
    """Batches made ahead: workers' queues, those that a trainer gathers for a step, one that accelerate looks ahead."""
    workers = getattr(run.loader, "num_workers", 0)
    return int(workers * (getattr(run.loader, "prefetch_factor", None) or 2) + run.batches_per_step + 2)


def _require_route(run: Run) -> None:
    """Refuse dataloaders through which echo rows would not come, or would drop data.

    Raises:
        ConfigError: with the reason.
    """
    loader = run.loader
    if isinstance(getattr(loader, "collate_fn", None), EchoCollator):
        return
    if run.route is None:
        raise ConfigError(
            "echo is configured, but nothing adds its rows to the batches; allowed: "
            "DataLoader(..., collate_fn=guard.collator(collate)), and attach(..., dataloader=...) with that dataloader"
        )
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"echo: the training dataloader is a {type(loader).__name__}; allowed: a torch DataLoader")
    if (
        run.route == "collate"
        and type(run.dataloader).__name__ == "DataLoaderDispatcher"
        and collective.world_size() > 1
    ):
        raise ConfigError(
            "echo: the main process dispatches batches to the others, and rows added there would drop data; allowed: "
            "accelerator_config={'dispatch_batches': False}"
        )
    if run.route == "collate" and loader.batch_sampler is None and loader.batch_size is None:
        raise ConfigError("echo: the dataset makes batches by itself; allowed: a dataloader that collates examples")


def _try_once(run: Run, source: EchoSource, allowed: Tensor) -> bool:
    """Add echo rows to one batch of the run's data, through copies.

    Returns:
        Whether the collate function joins all rows into one; False where that was not tried.

    Raises:
        ConfigError: if that fails, with the reason.
    """
    loader = run.loader
    if not hasattr(loader.dataset, "__getitem__") or not hasattr(loader.dataset, "__len__"):
        return False
    ids = allowed[: source.maker.list_tokens].tolist()
    with untouched_rng(loader.dataset, loader.collate_fn, loader.batch_sampler):
        try:
            examples = first_examples(loader, 2)
            collate = own_copy(loader.collate_fn)
            if run.route == "collate":
                batch = EchoCollator(collate, source.feed, source.maker).with_echo(examples, ids, 0)
                return bool(batch[ECHO_KEY].ndim == 2)
            source.join(collate(examples), ids, number=0, rank=0)
            return False
        except EchoError as error:
            raise ConfigError(f"echo: {error}") from error
        except Exception as error:
            # The user's collate function may fail on rows of ours in any way; better now than in mid-run.
            raise ConfigError(f"echo: a batch with echo rows fails with {type(error).__name__}: {error}") from error


def _wrap(loader: Any, source: EchoSource, joined: bool) -> Callable[[], None]:
    inner = loader.collate_fn
    loader.collate_fn = EchoCollator(inner, source.feed, source.maker, joined=joined)

    def undo() -> None:
        loader.collate_fn = inner

    return undo


@dataclass(frozen=True)
class Parts:
    """What works while training runs.

    Attributes:
        protection: echo and hold; None where neither is configured.
        prober: what probes, or why nothing does.
        named: which of the tokens that matter are never a target.
    """

    observer: Observer | None
    checker: Checker
    protection: Protection | None
    flight: Preflight | NotApplicable
    prober: Prober | NotApplicable
    named: tuple[str, ...] = ()

    def describe(self, run_dir: Path | None) -> Watch:
        """What a user is told before step 1."""
        return describe(self.checker.watched, self.flight, self.prober, run_dir, self.notes())

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the parts before step 1."""
        told = self.protection.notes() if self.protection is not None else ()
        return self.named + told + self.checker.evaluations.notes()

    def hook(self, optimizer: Any, faults: Faults, *, hook_model: bool, steps_done: int) -> None:
        """Set all hooks."""
        if self.observer is None:
            return
        if optimizer is None and self.protection is not None and self.protection.holder is not None:
            raise ConfigError("hold: attach got no optimizer, and rows are put back after its steps; pass it")
        if optimizer is not None:
            optimizers = inner_optimizers(optimizer)
            forecaster = self.checker.forecaster
            meter = None if forecaster is None else forecaster.hook(optimizers, steps_done)
            self.observer.hook_optimizers(optimizers, meter)
        if self.protection is not None:
            # First, so that the echo mask is out of the batch before anything else sees it.
            self.protection.hook_model(self.checker.model, faults)
        if hook_model:
            self.observer.hook_model(self.checker.model)


def put_together(
    config: GuardConfig, rules: Iterable[AlertRule], run: Run, tokenizer: Any, resumed: Mapping[str, Any], *,
    hook_model: bool, faults: Faults, targets: Targets | NotApplicable | None, source: EchoSource | None,
    steps_done: int = 0, call: Call | None = None,
) -> Parts:  # fmt: skip
    """Find what is watched, count targets of the data to come, choose what probes, and build the parts.

    Args:
        run: what is known of the run, without its ``shift`` and ``flight``.
        resumed: the state of an earlier run that goes on, or empty.
        targets: the user's extractor, if any, or why labels are no targets of the data here.
        source: of echo rows, where `VocabGuard.collator` was called.
        steps_done: optimizer steps that the trainer has behind it.
        call: how a model of the user's own is asked; None for ``model(input_ids=...).logits``.

    Raises:
        ConfigError: for settings that do not fit the model, the tokenizer or the data; where echo or hold would be
            wrong, or questions cannot be asked.
    """
    rules = tuple(rules)
    watched = watch_model(run.model, tokenizer, config, resumed, steps_done)
    refused = refusals(config, rules, watched, collates=source is not None)
    asked = run.model if call is None else CalledModel(run.model, call, watched.rows).tried()
    shift = config.exposure.shift_labels
    shift = predicts_next(run.model) if shift is None else shift
    flight = wanted_preflight(config, run.dataloader, watched.rows, shift, targets, hook_model, tokenizer)
    batches = None if run.total_steps is None else run.total_steps * run.batches_per_step
    prober: Prober | NotApplicable = NotApplicable(refused.get("probe", ""))
    if "probe" not in refused:
        prober = choose_prober(asked, config, tokenizer, watched.table, flight, batches)
    if isinstance(prober, NotApplicable) and "probe" not in refused and config.probe.enabled and config.probe.watch:
        raise ConfigError(f"probe.watch names words, but {prober.reason}; allowed: null, or what is missing")
    run = replace(run, shift=shift, flight=flight)
    uncounted = targets if isinstance(targets, NotApplicable) else watched.replicas.refused
    counts = config.exposure.enabled and uncounted is None and (shift is not None or targets is not None)
    counter = None
    if counts:
        device, several = next(run.model.parameters()).device, collective.world_size() > 1
        counter = ExposureCounter(
            watched.rows, device, watched.tied, deferred=several, speaks=watched.replicas.speaks, edges=watched.edges
        )
    context = BatchContext(None if isinstance(targets, NotApplicable) else targets)
    protection = arm(config, rules, run, watched, counter, source, context, uncounted, refused)
    observer = None
    if counter is not None:
        observer = Observer(
            counter, watched.gradient_matrix, shift=bool(shift), push_every=config.exposure.push_every_n_steps,
            faults=faults, context=context, holder=None if protection is None else protection.holder,
        )  # fmt: skip
    asks = prober if isinstance(prober, Prober) else None
    watch, to_train = (torch.empty(0).long(), math.nan) if asks is None else (asks.watched, asks.to_train)
    reader: Reader | NotApplicable = NotApplicable(refused.get("probe", ""))
    if "probe" not in refused:
        reader = choose_reader(asked, config, tokenizer, watch, to_train)
    if asks is not None and isinstance(reader, Reader):
        asks.read_beside(int(reader.windows.lengths.sum()))
    checker = Checker(
        run.model, watched, counter, asks, AlertMachine(rules), config.drift.chunk_rows, config.log.top_k,
        protection=protection, uncounted=uncounted, total_steps=run.total_steps,
        evaluations=Evaluations(config, asked, watched, asks), forecaster=_forecaster(config, run, watched),
        reader=reader if isinstance(reader, Reader) else None, called=None if call is None else asked,
    )  # fmt: skip
    named: tuple[str, ...] = ()
    if shift or is_encoder_decoder(run.model):
        protected = protection is not None and protection.has("echo")
        named = named_notes(run.model, tokenizer, flight, config.probe.watch, protected=protected)
    off = tuple(f"{kind.capitalize()} is off: {reason}." for kind, reason in refused.items())
    return Parts(observer, checker, protection, flight, prober, off + named)


def _forecaster(config: GuardConfig, run: Run, watched: Watched) -> Forecaster | None:
    if not config.forecast.enabled:
        return None
    batches = run.batches_per_step * watched.replicas.count
    return Forecaster(watched, run.flight, run.total_steps, batches, run.schedule)
