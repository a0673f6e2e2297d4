"""Words that readers stumbled over do not come back: in the package's source, its help and the README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
WORN_OUT = (
    "will be below cosine",
    "have not been a target so far",
    "To do: echo and hold",
    "could say is still said",
    "stands down",
    "stood down",
    "No saved state of a guard",
    "news of alerts could not be delivered",
    "tokens have no groups and no texts",
    "is not a scan's file",
    "allowed: a section of",
    "nothing to write; allowed",
    "in times the need",
    "where columns leave it open",
    "Even who knows",
    "lacks to 1, the forecast makes up",
    "dashed line is up before",
    "Told at step",
    "No GPU was at hand",
    "hold it to what comes out",
    "in a loop of one's own",
    "where there are neither it is said",
    "Gives alerts that fire their stories",
    "the ground that its story",
    "Begin to talk",
    "the base could say 98",
)
"""Phrases that were replaced; `CONTRIBUTING.md` says how messages are written."""


def paths() -> Iterator[Path]:
    for folder in ("vocabguard", "integrations", "configs", "examples"):
        for path in sorted((TOP / folder).rglob("*")):
            if path.suffix in (".py", ".j2", ".md", ".yaml") and "__pycache__" not in path.parts:
                yield path
    yield from (TOP / name for name in ("README.md", "CONTRIBUTING.md"))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Texts by name, without their line ends, which fall between any words."""
    return {str(path.relative_to(TOP)): " ".join(path.read_text("utf-8").split()) for path in paths()}


@pytest.mark.parametrize("phrase", WORN_OUT)
def test_a_phrase_is_gone(phrase: str, texts: dict[str, str]) -> None:
    assert [name for name, text in texts.items() if phrase in text] == []


def test_the_search_would_find_one(texts: dict[str, str]) -> None:
    assert "disabled itself; training continues" in texts["vocabguard/guard/failures.py"]
    assert len(texts) > 150
