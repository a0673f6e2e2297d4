"""What notebooks show, and tables for pandas."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import llama

import vocabguard
from vocabguard import RunLog, VocabGuard

QUIET: Any = {"log": {"console": False, "tensorboard": False}, "probe": {"enabled": False}}


@pytest.fixture
def run(tmp_path: Path) -> RunLog:
    guard = VocabGuard(drift={"every_n_steps": 1}, **QUIET)
    assert "not attached" in guard._repr_html_()
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(model, optimizer, total_steps=2, run_dir=tmp_path / "a<b")
    ids = torch.arange(12).view(2, 6)
    for step in (1, 2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        check = guard.step(step)
    assert check is not None
    shown = check._repr_html_()
    assert "<th>step</th><td>2</td>" in shown
    assert "head/cosine_mean" in shown
    shown = guard._repr_html_()
    assert "<td>attached</td>" in shown
    assert "a&lt;b" in shown
    assert "<b" not in shown
    log = guard.finish()
    assert log is not None
    return log


def test_a_run_is_a_table(run: RunLog) -> None:
    pandas = pytest.importorskip("pandas")
    frame = run.to_pandas()
    checks = run.checks()
    assert frame.index.tolist() == [check["step"] for check in checks] == [0, 1, 2]
    assert frame.index.name == "step"
    for key, values in frame.items():
        if "/" in str(key):
            steps, expected = run.scalar(str(key))
            known = values.loc[steps].tolist()
            assert all(one == other or (math.isnan(one) and math.isnan(other))
                       for one, other in zip(known, expected, strict=True))  # fmt: skip
    assert frame["probed"].tolist() == [False] * 3
    assert isinstance(frame, pandas.DataFrame)
    (run.folder / "checks.jsonl").write_text("")
    assert run.to_pandas().empty


def test_a_run_in_a_notebook(run: RunLog) -> None:
    shown = run._repr_html_()
    assert "a&lt;b/report.html" in shown
    assert "<th>checks</th><td>3</td>" in shown
    (run.folder / "report.html").unlink()
    assert "vocabguard report" in run._repr_html_()


def test_without_pandas_the_line_that_installs_it(run: RunLog) -> None:
    code = "import sys; sys.modules['pandas'] = None\nfrom vocabguard import RunLog\n"
    code += f"RunLog.open({str(run.folder)!r}).to_pandas()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RunLog.to_pandas needs pandas, which is not installed: pip install pandas" in done.stderr


def test_where_a_run_comes_from_is_kept(run: RunLog) -> None:
    origin = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["origin"]
    assert origin["model_class"] == "LlamaForCausalLM"
    assert origin["parameters"] == sum(one.numel() for one in llama().parameters())
    assert origin["versions"]["vocabguard"] == vocabguard.__version__
    assert origin["command"]
