"""Rows that were never trained at the base, by the indicators of "Fishing for Magikarp" (EMNLP 2024, arXiv 2405.05417).

They look like the rows that are known to be unused (`vocabguard.measure.unused`): those beyond the tokenizer, those of
tokens that no text gives, and those of reserved tokens. Two indicators see it: the norm of the input row, which weight
decay or the initialisation has left small, and the cosine distance of the output row to the mean unused row, since all
unused rows are pushed alike. The second works as well where head and embedding were one matrix in pre-training; there
an unused row's norm may be the largest of all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vocabguard.measure.chunks import Chunks, by_chunk, read_rows
from vocabguard.measure.unused import FEWEST_UNUSED, spread_of

_SAMPLED_ROWS = 2048
# In the cosine distance: tokens that pre-training met a few times are hardly further. Unused rows that differ by less
# than their rounding would else admit none but themselves.
_NEAR_UNUSED = 0.05
_POWER_STEPS = 50
# Passes over all rows, after the sample: two take Spearman's coefficient with exact distances from 0.998 to 1.0000.
_POWER_PASSES = 2
# In standard deviations, estimated by the median absolute deviation, which a few odd rows do not move.
_WITHIN_UNUSED = 6.0
_BELOW_BULK = 6.0
_FAR_BELOW_BULK = 8.0


def row_norms(chunks: Chunks, rows: int) -> Tensor:
    """L2 norm of every row: the indicator for input rows that are not tied to the head.

    (rows,) float32 on the CPU, NaN where the row is not finite; a ValueError if the chunks do not cover so many rows.

    Example:
        >>> row_norms(lambda: [(slice(0, 1), torch.tensor([[3.0, 4.0]])), (slice(1, 2), torch.tensor([[0.0, 2.0]]))], 2)
        tensor([5., 2.])
    """
    return by_chunk(chunks, rows, lambda _, part: part.norm(dim=1))


def unused_distances(chunks: Chunks, known_unused: Tensor) -> Tensor:
    """Cosine distance of every row to the mean unused row, both without the first principal component.

    The component is that of the rows as they are, not centred: it stands for the constant that all output rows share
    and softmax ignores. A row that is itself known as unused is compared with the mean of the others, so that its
    distance is comparable with a candidate's.

    Args:
        chunks: the output rows; read twice, of more than 2,048 rows four times.
        known_unused: (V,) bool.

    Returns:
        (V,) float32 in [0, 2] on the CPU; NaN for rows that are zero or not finite, and everywhere if fewer than two
        rows are known as unused.

    Raises:
        ValueError: if the chunks do not cover V rows.

    Example:
        >>> head = torch.tensor([[9.0, 1.0], [9.0, 1.0], [9.0, 1.0], [9.0, -1.0]])  # 9 is what all rows share
        >>> unused_distances(lambda: [(slice(0, 4), head)], torch.tensor([True, True, False, False])).round()
        tensor([0., 0., 0., 2.])
    """
    count, total, component = _survey(chunks, known_unused)
    if count < 2 or component is None:
        return torch.full(known_unused.shape, math.nan)
    total = total - (total @ component) * component
    directions = torch.stack([total, component], dim=1)

    def distance(where: slice, part: Tensor) -> Tensor:
        # The total has no share of the component, so a row's product with it is that of the projected row.
        to_total, to_component = (part @ directions.to(part.device)).cpu().double().unbind(dim=1)
        length = torch.linalg.vecdot(part, part).cpu().double() - to_component.square()
        own = known_unused[where].double()
        others = (total @ total).double() + own * (length - 2 * to_total)
        cosine = (to_total - own * length) / (length * others).sqrt()
        return torch.where(length > 0, 1 - cosine, math.nan).clamp(0, 2).float()

    return by_chunk(chunks, len(known_unused), distance)


def never_trained(
    embedding: Chunks | None, head: Chunks | None, tied: bool, candidates: Tensor,
    known_unused: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which of the candidates were never trained.

    A candidate is named when it is no further than 6 standard deviations from the known unused rows (or than 0.05 in
    the distance) *and* at least 6 below the bulk of the candidates, in the distance of its head row and, with untied
    weights, in the log norm of its input row. An indicator in which the unused rows do not stand out so from the bulk
    (a fresh model, few or odd unused rows) has no say; where both have one, they must agree. Where none has, only rows
    whose norm is less than half the median and 8 standard deviations below it in the logarithm are named.

    Args:
        embedding: the input rows, or None.
        head: the output rows, or None; with tied weights either will do.
        tied: whether both are one matrix now. Matrices that were tied in pre-training may come as untied.
        candidates: (V,) bool, the rows in question: live tokens. What is found is a subset.
        known_unused: (V,) bool, see `vocabguard.measure.unused`; None if there are none.

    Raises:
        ValueError: if there is neither matrix, or masks and chunks do not cover the same V rows.

    Example:
        >>> rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> rows[[5, 40]] = 0.01  # smaller than half of the median, and far from all others
        >>> found = never_trained(lambda: [(slice(0, 100), rows)], None, False, torch.ones(100, dtype=torch.bool))
        >>> found.nonzero().flatten().tolist()
        [5, 40]
    """
    output = head or (embedding if tied else None)
    first = embedding or head
    if first is None:
        raise ValueError("never_trained needs the input rows, the output rows or both; got neither")
    unused = torch.zeros_like(candidates) if known_unused is None else known_unused
    if unused.shape != candidates.shape:
        raise ValueError(f"candidates has shape {tuple(candidates.shape)}, known_unused {tuple(unused.shape)}")
    unused = unused & ~candidates
    distances = None if output is None else unused_distances(output, unused)
    log_norms = row_norms(first, len(candidates)).log()
    votes = [] if distances is None else [_like_unused(distances, candidates, unused, _NEAR_UNUSED)]
    if not tied and embedding is not None:
        votes.append(_like_unused(log_norms, candidates, unused))
    cuts = [vote for vote in votes if vote is not None] or [_outliers(log_norms, candidates)]
    return torch.stack(cuts).all(dim=0) & candidates


