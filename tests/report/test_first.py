"""The first screen, and runs side by side: which words, what to do, names, intervals over seeds."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from parsed_page import Page

from vocabguard.report.commands import after_probe, after_run, after_scan, command, latest_checkpoint, newest_run
from vocabguard.report.data import run_data
from vocabguard.report.first import badge_of, first_tokens, heading_of, main_chart, markdown_of
from vocabguard.report.limits import Limits
from vocabguard.report.many import distinct_names, interval, side_by_side
from vocabguard.report.page import render
from vocabguard.report.sentences import verdict_of
from vocabguard.report.words import example_words


def test_lost_tokens_come_first_with_a_word_for_each_piece(make_run):
    data = run_data(make_run(texts=["hesia"] * 12))
    lines = list(data.tokens)
    lines[0] = replace(lines[0], report=replace(lines[0].report, text="hesia"))
    data = replace(data, tokens=tuple(lines), vocabulary=[" anesthesia", " Support"])
    table = first_tokens(data)
    assert (table.title, len(table.rows)) == ("Lost tokens", 12)
    assert dict(table.rows[0])["token"] == "hesia"
    assert dict(table.rows[0])["as in"] == "anesthesia"
    assert table.caption.startswith("12 of 40 tokens that were probed")
    assert [name for name, _ in table.columns][:3] == ["token", "as in", "says instead"]


def test_without_a_lost_token_the_rows_that_drifted_or_none(make_run):
    drifted = first_tokens(run_data(make_run("a", missed=0)))
    assert drifted.title == "Rows that drifted most"
    assert drifted.caption.startswith("81 live rows are below cosine 0.95")
    whole = run_data(make_run("b", worst=0.96, missed=0))
    assert (first_tokens(whole).title, first_tokens(whole).rows) == ("No lost token found", ())
    assert heading_of(whole, verdict_of(whole, Limits())) == "No loss found"


def test_the_title_never_says_more_than_was_found(make_run):
    data = run_data(make_run())
    some = Limits(1, 1)
    assert verdict_of(data, some).level == "fine"
    assert heading_of(data, verdict_of(data, some)) == "Losses are within the limits"
    assert heading_of(data, verdict_of(data, Limits())) == "This model lost tokens"
    assert badge_of(data, verdict_of(data, Limits())) == "✕ tokens lost"
    rows = replace(data.table[0], retained=None)
    unasked = replace(data, table=(rows, *data.table[1:]), probed=None)
    assert badge_of(unasked, verdict_of(unasked, some)) == "✓ rows within limits"


@pytest.mark.parametrize(
    ("pieces", "texts", "found"),
    [
        (["hesia"], [" anesthesia"], {"hesia": "anesthesia"}),
        ([" Xylo"], [" Xylophone", " Xyl"], {" Xylo": "Xylophone"}),
        (["Whale"], [" Whale", " Whales"], {}),  # a word already
        (["qqzz"], [" nothing"], {}),
        (["!!", "\n", ""], [" a!!b"], {}),
    ],
)
def test_words_for_pieces(pieces, texts, found):
    assert example_words(pieces, texts) == found


def test_the_chart_needs_a_course(make_run):
    data = run_data(make_run())
    chart = main_chart(data)
    assert chart is not None
    assert chart.title == "Retained, of what the base repeats"
    bare = replace(data, curves={key: (steps[:1], values[:1]) for key, (steps, values) in data.curves.items()})
    assert main_chart(bare) is None


def test_markdown_is_escaped_and_whole(make_run):
    data = run_data(make_run(told=True))
    text = markdown_of(data, verdict_of(data, Limits()), first_tokens(data), ["Do <b>this</b>"])
    assert "<script>" not in text.split("What to do")[0]
    assert "| token | as in |" in text
    assert "- Do <b>this</b>" in text
    area = next(one for one in Page(render(data)).texts["textarea"])
    assert area.startswith("**✕ tokens lost**")


def test_commands_are_filled_in(tmp_path):
    run = tmp_path / "out put" / "vocabguard"
    run.mkdir(parents=True)
    (run / "events.out.tfevents.1").touch()
    (run / "report.html").touch()
    for step in (9, 100):
        (run.parent / f"checkpoint-{step}").mkdir()
        (run.parent / f"checkpoint-{step}" / "config.json").touch()
    quoted = f"'{run}'"
    assert [one.command for one in after_run(run, {"model": "org/base", "tokenizer": "org/base"}, lost=True)] == [
        f"vocabguard show {quoted}",
        f"tensorboard --logdir {quoted}",
        f"vocabguard probe '{run.parent / 'checkpoint-100'}' org/base",
        f"vocabguard echo org/base --ids '{run / 'echo.jsonl'}'",
    ]
    assert [one.command for one in after_scan("base", "tuned", "s.safetensors", tokens=[7, 8, 9, 10])] == [
        "vocabguard probe tuned base", "vocabguard explain base tuned 7 8 9", "vocabguard report s.safetensors",
    ]  # fmt: skip
    lost = after_probe("tuned", "base", "p.safetensors", tokens=[" a"], lost=True)
    assert [one.command for one in lost] == [
        "vocabguard explain base tuned ' a'", "vocabguard repair base tuned --out repaired",
        "vocabguard echo tuned --needs p.safetensors --ids echo.jsonl", "vocabguard report p.safetensors",
    ]  # fmt: skip
    assert command("a", "b c") == "a 'b c'"


def test_runs_and_checkpoints_are_found_in_an_output_folder(tmp_path, make_run):
    run = make_run("out").folder
    assert newest_run(run) == run
    assert newest_run(tmp_path) is None
    for name in ("vocabguard", "vocabguard-2"):
        (tmp_path / "hf" / name).mkdir(parents=True)
        (tmp_path / "hf" / name / "run.json").write_bytes((run / "run.json").read_bytes())
    (tmp_path / "hf" / "run.json").write_text("{}")  # of another tool
    assert newest_run(tmp_path / "hf") == tmp_path / "hf" / "vocabguard-2"
    assert latest_checkpoint(tmp_path / "hf") is None
    (tmp_path / "hf" / "adapter_config.json").touch()
    assert latest_checkpoint(tmp_path / "hf") == tmp_path / "hf"


def test_three_runs_are_a_table_with_names_and_intervals(make_run):
    shown = [run_data(make_run(name, missed=missed)) for name, missed in (("a", 12), ("b", 8), ("c", 4))]
    settings = {"seed": "3"}
    shown = [replace(data, settings={**settings, "seed": str(place)}) for place, data in enumerate(shown)]
    many = side_by_side(shown, Limits())
    assert [run.name for run in many.runs] == ["a", "b", "c"]
    (repeated,) = many.repeated
    kept = [1 - missed / 40 for missed in (12, 8, 4)]
    half = 4.303 * statistics.stdev(kept) / 3**0.5
    assert interval(kept) == pytest.approx((0.8, half))
    assert ("retained", f"80.0 % ± {100 * half:.1f} %", 3) in repeated.means
    assert many.settings == (("seed", ("0", "1", "2")),)
    page = Page(render(*shown))
    assert "3 runs side by side" in page.text
    assert "Mean of 3 runs with the same settings" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    other = replace(shown[2], settings={"seed": "2", "echo.enabled": "True"})
    assert [one.names for one in side_by_side([*shown[:2], other], Limits()).repeated] == [("a", "b")]
    assert distinct_names(["x/vocabguard", "y/x/vocabguard"]) == ["x/vocabguard", "y/x/vocabguard"]


def test_a_model_that_repeats_nothing_is_not_within_limits(make_run):
    """Loss beyond the lost skill is none then, and the verdict is about the skill."""
    data = run_data(make_run(missed=2, worst=0.99))
    scalars = data.scalars | {"probe/tokens_retained_high": 1.0, "probe/skill": 0.02, "probe/skill_high": 0.11}
    verdict = verdict_of(replace(data, scalars=scalars), Limits())
    assert verdict.level == "lost"
    assert any("of the frequent targets are lost too" in one for one in verdict.findings)
    kept = verdict_of(replace(data, scalars=scalars | {"probe/skill": 1.0, "probe/skill_high": 1.0}), Limits())
    assert not any("frequent" in one for one in kept.findings)
