"""Plans against plain loops: every id once a pass, whole lists, the rate that was asked for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabguard.measure.exposure import exposure_classes
from vocabguard.protect.plan import (
    adjusted_dose,
    balanced,
    batch_ids,
    by_recall,
    foreseen,
    least_exposed,
    lists_at_a_time,
    most_targets,
    next_plan,
    taken,
)
from vocabguard.results import EchoPlan, Exposure

FEW = settings(max_examples=60, deadline=None, derandomize=True)


def plan_of(size: int = 50, **changes: object) -> EchoPlan:
    ids = torch.arange(1000, 1000 + size)
    plan = EchoPlan(0, 0, "uniform", 0.1, 16.0, 8, ids, cycle=0, offset=0, owed=0.0, seed=0)
    return replace(plan, **changes)


@st.composite
def plans(draw: st.DrawFn) -> EchoPlan:
    return plan_of(
        draw(st.integers(1, 60)),
        first_batch=draw(st.integers(0, 1000)),
        rate=draw(st.floats(0, 40)),
        list_tokens=draw(st.integers(1, 20)),
        owed=draw(st.floats(0, 0.99)),
        seed=draw(st.integers(0, 2**40)),
        cycle=draw(st.integers(0, 5)),
        offset=draw(st.integers(0, 200)),
    )


def stream(plan: EchoPlan, batches: int, world: int = 1, first: int | None = None) -> list[int]:
    """What all processes echo, in the order of turns."""
    begin = plan.first_batch if first is None else first
    return [
        id_
        for batch in range(begin, begin + batches)
        for rank in range(world)
        for id_ in batch_ids(plan, batch, rank, world)
    ]


def passes(found: list[int], offset: int, size: int) -> list[list[int]]:
    """The stream cut at the ends of passes; the first begins at `offset` within one."""
    cut = size - offset % size
    return [found[:cut], *(found[at : at + size] for at in range(cut, len(found), size))]


@FEW
@given(plans(), st.integers(1, 4))
def test_each_pass_takes_every_id_once(plan: EchoPlan, world: int) -> None:
    parts = passes(stream(plan, 40, world), plan.offset, len(plan.ids))
    for part in parts[1:-1]:
        assert sorted(part) == plan.ids.tolist()
    for part in (parts[0], parts[-1]):
        assert max(Counter(part).values(), default=1) == 1
        assert set(part) <= set(plan.ids.tolist())


@FEW
@given(plans(), st.integers(1, 4))
def test_whole_turns_at_the_rate_in_the_same_batches_on_all_processes(plan: EchoPlan, world: int) -> None:
    """Where a row came to one process at a time, every step would wait for some process with more to do."""
    total = 0
    for batch in range(30):
        [count] = {len(batch_ids(plan, plan.first_batch + batch, rank, world)) for rank in range(world)}
        assert count % plan.list_tokens == 0
        assert abs(count - plan.rate) < plan.list_tokens + 1e-6
        total += count
        due = plan.owed + (batch + 1) * plan.rate
        assert due - plan.list_tokens < total <= due + 1e-6 * plan.list_tokens


@pytest.mark.parametrize(
    ("in_a_row", "rate", "data", "batches", "wanted"),
    [
        (38, 100.0, 1000.0, None, 38),  # a row of 2,048 every sixth batch instead of an almost empty one in each
        (1, 100.0, 1000.0, None, 1),  # a row holds one list
        (38, 30.0, 300.0, None, 18),  # never more echo than data in a batch
        (38, 30.0, 300.0, 100, 11),  # a short run gets its rows spread over it
        (38, 0.5, 5.0, 20, 1),
        (38, 0.0, 300.0, 100, 1),  # off
        (38, 100.0, 1000.0, 0, 1),  # the last batches
    ],
)
def test_lists_at_a_time(in_a_row: int, rate: float, data: float, batches: int | None, wanted: int) -> None:
    assert lists_at_a_time(in_a_row, 16, rate=rate, data=data, batches=batches) == wanted


def test_a_turn_may_become_longer_or_shorter_and_nothing_is_lost() -> None:
    plan, found = plan_of(rate=3.0, list_tokens=8), []
    for tokens in (24, 8, 40, 16, 8, 8):
        found += stream(plan, 15)
        plan = next_plan(plan, first_batch=plan.first_batch + 15, rate=3.0, list_tokens=tokens)
    found += stream(plan, 15)
    assert 7 * 15 * 3 - 8 <= len(found) <= 7 * 15 * 3
    for part in passes(found, plan_of().offset, len(plan.ids))[1:-1]:
        assert sorted(part) == plan.ids.tolist()


@FEW
@given(plans(), st.integers(1, 3))
def test_batches_are_a_function_of_plan_number_and_process(plan: EchoPlan, world: int) -> None:
    ahead = [stream(plan, 1, world, plan.first_batch + batch) for batch in range(12)]
    back = [
        stream(replace(plan, ids=plan.ids.clone()), 1, world, plan.first_batch + batch) for batch in range(12)[::-1]
    ]
    assert ahead == back[::-1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"cycle": 1}])
def test_other_seeds_and_other_lists_are_shuffled_otherwise(change: dict) -> None:
    plan = plan_of(200, rate=200.0)
    other = replace(plan, **change)
    assert sorted(stream(plan, 1)) == sorted(stream(other, 1))
    assert stream(plan, 1) != stream(other, 1)


def test_each_pass_is_shuffled_anew() -> None:
    first, second, third = passes(stream(plan_of(200, rate=200.0), 3), 0, 200)[:3]
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert plan_of(200).ids.tolist() not in (first, second, third)


def test_the_shuffle_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch_ids(plan_of(rate=77.0, seed=123456), 5)
    assert torch.equal(before, torch.get_rng_state())


def test_taken_is_exact_where_the_rate_divides_lists() -> None:
    for denominator in range(1, 60):
        plan = plan_of(rate=8 / denominator)
        assert [taken(plan, turns) for turns in range(0, 40 * denominator, denominator)] == list(range(0, 320, 8))


def test_nothing_without_rate_or_ids() -> None:
    assert stream(plan_of(rate=0.0), 9) == []
    assert stream(plan_of(ids=torch.empty(0, dtype=torch.int64)), 9) == []


@FEW
@given(plans(), st.integers(0, 30), st.floats(0, 40), st.integers(1, 3))
def test_another_rate_goes_on_in_the_same_pass(plan: EchoPlan, batches: int, rate: float, world: int) -> None:
    first = plan.first_batch + batches
    after = next_plan(plan, first_batch=first, rate=rate, world=world)
    assert (after.version, after.first_batch, after.rate, after.cycle) == (plan.version + 1, first, rate, plan.cycle)
    found = stream(plan, batches, world) + stream(after, 30, world)
    for part in passes(found, plan.offset, len(plan.ids))[1:-1]:
        assert sorted(part) == plan.ids.tolist()
    # The stream is the old plan's, at another speed.
    fast = replace(plan, rate=float(len(found) + plan.list_tokens))
    assert found == stream(fast, 1)[: len(found)]


@FEW
@given(plans(), st.integers(0, 30))
def test_other_ids_begin_a_pass_of_their_own(plan: EchoPlan, batches: int) -> None:
    ids = torch.arange(5, 25)
    after = next_plan(plan, first_batch=plan.first_batch + batches, rate=40.0, ids=ids)
    assert (after.cycle, after.offset) == (after.version, 0)
    found = stream(after, 4)
    assert sorted(found[:20]) == ids.tolist() or after.list_tokens > 40
    assert set(found) <= set(ids.tolist())


def test_a_plan_that_follows_before_the_old_one_holds() -> None:
    plan = plan_of(first_batch=10, offset=8)
    assert next_plan(plan, first_batch=5, rate=1.0).offset == 8


def test_what_a_plan_owes_is_given_by_the_plans_after_it() -> None:
    """Plans that change often, at a small rate, give as much as one plan would."""
    plan, given = plan_of(rate=1.5, list_tokens=8), 0
    for _ in range(100):
        given += len(stream(plan, 4, 2))
        plan = next_plan(plan, first_batch=plan.first_batch + 4, rate=1.5, world=2, ids=plan.ids.clone())
        assert 0 <= plan.owed <= plan.list_tokens
    # Two processes, each owed less than a turn at the end.
    assert 1200 - 16 < given <= 1200


@pytest.mark.parametrize("mode", ["balanced", "least_exposed", "recall"])
def test_ids_chosen_by_need_are_taken_in_their_order(mode: str) -> None:
    plan = plan_of(20, mode=mode, rate=8.0)
    assert stream(plan, 5) == 2 * plan.ids.tolist()


# -- which -----------------------------------------------------------------------------------------------------------

V = 40


def exposure_of(data: list[int], last: list[int], steps: int) -> Exposure:
    zeros, none = torch.zeros(V, dtype=torch.int64), torch.zeros(V)
    counts = {"inputs": zeros, "data_target": torch.tensor(data), "echo_target": zeros}
    norms = {"pull": none, "push": none, "input_only": none, "push_samples": 0, "push_share": math.nan}
    return Exposure(**counts, **norms, last_target=torch.tensor(last), steps=steps)


@FEW
@given(
    data=st.lists(st.sampled_from([0, 1, 4, 5, 19, 20, 500]), min_size=V, max_size=V),
    last=st.lists(st.integers(-1, 9), min_size=V, max_size=V),
    cosine=st.none() | st.lists(st.sampled_from([0.5, 0.9, 1.0, math.nan]), min_size=V, max_size=V),
    allowed=st.sets(st.integers(0, V - 1), min_size=1).map(sorted),
    count=st.integers(0, V + 5),
)
def test_least_exposed_is_a_sort_by_class_time_and_drift(
    data: list[int], last: list[int], cosine: list[float] | None, allowed: list[int], count: int
) -> None:
    step = 9
    classes = exposure_classes(torch.tensor(data)).tolist()

    def need(id_: int) -> tuple[float, float, float]:
        since = math.inf if last[id_] < 0 else step - last[id_]
        drift = 1.0 if cosine is None or math.isnan(cosine[id_]) else cosine[id_]
        return classes[id_], -since, drift

    found = least_exposed(
        torch.tensor(allowed),
        exposure_of(data, last, step),
        None if cosine is None else torch.tensor(cosine),
        count,
        step,
    )
    assert found.tolist() == sorted(allowed, key=need)[:count]


@FEW
@given(
    data=st.lists(st.sampled_from([0, 1, 19, 20, 500]), min_size=V, max_size=V),
    echo=st.lists(st.integers(0, 9), min_size=V, max_size=V),
    allowed=st.sets(st.integers(0, V - 1), min_size=1).map(sorted),
    count=st.integers(0, V + 5),
    boost=st.sampled_from([1.0, 3.0, 4.5]),
)
def test_balanced_takes_those_furthest_behind_their_share(
    data: list[int], echo: list[int], allowed: list[int], count: int, boost: float
) -> None:
    exposure = replace(exposure_of(data, [-1] * V, 9), echo_target=torch.tensor(echo))
    found = balanced(torch.tensor(allowed), exposure, count, boost, seed=4).tolist()
    turns = [echo[id_] / (boost if 1 <= data[id_] < 20 else 1.0) for id_ in range(V)]
    assert len(found) == len(set(found)) == min(count, len(allowed))
    assert set(found) <= set(allowed)
    assert [turns[id_] for id_ in found] == pytest.approx(sorted(turns[id_] for id_ in allowed)[:count])
    assert found == balanced(torch.tensor(allowed), exposure, count, boost, seed=4).tolist()


def test_foreseen_counts_what_is_still_to_come() -> None:
    plan = plan_of(ids=torch.arange(V), first_batch=3, rate=8.0)
    exposure = exposure_of([0] * V, [-1] * V, 9)
    coming = Counter(id_ for n in (3, 4, 5) for rank in (0, 1) for id_ in batch_ids(plan, n, rank, 2))
    found = foreseen(exposure, plan, range(1, 6), 2, 9)
    assert found.echo_target.tolist() == [coming[id_] for id_ in range(V)]
    assert found.last_target.tolist() == [9 if coming[id_] else -1 for id_ in range(V)]
    assert not exposure.echo_target.any()


# -- how much --------------------------------------------------------------------------------------------------------


@FEW
@given(st.floats(0, 10), st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_dose_keeps_its_limits(dose: float, rise: float, tolerated: float, one: float, two: float) -> None:
    least, most = sorted((one, two))
    assert least <= adjusted_dose(dose, rise, tolerated=tolerated, least=least, most=most) <= most


@pytest.mark.parametrize(
    ("rise", "wanted"), [(0.3, 0.15), (0.2, 0.1), (0.1, 0.1), (0.099, 0.08), (0.0, 0.08), (-1.0, 0.08)]
)
def test_the_dose_rises_and_falls(rise: float, wanted: float) -> None:
    assert adjusted_dose(0.1, rise, tolerated=0.2, least=0.01, most=0.5) == pytest.approx(wanted)


def test_an_unknown_rise_leaves_the_dose_as_it_is() -> None:
    assert adjusted_dose(0.1, math.nan, tolerated=0.2, least=0.01, most=0.5) == 0.1


@pytest.mark.parametrize(
    ("rate", "data", "limit", "wanted"),
    [
        (16.0, 40, 1.0, 40),
        (16.0, 40, 0.5, 20),
        (16.0, 3, 0.5, 1),
        (16.0, 0, 1.0, 0),
        (2.0, 5, 0.5, 10),  # a list of 8 every fourth batch has the room of four batches
        (2.0, 0, 0.5, 0),
        (0.0, 40, 1.0, 0),
    ],
)
def test_a_batch_gets_no_more_than_the_limit(rate: float, data: int, limit: float, wanted: int) -> None:
    assert most_targets(plan_of(rate=rate), data, limit) == wanted


@FEW
@given(plans(), st.integers(0, 60), st.floats(0.1, 2.0), st.integers(1, 40))
def test_over_equal_batches_the_limit_holds_whatever_the_rate(
    plan: EchoPlan, data: int, limit: float, batches: int
) -> None:
    numbers = range(plan.first_batch, plan.first_batch + batches)
    given_ = sum(min(len(batch_ids(plan, number)), most_targets(plan, data, limit)) for number in numbers)
    # A plan may begin with what the one before still owed.
    assert given_ <= limit * data * batches + plan.list_tokens


# -- by recall -------------------------------------------------------------------------------------------------------


@FEW
@given(
    nats=st.none() | st.lists(st.sampled_from([-9.0, -1.0, -0.1, math.nan]), min_size=V, max_size=V),
    echo=st.lists(st.integers(0, 3), min_size=V, max_size=V),
    allowed=st.sets(st.integers(0, V - 1), min_size=1).map(sorted),
    count=st.integers(0, V + 5),
)
def test_a_plan_by_recall_takes_those_furthest_behind_their_turns(
    nats: list[float] | None, echo: list[int], allowed: list[int], count: int
) -> None:
    exposure = replace(exposure_of([0] * V, [-1] * V, 9), echo_target=torch.tensor(echo))
    values = None if nats is None else torch.tensor(nats)
    found = by_recall(torch.tensor(allowed), exposure, values, count, 3.0, seed=4).tolist()
    assert len(found) == len(set(found)) == min(count, len(allowed))
    assert set(found) <= set(allowed)
    assert found == by_recall(torch.tensor(allowed), exposure, values, count, 3.0, seed=4).tolist()
    at_risk = 0 if nats is None else min(math.ceil(len(allowed) / 4), sum(nats[id_] == nats[id_] for id_ in allowed))
    # Whichever of equals are at risk: none is further behind than the first that is left out, counted either way.
    left = [echo[id_] for id_ in allowed if id_ not in found]
    assert at_risk or nats is None or all(math.isnan(nats[id_]) for id_ in allowed)
    if left and found:
        assert max(echo[id_] for id_ in found) / 3.0 <= min(left)


def test_a_plan_by_recall_draws_tokens_at_risk_more_often_and_leaves_none_out() -> None:
    exposure, nats = exposure_of([0] * V, [-1] * V, 9), torch.linspace(-9, -0.1, V)
    drawn = torch.zeros(V)
    for seed in range(3000):
        drawn[by_recall(torch.arange(V), exposure, nats, 1, 3.0, seed)] += 1
    # Ten at risk of weight 3 and thirty of weight 1.
    expected = torch.where(torch.arange(V) < V // 4, 3.0, 1.0) / 60 * 3000
    assert float(((drawn - expected).square() / expected).sum()) < 74  # 99.9 % of chi-squared with 39 degrees
    plain = torch.zeros(V)
    for seed in range(2000):
        plain[by_recall(torch.arange(V), exposure, None, 1, 3.0, seed)] += 1
    assert float(((plain - 50).square() / 50).sum()) < 74
