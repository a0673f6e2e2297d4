"""Nearest rows by cosine, then and now: what has moved in next to a token, read chunk by chunk.

A row that has lost its place is seen by its company: where a name once lay among names, control markers and pieces of
other scripts come close. Nothing of the matrix's size is allocated; the k best of each row are kept while the chunks
pass by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabguard.measure.kernels import RowReader
from vocabguard.rows.baselines import Baseline
from vocabguard.vocabulary.table import VocabTable

# Elements of a chunk in float32: 4 MiB, which stay in the cache between conversion, norm and product.
_CHUNK = 2**20
# Groups that every script lives beside.
_SHARED = ("digits_punctuation", "code")


@dataclass(frozen=True)
class NearestRows:
    """The rows nearest to each of n rows, nearest first.

    Attributes:
        ids: (n, k) int64; -1 where there are fewer, or the row itself is not finite, zero or missing.
        cosine: (n, k) float32 in [-1, 1]; NaN where the id is -1.
    """

    ids: Tensor
    cosine: Tensor


@dataclass(frozen=True)
class Neighborhoods:
    """The nearest rows of some tokens, (n,) int64 ids, at the baseline and now.

    Example:
        >>> then, now = (NearestRows(torch.tensor([ids]), torch.zeros(1, 4)) for ids in ([1, 2, 3, 4], [4, 3, 9, 8]))
        >>> Neighborhoods(torch.tensor([7]), then, now).overlap
        tensor([0.5000])
    """

    ids: Tensor
    then: NearestRows
    now: NearestRows

    @property
    def overlap(self) -> Tensor:
        """(n,) float32 in [0, 1]: share of the rows near then that are near now; NaN where none were."""
        known = self.then.ids >= 0
        stays = (self.then.ids[:, :, None] == self.now.ids[:, None, :]).any(2) & known
        return stays.sum(1).float() / known.sum(1)


def compare_neighbors(
    matrix: RowReader, baseline: Baseline, ids: Tensor, k: int, exclude: Tensor | None = None
) -> Neighborhoods:
    """The k nearest rows of some tokens at the baseline and now; see `nearest_rows`.

    The baseline may have fewer rows, where some were added since. Raises ValueError for ids outside the matrix.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> now = torch.tensor([[0.1, 1.0], [1.0, 0.1], [0.0, 1.0]])  # row 0 left row 1 for row 2
        >>> found = compare_neighbors(CopiedBaseline(now), CopiedBaseline(before), torch.tensor([0]), k=1)
        >>> found.then.ids.tolist(), found.now.ids.tolist(), found.overlap.tolist()
        ([[1]], [[2]], [0.0])
    """
    ids = ids.to("cpu", torch.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < matrix.rows:
        raise ValueError(f"ids are {int(ids.min())} to {int(ids.max())}; allowed: 0 to {matrix.rows - 1}")
    before = None if exclude is None else exclude[: baseline.rows]
    return Neighborhoods(ids, nearest_rows(baseline, ids, k, before), nearest_rows(matrix, ids, k, exclude))


@torch.no_grad()
def nearest_rows(rows: RowReader | Baseline, ids: Tensor, k: int, exclude: Tensor | None = None) -> NearestRows:
    """The k rows that point most nearly the same way as each of n rows, without that row itself.

    Args:
        rows: of any floating dtype, on any device; two passes, or one where single rows can be read.
        ids: (n,) int64; one beyond the rows has no neighbours.
        exclude: (V,) bool, rows that are never named. Rows that are not finite or zero never are. Rows that lie equally
            near come in any order.

    Returns:
        On the CPU. Products are taken in float32.

    Raises:
        ValueError: for k < 1 or a mask of another length.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> rows = CopiedBaseline(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
        >>> found = nearest_rows(rows, torch.tensor([0]), k=2)
        >>> found.ids, found.cosine
        (tensor([[1, 2]]), tensor([[0.6000, 0.0000]]))
    """
    if k < 1:
        raise ValueError(f"k is {k}; allowed: at least 1")
    if exclude is not None and exclude.shape != (rows.rows,):
        raise ValueError(f"exclude has shape {tuple(exclude.shape)}; expected ({rows.rows},)")
    ids = ids.to("cpu", torch.int64)
    size = max(1, _CHUNK // max(1, rows.width))
    wanted = _directions(pick_rows(rows, ids))
    best, place = torch.full((k, len(ids)), -torch.inf), torch.full((k, len(ids)), -1)
    best, place, own = (tensor.to(wanted.device) for tensor in (best, place, ids))
    for part, chunk in rows.chunks(size):
        wide = chunk.float()
        # Divided after the product, which is the smaller matrix.
        near = (wide @ wanted.T) / torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        numbers = torch.arange(part.start, part.stop, device=near.device)[:, None]
        hidden = (numbers == own) | ~near.isfinite()
        if exclude is not None:
            hidden |= exclude[part].to(near.device)[:, None]
        near.masked_fill_(hidden, -torch.inf)
        best, kept = torch.cat([best, near]).topk(k, dim=0)
        place = torch.cat([place, numbers.expand_as(near)]).gather(0, kept)
    found = best.T.cpu()
    return NearestRows(
        place.T.cpu().where(found > -torch.inf, -1), found.clamp(-1, 1).where(found > -torch.inf, torch.nan)
    )


def intruders(table: VocabTable, ids: Tensor, near: Tensor) -> Tensor:
    """(n, k) bool: neighbours that do not belong beside a token: control and byte pieces, letters of another group.

    Digits, punctuation and code belong beside every group. `near` is (n, k) int64, -1 for none.

    Example:
        >>> from vocabguard.vocabulary.table import GROUPS, plain_table
        >>> from dataclasses import replace
        >>> group = torch.tensor([GROUPS.index(name) for name in ("ja", "ja", "latin", "code", "control")])
        >>> table = replace(plain_table(5), group=group.to(torch.uint8), names=GROUPS)
        >>> intruders(table, torch.tensor([0]), torch.tensor([[1, 2, 3, 4, -1]])).tolist()
        [[False, True, False, True, False]]
    """
    group = table.group.long()
    shared = torch.tensor([name in _SHARED for name in table.names])
    theirs = group[near.clamp(min=0)]
    return (theirs != group[ids][:, None]) & ~shared[theirs] & (near >= 0)


@torch.no_grad()
def pick_rows(rows: RowReader | Baseline, ids: Tensor) -> Tensor:
    """Some rows: one by one where single rows can be read, else in one pass. The (n,) ids are on the CPU.

    Returns:
        (n, width) float32 on the rows' device; NaN for an id beyond them.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> pick_rows(CopiedBaseline(torch.tensor([[1.0], [2.0]])), torch.tensor([1, 5])).tolist()
        [[2.0], [nan]]
    """
    read: Callable[[slice], Tensor] | None = getattr(rows, "chunk", None)
    size = max(1, _CHUNK // max(1, rows.width))
    found: Tensor | None = None
    parts = (
        ((slice(i, i + 1), read(slice(i, i + 1))) for i in ids.tolist() if i < rows.rows) if read else rows.chunks(size)
    )
    for part, chunk in parts:
        if found is None:
            found = torch.full((len(ids), rows.width), torch.nan, device=chunk.device)
        inside = (ids >= part.start) & (ids < part.stop)
        if inside.any():
            found[inside.to(chunk.device)] = chunk[(ids[inside] - part.start).to(chunk.device)].float()
    return torch.full((len(ids), rows.width), torch.nan) if found is None else found


def _directions(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length
