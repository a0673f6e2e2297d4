"""What a caller may read and catch: the public face of the package."""

from __future__ import annotations

import contextlib
import math
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import llama

import vocabguard
from vocabguard.cli.app import InputError
from vocabguard.collective import PeerFaultError
from vocabguard.data.readers import DataError
from vocabguard.installation import DISTRIBUTION
from vocabguard.protect.collator import EchoError

QUIET: Any = {"log": {"console": False, "tensorboard": False}}


def test_version() -> None:
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a clone that is on the path only
        assert vocabguard.__version__ == metadata.version(DISTRIBUTION)
    assert re.fullmatch(r"\d+\.\d+\.\d+", vocabguard.__version__)


@pytest.mark.parametrize("kind", [vocabguard.ConfigError, DataError, EchoError, InputError, PeerFaultError])
def test_one_base_for_all_errors(kind: type[Exception]) -> None:
    assert issubclass(kind, vocabguard.VocabGuardError)
    assert issubclass(kind, RuntimeError if kind is PeerFaultError else ValueError)


def test_what_can_be_read_of_a_guard_cannot_be_set() -> None:
    guard = vocabguard.VocabGuard(**QUIET)
    for name in ("table", "failure", "timings", "counting"):
        with pytest.raises(AttributeError):
            setattr(guard, name, None)


def test_what_can_be_read_of_a_guard(tmp_path: Path) -> None:
    guard = vocabguard.VocabGuard(drift={"every_n_steps": 1}, **QUIET)
    assert (guard.table, guard.failure, guard.counting, guard.timings.total) == (None, None, False, 0.0)
    assert math.isnan(guard.timings.step)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(model, optimizer, total_steps=1, run_dir=tmp_path / "run")
    assert guard.table is not None
    assert len(guard.table) == 96
    assert guard.counting
    ids = torch.arange(12).view(2, 6)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    found = guard.step(1)
    assert found is not None
    assert guard.timings.check >= found.seconds - found.probe_seconds > 0
    assert guard.timings.total >= guard.timings.check
    assert guard.timings.step >= 0
    assert (guard.timings.probes, guard.timings.probing) == (0, 0.0)


def test_a_failed_guard_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = vocabguard.VocabGuard(**QUIET)
    monkeypatch.setattr("vocabguard.guard.session.put_together", lambda *_, **__: 1 / 0)
    assert guard.attach(llama()) is None
    assert guard.failure == "attach failed with ZeroDivisionError: division by zero"


def test_wants() -> None:
    assert not vocabguard.VocabGuard(**QUIET).wants("echo")
    assert vocabguard.VocabGuard(echo={"armed": True}, **QUIET).wants("echo")
    rule: Any = {"metric": "head/below_0.95", "threshold": 0.1, "actions": ["hold"]}
    assert vocabguard.VocabGuard(alerts={"mine": rule}, **QUIET).wants("hold")
