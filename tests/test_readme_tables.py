"""Tables of the documents are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import documents
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
READMES = sorted(path for path in ROOT.rglob("README.md") if not {".venv", "node_modules"} & set(path.parts))
LONGEST = 150
"""Lines of the README that a reader in a hurry sees."""


def test_tables_of_the_real_models_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS.parent / "examples"))
    monkeypatch.syspath_prepend(str(TESTS / "benchmarks"))
    from real.summary import README, written

    assert README == TESTS / "README.md"
    assert written() == README.read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", documents.PARTS)
def test_what_comes_from_the_code_is_current(mark: str) -> None:
    name, lines = documents.PARTS[mark]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert documents.written(text, mark, lines()) == text, "python tests/kits/documents.py writes it"


def test_marks_that_are_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="by tests/kits/documents"):
        documents.written("nothing", "keys", documents.keys())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST


def anchors(text: str) -> set[str]:
    """Of the headings, as Markdown viewers make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.resolve().parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for script in re.findall(r"python3? ((?:tests|examples)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


def test_of_known_damage_every_verdict_is_right() -> None:
    """And every pair was judged by all the commands that it is for."""
    found = json.loads((TESTS / "benchmarks" / "known_damage.json").read_text(encoding="utf-8"))
    assert {
        "untouched",
        "bfloat16",
        "8 bits",
        "GGUF Q8_0",
        "200 rows zeroed",
        "one row grown",
        "one MLP damaged",
    } <= found.keys()
    for name, one in found.items():
        assert one["right"] is True, name
        assert all(all(part.values()) for part in one["of"].values() if isinstance(part, dict)), name
        if name != "repair":
            assert {"probe", "scan --probe"} <= one["of"].keys()
            low, high = one["probe"]["lost"][1:]
            assert 0 <= low <= one["probe"]["lost"][0] <= high <= 1
