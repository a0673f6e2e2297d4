"""Which rows of a base were never trained: `vocabguard.measure.untrained` on rows that are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.measure.drift import evenly
from vocabguard.measure.rowwise import take_rows
from vocabguard.measure.untrained import Chunks, never_trained
from vocabguard.offline.tensors import one_torch_thread
from vocabguard.results import NotApplicable
from vocabguard.snapshot import Baseline

# Fewer rows known as unused say nothing about what an unused row looks like.
_FEWEST_UNUSED = 4
# Rows of each kind that a sample holds, and rows that are converted at a time.
_SAMPLED, _FEW_ROWS = 8192, 64

_Read = Callable[[Baseline], Iterable[tuple[slice, Tensor]]]
"""Rows of a matrix by slices of places."""


@dataclass(frozen=True)
class BaseRows:
    """The base's matrices, in the order of the tuned vocabulary.

    Attributes:
        head: its output rows.
        embedding: its input rows.
        tied: whether both are one matrix.
        live: (V,) bool, the rows in question.
        unused: (V,) bool, rows that are known to be unused: padded and unreachable ones.
        chunk: elements to read at a time.
    """

    head: Baseline | NotApplicable
    embedding: Baseline | NotApplicable
    tied: bool
    live: Tensor
    unused: Tensor
    chunk: int

    @one_torch_thread()
    def never_trained(self, norms: Mapping[str, Tensor]) -> Tensor:
        """(V,) bool: the live rows that were never trained.

        Args:
            norms: (V,) float32 of the rows of ``head`` and ``embedding``, as far as they have been measured.
        """
        source = self._source
        if isinstance(source, NotApplicable):
            return torch.zeros_like(self.live)
        known = norms.get("head" if source is self.head else "embedding", norms.get("head") if self.tied else None)
        size = max(1, self.chunk // source.width)
        everyone = slice(None)
        return self._judge(everyone, source.norms if known is None else known, lambda rows: rows.chunks(size))

    @one_torch_thread()
    def trained_sample(self, targets: Tensor | None) -> Tensor:
        """(V,) bool: at most 8,192 evenly spaced live rows that are no target and not such that were never trained.

        They are judged before the base is read, by as large a sample of all live and of the unused rows.

        Args:
            targets: (V,) counts of the data's targets; None takes all live rows.
        """
        wanted = self.live if targets is None else self.live & (targets == 0)
        of_live, chosen, of_unused = (evenly(np.flatnonzero(m), _SAMPLED) for m in (self.live, wanted, self.unused))
        ids = np.unique(np.concatenate((of_live, chosen, of_unused)))
        sample = np.zeros(len(wanted), dtype=np.bool_)
        sample[chosen] = True
        if not isinstance(self._source, NotApplicable) and len(ids):
            read = partial(_gathered, ids, self.chunk)
            norms = torch.cat([rows.norm(dim=1) for _, rows in read(self._source)])
            sample[ids[self._judge(torch.from_numpy(ids), norms, read).numpy()]] = False
        return torch.from_numpy(sample)

    @property
    def _source(self) -> Baseline | NotApplicable:
        """The rows whose norms tell."""
        return self.head if isinstance(self.embedding, NotApplicable) else self.embedding

    def _judge(self, which: slice | Tensor, norms: Tensor, read: _Read) -> Tensor:
        """(n,) bool of n rows: live ones that were never trained; ``read`` gives them by their places among the n."""
        live, unused = self.live[which], self.unused[which]
        outputs: Chunks | None = None
        # Without known unused rows two more passes over the head could find nothing.
        if int(unused.sum()) >= _FEWEST_UNUSED and not isinstance(self.head, NotApplicable):
            outputs = partial(read, self.head)
        one_matrix = outputs is not None and (self.tied or self._source is self.head)
        # Rows of width 1 with the norms: of input rows no more is asked.
        column = [(slice(0, len(norms)), norms[:, None])]
        return never_trained(lambda: column, outputs, one_matrix, live, unused)


def _gathered(ids: npt.NDArray[np.int64], chunk: int, rows: Baseline) -> Iterator[tuple[slice, Tensor]]:
    """The rows ``ids``, in order, a few at a time: their places among the ids, and the rows in float32."""
    for part, block in rows.chunks(max(1, 8 * chunk // rows.width)):
        first, last = np.searchsorted(ids, (part.start, part.stop))
        for start in range(first, last, _FEW_ROWS):
            stop = min(start + _FEW_ROWS, last)
            yield slice(start, stop), torch.from_numpy(take_rows(block, ids[start:stop] - part.start))
