"""A run that is killed by SIGKILL goes on from its last checkpoint and ends as one that was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

CASES = [
    pytest.param("hf", 2),
    pytest.param("lightning", 1, marks=pytest.mark.slow),
    pytest.param("hf", 1, marks=pytest.mark.slow),
    pytest.param("lightning", 2, marks=pytest.mark.slow),
]


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two nested results are not the same, bit by bit; NaN is NaN's like."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        return [place for key in expected for place in differences(found[key], expected[key], f"{path}/{key}")]
    if isinstance(expected, (torch.Tensor, float)):
        one, other = torch.as_tensor(found), torch.as_tensor(expected)
        same = one.shape == other.shape and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))
        return [] if same else [path]
    return [] if found == expected else [path]


@pytest.mark.parametrize(("trainer", "count"), CASES)
def test_it_ends_as_if_it_had_not_been_killed(trainer: str, count: int, tmp_path: Path, together: Any) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    together("killed.py", folder, trainer, "whole", count=count)
    together("killed.py", folder, trainer, "first", count=count, killed=True)
    assert not (folder / "first-0.pt").exists()
    if count == 1:
        # Whoever goes on with a run may have moved it.
        folder = folder.rename(tmp_path / "moved")
    try:
        together("killed.py", folder, trainer, "second", count=count)
    except AssertionError as error:
        if "restore data location" in str(error):
            pytest.skip("this version of the trainer does not itself resume two processes on a CPU")
        raise
    for rank in range(count):
        whole, second = (torch.load(folder / f"{phase}-{rank}.pt", weights_only=True) for phase in ("whole", "second"))
        assert whole["exposure"]["echo_target"].sum() > 0
        assert 0 < whole["held"].sum() < len(whole["held"])
        assert "moved" in whole["firing"]
        for run in (whole, second):
            run["losses"] = run["losses"][-3:]
            if trainer == "lightning":
                # Lightning's checkpoints hold no state of torch's generators.
                del run["rng"]
        assert differences(second, whole) == []
