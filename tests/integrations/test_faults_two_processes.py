"""A guard that fails on one of two processes disables itself on both, and training goes on as if it were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ATTACHING = ("finding the matrices", "copying the baseline", "making the folder")
PROTECTED = ("holding rows", "keeping rows", "telling of a check", "making a plan")
AT_THE_END = ("the last rows",)


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs ended with the same weights, bit by bit."""
    return all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_both_stand_down_and_train_on(trainer: str, tmp_path: Path, together: Any) -> None:
    together("faults.py", tmp_path, trainer)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    bare = [found.pop("None") for found in ranks]
    assert len(ranks[0]) == 20
    for case, first in ranks[0].items():
        here = (first, ranks[1][case])
        assert agree(*here), f"{case}: the processes train the same model"
        if case not in PROTECTED:
            assert agree(first, bare[0]), case
            assert [run["losses"] for run in here] == [run["losses"] for run in bare], case
        if case in ("none", "again"):
            # Before and after all the faults, in the same processes.
            assert [run["reason"] for run in here] == [None, None]
            assert [run["last"] for run in here] == [6, 6]
            continue
        failed = [run for run in here if case in str(run["reason"])]
        assert len(failed) == 1, case
        assert "OnPurposeError" in failed[0]["reason"]
        told = [len(run["told"]) for run in here]
        if case in AT_THE_END:
            assert sorted(told) == [0, 1]
            continue
        assert told == [1, 1], f"{case}: once on each process"
        (other,) = (run for run in here if run is not failed[0])
        assert "of 2 has failed" in other["reason"], case
        assert (first["last"] is None) == (case in ATTACHING), case
