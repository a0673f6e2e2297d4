"""A probe against the base's: which tokens are retained, lost and gained, how sure that is, and what is noise.

A token is asked several times. It is *said* where more than half of the asks get it and *gone* where fewer than half
do; between the two nothing is claimed. Lost: said at the base, gone now. This is the only definition: guard,
``explain`` and ``repair`` use it.

Two things look like a loss and are none. A single ask depends on the list that it stands in, so the base itself, asked
among other neighbours, would lose some: `reask_noise`. And where a model follows the prompts less, tokens that are
targets all the time go too: the lost *skill* of those is taken off before tokens are called lost
(``tokens_retained``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabguard.measure.intervals import wilson_share, z_of_look
from vocabguard.results import ProbeResult

ENOUGH = 16
"""Frequent tokens that the base must say before their skill is told."""

_LEAST_PROBABILITY = 1e-30


def said(result: ProbeResult) -> Tensor:
    """(n,) bool: the token was emitted in more than half of the asks.

    >>> emitted, none = torch.tensor([[True, True, False], [True, False, False]]), torch.zeros(2, 3)
    >>> said(ProbeResult(("a", "b", "c"), torch.tensor([5, 9]), emitted, none, none, none))
    tensor([ True, False])
    """
    return result.emitted.sum(1) * 2 > result.emitted.shape[1]


def gone(result: ProbeResult) -> Tensor:
    """(n,) bool: the token was emitted in fewer than half of the asks.

    >>> emitted, none = torch.tensor([[True, False], [False, False]]), torch.zeros(2, 2)
    >>> gone(ProbeResult(("a", "b"), torch.tensor([5, 9]), emitted, none, none, none))
    tensor([False,  True])
    """
    return result.emitted.sum(1) * 2 < result.emitted.shape[1]


def lost(base: ProbeResult, now: ProbeResult) -> Tensor:
    """(n,) bool: said at the base and gone now.

    Raises:
        ValueError: if the two probes asked for different tokens or in different contexts.

    Example:
        >>> yes, none = torch.ones(1, 1).bool(), torch.zeros(1, 1)
        >>> base, now = (ProbeResult(("a",), torch.tensor([5]), said, none, none, none) for said in (yes, ~yes))
        >>> lost(base, now)
        tensor([True])
    """
    _require_pair(base, now)
    return said(base) & gone(now)


def gained(base: ProbeResult, now: ProbeResult) -> Tensor:
    """(n,) bool: gone at the base and said now.

    Raises:
        ValueError: if the two probes asked for different tokens or in different contexts.

    Example:
        >>> none = torch.zeros(1, 1)
        >>> base = ProbeResult(("a",), torch.tensor([5]), none.bool(), none, none, none)
        >>> gained(base, base)
        tensor([False])
    """
    _require_pair(base, now)
    return gone(base) & said(now)


def retained(base: ProbeResult, now: ProbeResult, mask: Tensor | None = None) -> float:
    """Of the tokens said at the base, the share in [0, 1] that is not lost now; NaN if the base said none of them.

    Args:
        mask: (n,) bool over the probed tokens, those to look at; None takes all.

    Raises:
        ValueError: if the two probes asked for different tokens or in different contexts.

    Example:
        >>> ids, no = torch.arange(4), torch.zeros(4, 1)
        >>> base, now = (
        ...     ProbeResult(("one",), ids, torch.tensor(emitted)[:, None], no, no, no)
        ...     for emitted in ([True, True, True, False], [True, True, False, True])
        ... )
        >>> round(retained(base, now), 3)  # 2 of 3; what was gained does not count
        0.667
    """
    missing = lost(base, now)
    at_base = said(base) if mask is None else said(base) & mask
    return 1 - missing[at_base].float().mean().item() if at_base.any() else math.nan


def words_lost(base: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Verdicts over words, each by its own asks.

    A word counts as known where three quarters of the base's asks get it, and as lost where at most one quarter do now:
    with 16 asks, a word whose chance is still three quarters is called lost once in some ten thousand looks.

    Args:
        base: (w, A) bool, right answers at the base.
        now: the same of a later probe.

    Returns:
        (w,) bool, the base says it; and (w,) bool, it is lost.

    Example:
        >>> yes, no = torch.ones(1, 8).bool(), torch.zeros(1, 8).bool()
        >>> known, missing = words_lost(torch.cat([yes, yes, no]), torch.cat([yes, no, no]))
        >>> known.tolist(), missing.tolist()
        ([True, True, False], [False, True, False])
    """
    asks = base.shape[1]
    known = base.sum(1) * 4 >= 3 * asks
    return known, known & (now.sum(1) * 4 <= asks)


