"""Samples in which small strata are not lost, and what each of their tokens stands for."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def stratified_sample(strata: Tensor, eligible: Tensor, size: int, seed: int) -> Tensor:
    """A sample in which small strata are not lost.

    Every stratum gets its share of `size`, but at least ``size / (2 * strata)`` ids, or all it has; the larger strata
    pay for that. Of `size` or fewer eligible ids all are taken.

    Args:
        strata: (V,) int64 >= 0, the stratum of each id, such as its group.
        eligible: (V,) bool, the ids that may be drawn.

    Example:
        >>> strata = torch.tensor([0] * 96 + [1] * 4)
        >>> sample = stratified_sample(strata, torch.ones(100, dtype=torch.bool), size=16, seed=0)
        >>> torch.bincount(strata[sample]).tolist()
        [12, 4]
    """
    ids = eligible.nonzero().squeeze(1)
    size = max(0, min(size, len(ids)))
    sizes = torch.bincount(strata[ids])
    labels = sizes.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, quota in zip(labels, _quotas(sizes[labels].tolist(), size), strict=True):
        members = ids[strata[ids] == label]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values if chosen else ids


def sample_weights(strata: Tensor, eligible: Tensor, sample: Tensor) -> Tensor:
    """(n,) float32: eligible ids of its stratum that each id of a sample stands for; 0 for ids that are not eligible.

    >>> strata = torch.tensor([0] * 6 + [1] * 4)
    >>> sample_weights(strata, torch.ones(10, dtype=torch.bool), torch.tensor([0, 1, 9])).tolist()
    [3.0, 3.0, 4.0]
    """
    here = eligible[sample]
    sizes, drawn = torch.bincount(strata[eligible]), torch.bincount(strata[sample[here]], minlength=len(strata))
    found = torch.zeros(len(sample))
    own = strata[sample[here]]
    found[here] = sizes[own].float() / drawn[own].float()
    return found


def _quotas(sizes: list[int], size: int) -> list[int]:
    """How many to draw of each stratum; in fractions, so that they add up to `size` and none exceeds its stratum."""
    if not sizes or size == 0:
        return [0] * len(sizes)
    shares = [Fraction(n * size, sum(sizes)) for n in sizes]
    floors = [min(n, size // (2 * len(sizes))) for n in sizes]
    above = [max(Fraction(0), share - floor) for share, floor in zip(shares, floors, strict=True)]
    scale = (size - sum(floors)) / sum(above, Fraction(0))
    exact = [floor + extra * scale for floor, extra in zip(floors, above, strict=True)]
    quotas = [int(q) for q in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: size - sum(quotas)]:
        quotas[i] += 1
    return quotas