def _survey(chunks: Chunks, known_unused: Tensor) -> tuple[int, Tensor, Tensor | None]:
    """Number and sum (d,) float32 of the finite unused rows, and the first principal component (d,) of all."""
    stride = max(1, math.ceil(len(known_unused) / _SAMPLED_ROWS))
    count, total, sample = 0, torch.zeros(()), []
    for where, part in read_rows(chunks, len(known_unused)):
        unused = _finite(part[known_unused[where].to(part.device)])
        count, total = count + len(unused), total + unused.sum(dim=0).cpu()
        sample.append(_finite(part[-where.start % stride :: stride]).cpu())
    component = _first_component(torch.cat(sample)) if count > 1 else None
    if component is not None and stride > 1:
        for _ in range(_POWER_PASSES):
            component = _powered(chunks, len(known_unused), component)
    return count, total, component


def _powered(chunks: Chunks, rows: int, vector: Tensor) -> Tensor:
    """One step of power iteration over all finite rows."""
    moved = torch.zeros_like(vector)
    for _, part in read_rows(chunks, rows):
        shares = part @ vector.to(part.device)
        moved += (shares.nan_to_num(0, 0, 0) @ part.nan_to_num(0, 0, 0)).cpu()
    return torch.nn.functional.normalize(moved, dim=0)


def _finite(rows: Tensor) -> Tensor:
    """Those rows that hold neither NaN nor Inf."""
    return rows[rows.isfinite().all(dim=1)]


def _first_component(sample: Tensor) -> Tensor | None:
    """The unit vector (d,) along which the rows (n, d) are longest, by power iteration; None if all are zero."""
    if not sample.any():
        return None
    vector = sample[sample.norm(dim=1).argmax()]
    for _ in range(_POWER_STEPS):
        vector = torch.nn.functional.normalize(sample.T @ (sample @ vector), dim=0)
    return vector


def _like_unused(score: Tensor, candidates: Tensor, unused: Tensor, near: float = 0.0) -> Tensor | None:
    """Rows that score as the unused ones do, far below the bulk; None if the unused ones do not stand out so.

    Args:
        near: what is above the unused rows' median by no more scores as they do.
    """
    known, bulk = score[unused & score.isfinite()], score[candidates & score.isfinite()]
    if len(known) < FEWEST_UNUSED or len(bulk) == 0:
        return None
    (low, low_spread), (middle, spread) = spread_of(known), spread_of(bulk)
    edge = min(low + max(near, _WITHIN_UNUSED * low_spread), middle - _BELOW_BULK * spread)
    return score <= edge if edge > low else None


def _outliers(log_norms: Tensor, candidates: Tensor) -> Tensor:
    """Rows far below the bulk of the candidates; zero rows, whose logarithm is -inf, are among them."""
    bulk = log_norms[candidates & log_norms.isfinite()]
    if len(bulk) == 0:
        return torch.zeros_like(candidates)
    middle, spread = spread_of(bulk)
    return log_norms <= middle - max(_FAR_BELOW_BULK * spread, math.log(2))
