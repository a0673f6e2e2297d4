"""Two runs on one page: which tokens either lost, and what each of the two says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from parsed_page import Page

from vocabguard.report.compare import compare
from vocabguard.report.data import run_data
from vocabguard.report.either import NOT_PROBED, REPEATED, lost_in_either, markdown_of_two
from vocabguard.report.limits import Limits
from vocabguard.report.page import render


def cells(table, name):
    place = [column for column, _ in table.columns].index(name)
    return [row[place][1] for row in table.rows]


def test_what_only_one_lost_comes_first_in_turns(make_run):
    first, second = run_data(make_run("a", missed=12)), run_data(make_run("b", missed=12))
    assert first.probed is not None
    assert second.probed is not None
    # A lost tokens 0 to 7, B lost 6 to 11.
    lost = np.arange(len(first.probed.ids))
    first = replace(first, probed=replace(first.probed, gone=lost < 8))
    second = replace(second, probed=replace(second.probed, gone=(lost >= 6) & (lost < 12)))
    table = lost_in_either(first, second)
    assert table.title == "Lost tokens"
    repeated = [
        (a == REPEATED, b == REPEATED) for a, b in zip(cells(table, "A says"), cells(table, "B says"), strict=True)
    ]
    assert repeated == [(False, True), (True, False)] * 4 + [(False, True)] * 2 + [(False, False)] * 2
    assert "8 of 40 in A and 6 of 40 in B; 2 in both" in table.caption


def test_a_token_that_one_was_not_asked_for(make_run):
    first, second = run_data(make_run("a", missed=2)), run_data(make_run("b", missed=2))
    assert first.probed is not None
    alone = lost_in_either(first, replace(second, probed=None))
    assert set(cells(alone, "B says")) == {NOT_PROBED}
    assert "in B" not in alone.caption


def test_without_a_lost_token_rows_that_drifted(make_run):
    first, second = (
        replace(run_data(make_run(name, worst=worst)), probed=None) for name, worst in (("a", 0.5), ("b", 0.9))
    )
    table = lost_in_either(first, second)
    assert table.title == "Rows that drifted most"
    assert "was not measured" in table.caption
    low = [min(float(a), float(b)) for a, b in zip(cells(table, "cosine A"), cells(table, "cosine B"), strict=True)]
    assert low == sorted(low)
    assert low[0] == 0.5
    still = [replace(data, tokens=()) for data in (first, second)]
    assert lost_in_either(*still).title == "No row below 0.95"


def test_other_bases_have_a_table_each(make_run):
    told = [{"base": {"sha256": digest * 32}} for digest in ("ab", "cd")]
    sides = [replace(run_data(make_run(name)), evidence=one) for name, one in zip("ab", told, strict=True)]
    page = Page(render(*sides))
    assert "A: Lost tokens" in page.text
    assert "B: Lost tokens" in page.text


def test_two_runs_as_markdown(make_run):
    first, second = run_data(make_run("a", worst=0.5, missed=12)), run_data(make_run("b", worst=0.9, missed=2))
    both = compare(first, second)
    text = markdown_of_two(both, (first, second), lost_in_either(first, second), Limits())
    assert text.startswith(both.sentence)
    assert "| token | A says | B says |" in text
    assert "Settings that differ:" in text
    assert all(line.count("|") in (0, 4, 6) for line in text.splitlines() if not line.startswith("- "))
