import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from vocabguard.measure.forecast import (
    Asked,
    Moment,
    Past,
    RowFacts,
    angles,
    class_medians,
    halfway,
    keep,
    running_features,
    starting_features,
    summarise_forecast,
    targets_to_come,
    track,
)
from vocabguard.measure.forecast_networks import (
    KINDS,
    QuantileNets,
    forecast_of,
    forecast_running,
    forecast_starting,
    growths,
    packaged,
    packaged_range,
)
from vocabguard.measure.ranges import LEVELS, level_numbers, missed_by, widened, width_numbers
from vocabguard.results import AT_RISK, Forecast, RowDrift, Schedule

V, D = 400, 16


def drift_of(base: torch.Tensor, now: torch.Tensor) -> RowDrift:
    base, now = base.double(), now.double()
    cosine = torch.nn.functional.cosine_similarity(base, now)
    none = torch.zeros(len(base), dtype=torch.bool)
    l2, ratio = (now - base).norm(dim=1), now.norm(dim=1) / base.norm(dim=1)
    return RowDrift(*(one.float() for one in (cosine, cosine, l2, ratio)), bad=none, zero=none)


def schedule(step: int = 20, total: int = 200, optimizer: str = "adam", left: float = 1.8) -> Schedule:
    return Schedule(step, total, 0.2 if step else 0.0, 0.002 if step else 0.0, left, left / 100, optimizer, 1000.0)


def rows(scale: float = 1.0) -> RowFacts:
    generator = torch.Generator().manual_seed(0)
    norm = scale * (1 + torch.rand(V, generator=generator))
    return RowFacts(norm, (torch.arange(V) % 5).to(torch.uint8), torch.arange(V) % 7 != 0, D, tied=False)


def asked(prior: bool = True, complete: bool = True) -> Asked:
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(V, generator=generator) * 30).long() * (torch.arange(V) % 3 == 0)
    push = torch.rand(V, generator=generator) + 0.1
    last = torch.where(targets > 0, 15, -1)
    counts = targets * 10 + (torch.arange(V) % 5 == 0)
    return Asked(
        targets, targets + 1, last, push * 3, push, push * 0, 5, counts if prior else None, complete,
        float(targets.sum()) / 20,
    )  # fmt: skip


def past(step: int, rate_sum: float, size: float) -> Past:
    generator = torch.Generator().manual_seed(step)
    angle = (size * (0.5 + torch.rand(V, generator=generator))).numpy()
    return Past(step, rate_sum, angle, angle / 3, angle, step // 5)


TRACK = (past(20, 0.2, 0.1), past(10, 0.1, 0.06), past(5, 0.05, 0.03))


def moment(known: Schedule, track: tuple[Past, Past, Past] = TRACK) -> Moment:
    return Moment(rows(), track, asked(), known, np.ones(V, dtype=np.float32))


def test_angles_are_exact_where_a_cosine_has_lost_its_digits() -> None:
    torch.manual_seed(0)
    base = torch.randn(V, D, dtype=torch.float64)
    away = torch.randn(V, D, dtype=torch.float64)
    across = away - (away * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True) * base
    across *= base.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    wanted = torch.logspace(-4, 0.4, V, dtype=torch.float64)
    now = 1.1 * (torch.cos(wanted)[:, None] * base + torch.sin(wanted)[:, None] * across)
    found = angles(drift_of(base, base + (now / 1.1 - base)), base.norm(dim=1).float())
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0.02)
    assert np.isnan(angles(drift_of(base, base * math.nan), base.norm(dim=1).float())).all()


def test_pasts_are_thinned_evenly_and_the_track_is_found() -> None:
    kept: tuple[Past, ...] = ()
    for step in range(1, 101):
        kept = keep(kept, past(step, step / 100, 0.1))
    assert len(kept) == 5
    assert kept[-1].step == 100
    sums = [one.rate_sum for one in kept]
    assert all(later / earlier <= 4 for earlier, later in pairwise(sums))
    assert sums[0] > 1 / 16
    assert [one.step for one in keep(kept, past(101, 50.0, 0.1))] == [100, 101]
    found = track(kept, kept[-1])
    assert found is not None
    assert found[0] is kept[-1]
    assert 0.35 <= found[1].rate_sum <= 0.7
    assert 0.4 <= found[2].rate_sum / found[1].rate_sum <= 0.7
    assert track((), kept[-1]) is None
    assert halfway(kept[-1:], 1.0) is None


