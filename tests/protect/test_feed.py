"""Plans written in the training process reach the workers, and every batch knows its number."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from vocabguard.protect.collator import ECHO_KEY, EchoCollator, RowMaker
from vocabguard.protect.feed import EchoFeed
from vocabguard.protect.plan import batch_ids, next_plan
from vocabguard.protect.rows import EchoPrompt
from vocabguard.results import EchoPlan

LENGTH = 24
PROMPTS = (EchoPrompt((1, 2), (3,), (4,)), EchoPrompt((5,), (6, 7), (4,)))


def plan_of(**changes: Any) -> EchoPlan:
    plan = EchoPlan(0, 0, "uniform", 0.1, 8.0, 4, torch.arange(100, 140), cycle=0, offset=0, owed=0.0, seed=3)
    return replace(plan, **changes)


def examples(count: int) -> list[dict[str, Tensor]]:
    """Number k is all k, so a batch says which examples it is of."""
    rows = [torch.full((LENGTH,), 1000 + number) for number in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def maker() -> RowMaker:
    return RowMaker(PROMPTS, list_tokens=4, seed=3)


def loader_of(feed: EchoFeed, count: int = 16, **options: Any) -> DataLoader[Any]:
    given = {"batch_size": 2, "drop_last": True} | options
    return DataLoader(examples(count), collate_fn=EchoCollator(default_collate, feed, maker()), **given)


def echoed(batch: dict[str, Tensor]) -> list[list[int]]:
    """The rows that were added, as lists of ids."""
    return batch["input_ids"][batch[ECHO_KEY]].tolist() if ECHO_KEY in batch else []


def expected(plan: EchoPlan, number: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """What the rows have to be, by the plan and the batch's number alone."""
    rows = maker()(batch_ids(plan, number, rank, world), batch=number, rank=rank, length=LENGTH)
    return [[*row.input_ids, *[0] * (LENGTH - len(row.input_ids))] for row in rows]


def first_example(batch: dict[str, Tensor]) -> int:
    return int(batch["input_ids"][0, 0]) - 1000


# -- what is written is what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "least_exposed", "watch"])
def test_a_plan_is_read_as_it_was_written(mode: Any) -> None:
    feed = EchoFeed(64)
    plan = plan_of(mode=mode, version=7, first_batch=5, dose=0.25, rate=3.75, offset=11, cycle=2, seed=2**40)
    feed.publish(plan)
    assert feed.plan_at(4) is None
    read = feed.plan_at(5)
    assert read is not None
    assert read.ids.tolist() == plan.ids.tolist()
    assert {**asdict(read), "ids": None} == {**asdict(plan), "ids": None}


def test_the_newest_plan_that_holds() -> None:
    feed, plan = EchoFeed(64), plan_of()
    assert feed.ids(0) == []
    feed.publish(plan)
    second = next_plan(plan, first_batch=4, rate=16.0)
    feed.publish(second)
    assert [feed.ids(n) for n in range(4)] == [batch_ids(plan, n) for n in range(4)]
    assert [feed.ids(n) for n in range(4, 9)] == [batch_ids(second, n) for n in range(4, 9)]
    third = next_plan(second, first_batch=9, rate=0.0, ids=torch.arange(5))
    feed.publish(third)
    assert [feed.ids(n) for n in range(5, 9)] == [batch_ids(second, n) for n in range(5, 9)]
    assert feed.ids(9) == []
    assert (feed.plan_at(8).version, feed.plan_at(9).version) == (1, 2)  # type: ignore[union-attr]


def test_more_ids_than_room() -> None:
    feed = EchoFeed(39)
    with pytest.raises(ValueError, match="the plan has 40 ids; allowed: at most 39"):
        feed.publish(plan_of())
    assert feed.plan_at(0) is None


def test_each_process_has_its_own_turns() -> None:
    found: list[int] = []
    feeds = [EchoFeed(64), EchoFeed(64)]
    for rank, feed in enumerate(feeds):
        feed.place(rank, 2)
        feed.publish(plan_of(rate=4.0))
    for number in range(5):
        for rank, feed in enumerate(feeds):
            assert (feed.rank, feed.ids(number)) == (rank, batch_ids(plan_of(rate=4.0), number, rank, 2))
            found += feed.ids(number)
    assert sorted(found) == list(range(100, 140))


def test_a_cleared_feed_knows_nothing_of_the_run_before() -> None:
    """A guard that is attached again numbers its plans from 0 again."""
    feed = EchoFeed(64)
    feed.publish(plan_of())
    assert set(feed.ids(0)) <= set(range(100, 140))
    feed.fail()
    feed.clear()
    assert (feed.ids(0), feed.plan_at(0), feed.failed) == ([], None, False)
    other = plan_of(ids=torch.arange(10, 20))
    feed.publish(other)
    assert feed.ids(0) == batch_ids(other, 0)


# -- through dataloaders ---------------------------------------------------------------------------------------------

WORKERS = [
    pytest.param({"num_workers": 0}, id="0"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "fork"}, id="2-fork"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "fork", "prefetch_factor": 1}, id="2-fork-short"),
]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_batch_gets_the_rows_of_its_number(workers: dict[str, Any], shuffle: bool) -> None:
    feed, plan = EchoFeed(64), plan_of(rate=6.0)
    feed.publish(plan)
    batches = list(loader_of(feed, 17, shuffle=shuffle, **workers))
    assert len(batches) == 8
    assert [echoed(batch) for batch in batches] == [expected(plan, n) for n in range(8)]
    if not shuffle:
        assert [first_example(batch) for batch in batches] == list(range(0, 16, 2))


