"""What holds for the ids of any run: whatever plans follow each other, however many processes take turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.batches import add_rows
from vocabguard.protect.plan import batch_ids, next_plan, taken
from vocabguard.protect.rows import EchoPrompt, echo_rows
from vocabguard.results import EchoPlan

STABLE = settings(max_examples=60, deadline=None, derandomize=True)
RATES = st.one_of(st.just(0.0), st.floats(0, 30), st.integers(1, 40).map(lambda one: 8 / one))
SHUFFLED = st.sampled_from(["uniform", "watch"])


@dataclass(frozen=True)
class Part:
    """What one plan does before another follows it."""

    rate: float
    batches: int
    world: int


PARTS = st.lists(st.builds(Part, RATES, st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=6)


def plan_of(size: int, rate: float, list_tokens: int, mode: str, owed: float = 0.0, seed: int = 3) -> EchoPlan:
    ids = torch.arange(100, 100 + size)
    return EchoPlan(0, 0, mode, 0.1, rate, list_tokens, ids, cycle=0, offset=0, owed=owed, seed=seed)


def handed_out(plan: EchoPlan, part: Part) -> list[int]:
    batches = range(plan.first_batch, plan.first_batch + part.batches)
    return [id_ for batch in batches for rank in range(part.world) for id_ in batch_ids(plan, batch, rank, part.world)]


def after(plan: EchoPlan, part: Part, rate: float, ids: torch.Tensor | None = None) -> EchoPlan:
    return next_plan(plan, first_batch=plan.first_batch + part.batches, rate=rate, world=part.world, ids=ids)


@STABLE
@given(PARTS, st.integers(1, 40), st.integers(1, 12), SHUFFLED)
def test_over_any_plans_each_token_is_within_one_of_the_others(
    parts: list[Part], size: int, list_tokens: int, mode: str
) -> None:
    plan, found, each, due = plan_of(size, parts[0].rate, list_tokens, mode), Counter(), 0, 0.0
    for part, coming in zip(parts, [*parts[1:], parts[-1]], strict=True):
        ids = handed_out(plan, part)
        assert len(ids) == part.world * taken(plan, part.batches)
        found.update(ids)
        each, due = each + len(ids) // part.world, due + part.rate * part.batches
        plan = after(plan, part, coming.rate)
        assert plan.offset == found.total()
    counts = [found[id_] for id_ in plan.ids.tolist()]
    assert found.total() == sum(counts), "an id that is not in the plan"
    assert max(counts) - min(counts) <= 1
    assert due - list_tokens - 1e-6 < each <= due + 1e-6, "of each process"


@STABLE
@given(PARTS, st.integers(1, 12), st.sampled_from(["uniform", "watch", "balanced", "least_exposed"]), st.data())
def test_plans_with_lists_of_their_own_keep_to_them(
    parts: list[Part], list_tokens: int, mode: str, data: st.DataObject
) -> None:
    lists = st.lists(st.integers(0, 500), min_size=1, max_size=20, unique=True)
    plan, total, due = plan_of(7, parts[0].rate, list_tokens, mode), 0, 0.0
    for part, coming in zip(parts, [*parts[1:], parts[-1]], strict=True):
        ids = handed_out(plan, part)
        counts = Counter(dict.fromkeys(plan.ids.tolist(), 0))
        counts.update(ids)
        assert set(counts) == set(plan.ids.tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
        total, due = total + len(ids) // part.world, due + part.rate * part.batches
        plan = after(plan, part, coming.rate, torch.tensor(data.draw(lists)))
    assert due - list_tokens - 1e-6 < total <= due + 1e-6, "of each process"


@STABLE
@given(st.integers(1, 30), st.floats(0, 20), st.integers(1, 4), st.floats(0, 3e-9))
def test_nothing_is_lost_where_a_whole_list_is_owed(list_tokens: int, rate: float, world: int, short: float) -> None:
    """Rounding can leave all but a billionth of a list owed: the first batch gives it, and no id is left out."""
    plan = plan_of(40, rate, list_tokens, "balanced", owed=list_tokens * (1 - short))
    part = Part(rate, 6, world)
    ids = handed_out(plan, part)
    assert ids == [100 + place % 40 for place in range(len(ids))]
    assert len(ids) == world * taken(plan, part.batches)
    stopped = plan_of(40, 0.0, list_tokens, "balanced", owed=list_tokens * (1 - short))
    assert handed_out(stopped, part) == []
    assert after(stopped, part, rate).owed == stopped.owed
    assert [batch_ids(plan, -1 - batch) for batch in range(3)] == [[], [], []]


@STABLE
@given(PARTS, st.integers(1, 40), st.integers(4, 40), st.integers(0, 2**32))
def test_what_plans_hand_out_is_what_is_counted(parts: list[Part], size: int, length: int, seed: int) -> None:
    """From plan to rows to the batch to the counters: echo targets are the ids, data targets are the data's."""
    prompts = [EchoPrompt((1, 2), (3,), (4,)), EchoPrompt((5,), (6,), ())]
    plan, expected = plan_of(size, parts[0].rate, 8, "uniform"), Counter()
    counter = ExposureCounter(200, "cpu", tied=False)
    data = torch.randint(7, 90, (2, length), generator=torch.Generator().manual_seed(seed))
    seen = 0
    for part, coming in zip(parts, [*parts[1:], parts[-1]], strict=True):
        for number in range(plan.first_batch, plan.first_batch + part.batches):
            for rank in range(part.world):
                ids = batch_ids(plan, number, rank, part.world)
                batch = {"input_ids": data.clone(), "labels": data.clone(), "attention_mask": torch.ones_like(data)}
                mask = add_rows(batch, echo_rows(ids, prompts, length=length, list_tokens=8, rng=Random(number)), pad=0)
                counter.observe(
                    batch["input_ids"], batch["labels"], shift=True,
                    attention_mask=batch["attention_mask"], echo_mask=mask,
                )  # fmt: skip
                expected.update(ids)
                seen += 1
        plan = after(plan, part, coming.rate)
    exposure, of_data = counter.exposure(), Counter(data[:, 1:].flatten().tolist())
    assert exposure.echo_target.tolist() == [expected[id_] for id_ in range(200)]
    assert exposure.data_target.tolist() == [seen * of_data[id_] for id_ in range(200)]
