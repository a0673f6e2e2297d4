"""The benchmark for accelerators, run small: that it works, not its times."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

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
    bench.main(["--table", str(path)])
    assert capsys.readouterr().out == said.out
