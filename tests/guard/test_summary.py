"""From measurements to logged keys and tables, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vocabguard.guard.summary import class_masks, group_masks, scalars_of, token_reports, worst_ids
from vocabguard.results import Exposure, NotApplicable, ProbeResult, RowDrift
from vocabguard.vocabulary.table import GROUPS, VocabTable, plain_table

ROWS = 40
NONE = NotApplicable("none")


@pytest.fixture
def table() -> VocabTable:
    """Thai, greek and padded rows by turns; every tenth row is a control token."""
    known = [GROUPS.index(name) for name in ("thai", "greek", "padded")]
    plain = plain_table(ROWS)
    index = torch.arange(ROWS)
    return replace(
        plain,
        group=torch.tensor(known, dtype=torch.uint8)[index % 3],
        control=index % 10 == 0,
        padded=index % 3 == 2,
        texts=tuple(f"t{row}" for row in range(ROWS)),
    )


@pytest.fixture
def drift() -> RowDrift:
    cosine = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.8
    bad = torch.zeros(ROWS, dtype=torch.bool)
    bad[4] = True
    cosine[4] = torch.nan
    return RowDrift(cosine, cosine + 0.001, 1 - cosine, torch.ones(ROWS), bad, torch.zeros_like(bad))


@pytest.fixture
def exposure() -> Exposure:
    zeros = torch.zeros(ROWS)
    targets = torch.arange(ROWS) // 2
    last = torch.where(targets > 0, targets + 3, -1)
    return Exposure(targets * 2, targets, targets * 0, last, zeros, zeros, zeros, 0, math.nan, 50)


@pytest.fixture
def probes() -> tuple[ProbeResult, ProbeResult]:
    ids = torch.tensor([1, 3, 9, 12])
    said = torch.tensor([[True], [True], [True], [False]])
    base = ProbeResult(("list",), ids, said, said * 0.9, (~said).long(), torch.where(said[:, 0], ids, 7)[:, None])
    said = torch.tensor([[True], [False], [True], [True]])
    now = ProbeResult(("list",), ids, said, said * 0.8, (~said).long(), torch.where(said[:, 0], ids, 6)[:, None])
    return base, now


def test_scalars_against_plain_loops(table: VocabTable, drift: RowDrift, exposure: Exposure, probes: Any) -> None:
    classes = torch.tensor([min(3, (t > 0) + (t > 4) + (t > 19)) for t in exposure.data_target.tolist()])
    groups = group_masks(table)
    assert set(groups) == {"thai", "greek"}, "padded rows are no group of live ones"
    found = scalars_of(
        {"head": drift, "embedding": NONE}, exposure, classes, probes, live=table.live, groups=groups,
    )  # fmt: skip
    live = [row for row in range(ROWS) if row % 3 != 2 and row % 10 != 0]

    def cosines(rows: list[int]) -> list[float]:
        return [float(drift.cosine[row]) for row in rows if row != 4]

    parts = {"": live, "thai/": [row for row in live if row % 3 == 0], "greek/": [row for row in live if row % 3 == 1]}
    for index, name in enumerate(("never", "1-4", "5-19")):
        parts[f"{name}/"] = [row for row in live if classes[row] == index]
    for name, rows in parts.items():
        values = cosines(rows)
        assert found[f"vocabguard/head/{name}cosine_mean"] == pytest.approx(sum(values) / len(values))
        assert found[f"vocabguard/head/{name}cosine_min"] == pytest.approx(min(values))
        low = sum(value < 0.95 for value in values) / len(values)
        assert found[f"vocabguard/head/{name}below_0.95"] == pytest.approx(low)
    assert found["vocabguard/head/nonfinite_rows"] == (4 in live)
    assert found["vocabguard/exposure/1-4"] == pytest.approx(len(parts["1-4/"]) / len(live))
    assert found["vocabguard/probe/retained"] == pytest.approx(2 / 3)
    assert found["vocabguard/probe/thai/retained"] == 0.5
    assert found["vocabguard/probe/greek/retained"] == 1.0
    assert not [key for key in found if key.startswith("vocabguard/embedding")]
    assert "vocabguard/head/20+/cosine_mean" not in found


def test_nothing_measured_gives_no_keys(table: VocabTable) -> None:
    none = torch.zeros(ROWS, dtype=torch.uint8)
    found = scalars_of({"head": NONE, "embedding": NONE}, NONE, none, None, live=table.live, groups={})
    assert found == {}


def test_class_masks() -> None:
    masks = class_masks(torch.tensor([0, 3, 1, 0], dtype=torch.uint8))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "never": [True, False, False, True],
        "1-4": [False, False, True, False],
        "5-19": [False] * 4,
        "20+": [False, True, False, False],
    }


@pytest.mark.parametrize("k", [0, 3, 1000])
def test_worst_are_the_lowest_live_finite_rows(table: VocabTable, drift: RowDrift, k: int) -> None:
    live = [row for row in range(ROWS) if row % 3 != 2 and row % 10 != 0 and row != 4]
    expected = sorted(live, key=lambda row: float(drift.cosine[row]))[:k]
    assert worst_ids(drift, table.live, k).tolist() == expected
    assert worst_ids(NONE, table.live, k).tolist() == []


def test_reports(table: VocabTable, drift: RowDrift, exposure: Exposure, probes: Any) -> None:
    classes = torch.tensor([min(3, (t > 0) + (t > 4) + (t > 19)) for t in exposure.data_target.tolist()])
    lost, unseen, strange = token_reports(torch.tensor([3, 1, 30]), drift, exposure, classes, probes[1], table, step=60)
    assert (lost.text, lost.group, lost.exposure_class, lost.said_instead) == ("t3", "thai", "1-4", "t6")
    assert (lost.data_target, lost.inputs, lost.steps_since_target) == (1, 2, 60 - 4)
    assert lost.cosine == pytest.approx(float(drift.cosine[3]))
    assert lost.residual == pytest.approx(float(drift.residual[3]))
    assert lost.probability == 0
    assert (unseen.exposure_class, unseen.steps_since_target, unseen.said_instead) == ("never", None, None)
    assert unseen.probability == pytest.approx(0.8)
    assert (strange.probability, strange.said_instead) == (None, None)


def test_reports_of_what_was_not_measured(table: VocabTable) -> None:
    (report,) = token_reports(torch.tensor([3]), NONE, NONE, torch.zeros(ROWS, dtype=torch.uint8), None, table, step=1)
    assert math.isnan(report.cosine)
    assert report.exposure_class == "unknown"
    assert (report.data_target, report.steps_since_target, report.probability) == (0, None, None)