def _require_pair(base: ProbeResult, now: ProbeResult) -> None:
    if base.contexts != now.contexts:
        raise ValueError(f"the probes have different contexts: {base.contexts} and {now.contexts}")
    if not torch.equal(base.ids, now.ids):
        raise ValueError(f"the probes have different ids: {len(base.ids)} at the base, {len(now.ids)} now")


def said_instead(result: ProbeResult) -> Tensor:
    """(n,) int64: the wrong token said in most contexts, the earliest context winning a tie; -1 if always right.

    >>> instead, none = torch.tensor([[5, 7, 7], [9, 9, 9]]), torch.zeros(2, 3)
    >>> ids = torch.tensor([5, 9])
    >>> said_instead(ProbeResult(("a", "b", "c"), ids, instead == ids[:, None], none, none, instead))
    tensor([ 7, -1])
    """
    wrong = ~result.emitted
    same = result.instead[:, :, None] == result.instead[:, None, :]
    votes = same.sum(2).masked_fill(~wrong, 0)
    commonest = result.instead.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)
    return torch.where(wrong.any(1), commonest, -1)


def nats(result: ProbeResult) -> Tensor:
    """(n, C) float32 log-probabilities of the tokens, in nats; at least -69.

    >>> one = torch.ones(1, 1)
    >>> nats(ProbeResult(("a",), torch.tensor([5]), one.bool(), one / 2, one, one))
    tensor([[-0.6931]])
    """
    return result.probability.clamp_min(_LEAST_PROBABILITY).log()


def reask_noise(emitted: Tensor) -> float:
    """Of the tokens that are said, the share in [0, 1] that would be gone if the same model was asked once more.

    Each token has a chance of its own to be got right in an ask. These chances are taken to be beta distributed, with
    the mean and the agreement between asks that are seen; the share then follows for a second round of as many asks
    among other neighbours. It needs no second round. NaN with a single ask, from which it cannot be told.

    Args:
        emitted: (n, C) bool, of one round.

    Example:
        >>> reask_noise(torch.ones(50, 4).bool())
        0.0
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> chance = torch.distributions.Beta(4.0, 1.0).sample((40_000, 1)).expand(-1, 8)
        >>> asks = torch.rand(40_000, 8) < chance
        >>> first, second = asks[:, :4], asks[:, 4:]
        >>> seen = (second.sum(1) < 2)[first.sum(1) > 2].float().mean().item()
        >>> abs(reask_noise(first) - seen) < 0.005
        True
    """
    asks = emitted.shape[1]
    said, gone = [n for n in range(asks + 1) if 2 * n > asks], [n for n in range(asks + 1) if 2 * n < asks]
    return _chance_of(emitted, said, gone)


def outright_noise(emitted: Tensor) -> float:
    """Of the tokens that every ask gets, the share in [0, 1] that no ask would get if the model was asked once more.

    As `reask_noise`; NaN with a single ask.

    Args:
        emitted: (n, C) bool, of one round.

    Example:
        >>> asks = torch.tensor([[1, 1, 1, 1]] * 90 + [[1, 1, 1, 0]] * 10).bool()
        >>> outright_noise(asks) < 1e-5
        True
    """
    return _chance_of(emitted, [emitted.shape[1]], [0])


def _chance_of(emitted: Tensor, first: Sequence[int], second: Sequence[int]) -> float:
    """Of the tokens that one round gets as often as `first` says, the share that another gets as `second` says."""
    found = _chances(emitted)
    if found is None:
        return math.nan
    asks, a, b = found
    if math.isinf(a):
        return 0.0
    chance = sum(_joint(x, y, asks, a, b) for x in first for y in second)
    total = sum(_joint(x, y, asks, a, b) for x in first for y in range(asks + 1))
    return chance / total if total > 0 else 0.0


