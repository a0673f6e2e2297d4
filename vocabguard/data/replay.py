"""The fewest rows of a corpus in which every token in need is a target as often as it needs.

A greedy cover: again and again the row that adds most. Of a corpus of any size only candidates are kept: a row is one
if it holds some token of which the candidates so far hold less than `pool` times the need. So the candidates cover all
that the corpus can cover, in memory that depends on the need alone; a larger pool gives the greedy choice more to
choose from, and a corpus that fits is searched whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocabguard.data.counting import CHUNK
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Example, in_chunks

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """A row that may be chosen.

    Attributes:
        index: of the row in the corpus, from 0.
        ids: (k,) int64, tokens in need that are its targets, ascending.
        counts: (k,) int64, how often, at least 1.
    """

    index: int
    ids: Counts
    counts: Counts


@dataclass(frozen=True, eq=False)
class Replay:
    """What was chosen.

    Attributes:
        chosen: indices of the rows in the corpus, ascending.
        need: (V,) int64, how often each token should be a target; 0 where it is not in need.
        covered: (V,) int64, how often each token in need is a target of the chosen rows; 0 for others.
        available: (V,) bool, in need and a target of some row.
    """

    chosen: tuple[int, ...]
    rows: int
    need: Tensor
    covered: Tensor
    available: Tensor

    @property
    def met(self) -> Tensor:
        """(V,) bool: in need, and a target as often as needed."""
        return (self.need > 0) & (self.covered >= self.need)


def needed_targets(live: Tensor, targets: int, data_target: Tensor | None = None) -> Tensor:
    """How many more targets each token needs.

    Args:
        live: (V,) bool, tokens that count.
        targets: wanted for each; at least 1.
        data_target: (V,) int64, targets that it has already; None is 0.

    Returns:
        (V,) int64 >= 0.

    Raises:
        ValueError: if `targets` is below 1, or the shapes differ.
    """
    if targets < 1:
        raise ValueError(f"targets is {targets}; allowed: at least 1")
    had = torch.zeros(len(live), dtype=torch.int64) if data_target is None else data_target
    if had.shape != live.shape:
        raise ValueError(
            f"the counts are of {len(had)} ids, the tokenizer has {len(live)}; they do not belong together"
        )
    return (targets - had).clamp(min=0) * live


def find_replay(
    read: Callable[[], Iterable[Example]], encoder: TargetEncoder, need: Tensor, *, pool: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Replay:  # fmt: skip
    """Choose rows of a corpus; see `greedy_cover`.

    Args:
        read: gives the corpus from its beginning.
        need: (V,) int64.
        pool: candidates hold at least so many times the need, where the corpus does; at least 1.
        progress: gets the number of rows of each chunk that is read.

    Raises:
        DataError: for a row that cannot be used.
        ValueError: if `pool` is below 1, the corpus is empty, or no token is in need.
    """
    wanted = need.numpy()
    candidates, held, rows = find_candidates(read, encoder, need, pool=pool, progress=progress)
    chosen = greedy_cover(candidates, wanted)
    covered = np.zeros_like(wanted)
    for candidate in chosen:
        covered[candidate.ids] += candidate.counts
    indices = tuple(sorted(candidate.index for candidate in chosen))
    available = torch.from_numpy(held > 0)
    return Replay(indices, rows, need, torch.from_numpy(covered), available)


def find_candidates(
    read: Callable[[], Iterable[Example]], encoder: TargetEncoder, need: Tensor, *, pool: int = 8,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Candidate], Counts, int]:  # fmt: skip
    """The rows from which `find_replay` chooses, how often all ask for each token in need, and how many rows there are.

    Raises:
        DataError: for a row that cannot be used.
        ValueError: if `pool` is below 1, the corpus is empty, or no token is in need.
    """
    if pool < 1:
        raise ValueError(f"pool is {pool}; allowed: at least 1")
    if not bool((need > 0).any()):
        raise ValueError("no token is in need; there is nothing to choose")
    wanted = need.numpy()
    candidates, held, rows = _candidates(_asked(read(), encoder, wanted, progress), wanted * pool)
    if not rows:
        raise ValueError("no rows in the corpus; there is nothing to choose from")
    return candidates, held, rows


def greedy_cover(candidates: Sequence[Candidate], need: Counts) -> list[Candidate]:
    """Rows taken one by one, each the one that adds most targets still needed; earlier rows win ties.

    A heap of old gains is enough, since a gain only falls (Minoux 1978, lazy greedy). At the end rows that later ones
    made needless are given back, so there are never more than the plain greedy choice has, which needs at most
    H(largest gain of a row) times as many rows as the best choice (Wolsey 1982).

    Args:
        need: (V,) int64.

    Returns:
        The chosen rows, in the order of choice.
    """
    left = need.copy()
    heap = [(-_gain(row, left), place) for place, row in enumerate(candidates)]
    heapq.heapify(heap)
    chosen: list[Candidate] = []
    while heap:
        _, place = heapq.heappop(heap)
        gain = _gain(candidates[place], left)
        if gain == 0:
            continue
        if heap and (-gain, place) > heap[0]:
            heapq.heappush(heap, (-gain, place))
            continue
        chosen.append(candidates[place])
        left[candidates[place].ids] -= np.minimum(candidates[place].counts, left[candidates[place].ids])
    return _without_needless(chosen, need)


def written_rows(read: Callable[[], Iterable[Example]], chosen: Sequence[int]) -> Iterator[Example]:
    """The chosen rows of the corpus, by ascending indices, in its order."""
    wanted = iter(chosen)
    following = next(wanted, None)
    for index, example in enumerate(read()):
        if following is None:
            return
        if index == following:
            yield example
            following = next(wanted, None)


def count_targets_in(examples: Iterable[Example], encoder: TargetEncoder, rows: int) -> Tensor:
    """(rows,) int64: how often each token is a target of the examples."""
    counts = np.zeros(rows, dtype=np.int64)
    for chunk in in_chunks(examples, CHUNK):
        for row in encoder.encode(chunk):
            counts += np.bincount(row.ids[row.target], minlength=rows)
    return torch.from_numpy(counts)


def _gain(row: Candidate, left: Counts) -> int:
    return int(np.minimum(row.counts, left[row.ids]).sum())


def _without_needless(chosen: list[Candidate], need: Counts) -> list[Candidate]:
    """Give back rows without which everything is covered as well as with them, the last chosen first."""
    covered = np.zeros_like(need)
    for row in chosen:
        covered[row.ids] += row.counts
    reachable = np.minimum(covered, need)
    kept = []
    for row in reversed(chosen):
        if (covered[row.ids] - row.counts >= reachable[row.ids]).all():
            covered[row.ids] -= row.counts
        else:
            kept.append(row)
    return kept[::-1]


def _asked(
    examples: Iterable[Example], encoder: TargetEncoder, need: Counts, progress: Callable[[int], object] | None
) -> Iterator[Candidate]:
    """Targets of each row, of the tokens in need."""
    index = 0
    for chunk in in_chunks(examples, CHUNK):
        for row in encoder.encode(chunk):
            asked = row.ids[row.target]
            ids, counts = np.unique(asked[need[asked] > 0], return_counts=True)
            yield Candidate(index, ids, counts)
            index += 1
        if progress is not None:
            progress(len(chunk))


def _candidates(rows: Iterable[Candidate], enough: Counts) -> tuple[list[Candidate], Counts, int]:
    """The rows to choose from, how often each token in need is their target, and how many rows there were."""
    held = np.zeros_like(enough)
    candidates, number = [], 0
    for row in rows:
        number += 1
        if len(row.ids) and (held[row.ids] < enough[row.ids]).any():
            held[row.ids] += row.counts
            candidates.append(row)
    return candidates, held, number
