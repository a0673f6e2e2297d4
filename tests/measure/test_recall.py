"""Recall of all tokens: sums against loops over places, the regression against refits, what it does not say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vocabguard.measure.recall import (
    FLOOR,
    LEAST_KNOWN,
    RIDGE,
    LogitMoments,
    estimate_recall,
    moment_features,
    summarise_recall,
)
from vocabguard.results import ProbeResult, Recall

V, N = 300, 120


def probe_of(ids: Tensor, nats: Tensor) -> ProbeResult:
    """A probe of two asks whose log-probabilities are these, give or take a tenth."""
    probability = torch.stack([nats - 0.1, nats + 0.1], 1).exp().clamp(max=1)
    rank = torch.zeros(probability.shape, dtype=torch.int64)
    return ProbeResult(("one", "two"), ids, probability > 0.5, probability, rank, rank)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(V, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randperm(V, generator=torch.Generator().manual_seed(2))[:N]


@pytest.fixture
def base(ids: Tensor) -> ProbeResult:
    return probe_of(ids, torch.full((N,), -0.2))


def true_nats(features: Tensor) -> Tensor:
    noise = torch.randn(V, generator=torch.Generator().manual_seed(3))
    return (-2.5 + features @ torch.tensor([1.0, -0.5, 0.0, 0.2]) + 0.3 * noise).clamp(max=-0.11)


# -- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[12], [5, 0, 7], [1] * 12])
def test_moments_are_those_of_a_loop_over_the_places_of_others(batches: list[int]) -> None:
    logits = 30 * torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 5, 7, 8, 8])
    moments = LogitMoments()
    for part, some in zip(torch.split(logits, batches), torch.split(wanted, batches), strict=True):
        moments.add(part, some)
    for token in range(9):
        others = logits[wanted != token, token].double().numpy()
        assert float(moments.mean[token]) == pytest.approx(np.mean(others), rel=1e-5)
        assert float(moments.spread[token]) == pytest.approx(np.std(others), rel=1e-4)
    assert torch.equal(moment_features([moments, moments])[:, 2:], torch.stack([moments.mean, moments.spread], 1))


def test_a_token_that_is_wanted_everywhere_is_unknown() -> None:
    moments = LogitMoments()
    moments.add(torch.ones(2, 3), torch.tensor([1, 1]))
    assert moments.mean.isnan().tolist() == [False, True, False]


# -- the estimate ----------------------------------------------------------------------------------------------------


def refit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and intercept of a ridge regression whose intercept costs nothing, by its normal equations."""
    whole = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    penalty = RIDGE * torch.eye(whole.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    found = torch.linalg.solve(whole.T @ whole + penalty, whole.T @ y)
    return found[:-1], found[-1]


def test_the_estimate_is_a_ridge_regression_on_known_tokens(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    nats = true_nats(features)[ids]
    found = estimate_recall(features, base, probe_of(ids, nats))
    assert found is not None
    measured = probe_of(ids, nats).probability.double().log().clamp(min=FLOOR).mean(1)
    x = features[ids].double()
    scaled = (features.double() - x.mean(0)) / x.std(0)
    weights, intercept = refit(scaled[ids], measured)
    torch.testing.assert_close(found.nats.double(), (scaled @ weights + intercept).clamp(max=0), atol=1e-5, rtol=1e-5)
    assert found.taught == N


def test_agreement_is_that_with_tokens_left_out_one_by_one(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    now = probe_of(ids, true_nats(features)[ids])
    found = estimate_recall(features, base, now)
    assert found is not None
    measured = now.probability.double().log().clamp(min=FLOOR).mean(1)
    x = features[ids].double()
    x = (x - x.mean(0)) / x.std(0)
    unseen = []
    for left_out in range(N):
        kept = torch.arange(N) != left_out
        weights, intercept = refit(x[kept], measured[kept])
        unseen.append(float(x[left_out] @ weights + intercept))
    assert found.agreement == pytest.approx(np.corrcoef(unseen, measured.numpy())[0, 1], abs=1e-6)
    assert found.ranks


def test_features_that_say_nothing_rank_nothing(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    noise = -1 - torch.rand(N, generator=torch.Generator().manual_seed(9))
    found = estimate_recall(features, base, probe_of(ids, noise))
    assert found is not None
    assert not found.ranks


def test_where_nothing_is_lost_nothing_is_said_to_be(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    found = estimate_recall(features, base, base)
    assert found is not None
    assert found.agreement == 0.0
    assert not found.ranks
    assert float((found.nats - found.nats[0]).abs().max()) < 1e-6


def test_tokens_that_the_base_does_not_repeat_teach_nothing(features: Tensor, ids: Tensor) -> None:
    nats = true_nats(features)[ids]
    known = torch.arange(N) % 2 == 0
    base = probe_of(ids, torch.where(known, -0.2, -4.0))
    spoilt = torch.where(known, nats, -0.2)
    found, expected = (estimate_recall(features, base, probe_of(ids, now)) for now in (spoilt, nats))
    assert found is not None
    assert expected is not None
    assert found.taught == N // 2
    assert torch.equal(found.nats, expected.nats)


def test_too_few_known_tokens_estimate_nothing(features: Tensor, ids: Tensor) -> None:
    for count, estimated in ((LEAST_KNOWN - 1, False), (LEAST_KNOWN, True)):
        base = probe_of(ids, torch.where(torch.arange(N) < count, -0.2, -4.0))
        assert (estimate_recall(features, base, base) is not None) == estimated


def test_what_is_not_finite_is_unknown_and_spoils_nothing(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    nats = true_nats(features)[ids]
    broken = features.clone()
    other = next(token for token in range(V) if token not in ids.tolist())
    broken[other, 1], broken[int(ids[0]), 2] = math.nan, math.inf
    found = estimate_recall(broken, base, probe_of(ids, nats))
    assert found is not None
    assert sorted(found.nats.isnan().nonzero().flatten().tolist()) == sorted([other, int(ids[0])])
    assert found.taught == N - 1
    assert estimate_recall(torch.full_like(features, math.nan), base, base) is None


def test_ids_beyond_the_features_teach_nothing(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    found = estimate_recall(features[:150], base, probe_of(ids, true_nats(features)[ids]))
    assert found is not None
    assert found.taught == int((ids < 150).sum())


def test_probes_of_other_tokens_are_refused(features: Tensor, ids: Tensor, base: ProbeResult) -> None:
    with pytest.raises(ValueError, match="same ids"):
        estimate_recall(features, base, probe_of(ids.flip(0), torch.zeros(N)))


def test_parts_without_a_measured_live_token_are_left_out() -> None:
    found = Recall(torch.tensor([-1.0, -2.0, math.nan, -9.0]), agreement=0.4, taught=40)
    live = torch.tensor([True, True, True, False])
    parts = {"a": torch.tensor([False, True, True, True]), "b": torch.tensor([False, False, True, True])}
    assert summarise_recall(found, live, parts) == {"agreement": 0.4, "nats": -1.5, "a/nats": -2.0}