def _chances(emitted: Tensor) -> tuple[int, float, float] | None:
    """Asks, and the beta distribution of the tokens' chances; infinite where all have one of 0 or 1; None: one ask."""
    count, asks = emitted.shape
    if asks < 2 or not count:
        return None
    right = emitted.sum(1).double()
    mean, both = float(right.mean()) / asks, float((right * (right - 1)).mean()) / (asks * (asks - 1))
    spread = both - mean * mean
    if not 0 < mean < 1 or spread >= mean * (1 - mean):
        return asks, math.inf, math.inf
    # A beta distribution of the same mean and spread; without any spread all tokens have one chance.
    weight = mean * (1 - mean) / max(spread, 1e-9) - 1
    return asks, mean * weight, (1 - mean) * weight


def _joint(x: int, y: int, asks: int, a: float, b: float) -> float:
    """Chance of x and then y right asks of `asks`, for a token whose chance is Beta(a, b) distributed."""
    ways = math.log(math.comb(asks, x)) + math.log(math.comb(asks, y))
    return math.exp(ways + _log_beta(a + x + y, b + 2 * asks - x - y) - _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


@dataclass(frozen=True)
class Share:
    """A share of a weighted sample, with its interval.

    Attributes:
        value: in [0, 1]; NaN of nothing.
        low: lower end of the interval; 0 of nothing.
        high: upper end; 1 of nothing.
        count: tokens that it is of.
    """

    value: float
    low: float
    high: float
    count: int


def share_of(hit: Tensor, among: Tensor, weights: Tensor, z: float) -> Share:
    """Share of the tokens of a population, from a sample in which each stands for a number of them.

    The interval is Wilson's, of the effective sample size (Kish): the sum of weights squared over the sum of squares.

    Args:
        hit: (n,) bool.
        among: (n,) bool, the tokens that count.
        weights: (n,) float >= 0; those of weight 0 do not count.
        z: half width in standard errors.

    Example:
        >>> yes = torch.tensor([True, False, True, True])
        >>> found = share_of(yes, torch.ones(4).bool(), torch.tensor([1.0, 3.0, 1.0, 0.0]), z=1.96)
        >>> round(found.value, 2), found.count
        (0.4, 3)
    """
    among = among & (weights > 0)
    taken = weights[among].double()
    if not len(taken):
        return Share(math.nan, 0.0, 1.0, 0)
    total = float(taken.sum())
    value = float(taken[hit[among]].sum()) / total
    low, high = wilson_share(value, total * total / float(taken.square().sum()), z)
    return Share(value, low, high, len(taken))


def lost_outright(base: ProbeResult, now: ProbeResult) -> Tensor:
    """(n,) bool: got in every ask at the base, and in none now.

    A share of lost tokens hides a small damage, since noise takes as many. These are hardly ever noise
    (`outright_noise`), so that few of them are evidence.

    Raises:
        ValueError: if the two probes asked for different tokens or in different contexts.

    Example:
        >>> ids, none = torch.tensor([5, 9]), torch.zeros(2, 2)
        >>> base = ProbeResult(("a", "b"), ids, torch.ones(2, 2).bool(), none, none, none)
        >>> now = ProbeResult(("a", "b"), ids, torch.tensor([[False, False], [False, True]]), none, none, none)
        >>> lost_outright(base, now)
        tensor([ True, False])
    """
    _require_pair(base, now)
    return base.emitted.all(1) & ~now.emitted.any(1)


@dataclass(frozen=True)
class Sample:
    """Which probed tokens stand for what.

    Attributes:
        weights: (n,) float32, live tokens that each probed one stands for; 0 for those asked for other reasons.
        frequent: (n,) bool, frequent targets: what they lose is skill.
    """

    weights: Tensor
    frequent: Tensor


def even_sample(count: int) -> Sample:
    """Every token stands for itself, and none is known to be frequent.

    >>> even_sample(2).weights.tolist()
    [1.0, 1.0]
    """
    return Sample(torch.ones(count), torch.zeros(count, dtype=torch.bool))


def summarise_probe(
    base: ProbeResult, now: ProbeResult, parts: Mapping[str, Tensor], *,
    sample: Sample | None = None, look: int = 1,
) -> dict[str, float]:  # fmt: skip
    """A probe against the base's, as a few numbers; what cannot be told is left out.

    Args:
        parts: (V,) bool masks by name.
        sample: what each token stands for; None takes them evenly.
        look: number of this probe, from 1: intervals widen with it, so that all of a run together are right.

    Returns:
        Shares in [0, 1] unless said:

        ``asked``, ``known``: numbers of sampled tokens, and of those that the base says; ``base``: the share of live
        tokens that it says. ``retained``, ``lost``: of the known; ``gained``: of the others. ``noise``: what the base
        itself would lose, asked among other neighbours. ``nats``: mean change of the known tokens' log-probability.
        ``skill``: retained of the frequent tokens. ``tokens_retained``: ``retained``, had no token been lost by noise
        or with the skill; may exceed 1. Each of these four has ``_low`` and ``_high``. ``<part>/retained``,
        ``<part>/known``. ``probability_mean`` over tokens and asks.

    Example:
        >>> ids, no = torch.tensor([0, 2]), torch.zeros(2, 1)
        >>> base = ProbeResult(("one",), ids, torch.ones(2, 1).bool(), no + 1, no, no)
        >>> now = ProbeResult(("one",), ids, torch.tensor([[True], [False]]), torch.tensor([[1.0], [0.5]]), no, no)
        >>> found = summarise_probe(base, now, {"ja": torch.tensor([False, False, True])})
        >>> found["known"], found["retained"], found["ja/retained"], round(found["nats"], 3)
        (2.0, 0.5, 0.0, -0.347)
    """
    _require_pair(base, now)
    sample = sample or even_sample(len(base.ids))
    z, weights = z_of_look(look), sample.weights
    knew, missing = said(base), lost(base, now)
    every = torch.ones_like(knew)
    kept = share_of(~missing, knew, weights, z)
    at_base = share_of(knew, every, weights, z)
    found = {
        "asked": float(at_base.count), "known": float(kept.count), "base": at_base.value,
        "retained": kept.value, "lost": 1 - kept.value,
        "gained": share_of(gained(base, now), gone(base), weights, z).value, "noise": reask_noise(base.emitted),
    }  # fmt: skip
    if kept.count:
        found |= {"retained_low": kept.low, "retained_high": kept.high}
    found |= _change(base, now, knew & (weights > 0), weights, z)
    found |= _beside_skill(found, missing, knew, sample, z)
    for name, members in parts.items():
        part = share_of(~missing, knew & members[now.ids], weights, z)
        found |= {f"{name}/retained": part.value, f"{name}/known": float(part.count) if part.count else math.nan}
    found["probability_mean"] = now.probability.mean().item() if len(now.ids) else math.nan
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _change(base: ProbeResult, now: ProbeResult, among: Tensor, weights: Tensor, z: float) -> dict[str, float]:
    """Mean change in nats and its interval; tokens are the units, their asks are averaged."""
    change, taken = (nats(now) - nats(base)).mean(1)[among].double(), weights[among].double()
    if len(change) < 2:
        return {}
    taken = taken / taken.sum()
    mean = float((taken * change).sum())
    half = z * math.sqrt(float((taken.square() * (change - mean).square()).sum()) * len(change) / (len(change) - 1))
    return {"nats": mean, "nats_low": mean - half, "nats_high": mean + half}


def _beside_skill(
    found: Mapping[str, float], missing: Tensor, knew: Tensor, sample: Sample, z: float
) -> dict[str, float]:
    """``skill`` and ``tokens_retained``, with their intervals.

    What would be lost without any token being so is the larger of the noise and of what frequent tokens lost. The
    difference to the latter has Newcombe's interval for differences (1998, method 10), that to noise one like it.
    """
    if not found["known"]:
        return {}
    often = share_of(missing, knew & sample.frequent, torch.ones_like(sample.weights), z)
    told: dict[str, float] = {}
    if often.count >= ENOUGH:
        told = {"skill": 1 - often.value, "skill_low": 1 - often.high, "skill_high": 1 - often.low}
    noise = 0.0 if math.isnan(found["noise"]) else found["noise"]
    if told and often.value > noise:
        beside = often
    else:
        # Estimated once, at the base, so that it does not widen with the looks.
        high = noise if math.isnan(found["noise"]) else wilson_share(noise, found["known"])[1]
        beside = Share(noise, noise, high, 0)
    kept, low, high = found["retained"], found["retained_low"], found["retained_high"]
    told["tokens_retained"] = kept + beside.value
    told["tokens_retained_low"] = kept + beside.value - math.hypot(kept - low, beside.value - beside.low)
    told["tokens_retained_high"] = kept + beside.value + math.hypot(high - kept, beside.high - beside.value)
    return told