def test_targets_to_come_are_counted_beforehand_or_guessed() -> None:
    known = asked()
    assert known.prior is not None
    rate = float(known.targets.sum()) / 20
    whole = known.prior.double() * (rate * 200 / float(known.prior.sum()))
    np.testing.assert_allclose(targets_to_come(known, schedule()), (whole - known.targets).clamp(min=0), rtol=1e-6)
    np.testing.assert_allclose(targets_to_come(asked(complete=False), schedule()), whole * 0.9, rtol=1e-6)
    guessed = targets_to_come(asked(prior=False), schedule())
    np.testing.assert_allclose(guessed, asked().targets.numpy() * 9)


def test_features_know_no_scale_and_no_order() -> None:
    ratio = np.ones(V, dtype=np.float32)
    wanted, angle = running_features(rows(), TRACK, asked(), schedule(), ratio)
    assert wanted.shape[0] == V
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(angle, np.log(TRACK[0].angle), rtol=1e-5)
    # Rows ten times as long, moved ten times as far at ten times the rates: the same to a scale-free eye.
    longer = Schedule(20, 200, 2.0, 0.2, 18.0, 1.8, "adam", 1000.0)
    grown = tuple(replace(one, rate_sum=10 * one.rate_sum) for one in TRACK)
    found, _ = running_features(rows(10.0), grown, asked(), longer, ratio)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    order = np.random.default_rng(0).permutation(V)

    def mixed(values: torch.Tensor) -> torch.Tensor:
        return values[torch.from_numpy(order)]

    known = rows()
    turned = RowFacts(mixed(known.norm), mixed(known.group), mixed(known.live), D, known.tied)
    before = asked()
    assert before.prior is not None
    vectors = (before.targets, before.inputs, before.last_target, before.pull, before.push, before.input_only)
    questions = Asked(*map(mixed, vectors), 5, mixed(before.prior), True, before.per_step)
    moved = tuple(
        replace(one, angle=one.angle[order], own_angle=one.own_angle[order], push=one.push[order]) for one in TRACK
    )
    found, _ = running_features(turned, moved, questions, schedule(), ratio)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, wanted[order], atol=2e-5)


def test_a_push_that_dies_out_is_seen() -> None:
    ratio, known, half = np.ones(V, dtype=np.float32), asked(), TRACK[1]
    names = slice(33, 37)  # row beside median, median, and its products
    found = running_features(rows(), TRACK, known, schedule(), ratio)[0][:, names]
    late = (known.push.numpy() - half.push) / (known.push_samples - half.push_samples)
    wanted = np.log(late / (half.push / half.push_samples))
    never = (known.targets == 0).numpy() & rows().live.numpy()
    usual = np.median(wanted[never])
    assert 0 < abs(usual) < 3
    np.testing.assert_allclose(found[:, 0], np.clip(wanted - usual, -3, 3), atol=1e-5)
    np.testing.assert_allclose(found[:, 1], usual, rtol=1e-5)
    np.testing.assert_allclose(found[:, 2], usual * math.log(2.0 / 0.2), rtol=1e-5)
    # Read once only, or not since: nothing is known.
    for samples in (half.push_samples, 0):
        blind = running_features(rows(), TRACK, replace(known, push_samples=samples), schedule(), ratio)[0][:, names]
        assert not blind.any()


def test_features_of_a_run_that_has_no_gradients_are_finite() -> None:
    known = asked(prior=False)
    nothing = torch.full((V,), math.nan)
    blind = Asked(known.targets, known.inputs, known.last_target, nothing, nothing, nothing, 0, None, False, 5.0)
    found, _ = running_features(rows(), TRACK, blind, schedule(), np.ones(V, dtype=np.float32))
    assert np.isfinite(found).all()


