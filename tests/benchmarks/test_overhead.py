"""The overhead benchmark on a few steps: its bookkeeping, not its times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, found as it is when run: beside its neighbours."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("overhead")


@pytest.fixture
def pairs(overhead: ModuleType) -> Any:
    """Steps of 100: hooks cost 1, every tenth time 2 more for a push, one check 30, another with its probe 530."""
    bare = np.full(40, 100.0)
    kind = np.zeros(40)
    kind[::10], kind[19], kind[39] = 1, 2, 3
    step_call = np.full(40, 0.25)
    step_call[19] += 30
    step_call[39] += 530
    probe = np.where(kind == 3, 500.0, 0.0)
    own = np.where(kind == 1, 3.0, 1.0) + step_call - 0.25
    return overhead.Pairs(bare, bare + own, step_call, probe, own, kind)


def test_parts_are_told_apart(overhead: ModuleType, pairs: Any) -> None:
    report = overhead.summarise(pairs, np.random.default_rng(0))
    expected = {"hooks": 40 + 4 * 2, "checks": 60, "probes": 500, "total": 608}
    assert {name: part["share"] for name, part in report["parts"].items()} == pytest.approx(
        {name: seconds / 4000 for name, seconds in expected.items()}
    )
    # Nothing varies within a kind, so drawing within kinds must not either.
    for part in report["parts"].values():
        assert part["interval"] == pytest.approx((part["share"],) * 2)
    assert report["own_clock_share"] == pytest.approx(608 / 4000)
    assert report["median_ratio"] == pytest.approx(0.01)
    assert {name: kind["pairs"] for name, kind in report["kinds"].items()} == {
        "plain": 34, "push sampled": 4, "check": 1, "check and probe": 1,
    }  # fmt: skip


def test_interval_widens_with_noise(overhead: ModuleType, pairs: Any) -> None:
    noise = np.random.default_rng(1).normal(0, 5, 40)
    noisy = overhead.Pairs(pairs.bare, pairs.guarded + noise, pairs.step_call, pairs.probe, pairs.own, pairs.kind)
    low, high = overhead.bootstrap(noisy, np.random.default_rng(0))["hooks"]
    # 1.96 standard errors of a mean of 40 draws, in shares of 100.
    assert high - low == pytest.approx(2 * 1.96 * 5 / 40**0.5 / 100, rel=0.4)


def test_bare_steps_do_not_reach_the_guard(overhead: ModuleType, tmp_path: Path) -> None:
    arguments = overhead.parse(["--pairs", "5", "--width", "16", "--batch", "2", "--tokens", "8", "--config", "light"])
    bench = overhead.Bench(arguments.rows, arguments.width, (2, 8), seed=0)
    with overhead.quiet_terminal():
        guard = overhead.attached(bench, arguments, tmp_path)
        settled = guard.steps
        assert guard._observer.counter.steps == settled == guard.config.cadence.settle_steps
        found = overhead.run_pairs(bench, guard, 5, settled + 1)
        guard.finish(check=False)
    assert guard._observer.counter.steps == settled + 5
    assert int(guard._observer.counter.exposure().data_target.sum()) == (settled + 5) * 2 * 7
    optimizer_steps = {int(state["step"]) for state in bench.optimizer.state.values()}
    assert optimizer_steps == {settled + 10}
    assert found.kind.tolist()[-1] == 3
    assert bool((found.own < found.guarded).all())
    assert not bench.model._forward_pre_hooks


@pytest.mark.parametrize("null", [False, True])
def test_report(overhead: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], null: bool) -> None:
    path = tmp_path / "figures.json"
    argv = ["--pairs", "3", "--width", "16", "--batch", "1", "--tokens", "8", "--config", "light", "--json", str(path)]
    state = torch.random.get_rng_state()
    overhead.main([*argv, "--null"] if null else argv)
    torch.random.set_rng_state(state)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["pairs"] == 3
    assert set(report["kinds"]) == {"plain"} if null else "check and probe" in report["kinds"]
    assert ("extrapolated" in report) is not null
    assert "total, 3 pairs" in capsys.readouterr().out


def test_synthetic_vocabulary_fills_every_row(overhead: ModuleType) -> None:
    assert len(overhead.tokenizer_of(9000)) == 9000


def test_too_few_rows_are_refused(overhead: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.parse(["--rows", "100"])
    assert "allowed: at least 8192" in capsys.readouterr().err
