"""Counts of all processes together, of which each tells only what is new, packed.

What a process has counted since the last time is small for most tokens: two kinds of counts share an int32, 15 bits
each, so many that no sum over the processes runs over. Tokens of which some process has counted more are marked
beforehand, and their counts follow in full, in three parts that any sum fits into. So totals stay exact, to 2^63.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vocabguard.vocabulary.table import fit_rows

_BITS = 15
_LANE = 2**_BITS - 1


def too_large(news: Tensor, world: int) -> Tensor:
    """(V,) bool: tokens whose (K, V) int64 new counts do not fit, if every one of `world` processes has as many.

    >>> too_large(torch.tensor([[3, 16_383, 16_384], [0, 1, 0]]), world=2)
    tensor([False, False,  True])
    """
    fits: Tensor = news <= _LANE // world
    return ~fits.all(dim=0)


def encoded(news: Tensor, large: Tensor) -> Tensor:
    """New counts as int32, sums of which are those of the counts.

    Args:
        news: (K, V) int64, K even, not negative.
        large: (V,) bool, the same on all processes: where `too_large` was true on any.

    Returns:
        (K / 2 * V + 3 * K * n,) int32, for n large tokens.

    Example:
        >>> encoded(torch.tensor([[3, 70_000], [2, 5]]), torch.tensor([False, True])).tolist()
        [65539, 0, 4464, 5, 1, 0, 0, 0]
    """
    small, full = news.masked_fill(large, 0), news[:, large]
    pairs = small[0::2] + (small[1::2] << _BITS)
    parts = torch.stack([full & 0xFFFF, (full >> 16) & 0xFFFF, full >> 32])
    return torch.cat([pairs.flatten(), parts.flatten()]).to(torch.int32)


def decoded(words: Tensor, large: Tensor, kinds: int) -> Tensor:
    """(K, V) int64: the sum of the counts whose `encoded` words were added up.

    >>> news, large = torch.tensor([[3, 70_000], [2, 5]]), torch.tensor([False, True])
    >>> decoded(encoded(news, large) + encoded(news, large), large, kinds=2).tolist()
    [[6, 140000], [4, 10]]
    """
    rows = len(large)
    wide = words.to(torch.int64)
    pairs, parts = wide[: kinds // 2 * rows].view(-1, rows), wide[kinds // 2 * rows :].view(3, kinds, -1)
    counts = torch.stack([pairs & _LANE, pairs >> _BITS], dim=1).flatten(0, 1)
    counts[:, large] = parts[0] + (parts[1] << 16) + (parts[2] << 32)
    return counts


class SharedCounts:
    """The sums over all processes, as far as they have told one another.

    Args:
        kinds: K of counts.
        rows: V.

    Attributes:
        totals: (K, V) int64 on the CPU, the same on all processes.

    Example:
        >>> shared, mine = SharedCounts(kinds=2, rows=3), torch.tensor([[1, 0, 5], [0, 0, 9]])
        >>> shared.add(shared.news(mine), mine)
        >>> shared.totals.tolist(), shared.news(mine).any()
        ([[1, 0, 5], [0, 0, 9]], tensor(False))
    """

    def __init__(self, kinds: int, rows: int) -> None:
        self.totals = torch.zeros(kinds, rows, dtype=torch.int64)
        self._told: Tensor | None = None

    def news(self, counts: Tensor) -> Tensor:
        """(K, V) int64 on the CPU: what is new in this process's own counts, which only grow."""
        return (counts if self._told is None else counts - self._told).to("cpu", copy=True)

    def add(self, everyones: Tensor, counts: Tensor) -> None:
        """Take in the news of all processes, which hold those of this one's counts as they are now."""
        self.totals[: len(everyones)] += everyones
        self._told = counts.clone()

    def resize(self, rows: int) -> None:
        """Follow a resized matrix; new rows have no counts."""
        self.totals = fit_rows(self.totals, rows, 0)
        self._told = None if self._told is None else fit_rows(self._told, rows, 0)

    def to(self, device: torch.device) -> None:
        """Follow the counts to another device."""
        self._told = None if self._told is None else self._told.to(device)
