"""What a training dataloader would give, without touching the run's order, state or random numbers."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerBase

_HEAVY = (nn.Module, PreTrainedTokenizerBase)
# How far generators, models and tokenizers are looked for inside a dataset or collator.
_DEPTH, _FEW = 4, 64
# Batches of a batch sampler of one's own that are looked at: it may be without an end.
_MOST = 100_000


def inner_loader(dataloader: Any) -> Any:
    """The torch ``DataLoader`` inside accelerate's wrapper or Fabric's; what is in neither comes back.

    >>> plain = DataLoader([1, 2])
    >>> inner_loader(plain) is plain
    True
    """
    for name in ("base_dataloader", "_dataloader"):
        if isinstance(inner := getattr(dataloader, name, None), DataLoader):
            return inner
    return dataloader


def sampled_examples(loader: DataLoader[Any], seed: int) -> Iterator[tuple[int, Any]]:
    """(number of examples, what the collate function gets) of a map-style dataset, drawn from everywhere.

    A batch sampler of one's own says which examples go together, as multipack's does, which gives lists of lists.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = own_batches(loader)
    count = len(loader.dataset) if batches is None else len(batches)  # type: ignore[arg-type]
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    if batches is None:
        yield from _by_size(loader, order)
    else:
        yield from ((_count(batches[place]), _fetched(loader.dataset, batches[place])) for place in order)


def first_examples(loader: DataLoader[Any], most: int) -> Any:
    """What the collate function gets first: at most so many examples, or the first batch of a sampler of one's own."""
    batches = own_batches(loader)
    if batches:
        return _fetched(loader.dataset, batches[0])
    order = list(range(min(most, len(loader.dataset))))  # type: ignore[arg-type]
    return next(_by_size(loader, order))[1]


def own_batches(loader: DataLoader[Any]) -> list[list[Any]] | None:
    """The batches, as indices, of a batch sampler that is not torch's; None where it is, or cannot be copied.

    They are read from a copy. Call it within `untouched_rng`: a sampler may draw.
    """
    sampler: Any = loader.batch_sampler
    while isinstance(getattr(sampler, "batch_sampler", None), BatchSampler):  # accelerate's, one process's share
        sampler = sampler.batch_sampler
    if sampler is None or type(sampler) is BatchSampler:
        return None
    shared = [loader.dataset, *(part for part in _parts(sampler) if isinstance(part, _HEAVY))]
    try:
        copied = copy.deepcopy(sampler, {id(part): part for part in shared})
        return [list(batch) for batch in itertools.islice(copied, _MOST)]
    except Exception:  # a sampler of the user's may fail in any way, outside of its run
        return None


def _by_size(loader: DataLoader[Any], order: list[int]) -> Iterator[tuple[int, Any]]:
    """The examples in an order, as many together as in a batch."""
    if loader.batch_sampler is None:
        # Without automatic batching an example of the dataset is a batch.
        yield from ((1, loader.dataset[index]) for index in order)
        return
    # Samplers of one's own may not say how many examples they put together; 8 is the Hugging Face Trainer's default.
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 8
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        yield len(indices), _fetched(loader.dataset, indices)


def _fetched(dataset: Any, indices: Sequence[Any]) -> list[Any]:
    """The examples of a batch, nested as its indices are."""
    if indices and isinstance(indices[0], (list, tuple)):
        return [_fetched(dataset, part) for part in indices]
    fetch = getattr(dataset, "__getitems__", None)
    return list(fetch(indices)) if fetch else [dataset[index] for index in indices]


def _count(indices: Sequence[Any]) -> int:
    return sum(_count(part) if isinstance(part, (list, tuple)) else 1 for part in indices)


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
    # All devices of the host, as is the default, would open a context on each of them in each process.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for restore in put_back:
                restore()
