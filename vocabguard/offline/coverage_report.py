"""What a coverage says in a few numbers, by group, and by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocabguard.measure.exposure import CLASS_STARTS
from vocabguard.offline.coverage import Coverage
from vocabguard.results import EXPOSURE_CLASSES

AT_RISK = CLASS_STARTS[1]
"""Targets below which a token is at risk: the classes never and 1-4."""


@dataclass(frozen=True)
class GroupRow:
    """One line of the table.

    Attributes:
        group: name of a script group, or ``all``.
        live: its live tokens, at least one.
        classes: how many of them are in each of `results.EXPOSURE_CLASSES`.
    """

    group: str
    live: int
    classes: tuple[int, ...]


def group_rows(coverage: Coverage) -> tuple[GroupRow, ...]:
    """All live tokens, then the groups that have some, those with most tokens that are never a target first.

    Args:
        coverage: the counts.
    """
    groups, live = coverage.source.groups, coverage.live
    pairs = coverage.group[live].long() * len(EXPOSURE_CLASSES) + coverage.classes[live].long()
    counts = torch.bincount(pairs, minlength=len(groups) * len(EXPOSURE_CLASSES)).view(len(groups), -1)
    rows = [_row(name, part) for name, part in zip(groups, counts, strict=True) if int(part.sum())]
    return (_row("all", counts.sum(0)), *sorted(rows, key=lambda row: -row.classes[0]))


def _row(name: str, counts: Tensor) -> GroupRow:
    return GroupRow(name, int(counts.sum()), tuple(counts.tolist()))


def summary(coverage: Coverage) -> dict[str, Any]:
    """Totals: ``live`` tokens, ``targets`` and ``inputs`` of the data, ``never_share`` in [0, 1], ``classes``.

    Args:
        coverage: the counts.
    """
    return {
        "live": int(coverage.live.sum()),
        "targets": int(coverage.data_target.sum()),
        "inputs": int(coverage.inputs.sum()),
        "never_share": coverage.never_share,
        "classes": dict(zip(EXPOSURE_CLASSES, group_rows(coverage)[0].classes, strict=True)),
    }


def at_risk(coverage: Coverage, count: int, below: int = AT_RISK) -> list[int]:
    """Ids of live tokens with few targets: the fewest first, of these the most read, of these the lowest ids.

    A token that the data makes the model read and not say is the case to fear; in most tokenizers low ids are the
    commoner words.

    Args:
        coverage: the counts.
        count: at most so many.
        below: targets that are enough.
    """
    ids = (coverage.live & (coverage.data_target < below)).nonzero().flatten()
    ids = ids[torch.argsort(coverage.inputs[ids], descending=True, stable=True)]
    ids = ids[torch.argsort(coverage.data_target[ids], stable=True)]
    found: list[int] = ids[:count].tolist()
    return found
