"""Two processes stop together, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("trainer", ["hf", pytest.param("lightning", marks=pytest.mark.slow)])
def test_two_processes_stop_together_or_not_at_all(trainer: str, tmp_path: Path, together: Any) -> None:
    together("alerts.py", tmp_path, trainer)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    sound, broken = ([found[name] for found in ranks] for name in ("False", "True"))
    for here in (sound, broken):
        assert all(torch.equal(value, here[1]["weights"][name]) for name, value in here[0]["weights"].items())
    assert [run["step"] for run in sound] == [4, 4]
    assert [run["reason"] for run in sound] == [None, None]
    assert len(sound[0]["checkpoints"]) == 1
    # The main process alone runs callables.
    assert [run["seen"] for run in sound] == [["firing"], []]
    # Rank 0's guard failed after the rule had fired: the other must not stop without it.
    assert [run["step"] for run in broken] == [8, 8]
    assert broken[0]["checkpoints"] == []
    assert "broken on purpose" in broken[0]["reason"]
    assert "process 0 of 2 has failed" in broken[1]["reason"]