@pytest.mark.slow
def test_spawned_workers_see_the_plans_too() -> None:
    feed, plan = EchoFeed(64), plan_of()
    feed.publish(plan)
    seen = []
    for number, batch in enumerate(loader_of(feed, 24, num_workers=2, multiprocessing_context="spawn")):
        seen.append(echoed(batch))
        if number == 1:  # with 2 workers and 2 batches each, 7 and later are not made yet
            second = next_plan(plan, first_batch=8, rate=16.0)
            feed.publish(second)
    assert seen == [expected(plan if n < 8 else second, n) for n in range(12)]
    assert feed.seconds > 0


@pytest.mark.parametrize("workers", WORKERS)
def test_a_plan_to_come_reaches_workers_at_work_and_waits_for_its_batch(workers: dict[str, Any]) -> None:
    feed = EchoFeed(64)
    plan, seen = plan_of(first_batch=9), []
    second = next_plan(plan, first_batch=17, rate=0.0)
    third = next_plan(second, first_batch=26, rate=16.0)
    for number, batch in enumerate(loader_of(feed, 64, **workers)):
        seen.append(echoed(batch))
        if number in (1, 9, 17):  # each is published once the plan before it holds
            feed.publish({1: plan, 9: second, 17: third}[number])
    assert [bool(rows) for rows in seen] == [9 <= n < 17 or n >= 26 for n in range(32)]
    assert seen[9:17] == [expected(plan, n) for n in range(9, 17)]
    assert seen[26:] == [expected(third, n) for n in range(26, 32)]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("count", [16, 14])  # 8 batches, and 7: the workers then have unlike shares
def test_numbers_go_on_over_epochs(persistent: bool, count: int) -> None:
    feed, plan = EchoFeed(64), plan_of()
    feed.publish(plan)
    workers = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    loader = loader_of(feed, count, **workers)
    seen: list[Any] = []
    for _ in range(3):
        feed.start_epoch(len(seen))
        seen += [echoed(batch) for batch in loader]
    assert seen == [expected(plan, n) for n in range(3 * count // 2)]


def test_an_epoch_left_in_its_middle() -> None:
    feed, plan = EchoFeed(64), plan_of()
    feed.publish(plan)
    loader = loader_of(feed, 32, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    feed.start_epoch(0)
    stopped = iter(loader)
    seen = [echoed(next(stopped)) for _ in range(3)]
    time.sleep(0.5)  # the batches that were made beyond the third one were for nothing
    feed.start_epoch(3)
    seen += [echoed(batch) for batch in loader]
    assert seen == [expected(plan, n) for n in range(3 + 16)]


def test_without_workers_numbers_go_on_by_themselves() -> None:
    feed, plan = EchoFeed(64), plan_of()
    feed.publish(plan)
    loader = loader_of(feed, 6)
    assert [echoed(batch) for _ in range(3) for batch in loader] == [expected(plan, n) for n in range(9)]


class Endless(IterableDataset[Any]):
    """Each worker gives its own share."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from examples(20)[first::step]


@pytest.mark.parametrize("workers", WORKERS)
def test_no_number_is_handed_out_twice_for_iterable_data(workers: dict[str, Any]) -> None:
    feed, plan = EchoFeed(64), plan_of(rate=4.0, ids=torch.arange(100, 160))
    feed.publish(plan)
    collate = EchoCollator(default_collate, feed, maker())
    batches = list(DataLoader(Endless(), batch_size=2, drop_last=True, collate_fn=collate, **workers))
    assert len(batches) >= 9
    wanted = [expected(plan, n) for n in range(20)]
    numbers = [wanted.index(echoed(batch)) for batch in batches]
    assert len(set(numbers)) == len(numbers)
    assert numbers[:9] == list(range(9))


@pytest.mark.parametrize("workers", WORKERS)
def test_failing_stops_echo_in_all_workers(workers: dict[str, Any]) -> None:
    feed, plan = EchoFeed(64), plan_of()
    feed.publish(plan)
    seen = []
    for number, batch in enumerate(loader_of(feed, 40, **workers)):
        seen.append(echoed(batch))
        if number == 3:
            feed.fail()
    assert feed.failed
    assert all(seen[:4])
    # Not more than what was made already is still with echo.
    assert not any(seen[4 + 2 * workers["num_workers"] :])


def test_a_worker_that_gives_up_stops_the_others_and_the_training_process(caplog: pytest.LogCaptureFixture) -> None:
    feed = EchoFeed(64)
    feed.publish(plan_of())
    data = [{key: value for key, value in example.items() if key != "labels"} for example in examples(40)]
    collate = EchoCollator(default_collate, feed, maker())
    loader = DataLoader(data, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert feed.failed
    assert [first_example(batch) for batch in batches] == list(range(0, 40, 2))
    assert not any(ECHO_KEY in batch for batch in batches)


@pytest.mark.parametrize("workers", WORKERS)
def test_time_is_booked_over_all_workers(workers: dict[str, Any]) -> None:
    feed = EchoFeed(64)
    list(loader_of(feed, **workers))
    assert feed.seconds == 0
    feed.publish(plan_of())
    list(loader_of(feed, **workers))
    assert 0 < feed.seconds < 5
