"""Counting targets over a sample of the training data before step 1, without touching the run's order or RNG."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from vocabguard.config import ConfigError, GuardConfig
from vocabguard.data.coverage import load_coverage, vocabulary_hash
from vocabguard.guard.batches import Targets, labels_of
from vocabguard.measure.exposure import count_targets
from vocabguard.results import NotApplicable, Preflight

_HEAVY = (nn.Module, PreTrainedTokenizerBase)
# How far generators, models and tokenizers are looked for inside a dataset or collator.
_DEPTH, _FEW = 4, 64


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
    loader = getattr(dataloader, "base_dataloader", dataloader)
    if not isinstance(loader, DataLoader):
        return NotApplicable(f"preflight needs a DataLoader to sample from, got {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return NotApplicable("preflight leaves an iterable dataset alone: reading it would move the run's data on")
    began = time.perf_counter()
    counts = torch.zeros(rows, dtype=torch.int64)
    length, batches, seen, tokens = len(loader.dataset), 0, 0, 0
    with untouched_rng(loader.dataset, loader.collate_fn):
        for indices, batch in _sample(loader, seed):
            found = labels_of(batch, targets)
            if found is None and need_labels:
                raise ConfigError(_no_labels(batch))
            if found is None:
                return NotApplicable("preflight found no labels in the batches; they are counted in the forward pass")
            counts += count_targets(found[1].cpu(), shift and not found[2], rows)
            batches, seen, tokens = batches + 1, seen + indices, tokens + found[1].numel()
            if batches >= max_batches or time.perf_counter() - began > max_seconds:
                break
    return Preflight(counts, batches, seen, seen >= length, time.perf_counter() - began, tokens)


def _sample(loader: DataLoader[Any], seed: int) -> Iterator[tuple[int, Any]]:
    """(examples, batch) in an order of our own, through a copy of the collate function."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(loader.dataset), generator=generator).tolist()  # type: ignore[arg-type]
    collate = own_copy(loader.collate_fn)
    yield from ((count, collate(examples)) for count, examples in examples_of(loader, order))


def examples_of(loader: DataLoader[Any], order: list[int]) -> Iterator[tuple[int, Any]]:
    """(number of examples, what the collate function gets) for the examples of a map-style dataset in an order."""
    if loader.batch_sampler is None:
        # Without automatic batching an example of the dataset is a batch.
        yield from ((1, loader.dataset[index]) for index in order)
        return
    # Samplers of one's own may not say how many examples they put together; 8 is the Hugging Face Trainer's default.
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 8
    fetch = getattr(loader.dataset, "__getitems__", None)
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        yield len(indices), fetch(indices) if fetch else [loader.dataset[index] for index in indices]


def own_copy(collate: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a collator object, whose state must not move; models and tokenizers inside stay shared."""
    if hasattr(collate, "__self__"):
        # A bound method would take its whole owner along, which may be the data module.
        return collate
    return copy.deepcopy(collate, {id(part): part for part in _parts(collate) if isinstance(part, _HEAVY)})


def _parts(owner: Any, depth: int = _DEPTH, seen: set[int] | None = None) -> Iterator[Any]:
    """The object and what it holds, some levels deep: attributes, items, arguments of a `functools.partial`."""
    seen = set() if seen is None else seen
    if id(owner) in seen or isinstance(owner, (str, bytes, int, float, type, ModuleType, NoneType)):
        return
    seen.add(id(owner))
    yield owner
    if depth == 0 or isinstance(owner, (*_HEAVY, Tensor)):
        return
    held = [*getattr(owner, "__dict__", {}).values(), getattr(owner, "__self__", None)]
    if isinstance(owner, functools.partial):
        held += [owner.func, *owner.args, *owner.keywords.values()]
    elif isinstance(owner, (list, tuple)) and len(owner) <= _FEW:
        held += owner
    elif isinstance(owner, dict) and len(owner) <= _FEW:
        held += owner.values()
    for part in held:
        yield from _parts(part, depth - 1, seen)


@contextmanager
def untouched_rng(*owners: Any) -> Iterator[None]:
    """Put Python's, NumPy's, torch's and the owners' generators back afterwards: datasets and collators may draw."""
    put_back: list[Callable[[], object]] = [
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),
    ]
    for part in (part for owner in owners for part in _parts(owner)):
        if isinstance(part, random.Random):
            put_back.append(functools.partial(part.setstate, part.getstate()))
        elif isinstance(part, np.random.RandomState):
            put_back.append(functools.partial(part.set_state, part.get_state()))
        elif isinstance(part, np.random.Generator):
            put_back.append(functools.partial(setattr, part.bit_generator, "state", part.bit_generator.state))
        elif isinstance(part, torch.Generator):
            put_back.append(functools.partial(part.set_state, part.get_state()))
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for restore in put_back:
                restore()


def _no_labels(batch: Any) -> str:
    got = f"the keys {sorted(batch)}" if hasattr(batch, "keys") else type(batch).__name__
    return (
        f"no labels: a training batch holds {got}; the guard counts targets from 'labels' of shape (B, T), "
        "or from what `targets=` takes out of a batch; exposure={'enabled': False} goes on without"
    )
