"""The benchmark for accelerators, run small: that it works, not its times."""

from __future__ import annotations

import importlib
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("accelerator")
    small = replace(module.SMALL, matrices=((256, 16),), batch=(1, 8), block=1, pairs=2)
    monkeypatch.setattr(module, "SMALL", small)
    return module


def test_it_runs_small_and_says_so(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    bench.main(["--small", "--json", str(path)])
    said = capsys.readouterr()
    assert "shows that the benchmark works, and" in " ".join(said.out.split())
    assert ("no accelerator here" in said.err) is not torch.cuda.is_available()
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["identity"] == {"bare_runs_agree": True, "watched_run_agrees": True}
    assert report["checks"][0]["largest_error_of_a_cosine"] < 1e-6
    kinds = report["steps"]["kinds"]
    assert set(kinds) == set(bench.KINDS)
    for kind in kinds.values():
        low, high = kind["interval"]
        assert low <= kind["ratio"] <= high
    assert torch.cuda.is_available() or report["steps"]["waits"] == "not applicable: no accelerator"
    bench.main(["--table", str(path)])
    assert capsys.readouterr().out == said.out


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
def test_waits_are_counted_apart(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run on a device, here with its warnings and its clock played: bare and guarded, and put back after."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    machine = bench.Machine(small=True)
    machine.there = True
    training = SimpleNamespace(batches=lambda count: [None] * count, step=lambda ids: None)

    def block(ids: list[None]) -> None:
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    found = bench._waits(machine, training, SimpleNamespace(on=nullcontext, block=block))
    assert modes == ["warn", "default"] * 2
    assert [found[name]["waits"] for name in ("bare", "guarded")] == [0, 1]
    assert found["guarded"]["steps"] == machine.size.block
    assert {found[name]["copies_to_host"] for name in found} == {0}
