"""What holds for counts of any batches: a plain count of the same rows, however they are cut."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabguard.measure.exposure import (
    CLASS_STARTS,
    ExposureCounter,
    exposure_classes,
    steps_since_target,
    summarise_exposure,
)
from vocabguard.results import EXPOSURE_CLASSES

STABLE = settings(max_examples=60, deadline=None, derandomize=True)
V = 11
IDS = st.sampled_from([-100, -(2**31), -1, *range(V), V, V + 1, 2**31 - 1])


@dataclass(frozen=True)
class Row:
    """One training example: its inputs, what it asks for, what is no padding and what is echo."""

    inputs: list[int]
    labels: list[int]
    real: list[int]
    echo: list[bool]


@dataclass(frozen=True)
class Case:
    rows: list[Row]
    shift: bool
    kind: str
    dtype: torch.dtype


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width, kind = draw(st.integers(1, 6)), draw(st.sampled_from(["none", "rows", "positions"]))

    def wide(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
        return st.lists(values, min_size=width, max_size=width)

    flags = {
        "none": st.just([False] * width),
        "rows": st.booleans().map(lambda one: [one] * width),
        "positions": wide(st.booleans()),
    }[kind]
    rows = draw(st.lists(st.builds(Row, wide(IDS), wide(IDS), wide(st.integers(0, 1)), flags), min_size=1, max_size=8))
    return Case(rows, draw(st.booleans()), kind, draw(st.sampled_from([torch.int64, torch.int32])))


def counted(case: Case, batches: list[list[Row]], ends: list[bool], saves: list[bool]) -> ExposureCounter:
    """The rows observed batch by batch; a step ends, or a checkpoint is saved and loaded, after some of them."""
    counter, step = ExposureCounter(V, "cpu", tied=False), 0
    for batch, end, save in zip(batches, ends, saves, strict=True):
        echo = torch.tensor([row.echo for row in batch])
        counter.observe(
            torch.tensor([row.inputs for row in batch]).to(case.dtype),
            torch.tensor([row.labels for row in batch]).to(case.dtype),
            shift=case.shift,
            attention_mask=torch.tensor([row.real for row in batch]),
            echo_mask={"none": None, "rows": echo[:, 0], "positions": echo}[case.kind],
        )
        if end:
            step += 1
            counter.end_step(step)
        if save:
            resumed = ExposureCounter(V, "cpu", tied=False)
            resumed.load_state_dict(counter.state_dict())
            counter = resumed
    return counter


def naive(case: Case) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {name: Counter() for name in ("data_target", "echo_target", "inputs")}
    for row in case.rows:
        for place, (token, label) in enumerate(zip(row.inputs, row.labels, strict=True)):
            if 0 <= label < V and (place > 0 or not case.shift):
                found["echo_target" if row.echo[place] else "data_target"][label] += 1
            if 0 <= token < V and row.real[place] and not row.echo[place]:
                found["inputs"][token] += 1
    return found


@STABLE
@given(cases(), st.data())
def test_any_cut_into_batches_and_steps_gives_a_plain_count(case: Case, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(case.rows)))) | {0, len(case.rows)})
    batches = [case.rows[begin:end] for begin, end in itertools.pairwise(cuts)]
    flags = st.lists(st.booleans(), min_size=len(batches), max_size=len(batches))
    ends = data.draw(flags)
    found = counted(case, batches, ends, data.draw(flags))
    expected, exposure = naive(case), found.exposure()
    for name, counts in expected.items():
        assert getattr(exposure, name).tolist() == [counts[token] for token in range(V)], name
    assert (exposure.steps, found.batches) == (sum(ends), len(batches))


@STABLE
@given(cases(), st.data())
def test_the_last_step_is_that_of_the_last_target(case: Case, data: st.DataObject) -> None:
    """One row a step: the last one that asks for a token, data or echo, is the one that is told."""
    exposure = counted(case, [[row] for row in case.rows], [True] * len(case.rows), [False] * len(case.rows)).exposure()
    last = [-1] * V
    for step, row in enumerate(case.rows, start=1):
        for label in row.labels[1 if case.shift else 0 :]:
            if 0 <= label < V:
                last[label] = step
    now = data.draw(st.integers(0, len(case.rows) + 5))
    assert exposure.last_target.tolist() == last
    assert steps_since_target(exposure, now).tolist() == [-1 if one < 0 else max(0, now - one) for one in last]


COUNTS = st.one_of(
    st.integers(0, 2**62), st.sampled_from([at + by for at in (0, *CLASS_STARTS) for by in (-1, 0, 1) if at + by >= 0])
)


@STABLE
@given(st.lists(COUNTS, max_size=30))
def test_every_count_has_the_class_that_names_it(counts: list[int]) -> None:
    def named(count: int) -> str:
        return "never" if count < 1 else "1-4" if count < 5 else "5-19" if count < 20 else "20+"

    found = exposure_classes(torch.tensor(counts, dtype=torch.int64))
    assert found.dtype is torch.uint8
    assert [EXPOSURE_CLASSES[index] for index in found.tolist()] == [named(count) for count in counts]


@STABLE
@given(
    st.lists(st.tuples(COUNTS, st.booleans()), min_size=1, max_size=30), st.none() | st.floats(0, 1, allow_nan=False)
)
def test_shares_are_those_of_the_live_tokens(tokens: list[tuple[int, bool]], push: float | None) -> None:
    classes = exposure_classes(torch.tensor([count for count, _ in tokens]))
    live = torch.tensor([flag for _, flag in tokens])
    empty = ExposureCounter(len(tokens), "cpu", tied=False).exposure()
    found = summarise_exposure(replace(empty, push_share=math.nan if push is None else push), classes, live)
    of_live = Counter(EXPOSURE_CLASSES[index] for index in classes[live].tolist())
    total = sum(of_live.values())
    assert {name: found[name] for name in EXPOSURE_CLASSES} == {
        name: of_live[name] / total if total else 0.0 for name in EXPOSURE_CLASSES
    }
    assert math.isclose(sum(found[name] for name in EXPOSURE_CLASSES), 1.0 if total else 0.0)
    assert found.get("push_share") == push
    json.dumps(found, allow_nan=False)
