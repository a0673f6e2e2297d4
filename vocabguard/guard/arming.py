"""Before step 1: build what may protect the run, and refuse echo where it would be wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vocabguard import collective
from vocabguard.alerts.rules import AlertRule
from vocabguard.config import ConfigError
from vocabguard.guard.echoing import EchoControl, EchoSource, Pace
from vocabguard.guard.holding import Holder
from vocabguard.guard.preflight import examples_of, own_copy, untouched_rng
from vocabguard.guard.probing import watched_ids
from vocabguard.guard.protection import Protection, needed
from vocabguard.guard.setup import Watched
from vocabguard.matrices import VocabMatrix
from vocabguard.measure.counter import ExposureCounter
from vocabguard.models import is_encoder_decoder, no_tokens
from vocabguard.protect.collator import ECHO_KEY, EchoCollator, EchoError
from vocabguard.results import NotApplicable, Preflight
from vocabguard.settings import GuardConfig

logger = logging.getLogger("vocabguard")

Route = Literal["collate", "batch"]
"""How echo rows get in: through the dataloader's collate function, or appended to a batch of tensors."""


@dataclass(frozen=True)
class Run:
    """What is known of the run that is about to begin.

    Attributes:
        model: the model that is trained.
        dataloader: of the training data, or None.
        route: how echo rows get in; None where only a collate function of the guard's can bring them.
        total_steps: planned optimizer steps, if known.
        batches_per_step: micro-batches of a process in an optimizer step.
        schedule: a torch scheduler, or the learning rates of the steps to come; None if they are unknown.
        shift: whether the model shifts its labels; None where they are no tokens.
        flight: what preflight counted.
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
        """The dataloader inside accelerate's wrapper."""
        return getattr(self.dataloader, "base_dataloader", self.dataloader)


def arm(
    config: GuardConfig,
    rules: Iterable[AlertRule],
    run: Run,
    watched: Watched,
    counter: ExposureCounter | None,
    source: EchoSource | None,
    uncounted: NotApplicable | None = None,
) -> Protection | None:
    """What may protect this run; nothing is switched on yet.

    Args:
        config: all settings.
        rules: whose actions may switch echo and hold.
        run: the run.
        watched: matrices and table.
        counter: of the run's targets.
        source: made by `VocabGuard.collator`, if it was called.
        uncounted: why labels are no targets of the data here, where they are not.

    Returns:
        None where neither echo nor hold is configured.

    Raises:
        ConfigError: where echo or hold would be wrong; the dataloader is as it was then.
    """
    rules = tuple(rules)
    wants_echo, wants_hold = needed(config, rules, "echo") or source is not None, needed(config, rules, "hold")
    uncounted = uncounted or no_tokens(run.model)
    if counter is None and (wants_echo or wants_hold) and uncounted is not None:
        raise ConfigError(f"{'echo' if wants_echo else 'hold'}: {uncounted.reason}")
    if counter is None or not (wants_echo or wants_hold):
        return None
    holder = _holder(config, watched, counter) if wants_hold else None
    if not wants_echo:
        return Protection(config, rules, None, holder, shift=bool(run.shift))
    if not run.shift and not is_encoder_decoder(run.model):
        name = type(run.model).__name__
        raise ConfigError(f"echo: {name} neither predicts next tokens nor decodes; allowed: models that generate text")
    source = source or EchoSource(config, watched.tokenizer, seq2seq=is_encoder_decoder(run.model))
    _require_route(run)
    watch = watched_ids(watched.tokenizer, config.probe.watch, watched.rows)
    echo = EchoControl(config, source, watched, watch, _pace(config, run), counter)
    protection = Protection(config, rules, echo, holder, shift=bool(run.shift))
    if run.route is not None and not isinstance(run.loader.collate_fn, EchoCollator):
        _try_once(run, source, echo.allowed)
        if run.route == "collate":
            protection.on_finish(_wrap(run.loader, source))
    return protection


def _holder(config: GuardConfig, watched: Watched, counter: ExposureCounter) -> Holder | None:
    matrix = watched.matrices["head"]
    if isinstance(matrix, VocabMatrix):
        return Holder(config.hold, matrix, counter)
    logger.warning("vocabguard: hold has nothing to do: %s", matrix.reason)
    return None


def _pace(config: GuardConfig, run: Run) -> Pace:
    flight = run.flight
    per_batch = None
    if isinstance(flight, Preflight) and flight.batches > 0:
        per_batch = float(flight.data_target.sum()) / flight.batches
    batches = None if run.total_steps is None else run.total_steps * run.batches_per_step
    lag = config.echo.prefetch
    collates = run.route == "collate" or isinstance(getattr(run.loader, "collate_fn", None), EchoCollator)
    if lag is None:
        lag = _prefetched(run) if collates else 0
    pace = Pace(
        data_per_batch=per_batch,
        batches=batches,
        lag=lag,
        running=collates and run.route != "collate",
    )
    # Each process has looked at its own part of the data.
    return collective.agree(pace)


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


def _try_once(run: Run, source: EchoSource, allowed: Tensor) -> None:
    """Add echo rows to one batch of the run's data, through copies.

    Raises:
        ConfigError: if that fails, with the reason.
    """
    loader = run.loader
    if not hasattr(loader.dataset, "__getitem__") or not hasattr(loader.dataset, "__len__"):
        return
    ids = allowed[: source.maker.list_tokens].tolist()
    with untouched_rng(loader.dataset, loader.collate_fn):
        try:
            _, examples = next(iter(examples_of(loader, order=torch.arange(min(2, len(loader.dataset))).tolist())))
            collate = own_copy(loader.collate_fn)
            if run.route == "collate":
                batch = EchoCollator(collate, source.feed, source.maker).with_echo(examples, ids, 0)
                source.maker.joined = batch[ECHO_KEY].ndim == 2
                return
            source.join(collate(examples), ids, number=0, rank=0)
        except EchoError as error:
            raise ConfigError(f"echo: {error}") from error
        except Exception as error:
            # The user's collate function may fail on rows of ours in any way; better now than in mid-run.
            raise ConfigError(f"echo: a batch with echo rows fails with {type(error).__name__}: {error}") from error


def _wrap(loader: Any, source: EchoSource) -> Callable[[], None]:
    inner = loader.collate_fn
    loader.collate_fn = EchoCollator(inner, source.feed, source.maker)

    def undo() -> None:
        loader.collate_fn = inner

    return undo