def naive_quantiles(nets: QuantileNets, inputs: np.ndarray) -> np.ndarray:
    """One row at a time, in float64."""
    found = []
    for row in inputs.astype(np.float64):
        x = np.clip((row - nets.mean) / nets.scale, -4, 4)
        members = []
        for k in range(len(nets.weights[0])):
            hidden = x
            for layer in (0, 1):
                hidden = hidden @ nets.weights[layer][k] + nets.biases[layer][k][0]
                hidden = hidden * (1 / (1 + np.exp(-hidden)))
            out = hidden @ nets.weights[2][k] + nets.biases[2][k][0]
            steps = [math.log1p(math.exp(value - 2)) for value in out]
            values = [out[3] - sum(steps[i:3]) for i in range(3)] + [out[3]]
            values += [out[3] + sum(steps[4 : i + 1]) for i in range(4, 7)]
            members.append(np.array(values) + float(x @ nets.weights[3][k][:, 0]))
        mean = np.mean(members, axis=0)
        widened = [mean[3] + nets.widen[0 if i < 3 else 1] * (value - mean[3]) for i, value in enumerate(mean)]
        found.append(widened)
    return np.array(found)


@pytest.mark.parametrize("name", KINDS)
def test_quantiles_equal_a_naive_pass_and_ascend(name: str) -> None:
    nets = packaged(name)
    inputs = nets.mean + nets.scale * np.random.default_rng(0).normal(size=(30, len(nets.mean))).astype(np.float32) * 2
    found = nets.quantiles(inputs)
    np.testing.assert_allclose(found, naive_quantiles(nets, inputs), atol=2e-4)
    assert (np.diff(found, axis=1) > 0).all()


def test_a_forecast_reads_cosines_and_chances_off_the_quantiles() -> None:
    limit = math.log(math.acos(0.95))
    middle = np.array([limit, limit + 5, limit - 5, limit + 0.2], dtype=np.float32)
    spread = np.array([-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6], dtype=np.float32)
    bad = np.array([False, False, False, True])
    found = forecast_of(middle[:, None] + spread, bad, schedule())
    assert found.chance[:3].tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-3)
    assert bool(found.chance[3].isnan())
    assert float(found.cosine[0]) == pytest.approx(0.95, abs=1e-6)
    assert float(found.low[0]) == pytest.approx(math.cos(math.exp(limit + 0.6)), abs=1e-6)
    assert float(found.high[0]) == pytest.approx(math.cos(math.exp(limit - 0.6)), abs=1e-6)
    between = forecast_of(np.array([[limit - 0.1]], dtype=np.float32) + spread, np.array([False]), schedule())
    # Half of the way from the median to the 75 % quantile.
    assert float(between.chance[0]) == pytest.approx(1 - (0.5 + 0.125), abs=1e-4)
    assert len(LEVELS) == len(spread)


def test_at_the_end_rows_stay_where_they_are() -> None:
    done = Schedule(200, 200, 2.0, 0.02, 0.0, 0.0, "adam", 1000.0)
    found = forecast_running(moment(done))
    np.testing.assert_allclose(found.cosine.numpy(), np.cos(TRACK[0].angle), atol=1e-6)
    assert torch.equal(found.at_risk, found.cosine < 0.95)


def test_longer_schedules_and_fewer_targets_cost_more() -> None:
    """What is fitted knows which way things go."""
    near, far = (forecast_running(moment(schedule(left=left))).cosine.mean() for left in (0.4, 3.0))
    assert float(far) < float(near)
    short, long = (forecast_starting(rows(), asked(), schedule(0, left=left)).cosine for left in (0.02, 0.2))
    assert float(long.mean()) < float(short.mean())
    wanted = asked().prior
    assert wanted is not None
    assert float(long[wanted == 0].mean()) < float(long[wanted > 20].mean())


def test_starting_features_need_no_past() -> None:
    found, largest = starting_features(rows(), asked(), schedule(0))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(largest, np.log(1.8 * math.sqrt(D) / rows().norm.numpy()), rtol=1e-5)


