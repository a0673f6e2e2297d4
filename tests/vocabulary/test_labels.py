"""Groups and exposure classes have words for people, and no identifier with an underscore reaches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.vocabulary.labels import kinds_of_tokens, label_of
from vocabguard.vocabulary.table import GROUPS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*GROUPS, *EXPOSURE_CLASSES])
def test_every_group_and_class_has_a_label(name: str) -> None:
    plain = {"control", "padded", "other"}
    assert (label_of(name) == name) == (name in plain)
    assert "_" not in label_of(name)
    assert label_of(label_of(name)) == label_of(name), "said twice it stays as it is"
    assert "_" not in kinds_of_tokens([name, "ja"])


def test_a_table_of_ones_own_keeps_its_names() -> None:
    assert label_of("klingon") == "klingon"


def test_no_view_makes_labels_of_its_own() -> None:
    """Underscores were once replaced by each command in its own way."""
    for path in (ROOT / "vocabguard").rglob("*.py"):
        if path.name != "labels.py":
            assert 'replace("_", " ")' not in path.read_text(encoding="utf-8"), path
