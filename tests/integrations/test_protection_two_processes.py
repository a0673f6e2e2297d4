"""Echo and hold with two processes (DDP over gloo): one stream of echo rows for both, one opinion on what is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def test_two_processes_share_one_stream_and_hold_alike(tmp_path: Path, together: Any) -> None:
    together("protection.py", tmp_path)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert one["down"] is None
    assert other["down"] is None
    for name in ("head", "data", "echo", "held"):
        assert torch.equal(one[name], other[name]), name
    # Each process echoes tokens of its own; together they are what was counted, none twice.
    assert one["mine"]
    assert other["mine"]
    assert set(one["mine"]).isdisjoint(other["mine"])
    echoed = torch.bincount(torch.tensor(one["mine"] + other["mine"]), minlength=8192)
    assert torch.equal(echoed, one["echo"])
    assert echoed.max() == 1
    live = int(one["live"].sum())
    assert int(echoed.sum()) == int(0.02 * live / 4) * 4
    # Rows that no process asked for are the base's, bit by bit.
    asked, base = one["asked"] | (echoed > 0), one["base"]
    assert torch.equal(one["head"][~asked], base[~asked])
    assert bool((one["head"][asked] != base[asked]).any(dim=1).all())
