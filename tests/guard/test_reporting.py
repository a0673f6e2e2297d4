"""The report page that a run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vocabguard import VocabGuard


def run(kit: Any, folder: Path, **log: Any) -> VocabGuard:
    guard = VocabGuard(**kit.QUIET | {"log": {**kit.QUIET["log"], **log}})
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard.attach(model, optimizer, total_steps=3, run_dir=folder)
    kit.loop(guard, model, optimizer, kit.batches(3))
    return guard


@pytest.mark.parametrize("wanted", [True, False])
def test_the_page_lies_in_the_run_folder(kit: Any, tmp_path: Path, wanted: bool) -> None:
    log = run(kit, tmp_path / "run", report=wanted).finish()
    assert log is not None
    page = log.folder / "report.html"
    assert page.exists() == wanted
    if wanted:
        assert "<table" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_ends_nothing(kit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = run(kit, tmp_path / "run")
    (tmp_path / "run" / "report.html").mkdir()
    log = guard.finish()
    assert log is not None
    assert log.checks()[-1]["step"] == 3
    assert "no report.html could be written" in caplog.text
