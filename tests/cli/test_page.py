"""``vocabguard/cli/README.md`` is what the code says; its JSON part is held by ``tests/test_contract_kept.py``."""

from __future__ import annotations

from importlib.metadata import version

import command_page
import pytest


@pytest.mark.skipif(version("typer") < "0.20", reason="older versions do not hand on what arguments are for")
def test_the_options_on_the_page_are_current() -> None:
    text = command_page.README.read_text(encoding="utf-8")
    assert command_page.with_part(text, "options", command_page.options_part()) == text, (
        "python tests/kits/command_page.py writes the page anew"
    )
    assert "### `vocabguard scan`" in text


def test_fields_that_are_listed_have_paths_that_end_in_a_name() -> None:
    found = {"scan A": {"has": ["groups", "groups/*", "groups/*/tokens", "worst", "worst[]", "worst[]/id"]}}
    assert command_page.json_part(found).splitlines()[2:] == [
        "| field | |", "|---|---|", "| `groups` | by script group |", "| `groups/*` | by script group |",
        "| `groups/*/tokens` | number of tokens |", "| `worst[]` | tokens with the lowest cosine |",
        "| `worst[]/id` | token id |",
    ]  # fmt: skip
