"""How well a measure names lost tokens: AUROC with a bootstrap interval, measures together, and the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 2000


def ranks(values: Tensor) -> Tensor:
    """(n,) float64 from 1; equal values share their mean rank; NaN counts as the lowest."""
    values = values.double().nan_to_num(nan=-torch.inf)
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[place]


def auroc(score: Tensor, lost: Tensor) -> float:
    """Chance that a lost token has a higher score than a kept one, ties counted half; NaN without either.

    Args:
        score: (n,) float.
        lost: (n,) bool.
    """
    hits, others = int(lost.sum()), int((~lost).sum())
    if not hits or not others:
        return float("nan")
    return float((ranks(score)[lost].sum() - hits * (hits + 1) / 2) / (hits * others))


def interval(score: Tensor, lost: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % of the AUROCs of tokens drawn with replacement, lost and kept ones apart."""
    if not bool(lost.any()) or bool(lost.all()):
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    beats = (score[lost].double()[:, None] - score[~lost].double()).sign().add(1).div(2)

    def drawn(size: int) -> Tensor:
        """(DRAWS, size), how often each is drawn, as shares."""
        picks = torch.randint(size, (DRAWS, size), generator=generator)
        return torch.zeros(DRAWS, size, dtype=torch.float64).scatter_add_(
            1, picks, torch.full(picks.shape, 1 / size).double()
        )

    found = ((drawn(beats.shape[0]) @ beats) * drawn(beats.shape[1])).sum(1)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def top_share(score: Tensor, lost: Tensor, share: float = 0.1) -> float:
    """Of the tokens with the highest scores, how many are lost."""
    count = max(1, round(share * len(score)))
    return float(lost[score.nan_to_num(nan=-torch.inf).topk(count).indices].double().mean())


def together(scores: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """(n,) float64, mean of ranks in [0, 1]."""
    return torch.stack([ranks(scores[name]) / len(scores[name]) for name in names]).mean(0)


class Logistic:
    """Logistic regression on ranks, with a ridge; fitted on some runs, read on others.

    Args:
        runs: scores of the known tokens of each run, and which are lost.
        names: of the scores that are used.
    """

    def __init__(self, runs: Sequence[tuple[Mapping[str, Tensor], Tensor]], names: Sequence[str]) -> None:
        self._names = tuple(names)
        x = torch.cat([self._inputs(scores) for scores, _ in runs])
        y = torch.cat([lost for _, lost in runs]).double()
        self.weights = torch.zeros(x.shape[1], dtype=torch.float64)
        ridge = torch.eye(x.shape[1], dtype=torch.float64)
        ridge[0, 0] = 1e-6
        for _ in range(50):
            p = torch.sigmoid(x @ self.weights)
            step = torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + ridge, x.T @ (y - p) - ridge @ self.weights)
            self.weights = self.weights + step

    def _inputs(self, scores: Mapping[str, Tensor]) -> Tensor:
        columns = [ranks(scores[name]) / len(scores[name]) - 0.5 for name in self._names]
        return torch.stack([torch.ones_like(columns[0]), *columns], 1)

    def __call__(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64 in [0, 1]."""
        return torch.sigmoid(self._inputs(scores) @ self.weights)
