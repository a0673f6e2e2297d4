"""Counting targets over a sample of the training data before step 1, without touching the run's order or RNG."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from vocabguard.config import ConfigError, GuardConfig
from vocabguard.data.coverage import load_coverage, vocabulary_hash
from vocabguard.guard.batches import Targets, labels_of
from vocabguard.guard.loaders import inner_loader, own_copy, sampled_examples, untouched_rng
from vocabguard.measure.exposure import count_targets
from vocabguard.results import NotApplicable, Preflight


def wanted_preflight(
    config: GuardConfig, dataloader: Any, rows: int, shift: bool | None, targets: Targets | NotApplicable | None,
    need_labels: bool, tokenizer: Any = None,
) -> Preflight | NotApplicable:  # fmt: skip
    """`preflight` as a configuration asks for it, or why there is none.

    Args:
        shift: whether the model shifts its labels; None where they are no tokens.
        tokenizer: the model's, if known: counts taken beforehand must be of its tokens.

    Raises:
        ConfigError: if a batch carries no labels though it must, and there is no extractor; or for a prior that is no
            coverage file, or of another vocabulary.
    """
    wanted = config.preflight
    if isinstance(targets, NotApplicable):
        return targets
    if config.exposure.enabled and config.exposure.prior is not None:
        return _counted_before(config.exposure.prior, rows, tokenizer)
    if not (wanted.enabled and config.exposure.enabled):
        return NotApplicable("preflight is off")
    if shift is None and targets is None:
        return NotApplicable("the model's labels are no tokens, so there are no targets to count")
    if dataloader is None:
        return NotApplicable("preflight needs the training dataloader")
    return preflight(
        dataloader, rows=rows, shift=bool(shift), targets=targets, max_batches=wanted.max_batches,
        max_seconds=wanted.max_seconds, seed=config.seed, need_labels=need_labels,
    )  # fmt: skip


def _counted_before(path: str, rows: int, tokenizer: Any) -> Preflight:
    """What ``vocabguard coverage`` counted over all of the data."""
    began = time.perf_counter()
    try:
        coverage = load_coverage(path)
        counts = coverage.targets_for(rows)
    except ValueError as error:
        raise ConfigError(f"exposure.prior: {error}") from error
    if tokenizer is not None and coverage.source.vocabulary != vocabulary_hash(tokenizer):
        raise ConfigError(f"exposure.prior: {path} counts the tokens of another tokenizer, {coverage.source.tokenizer}")
    return Preflight(counts, 0, coverage.tally.rows, True, time.perf_counter() - began)


def preflight(
    dataloader: Any, *, rows: int, shift: bool, targets: Targets | None, max_batches: int, max_seconds: float,
    seed: int, need_labels: bool = True,
) -> Preflight | NotApplicable:  # fmt: skip
    """Count data targets over batches drawn at random from the dataloader's own dataset and collate function.

    Args:
        need_labels: whether batches must carry labels; False where the model may get them by another way.

    Raises:
        ConfigError: if a batch carries no labels though it must, and there is no extractor.
    """
    loader = inner_loader(dataloader)
    if not isinstance(loader, DataLoader):
        return NotApplicable(f"preflight needs a DataLoader to sample from, got {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return NotApplicable("preflight leaves an iterable dataset alone: reading it would move the run's data on")
    began = time.perf_counter()
    counts = torch.zeros(rows, dtype=torch.int64)
    length, batches, seen, tokens, complete = len(loader.dataset), 0, 0, 0, False
    with untouched_rng(loader.dataset, loader.collate_fn, loader.batch_sampler):
        collate = own_copy(loader.collate_fn)
        for indices, examples in sampled_examples(loader, seed):
            batch = collate(examples)
            found = labels_of(batch, targets)
            if found is None and need_labels:
                raise ConfigError(_no_labels(batch))
            if found is None:
                return NotApplicable("preflight found no labels in the batches; they are counted in the forward pass")
            counts += count_targets(found[1].cpu(), shift and not found[2], rows)
            batches, seen, tokens = batches + 1, seen + indices, tokens + found[1].numel()
            if batches >= max_batches or time.perf_counter() - began > max_seconds:
                break
        else:
            complete = True  # a batch sampler may leave examples out
    return Preflight(counts, batches, seen, complete or seen >= length, time.perf_counter() - began, tokens)


def _no_labels(batch: Any) -> str:
    got = f"the keys {sorted(batch)}" if hasattr(batch, "keys") else type(batch).__name__
    return (
        f"no labels: a training batch holds {got}; the guard counts targets from 'labels' of shape (B, T), "
        "or from what `targets=` takes out of a batch. Use a collator that makes labels, such as "
        "DataCollatorForLanguageModeling(tokenizer, mlm=False); exposure={'enabled': False} goes on without"
    )
