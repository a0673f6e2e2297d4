"""Guards that come by the environment variable ``VOCABGUARD``, in trainers that are real."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from vocabguard.config import ConfigError
from vocabguard.integrations import launched
from vocabguard.integrations.lightning import GuardAtSetup, VocabGuardCallback

GROUP = "lightning.pytorch.callbacks_factory"
SETTINGS = "log.console=false probe.enabled=false on_error=raise drift.every_n_steps=2"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning finds the entry points that pyproject.toml declares, as after an install."""
    from lightning.fabric.utilities import registry

    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    points = declared["project"]["entry-points"][GROUP]
    monkeypatch.setattr(
        registry, "entry_points",
        lambda group: [EntryPoint(name, value, group) for name, value in points.items() if group == GROUP],
    )  # fmt: skip


def fit(kit: Any, tokenizer: Any, folder: Path, *callbacks: Any) -> Any:
    return kit.run_lightning(kit.tiny_model(), kit.random_rows(24), tokenizer, folder, callbacks=callbacks)


def guards(run: Any) -> list[VocabGuardCallback]:
    return [one for one in run.trainer.callbacks if isinstance(one, VocabGuardCallback)]


@pytest.mark.usefixtures("installed")
def test_lightnings_entry_point(kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOCABGUARD", raising=False)
    assert not any(isinstance(one, GuardAtSetup) for one in fit(kit, tokenizer, tmp_path / "off").trainer.callbacks)
    monkeypatch.setenv("VOCABGUARD", "hold")
    monkeypatch.setenv("VOCABGUARD_SET", SETTINGS)
    rows = kit.random_rows(24)
    run = fit(kit, tokenizer, tmp_path / "on")
    (callback,) = guards(run)
    assert callback.guard.config.hold.enabled
    kit.assert_counts(callback.guard.last.exposure, kit.naive_counts(rows, kit.BATCH))
    assert (tmp_path / "on" / "vocabguard" / "run.json").is_file()


@pytest.mark.usefixtures("installed")
def test_the_entry_point_leaves_a_guard_of_ones_own_alone(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOCABGUARD", "hold")
    own = VocabGuardCallback(**kit.QUIET, probe={"enabled": False})
    assert guards(fit(kit, tokenizer, tmp_path, own)) == [own]
    assert not own.guard.config.hold.enabled
    assert own.guard.last is not None


def test_lightning_under_the_launcher(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Before the environment asks for a guard: where the package is installed, Lightning's entry point adds one.
    trainer = fit(kit, tokenizer, tmp_path).trainer
    monkeypatch.setenv("VOCABGUARD", "1")
    monkeypatch.setenv("VOCABGUARD_SET", SETTINGS)
    assert launched.guard_lightning(trainer)
    assert len([one for one in trainer.callbacks if isinstance(one, VocabGuardCallback)]) == 1
    assert launched.guard_lightning(trainer)
    told = capsys.readouterr().err
    assert f"Trainer is guarded (default settings {SETTINGS})" in told
    assert "Trainer has a guard of its own" in told


def test_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("", "0", "off", "False"):
        monkeypatch.setenv("VOCABGUARD", nothing)
        assert launched.asked() is None
        assert launched.lightning_callbacks() == []
    monkeypatch.setenv("VOCABGUARD", "on")
    assert launched.asked() == (None, ())
    monkeypatch.setenv("VOCABGUARD_SET", "log.keys='[a, b]'")
    assert launched.asked() == (None, ("log.keys=[a, b]",))
    monkeypatch.setenv("VOCABGUARD_SET", "log.keys='[a")
    with pytest.raises(ConfigError, match=r"VOCABGUARD_SET is .*No closing quotation"):
        launched.asked()
    monkeypatch.setenv("VOCABGUARD_SET", "")
    monkeypatch.setenv("VOCABGUARD", "protcet")
    with pytest.raises(ConfigError, match="protcet"):
        launched.lightning_callbacks()
