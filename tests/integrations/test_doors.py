"""The plugins for axolotl and ms-swift in a real trainer; the packages themselves where they are installed.

Their own runs: `tests/rehearsals`.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from by_path import module_of
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from vocabguard.config import ConfigError
from vocabguard.integrations.huggingface import VocabGuardCallback
from vocabguard.integrations.plugins import __file__ as plugins

QUIET = {"log": {"console": False}, "probe": {"enabled": False}, "drift": {"every_n_steps": 1}}
FILE = Path(plugins).with_name("ms_swift.py")


def stand_in(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of that name, where the package is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        return
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module."""
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "vocabguard.integrations.axolotl", raising=False)
    return importlib.import_module("vocabguard.integrations.axolotl")


def trainer_of(kit: Any, tokenizer: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1
    )
    rows: Any = kit.random_rows(16)
    return Trainer(kit.tiny_model(), arguments, DataCollatorForSeq2Seq(tokenizer), rows, processing_class=tokenizer)


class Cfg(dict[str, Any]):
    """As axolotl's: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def test_axolotls_plugin(kit: Any, tokenizer: Any, tmp_path: Path, axolotl: Any) -> None:
    plugin = axolotl.VocabGuardPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    section = {"config": "hold", **QUIET, "echo": {"targets_per_live_token": None}}
    checked = getattr(sys.modules[module], name)(vocabguard=section)
    assert checked.vocabguard == section
    plugin.register(Cfg(vocabguard=section))
    trainer = trainer_of(kit, tokenizer, tmp_path)
    # axolotl's checks have dropped what is null by then.
    (callback,) = plugin.add_callbacks_post_trainer(Cfg(vocabguard={"config": "hold"}), trainer)
    trainer.add_callback(callback)
    assert plugin.add_callbacks_post_trainer(Cfg(), trainer) == []
    trainer.train()
    assert callback.guard.config.hold.enabled
    assert callback.guard.steps == 2
    assert any("vocabguard/exposure/never" in entry for entry in trainer.state.log_history)


def test_axolotls_section_is_checked_before_anything_is_loaded(axolotl: Any) -> None:
    wrong = {
        "protcet": "config is 'protcet'", 3: "vocabguard is 3; allowed", ("echo", "dosis"): "dosis",
        ("config", 7): "vocabguard.config is 7",
    }  # fmt: skip
    for section, why in wrong.items():
        value: Any = section
        if isinstance(section, tuple):
            value = {"echo": {"dosis": 1}} if section[0] == "echo" else {"config": 7}
        with pytest.raises(ConfigError, match=why):
            axolotl.VocabGuardPlugin().register(Cfg(vocabguard=value))
    axolotl.VocabGuardPlugin().register(Cfg(vocabguard="protect"))
    axolotl.VocabGuardPlugin().register(Cfg())


def test_ms_swifts_plugin(kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=registered)
    # By its path, as ms-swift loads it.
    module_of(FILE, "loaded_by_path")
    registered = sys.modules["swift.callbacks"].callbacks_map
    monkeypatch.setenv("VOCABGUARD", "hold")
    monkeypatch.setenv("VOCABGUARD_SET", "log.console=false probe.enabled=false")
    trainer = trainer_of(kit, tokenizer, tmp_path)
    callback = registered["vocabguard"](trainer.args, trainer)
    assert isinstance(callback, VocabGuardCallback)
    assert callback.guard.config.hold.enabled
    trainer.add_callback(callback)
    trainer.train()
    assert any("vocabguard/exposure/never" in entry for entry in trainer.state.log_history)


def test_ms_swifts_file_is_found_without_ms_swift_and_shadows_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vocabguard.integrations.plugins.ms_swift"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert Path(done.stdout.strip()).samefile(FILE)
    # ms-swift puts the folder first on sys.path.
    assert {path.stem for path in FILE.parent.glob("*.py")} == {"__init__", "ms_swift"}
