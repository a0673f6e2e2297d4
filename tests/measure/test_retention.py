"""What a probe says against the base's: verdicts, shares, intervals, noise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from vocabguard.measure.intervals import wilson, z_of_look
from vocabguard.measure.retention import (
    Sample,
    gained,
    gone,
    lost,
    reask_noise,
    retained,
    said,
    said_instead,
    share_of,
    summarise_probe,
    words_lost,
)
from vocabguard.results import ProbeResult


def result_of(ids: list[int], instead: list[list[int]]) -> ProbeResult:
    told, table = torch.tensor(instead), torch.tensor(ids)
    names = tuple(f"c{i}" for i in range(told.shape[1]))
    emitted = told == table[:, None]
    return ProbeResult(names, table, emitted, emitted.float() / 2, (~emitted).long(), told)


BASE = result_of([4, 5, 6, 7], [[4, 4, 4, 4], [5, 5, 5, 0], [6, 6, 1, 1], [7, 7, 7, 7]])
NOW = result_of([4, 5, 6, 7], [[4, 4, 4, 9], [8, 9, 9, 8], [6, 6, 6, 6], [3, 7, 2, 2]])


def test_verdicts_are_by_most_of_the_asks_then_and_now() -> None:
    assert said(BASE).tolist() == [True, True, False, True]  # two of four is not most
    assert gone(BASE).tolist() == [False, False, False, False]  # nor is it fewer than half
    assert said(NOW).tolist() == [True, False, True, False]
    assert gone(NOW).tolist() == [False, True, False, True]
    assert lost(BASE, NOW).tolist() == [False, True, False, True]
    assert gained(NOW, BASE).tolist() == [False, True, False, True]
    assert retained(BASE, NOW) == pytest.approx(1 / 3)
    assert retained(BASE, NOW, torch.tensor([True, False, True, False])) == 1.0
    assert np.isnan(retained(BASE, NOW, torch.tensor([False, False, True, False])))
    assert said_instead(NOW).tolist() == [9, 8, -1, 2]  # 8 and 9 tie: the earlier context's
    assert said_instead(BASE).tolist() == [-1, 0, 1, -1]


def test_half_of_the_asks_is_no_verdict() -> None:
    """A token that is said in half of the asks now was not lost, and one so at the base cannot be."""
    half = result_of([4], [[4, 4, 0, 0]])
    all_, none = result_of([4], [[4, 4, 4, 4]]), result_of([4], [[0, 0, 0, 0]])
    assert not lost(all_, half).any()
    assert not lost(half, none).any()
    assert lost(all_, none).all()


def test_probes_of_different_things_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different ids"):
        retained(BASE, result_of([4, 5, 6, 8], NOW.instead.tolist()))
    with pytest.raises(ValueError, match="different contexts"):
        retained(BASE, result_of([4, 5, 6, 7], [[4], [5], [6], [7]]))


def test_summary() -> None:
    parts = {"ja": [5, 6], "ko": [6], "never": [4], "absent": [0]}
    masks = {name: torch.isin(torch.arange(12), torch.tensor(members)) for name, members in parts.items()}
    found = summarise_probe(BASE, NOW, masks)
    expected = {"asked": 4, "known": 3, "base": 0.75, "retained": 1 / 3, "lost": 2 / 3}
    expected |= {"ja/retained": 0.0, "ja/known": 1, "never/retained": 1.0, "never/known": 1}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert "ko/retained" not in found, "the base says none of them"
    assert "gained" not in found, "no token was gone at the base"
    assert found["probability_mean"] == pytest.approx(8 / 16 / 2)
    assert (found["retained_low"], found["retained_high"]) == pytest.approx(wilson(1, 3, z_of_look(1)))
    assert "skill" not in found, "no token is known to be frequent"


def test_a_probe_against_itself_has_lost_nothing_and_says_so_with_an_interval() -> None:
    found = summarise_probe(BASE, BASE, {})
    assert (found["lost"], found["nats"], found["retained_high"]) == (0.0, 0.0, 1.0)
    assert found["tokens_retained_low"] <= 1 <= found["tokens_retained_high"]


def asks(shares: list[float], count: int, seed: int) -> ProbeResult:
    """Tokens that are each said in a share of 8 asks."""
    draw = random.Random(seed)
    ids = list(range(count))
    return result_of(ids, [[token if draw.random() < shares[token] else -2 for _ in range(8)] for token in ids])


def test_what_frequent_tokens_lose_is_skill_and_is_no_loss_of_tokens() -> None:
    count = 400
    frequent = torch.arange(count) >= 350
    base = asks([0.98] * count, count, 0)
    tokens = asks([0.05 if token < 40 else 0.98 for token in range(count)], count, 1)
    skill = asks([0.05 if token % 3 == 0 else 0.98 for token in range(count)], count, 2)
    sample = Sample((~frequent).float(), frequent)
    rare, alike = (summarise_probe(base, now, {}, sample=sample) for now in (tokens, skill))
    assert rare["skill"] == 1.0
    assert rare["tokens_retained"] == pytest.approx(310 / 350, abs=0.02)
    assert rare["tokens_retained_low"] < 310 / 350 < rare["tokens_retained_high"] < 0.97
    assert alike["skill_high"] < 0.9
    assert alike["lost"] == pytest.approx(1 / 3, abs=0.05)
    assert alike["tokens_retained_low"] < 1 < alike["tokens_retained_high"]


def test_later_looks_have_wider_intervals() -> None:
    widths = [
        found["retained_high"] - found["retained_low"]
        for found in (summarise_probe(BASE, NOW, {}, look=look) for look in (1, 5, 20))
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_weights_make_a_sample_speak_for_its_population() -> None:
    """Of 1,000 tokens a tenth is lost; the sample has half of its tokens from that tenth."""
    hit = torch.tensor([True] * 50 + [False] * 50)
    weights = torch.tensor([2.0] * 50 + [18.0] * 50)
    found = share_of(hit, torch.ones(100).bool(), weights, 1.96)
    assert found.value == pytest.approx(0.1)
    effective = (50 * 2 + 50 * 18) ** 2 / (50 * 4 + 50 * 324)
    assert found.low == pytest.approx(wilson(round(effective / 10), round(effective))[0], abs=0.01)
    assert found.count == 100
    assert math.isnan(share_of(hit, torch.zeros(100).bool(), weights, 1.96).value)


@pytest.mark.parametrize(("a", "b"), [(9.0, 1.0), (3.0, 0.3), (30.0, 3.0)])
def test_noise_is_what_a_second_round_of_the_same_model_loses(a: float, b: float) -> None:
    torch.manual_seed(0)
    chance = torch.distributions.Beta(a, b).sample((40_000, 1)).expand(-1, 8)
    both = torch.rand(40_000, 8) < chance
    first, second = both[:, :4], both[:, 4:]
    seen = float((second.sum(1) < 2)[first.sum(1) > 2].float().mean())
    assert reask_noise(first) == pytest.approx(seen, abs=0.006)
    assert seen > 0.0005, "nothing to measure"
    assert math.isnan(reask_noise(first[:, :1]))


def test_repeated_looks_at_a_base_that_only_has_other_neighbours_raise_no_alarm() -> None:
    """Twenty runs of twenty probes, each among new neighbours: no interval of what is lost leaves 0."""
    torch.manual_seed(1)
    chance = torch.distributions.Beta(9.0, 0.6).sample((400, 1)).expand(-1, 4)
    wrong = 0
    for _ in range(20):
        rounds = [torch.rand(400, 4) < chance for _ in range(21)]
        base, *later = (result_of_flags(flags) for flags in rounds)
        found = [summarise_probe(base, now, {}, look=look) for look, now in enumerate(later, start=1)]
        wrong += any(not one["tokens_retained_low"] <= 1 <= one["tokens_retained_high"] for one in found)
    assert wrong <= 1


def result_of_flags(emitted: torch.Tensor) -> ProbeResult:
    names = tuple(str(ask) for ask in range(emitted.shape[1]))
    none = torch.zeros(emitted.shape)
    return ProbeResult(names, torch.arange(len(emitted)), emitted, emitted.float(), none.long(), none.long())


def test_a_word_is_lost_only_by_clear_evidence() -> None:
    def right(*counts: int) -> torch.Tensor:
        return torch.stack([torch.arange(8) < count for count in counts])

    known, missing = words_lost(right(8, 8, 8, 6, 5), right(0, 3, 8, 2, 0))
    assert known.tolist() == [True, True, True, True, False]
    assert missing.tolist() == [True, False, False, True, False]
