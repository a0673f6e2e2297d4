"""The report page that a run leaves behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from vocabguard import VocabGuard
from vocabguard.runlog import RunWriter


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


def test_a_disk_that_fills_up_costs_the_log_and_not_the_guard(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = RunWriter.check
    written: list[int] = []

    def check(self: RunWriter, result: Any) -> None:
        if result.step >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(result.step)
        whole(self, result)

    monkeypatch.setattr(RunWriter, "check", check)
    model = kit.llama()
    guard = VocabGuard(drift={"every_n_steps": 1}, log={"console": False, "tensorboard": False})
    guard.attach(model, kit.sgd(model), total_steps=4, run_dir=tmp_path / "run")
    for step in range(1, 5):
        guard.step(step)
    assert guard.failure is None
    assert guard.last is not None
    assert (guard.last.step, written) == (4, [0, 1])
    assert guard.finish() is None
    [told] = [record.message for record in caplog.records if "nothing more is written" in record.message]
    assert "No space left on device" in told
    assert str(tmp_path / "run") in told
