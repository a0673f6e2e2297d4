"""Echo rows against what they promise, over random prompts, ids and lengths."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabguard.protect.rows import (
    IGNORE,
    EchoPrompt,
    EchoRow,
    echo_rows,
    exchange,
    lists_in_row,
    seq2seq_rows,
    source_and_copy,
)

FEW = settings(max_examples=60, deadline=None, derandomize=True)
FEWEST = 8
# Ids of instructions and ids of lists are drawn apart, so that a test can tell them.
PROMPT_IDS, LIST_IDS = st.integers(0, 99), st.integers(100, 999)
PROMPTS = st.builds(
    EchoPrompt,
    st.lists(PROMPT_IDS, max_size=12).map(tuple),
    st.lists(PROMPT_IDS, max_size=12).map(tuple),
    st.lists(PROMPT_IDS, max_size=3).map(tuple),
)


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, object]:
    return {
        "ids": draw(st.lists(LIST_IDS, max_size=120)),
        "prompts": draw(st.lists(PROMPTS, min_size=1, max_size=4)),
        "length": draw(st.integers(1, 200)),
        "list_tokens": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 2**32)),
        "fill": draw(st.sampled_from([0.0, 0.4, 0.9, 1.0])),
    }


def made(wish: dict, *, seq2seq: bool = False) -> list[EchoRow]:
    given = {"length": wish["length"], "list_tokens": wish["list_tokens"], "rng": Random(wish["seed"])}
    if seq2seq:
        return seq2seq_rows(wish["ids"], wish["prompts"], **given)
    return echo_rows(wish["ids"], wish["prompts"], fill=wish["fill"], **given)


def reads(row: EchoRow, prompts: list[EchoPrompt], longest: int, place: int = 0) -> bool:
    """Whether a row is questions and their copies from `place` on, with nothing left over: every way is tried."""
    if place == len(row.input_ids):
        return True
    for prompt in set(prompts):
        first = place + len(prompt.before)
        if row.input_ids[place:first] != prompt.before:
            continue
        for count in range(1, longest + 1):
            asked = row.input_ids[first : first + count]
            ids = (*prompt.before, *asked, *prompt.after, *asked, *prompt.close)
            end = place + len(ids)
            copy = range(end - len(prompt.close) - count, end - len(prompt.close))
            labels = tuple(ids[at - place] if at in copy else IGNORE for at in range(place, end))
            if (row.input_ids[place:end], row.labels[place:end]) == (ids, labels) and reads(row, prompts, longest, end):
                return True
    return False


@FEW
@given(wishes())
def test_labels_are_the_copies_and_nothing_else(wish: dict) -> None:
    for row in made(wish):
        assert len(row.labels) == len(row.input_ids)
        assert all(label in (IGNORE, id_) for label, id_ in zip(row.labels, row.input_ids, strict=True))
        assert reads(row, wish["prompts"], wish["list_tokens"])
        # Each list stands in the row twice, asked for and said; one of them is a target.
        listed = [id_ for id_ in row.input_ids if id_ >= 100]
        assert sorted(listed) == sorted(2 * row.targets)


@FEW
@given(wishes())
def test_every_id_is_asked_for_once_in_order(wish: dict) -> None:
    for seq2seq in (False, True):
        asked = [id_ for row in made(wish, seq2seq=seq2seq) for id_ in row.targets]
        assert asked == list(wish["ids"])


@FEW
@given(wishes())
def test_no_row_is_longer_than_the_batchs_where_an_instruction_fits(wish: dict) -> None:
    fewest = min(FEWEST, len(wish["ids"]), wish["list_tokens"])
    shortest = min(prompt.overhead for prompt in wish["prompts"])
    for seq2seq, copies in ((False, 2), (True, 1)):
        longest = max(wish["length"], shortest + copies * fewest)
        rows = made(wish, seq2seq=seq2seq)
        assert all(len(row.input_ids) <= longest for row in rows)
        assert not seq2seq or all(len(row.targets) <= wish["list_tokens"] for row in rows)


@FEW
@given(wishes())
def test_rows_hold_nothing_but_prompts_and_lists(wish: dict) -> None:
    allowed = {
        id_ for prompt in wish["prompts"] for part in (prompt.before, prompt.after, prompt.close) for id_ in part
    }
    for seq2seq in (False, True):
        for row in made(wish, seq2seq=seq2seq):
            assert set(row.input_ids) <= allowed | set(wish["ids"])
            assert set(row.targets) <= set(wish["ids"])


@FEW
@given(wishes())
def test_packing_is_first_come_first_served(wish: dict) -> None:
    """Unpacked rows joined by a plain loop are the packed rows."""
    single = echo_rows(
        wish["ids"], wish["prompts"], length=wish["length"], list_tokens=wish["list_tokens"],
        rng=Random(wish["seed"]), fill=0.0,
    )  # fmt: skip
    expected: list[list[int]] = []
    for row in single:
        full = not expected or len(expected[-1]) >= wish["fill"] * wish["length"]
        if full or len(expected[-1]) + len(row.input_ids) > wish["length"]:
            expected.append([])
        expected[-1] += row.input_ids
    assert [list(row.input_ids) for row in made(wish)] == expected


@FEW
@given(wishes())
def test_rows_are_a_function_of_the_seed(wish: dict) -> None:
    assert made(wish) == made(wish)
    assert made(wish, seq2seq=True) == made(wish, seq2seq=True)


def test_the_exchange_by_hand() -> None:
    prompt = EchoPrompt((1, 2), (3,), (4, 5))
    assert prompt.overhead == 5
    assert exchange(prompt, [7, 7, 8]) == EchoRow(
        (1, 2, 7, 7, 8, 3, 7, 7, 8, 4, 5), (IGNORE,) * 6 + (7, 7, 8, IGNORE, IGNORE)
    )
    assert source_and_copy(prompt, [7, 8]) == EchoRow((1, 2, 7, 8, 3), (7, 8))
    assert source_and_copy(prompt, [7, 8]).targets == (7, 8)


def test_several_ways_of_asking_are_used() -> None:
    prompts = [EchoPrompt((n,), (), ()) for n in range(5)]
    rows = echo_rows(range(100, 900), prompts, length=17, list_tokens=8, rng=Random(0))
    used = [row.input_ids[0] for row in rows]
    assert min(used.count(n) for n in range(5)) > 10


def test_short_lists_keep_every_way_of_asking_that_has_room_for_them() -> None:
    """Three tokens a list fit into 9 whatever the instruction; the shortest must not be the only one used."""
    prompts = [EchoPrompt((n,), (), ()) for n in range(3)] + [EchoPrompt((), (3,) * 3, ())]
    rows = echo_rows(range(100, 400), prompts, length=9, list_tokens=3, rng=Random(0))
    assert {row.input_ids[0] for row in rows if row.input_ids[0] < 100} == {0, 1, 2}
    assert any(row.input_ids[0] >= 100 for row in rows)
    assert max(len(row.input_ids) for row in rows) == 9


def test_no_row_for_a_remainder_where_another_way_of_asking_needs_none() -> None:
    """Sixteen tokens fit a row of 40 by the shorter instructions; the longer ones would leave a row of a few tokens."""
    prompts = [EchoPrompt((n,) * (5 + n), (), ()) for n in range(8)]
    for seed in range(20):
        [row] = echo_rows(range(100, 116), prompts, length=40, list_tokens=16, rng=Random(seed))
        assert row.input_ids[0] <= 3
    assert {
        echo_rows(range(100, 116), prompts, length=40, list_tokens=16, rng=Random(seed))[0].input_ids[0]
        for seed in range(40)
    } == {0, 1, 2, 3}
    # Of two rows each, the remainder does not matter.
    used = {
        row.input_ids[0]
        for n in range(40)
        for row in echo_rows(range(100, 132), prompts, length=30, list_tokens=16, rng=Random(n))
    }
    assert len(used) > 1


@FEW
@given(PROMPTS, st.integers(1, 20), st.integers(0, 300), st.sampled_from([0.0, 0.4, 1.0]))
def test_lists_in_a_row_are_what_rows_hold(prompt: EchoPrompt, tokens: int, spare: int, fill: float) -> None:
    length = 2 * tokens + prompt.overhead + spare
    row = echo_rows(range(50 * 20), [prompt], length=length, list_tokens=tokens, rng=Random(0), fill=fill)[0]
    assert lists_in_row([prompt], length=length, list_tokens=tokens, fill=fill) == len(row.targets) / tokens


def test_instructions_without_room_are_not_used() -> None:
    prompts = [EchoPrompt((1,) * 30, (), ()), EchoPrompt((2,), (), (3,))]
    rows = echo_rows(range(100, 200), prompts, length=40, list_tokens=16, rng=Random(0))
    assert {row.input_ids[0] for row in rows} == {2}
    assert max(len(row.input_ids) for row in rows) <= 40


def test_the_shortest_instruction_where_none_fits() -> None:
    prompts = [EchoPrompt((1,) * 30, (), ()), EchoPrompt((2,) * 9, (), ())]
    rows = echo_rows(range(100, 120), prompts, length=12, list_tokens=16, rng=Random(0))
    assert [len(row.input_ids) for row in rows] == [25, 25, 17]
    assert [len(row.targets) for row in rows] == [8, 8, 4]


def test_no_ids_no_rows_and_no_prompts_no_sense() -> None:
    assert echo_rows([], [EchoPrompt((), (), ())], length=9, list_tokens=3, rng=Random(0)) == []
    for make in (echo_rows, seq2seq_rows):
        with pytest.raises(ValueError, match="prompts is empty"):
            make([1], [], length=9, list_tokens=3, rng=Random(0))
