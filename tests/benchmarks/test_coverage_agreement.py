"""A part of the agreement benchmark: real labels of the templates on which coverage once differed from TRL."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("datasets")
pytest.importorskip("trl.chat_template_utils")


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, found as it is when run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("coverage_agreement")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "gptoss", "gemma3"])
def test_targets_are_trls_labels(name: str, agreement: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ("two turns", "thoughts in text", "thoughts apart", "call with words")
    monkeypatch.setattr(agreement, "CHATS", {shape: agreement.CHATS[shape] for shape in shapes})
    template = (agreement.TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    found = agreement.compare(name, template)
    for form in agreement.FORMS:
        assert found[form].keys() <= {"same", "refused"}, found
        assert found[form]["same"] >= 2, found


def test_a_difference_is_seen(agreement: ModuleType) -> None:
    assert agreement.verdict(([1, 2], [False, True]), ([1, 2], [False, False])) == "other"
