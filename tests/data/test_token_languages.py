"""The language of a vocabulary's words."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard.data.coverage import measure_coverage
from vocabguard.data.ranking import COLUMNS, write_tokens
from vocabguard.data.readers import Text
from vocabguard.data.token_languages import UNCLEAR, chosen_languages, language_rows, token_languages
from vocabguard.vocabulary.table import GROUPS, VocabTable, build_table, plain_table

WORDS = {
    " Geschwindigkeit": ("latin", "de"),
    " throughout": ("latin", "en"),
    " Throughout": ("latin", "en"),
    " beaucoup": ("latin", "fr"),
    " Предложение": ("cyrillic", "ru"),
    " internet": ("latin", UNCLEAR),
    " the": ("latin", ""),
    "tion": ("latin", ""),
    " 日本語": ("zh", ""),
    ";": ("digits_punctuation", ""),
}
CODES = ("de", "en", "fr", "ru", "uk", "es", "it", "nl")


def table_of(words: dict[str, tuple[str, str]]) -> VocabTable:
    group = torch.tensor([GROUPS.index(name) for name, _ in words.values()], dtype=torch.uint8)
    return replace(plain_table(len(words)), texts=tuple(words), group=group)


def test_words_by_language() -> None:
    pytest.importorskip("lingua")
    table = table_of(WORDS)
    assert token_languages(table, CODES) == [code for _, code in WORDS.values()]
    held = replace(table, control=torch.arange(len(table)) == 0)
    assert token_languages(held, CODES)[:2] == ["", "en"]


def test_rows_add_up(tokenizer: Any) -> None:
    """By counting over all tokens one by one."""
    pytest.importorskip("lingua")
    table = build_table(tokenizer, 8192)
    languages = token_languages(table, ("en", "de", "es", "fr"))
    found = measure_coverage([Text("a", "the people would say something about their country")], tokenizer, table)
    rows = language_rows(found, table, languages, "latin")
    naive: dict[str, list[int]] = {}
    for index, code in enumerate(languages):
        if code and table.group_of(index) == "latin" and bool(found.live[index]):
            asked = int(found.data_target[index])
            naive.setdefault(code, [0, 0, 0, 0])[0 if asked == 0 else 1 if asked < 5 else 2 if asked < 20 else 3] += 1
    assert {code: list(counts) for code, counts in rows} == naive
    assert naive["en"][0] > 10
    assert sum(row[1] for row in naive.values()) >= 1
    assert rows[-1][0] == UNCLEAR


@pytest.mark.parametrize("told", ["en", "en,en", "en,xx", ""])
def test_codes_are_checked(told: str) -> None:
    pytest.importorskip("lingua")
    with pytest.raises(ValueError, match=r"--languages is .*; allowed: two or more of af, ar.*or common"):
        chosen_languages(told)


def test_without_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(ValueError, match="pip install lingua-language-detector"):
        chosen_languages("common")


def test_column_of_the_table(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("lingua")
    table = build_table(tokenizer, 8192)
    languages = token_languages(table, ("en", "de"))
    found = measure_coverage([Text("a", "the people")], tokenizer, table)
    write_tokens(tmp_path / "t.csv", found, table, languages)
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join((*COLUMNS, "language"))
    assert sum(line.endswith(",en") for line in lines) == languages.count("en") > 10