def test_summary_expects_as_many_rows_as_their_chances_say() -> None:
    chance = torch.tensor([0.9, 0.4, AT_RISK, math.nan, 0.8])
    cosine = torch.tensor([0.8, 0.97, 0.95, math.nan, 0.9])
    live = torch.tensor([True, True, True, True, False])
    masks = {
        "ja": torch.tensor([True, True, False, False, True]),
        "ko": torch.tensor([False, False, False, True, True]),
    }
    found = summarise_forecast(Forecast(20, 200, cosine, cosine, cosine, chance), live, masks)
    assert found == pytest.approx(
        {"below_0.95": 1.8 / 3, "rows": 1.8, "cosine_mean": 2.72 / 3, "ja/below_0.95": 0.65, "ja/rows": 1.3}
    )
    assert summarise_forecast(Forecast(20, 200, cosine, cosine, cosine, chance), live & False, masks) == {}


def test_the_range_is_a_weighted_sum_and_closes_with_the_rates_to_come() -> None:
    known = moment(schedule())
    inputs, _ = running_features(known.rows, known.track, known.asked, known.schedule, known.norm_ratio)
    networks = packaged("running-adam").quantiles(inputs)
    of_class = class_medians(networks[:, 3], known.rows, known.asked)
    fitted, row = packaged_range(), 11
    middle = sum(
        weight * number
        for weight, number in zip(fitted.median, level_numbers(inputs, networks[:, 3], of_class)[row], strict=True)
    )
    width = math.exp(float(width_numbers(inputs, networks)[row] @ fitted.width))
    found, of_networks, _ = growths(known)
    np.testing.assert_array_equal(of_networks, networks)
    np.testing.assert_allclose(found[row], [middle + width * level for level in fitted.levels], rtol=1e-4)
    assert (np.diff(found, axis=1) > 0).all()
    wide, narrow = (np.ptp(growths(moment(schedule(left=left)))[0], axis=1).mean() for left in (3.0, 0.02))
    assert narrow < 0.2 * wide


def test_rows_of_any_length_have_the_same_range() -> None:
    """A vocabulary whose rows are ten times as long, moved ten times as far at ten times the rates."""
    longer = Schedule(20, 200, 2.0, 0.2, 18.0, 1.8, "adam", 1000.0)
    grown = tuple(replace(one, rate_sum=10 * one.rate_sum) for one in TRACK)
    other = Moment(rows(10.0), grown, asked(), longer, np.ones(V, dtype=np.float32))  # type: ignore[arg-type]
    np.testing.assert_allclose(growths(other)[0], growths(moment(schedule()))[0], atol=2e-4)


def test_a_run_that_was_missed_before_gets_a_wider_range() -> None:
    told = np.repeat(np.array([[-3, -2, -1, 0, 1, 2, 3]], dtype=np.float32), 1000, axis=0)
    assert missed_by(told, np.zeros(1000, dtype=np.float32)) == (1.0, 1.0)
    beyond = np.linspace(0, 6, 1000, dtype=np.float32)
    beyond[::10] = math.nan
    below, above = missed_by(told, beyond)
    assert below == 1.0
    assert above == pytest.approx(0.95 * 6 / 3, rel=0.01)
    assert missed_by(told, np.full(1000, -90, dtype=np.float32)) == (5.0, 1.0)
    assert missed_by(told, np.full(1000, math.nan, dtype=np.float32)) == (1.0, 1.0)
    np.testing.assert_allclose(widened(told, (2.0, 1.0))[0], [-6, -4, -2, 0, 1, 2, 3])


def test_an_earlier_forecast_is_made_again_for_another_end() -> None:
    """Of some rows: as if the run had been planned to end at the later check."""
    ids = np.arange(0, V, 2)
    some = moment(schedule()).of(ids)
    assert [len(one.angle) for one in some.track] == [V // 2] * 3
    later = past(60, 0.6, 0.2)
    until = some.until(later, square=0.006)
    assert (until.schedule.total, until.schedule.sum_left) == (60, pytest.approx(0.4))
    assert until.schedule.square_left == pytest.approx(0.004)
    planned = Schedule(20, 60, 0.2, 0.002, 0.4, 0.004, "adam", 1000.0)
    np.testing.assert_allclose(growths(until)[0], growths(moment(planned).of(ids))[0], rtol=1e-6)
