"""How likely every token would be repeated: what a probe measured on some tokens, carried over to all.

A probe asks for a few hundred tokens; which of the others are lost, the drift of their rows does not say. What says
more is how the model's logits treat a token at places where *another* one is wanted: the mean and the spread of its
logit where the probe asks, and in natural text, now and at the base. What of these speaks for a loss differs from run
to run, so a ridge regression is fitted at each probe on the tokens that it asked for, and read for all tokens. It knows
body and head, needs no row of any matrix, and costs a sum over logits that are computed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vocabguard.results import ProbeResult, Recall

RIDGE = 30.0
"""Penalty on squared weights of standardised features."""
FLOOR = -6.0
"""Nats below which a probed token counts as gone: how far below says nothing more."""
KNOWN = -1.5
"""Mean log-probability from which on the base is taken to repeat a token; others teach nothing about losses."""
LEAST_KNOWN = 32
"""Known probed tokens below which nothing is estimated."""


class LogitMoments:
    """Mean and standard deviation of every token's logit over places, added up batch by batch.

    At places where a token is the wanted one it is left out: what is asked of the others is how they are treated
    beside it.

    Example:
        >>> moments = LogitMoments()
        >>> moments.add(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), wanted=torch.tensor([1, 1]))
        >>> moments.mean, moments.spread
        (tensor([2., nan]), tensor([1., nan]))
    """

    def __init__(self) -> None:
        self._sums = torch.empty(3, 0, dtype=torch.float64)

    def add(self, logits: Tensor, wanted: Tensor) -> None:
        """Add some places.

        Args:
            logits: (P, V) float32; P may be 0.
            wanted: (P,) int64, the id that is wanted at each place.
        """
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        totals = torch.full_like(logits[:0].sum(0), len(logits)), logits.sum(0), logits.square().sum(0)
        columns = [total.index_add(0, wanted, -own.pow(power)) for power, total in enumerate(totals)]
        found = torch.stack(columns).cpu().double()
        self._sums = found if not self._sums.shape[1] else self._sums + found

    @property
    def mean(self) -> Tensor:
        """(V,) float32; NaN for a token without places."""
        return (self._sums[1] / self._sums[0]).float()

    @property
    def spread(self) -> Tensor:
        """(V,) float32 >= 0, standard deviation."""
        mean = self._sums[1] / self._sums[0]
        return (self._sums[2] / self._sums[0] - mean.square()).clamp(min=0).sqrt().float()


def moment_features(kinds: Sequence[LogitMoments]) -> Tensor:
    """(V, 2 * kinds) float32: mean and spread by kind of place.

    >>> places = LogitMoments()
    >>> places.add(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), wanted=torch.tensor([0, 1]))
    >>> moment_features([places]).tolist()
    [[3.0, 0.0], [5.0, 0.0]]
    """
    return torch.stack([column for one in kinds for column in (one.mean, one.spread)], dim=1)


def _probed_nats(found: ProbeResult) -> Tensor:
    """(n,) float64, mean log-probability over the asks of each probed token, each at least `FLOOR`."""
    return found.probability.double().clamp(min=math.exp(FLOOR)).log().mean(1)


def estimate_recall(features: Tensor, base: ProbeResult, now: ProbeResult) -> Recall | None:
    """Estimate the log-probability of every token where it is the target.

    Args:
        features: (V, f) float32, of every token, as `moment_features` gives them, at the base and now side by side.
        base: the probe at the base: only tokens that it found repeated teach.
        now: the latest probe, of the same ids.

    Returns:
        None where the base repeats fewer than `LEAST_KNOWN` of the probed tokens, or where no feature is finite.

    Raises:
        ValueError: for probes of different ids.

    Example:
        Sixty probed tokens of which those with a low feature are lost:

        >>> features = torch.linspace(-1, 1, 100)[:, None]
        >>> ids, asks = torch.arange(20, 80), torch.zeros(60, 1, dtype=torch.int64)
        >>> def probed(probability):
        ...     return ProbeResult(("list",), ids, probability > 0.5, probability, asks, asks)
        >>> found = estimate_recall(features, probed(torch.ones(60, 1)), probed(torch.sigmoid(9 * features[20:80])))
        >>> found.nats[[0, 50, 99]].sort().indices.tolist(), found.agreement > 0.9
        ([0, 1, 2], True)
    """
    if not torch.equal(base.ids, now.ids):
        raise ValueError(f"base and now probed {len(base.ids)} and {len(now.ids)} ids; expected the same ids")
    usable = features.isfinite().all(1)
    inside = now.ids < len(features)
    taught = inside & (_probed_nats(base) > KNOWN)
    taught &= usable[now.ids.clamp(max=len(features) - 1)]
    if int(taught.sum()) < LEAST_KNOWN:
        return None
    known, measured = features[now.ids[taught]].double(), _probed_nats(now)[taught]
    centre, scale = known.mean(0), known.std(0).clamp(min=1e-9)
    x, y = (known - centre) / scale, measured - measured.mean()
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ y)
    nats = ((features.double() - centre) / scale) @ weights + measured.mean()
    # What the regression says of a token that it has not seen, in closed form (PRESS).
    leverage = (x @ torch.linalg.solve(gram, x.T)).diagonal() + 1 / len(x)
    unseen = y - (y - x @ weights) / (1 - leverage)
    return Recall(nats.masked_fill(~usable, torch.nan).clamp(max=0).float(), _correlation(unseen, y), int(taught.sum()))


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    one, other = one - one.mean(), other - other.mean()
    length = one.norm() * other.norm()
    return float(one @ other / length) if length > 0 else 0.0


def summarise_recall(found: Recall, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """A recall as a few numbers: ``agreement``, ``nats`` and ``<part>/nats``, means over live tokens.

    Args:
        live: (V,) bool.
        parts: name -> (V,) bool, groups and exposure classes; one without a measured live token is left out.

    Example:
        >>> live = torch.tensor([True, True, False])
        >>> found = Recall(torch.tensor([-1.0, -3.0, -9.0]), agreement=0.5, taught=64)
        >>> summarise_recall(found, live, {"never": torch.tensor([False, True, True])})
        {'agreement': 0.5, 'nats': -2.0, 'never/nats': -3.0}
    """
    numbers = {"agreement": found.agreement}
    for name, mask in {"": live, **{f"{part}/": mask & live for part, mask in parts.items()}}.items():
        values = found.nats[mask & found.nats.isfinite()]
        if len(values):
            numbers[f"{name}nats"] = float(values.double().mean())
    return numbers
