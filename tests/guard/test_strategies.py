"""What two processes do with the parts of the guard: DDP and FSDP2 probe, echo, hold and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, together: Any) -> dict[str, Any]:
    """What both ranks found, what a process by itself did, and which kind it was."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    together("strategies.py", folder, request.param)
    together("strategies.py", folder, request.param, count=1)
    ranks = {rank: torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in ("0", "1", "alone")}
    return ranks | {"kind": request.param}


def asked() -> torch.Tensor:
    """Data targets of the rows that the script makes."""
    ids = torch.randint(300, 800, (24, 32), generator=torch.Generator().manual_seed(1))
    return torch.bincount(ids[:, 1:].flatten(), minlength=8192)


def test_probe(found: dict[str, Any]) -> None:
    for rank in ("0", "1"):
        here, alone = found[rank]["probe"], found["alone"]["probe"]
        assert torch.equal(here["ids"], alone["ids"])
        torch.testing.assert_close(here["probability"], alone["probability"], rtol=1e-3, atol=1e-8)
        assert (here["emitted"] == alone["emitted"]).float().mean() > 0.99


def test_counts_drift_and_resume(found: dict[str, Any]) -> None:
    for rank in ("0", "1"):
        whole, second = found[rank]["whole"], found[rank]["second"]
        assert torch.equal(whole["data_target"], asked())
        torch.testing.assert_close(whole["cosine"], found["alone"]["whole"]["cosine"], rtol=0, atol=1e-5)
        assert whole["cosine"].min() < 0.999
        for name, value in whole.items():
            assert torch.equal(value, second[name]), name


def test_echo(found: dict[str, Any]) -> None:
    one, other = (found[rank]["echo"] for rank in ("0", "1"))
    for run in (one, other):
        assert torch.equal(run["data_target"], asked())
        assert torch.equal(run["echo_target"], one["mine"] + other["mine"])
    assert one["mine"].sum() > 10
    assert one["echo_target"].max() == 1, "no token is echoed by both"


def test_hold(found: dict[str, Any]) -> None:
    never = asked() == 0
    for rank in ("0", "1"):
        hold = found[rank]["hold"]
        assert torch.equal(hold["now"][never], hold["base"][never])
        assert bool((hold["now"][~never] != hold["base"][~never]).any(dim=1).all())
        assert 0.5 < hold["share"] < 1
