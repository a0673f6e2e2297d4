"""Every vocabulary row of a tuned checkpoint against its base's, read from disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.compare.matching import Match, ReorderedRows, match_rows, table_for
from vocabguard.measure.chunks import Chunks
from vocabguard.measure.drift import drift_beyond, evenly, mean_shift
from vocabguard.measure.kernels import RowReader, take_rows
from vocabguard.measure.undertrained import never_trained
from vocabguard.measure.unused import FEWEST_UNUSED, known_unused
from vocabguard.results import MatrixName, NotApplicable, RowDrift
from vocabguard.rows.baselines import Baseline, norms_of, one_torch_thread
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.tensors import MATRICES
from vocabguard.vocabulary.table import VocabTable

# Rows of each kind that a sample holds, and rows that are converted at a time.
_SAMPLED, _FEW_ROWS = 8192, 64

_Read = Callable[[Baseline], Iterable[tuple[slice, Tensor]]]
"""Rows of a matrix by slices of places."""


@dataclass(frozen=True)
class BaseRows:
    """The base's matrices, in the order of the tuned vocabulary.

    Attributes:
        live: (V,) bool, the rows in question.
        unused: (V,) bool, see `vocabguard.measure.unused.known_unused`.
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
        """(V,) bool: the live rows that were never trained, given the measured (V,) float32 norms by matrix."""
        source = self._source
        if isinstance(source, NotApplicable):
            return torch.zeros_like(self.live)
        known = norms.get("head" if source is self.head else "embedding", norms.get("head") if self.tied else None)
        size = max(1, self.chunk // source.width)
        everyone = slice(None)
        return self._judge(everyone, norms_of(source) if known is None else known, lambda rows: rows.chunks(size))

    @one_torch_thread()
    def trained_sample(self, targets: Tensor | None) -> Tensor:
        """(V,) bool: at most 8,192 evenly spaced live rows that are no target and not such that were never trained.

        They are judged before the base is read, by as large a sample of all live and of the unused rows. Without (V,)
        counts of targets all live rows may be taken.
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
        if int(unused.sum()) >= FEWEST_UNUSED and not isinstance(self.head, NotApplicable):
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


Progress = Callable[[str, int, int], None]
"""Called with what is being read, the rows read so far and the rows there are."""

# Elements read at a time; eight times as many where rows are sampled.
_CHUNK = 2**21


@dataclass(frozen=True)
class Scan:
    """What a scan finds; vectors are in the order of the tuned vocabulary.

    Attributes:
        head: drift of the output rows, or why there is none.
        embedding: drift of the input rows, or why there is none.
        table: groups, texts, and rows that were never trained at the base.
        match: which base row each row was compared with.
        unused: (V,) bool, rows of the base that are known to be unused.
        data_target: (V,) int64 targets of the training data, if they are known.
        seconds: what reading and measuring took.
        zeroed: (V,) bool by matrix, live rows that are zero now and were not at the base. They have no cosine, so that
            no share counts them.
    """

    base: Checkpoint
    tuned: Checkpoint
    head: RowDrift | NotApplicable
    embedding: RowDrift | NotApplicable
    table: VocabTable
    match: Match
    unused: Tensor
    data_target: Tensor | None
    seconds: float
    zeroed: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def live(self) -> Tensor:
        """(V,) bool: live tokens that have a base row."""
        return self.table.live & self.match.mask

    def drift(self, name: MatrixName) -> RowDrift | NotApplicable:
        """Of ``head`` or ``embedding``."""
        return self.head if name == "head" else self.embedding

    @property
    def judged(self) -> MatrixName | None:
        """The matrix that the verdict is about: the head, else the embedding, else none."""
        if isinstance(self.head, RowDrift):
            return "head"
        return "embedding" if isinstance(self.embedding, RowDrift) else None


def scan(
    base: Checkpoint, tuned: Checkpoint, *, base_tokenizer: Any = None, tokenizer: Any = None,
    data_target: Tensor | None = None, progress: Progress | None = None,
) -> Scan:  # fmt: skip
    """Measure every row of the head and of the input embedding against the base.

    Each matrix is read once, but for a sample of its rows: the residual cosine leaves out the mean displacement of the
    rows that were never a target of the data (where the data's counts are not known, of all live rows), and that has to
    be known before. Known unused rows (see `vocabguard.compare.scan`) cost a second reading of the base's head.

    Args:
        base_tokenizer: the base's own tokenizer, if it may differ from the tuned one's.
        tokenizer: the tuned model's; None gives one group without texts.
        data_target: (V,) int64, targets of each token of the tuned vocabulary.

    Raises:
        ValueError: if the widths differ, or the tokenizer or the counts do not fit.
    """
    began = time.perf_counter()
    rows = tuned.rows or base.rows
    _check_counts(data_target, rows)
    match = match_rows(base_tokenizer, tokenizer, base.rows, rows)
    table = table_for(tokenizer, rows)
    before, now = (_fitted(*pair) for pair in ((base, match.base_ids), (tuned, torch.arange(rows))))
    of_base = _base_rows(before, base.tied, table, match)
    unexposed = of_base.trained_sample(data_target)
    found: dict[str, RowDrift | NotApplicable] = {}
    norms: dict[str, Tensor] = {}
    for name in MATRICES:
        if name == "embedding" and tuned.tied and base.tied:
            found[name] = found["head"]
        else:
            found[name] = _drift(name, now[name], before[name], unexposed, norms, progress)
    table = table.with_trained(~of_base.never_trained(norms))
    live = table.live & match.mask
    zeroed = {
        name: live & drift.zero & (norms.get(name, norms.get("head", torch.zeros(rows))) > 0)
        for name, drift in found.items()
        if isinstance(drift, RowDrift)
    }
    seconds = time.perf_counter() - began
    return Scan(
        base, tuned, found["head"], found["embedding"], table, match, of_base.unused, data_target, seconds, zeroed
    )  # fmt: skip


@one_torch_thread()
def _fitted(checkpoint: Checkpoint, ids: Tensor) -> dict[str, Baseline | NotApplicable]:
    """Both matrices of a checkpoint."""
    return {name: fitted(checkpoint.matrix(name), ids) for name in MATRICES}


@one_torch_thread()
def _base_rows(before: Mapping[str, Baseline | NotApplicable], tied: bool, table: VocabTable, match: Match) -> BaseRows:
    head, embedding = before["head"], before["embedding"]
    output, unused = embedding if isinstance(head, NotApplicable) else head, table.idle
    if not isinstance(output, NotApplicable):
        chunks = partial(output.chunks, max(1, _CHUNK // output.width))
        unused = known_unused(chunks, unused, table.reserved, table.control)
    return BaseRows(head, embedding, tied, table.live & match.mask, unused & match.mask, _CHUNK)


def fitted(rows: Baseline | NotApplicable, ids: Tensor) -> Baseline | NotApplicable:
    """The rows in the order of (V,) int64 ``ids``; -1 gives NaN."""
    if isinstance(rows, NotApplicable):
        return rows
    in_place = rows.rows == len(ids) and bool((ids == torch.arange(len(ids))).all())
    return rows if in_place else ReorderedRows(rows, ids)


def _drift(
    name: str, now: Baseline | NotApplicable, before: Baseline | NotApplicable, unexposed: Tensor,
    norms: dict[str, Tensor], progress: Progress | None,
) -> RowDrift | NotApplicable:  # fmt: skip
    """Drift of one matrix; the base rows' norms go into ``norms``."""
    for rows, side in ((now, "tuned"), (before, "base")):
        if isinstance(rows, NotApplicable):
            return rows if side == "tuned" else NotApplicable(f"base: {rows.reason}")
    assert not isinstance(now, NotApplicable)
    assert not isinstance(before, NotApplicable)
    if now.width != before.width:
        raise ValueError(
            f"the {name}'s rows have {before.width} elements in the base and {now.width} in the tuned model; allowed: "
            "two checkpoints of one model"
        )
    size = max(1, _CHUNK // now.width)
    shift = mean_shift(now, before, unexposed, size)
    told: RowReader = now if progress is None else _Told(now, name, progress)
    found, base_sq = drift_beyond(shift, told, before, size, base_too=True)
    norms[name] = torch.from_numpy(np.sqrt(base_sq.numpy()))
    return found


def _check_counts(data_target: Tensor | None, rows: int) -> None:
    if data_target is not None and data_target.shape != (rows,):
        raise ValueError(
            f"counts of data targets have shape {list(data_target.shape)}; the tuned model has {rows} rows"
        )


class _Told:
    """Rows that tell how far their reader has come."""

    def __init__(self, inner: RowReader, name: str, tell: Progress) -> None:
        self._inner, self._name, self._tell = inner, name, tell
        self.rows, self.width = inner.rows, inner.width

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for part, rows in self._inner.chunks(size):
            self._tell(self._name, part.stop, self.rows)
            yield part, rows
