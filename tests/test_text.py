import dataclasses
import html
import math
import re
import unicodedata
import warnings

import pytest
import torch

from vocabguard import text as wording
from vocabguard.results import CheckResult, NotApplicable, Preflight, RowDrift, TokenReport, Watch, WatchedMatrix
from vocabguard.vocabulary.table import VocabTable

NAMES = ("latin", "ja", "zh", "thai")
SIZES = (100, 50, 40, 10)
GONE = NotApplicable("the head is frozen")
HEAD = WatchedMatrix("head", 8192, 128, "bfloat16", False, False, "a copy in CPU memory")
TOKEN = TokenReport(7, "嘉祺", "Chinese", "1-4 times", 0.41234, 0.5, 3, 12, 40, 0.0321, " the")


def table(dead=()):
    """100 latin, 50 ja, 40 zh and 10 thai tokens in a row; the ids in `dead` are not live."""
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES)).to(torch.uint8)
    live = torch.ones(len(group), dtype=torch.bool)
    live[list(dead)] = False
    every, none = torch.ones_like(live), torch.zeros_like(live)
    return VocabTable(group, none, live, none, every, ("",) * len(group), NAMES)


def drift(rows=200):
    values, flags = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    return RowDrift(values, values, values, values, flags, flags)


def result(scalars=(), head=None, embedding=GONE, **fields):
    keys = {f"vocabguard/{key}": value for key, value in dict(scalars).items()}
    classes = torch.zeros(200, dtype=torch.uint8)
    return CheckResult(120, head or drift(), embedding, NotApplicable("off"), classes, None, keys, **fields)


def watch(**changes):
    both = {"head": HEAD, "embedding": dataclasses.replace(HEAD, name="embedding")}
    rest = {"probe": None, "preflight": GONE, "live": 8015, "never_trained": 0, "run_dir": "runs/a_b"}
    return Watch(**both | rest | changes)


def preflight(target, complete=True, batches=45, rows=892):
    return Preflight(target, batches, rows, complete, 0.1)


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (1e-6, "<0.1 %"),
        (0.0005, "0.1 %"),
        (0.99951, ">99.9 %"),
        (0.9994, "99.9 %"),
        (0.1234, "12.3 %"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_percent_claims_nothing_and_everything_only_when_exact(share, shown):
    assert wording.percent(share) == shown


INVISIBLE = [chr(code) for code in (*range(32), *range(127, 161), 0xAD, 0x200B, 0x200D, 0x202E, 0x2028, 0x3000, 0xFEFF)]
INVISIBLE += ["\u3164", "\ufe0f", "\u2800", "\ue000", "\ud800", "\U000e0041"]


@pytest.mark.parametrize("character", INVISIBLE)
def test_what_leaves_no_mark_is_shown_as_its_escape(character):
    shown = wording.visible(f"a{character}b")
    assert shown.isascii()
    assert shown.encode().decode("unicode_escape").encode("utf-16", "surrogatepass") == f"a{character}b".encode(
        "utf-16", "surrogatepass"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("   ", "␣␣␣"),
        ("", "(empty)"),
        ("嘉祺", "嘉祺"),
        ("\u0301", "◌\u0301"),
        ("\u0e31", "◌\u0e31"),
        ("e\u0301", "e\u0301"),
        ("a|b`", "a|b`"),
        ("-" * 50, "-" * 39 + "…"),
    ],
)
def test_visible_text(text, shown):
    assert wording.visible(text) == shown


@pytest.fixture(scope="module")
def to_html():
    """TensorBoard's own Markdown renderer; importing it warns of parts of its HTML library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html
    return markdown_to_safe_html


@pytest.mark.parametrize(
    "text", ["│ |x|", "`code`", "**b**", "<script>alert(1)</script>", "[a](http://b)", r"\|", "&amp;"]
)
def test_markdown_shows_tokens_literally_in_tensorboards_own_renderer(text, to_html):
    report = dataclasses.replace(TOKEN, text=text, said_instead=text)
    page = to_html(wording.worst_markdown([TOKEN, report]))
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cells = [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]
    assert cells[0] == list(wording.WORST_COLUMNS)
    assert cells[1] == ["7", "嘉祺", "Chinese", "1-4 times", "0.4123", "0.5000", "3", "12", "40", "0.032", "␣the"]
    assert cells[2][1] == cells[2][-1] == text.replace(" ", "␣")
    assert len(cells) == 3
    assert "<script" not in page
    assert "<a " not in page


def test_markdown_stays_one_line_a_token_whatever_the_token():
    texts = ["\n", "\r\n| x |", "\x85", "\u2028", "", "\x00"]
    lines = wording.worst_markdown([dataclasses.replace(TOKEN, text=text) for text in texts]).splitlines()
    assert len(lines) == 2 + len(texts)
    assert {line.count("|") for line in lines} == {len(wording.WORST_COLUMNS) + 1}


def test_missing_parts_of_a_token_report():
    bare = dataclasses.replace(TOKEN, steps_since_target=None, probability=None, said_instead=None, residual=math.nan)
    cells = dict(zip(wording.WORST_COLUMNS, wording.token_cells(bare), strict=True))
    assert (cells["since target"], cells["prob."], cells["says instead"], cells["residual"]) == ("never", "-", "-", "-")
    assert wording.token_cells(dataclasses.replace(TOKEN, probability=1e-7))[9] == "<0.001"
    assert "|" not in wording.worst_markdown([])


def test_preflight_counts_over_live_tokens_only():
    # 1 in 3 of the tokens has a target; the 20 dead latin tokens have none and must not be counted.
    target = torch.tensor([7 if index % 3 == 0 else 0 for index in range(200)])
    target[3] = 4
    live = table(dead=range(80, 100)).live
    never = sum(1 for index in range(200) if live[index] and target[index] == 0)
    headline, scarce, hit = wording.preflight_sentences(preflight(target), table(dead=range(80, 100)))
    assert headline == (
        f"Of 180 live tokens {never} ({100 * never / 180:.1f} %) are never a target in all 45 batches "
        "(892 rows) of the training data."
    )
    assert scarce == "Another 1 is a target fewer than 5 times."
    assert "thai" not in hit  # 10 tokens are too few to be named


def test_preflight_names_the_groups_that_are_hit_harder_than_the_whole():
    target = torch.ones(200, dtype=torch.int64) * 9
    target[100:150] = 0  # ja: all
    target[150:188] = 0  # zh: 38 of 40
    target[:10] = 0  # latin: 10 of 100, below the whole's 49 %
    said = wording.preflight_sentences(preflight(target, complete=False, batches=4000, rows=1), table())
    assert "in a sample of 4,000 batches (1 row) of the training data" in said[0]
    assert said[1:] == (
        "Hit hardest, tokens that are never a target: 50 of 50 Japanese (100 %), 38 of 40 Chinese (95.0 %).",
    )


@pytest.mark.parametrize(
    ("missing", "expected"), [(0, "Each of 200 live tokens is a target"), (1, "1 (0.5 %) is never")]
)
def test_preflight_with_nothing_or_little_missing(missing, expected):
    target = torch.full((200,), 5)
    target[:missing] = 0
    assert expected in wording.preflight_sentences(preflight(target), table())[0]


def test_preflight_without_live_tokens_or_not_applicable():
    assert "Each of 0 live tokens" in wording.preflight_sentences(preflight(torch.zeros(200)), table(range(200)))[0]
    assert wording.preflight_sentences(GONE, table()) == ("No preflight: the head is frozen.",)


def test_watch_says_what_is_watched_and_what_is_not():
    said = wording.watch_sentences(watch(embedding=GONE, probe=NotApplicable("No tokenizer."), notes=("Mind this.",)))
    assert said == (
        "Head: 8,192 rows x 128, bfloat16; baseline: a copy in CPU memory.",
        "Input embedding not watched: the head is frozen.",
        "No probe: No tokenizer.",
        "8,015 live tokens.",
        "Run folder: runs/a_b",
        "Mind this.",
    )


def test_watch_names_a_tied_matrix_once_with_its_bias():
    tied = dataclasses.replace(HEAD, tied=True, bias=True)
    said = wording.watch_sentences(watch(head=tied, embedding=tied, never_trained=32, run_dir=None))
    assert said[0].startswith("Head and input embedding, one tied matrix: 8,192 rows x 128, bfloat16, with a bias;")
    assert said[1:] == (
        "8,015 live tokens; 32 more were never trained at the base and can raise no alarm.",
        "No run folder is written.",
    )


FULL = {
    "head/cosine_mean": 0.9741,
    "head/cosine_min": 0.6124,
    "head/below_0.95": 0.123,
    "head/below_0.90": 0.05,
    "head/ja/below_0.95": 0.41,
    "head/thai/below_0.95": 0.33,
    "head/zh/below_0.95": 0.125,
    "head/latin/below_0.95": 0.01,
    "head/never/below_0.95": 0.9,
    "head/20+/below_0.95": 0.9,
    "embedding/ko/below_0.95": 1.0,
    "exposure/never": 0.712,
    "probe/retained": 0.831,
    "probe/ja/retained": 0.2,
}


def test_nothing_is_said_of_exposure_before_the_first_target():
    counted = dict(FULL) | {"exposure/targets": 12}
    assert "71.2 % never a target" in wording.verdict(result(counted))
    assert "never a target" not in wording.verdict(result(counted | {"exposure/targets": 0}))


def test_verdict_of_a_full_check():
    assert wording.verdict(result(FULL, firing=("a", "b"))) == (
        "step 120: head mean 0.9741, min 0.612; 12.3 % below 0.95 (Japanese 41.0 %, Thai 33.0 %); "
        "71.2 % never a target; retained 83.1 %; 2 alerts firing"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"groups": ("thai", "latin")}, "12.3 % below 0.95 (Thai 33.0 %);"),
        (
            {"scalars": {"exposure/never": 0.5}, "head": GONE},
            "step 120: row drift not applicable; 50.0 % never a target",
        ),
        ({"scalars": {"probe/retained": math.nan}, "head": GONE}, "step 120: row drift not applicable"),
        (
            {"scalars": {"embedding/cosine_mean": 1.0, "head/cosine_mean": 0.1}, "head": GONE, "embedding": drift()},
            "step 120: embedding mean 1.0000, min -; - below 0.95",
        ),
        ({"scalars": FULL | {"head/nonfinite_rows": 1.0}}, "; 1 broken row; 71.2 % never"),
        ({"firing": ("one",)}, "; 1 alert firing"),
    ],
)
def test_verdict_leaves_out_what_was_not_measured(changes, expected):
    groups = changes.pop("groups", None)
    line = wording.verdict(result(**{"scalars": FULL} | changes), groups)
    assert expected in line
    assert "\n" not in line
    if "step 120" in expected:
        assert line == expected


def test_report_rows_against_the_keys():
    rows = wording.report_rows(result(FULL | {"head/never/cosine_min": 0.61}), NAMES)
    assert [(row.label, row.kind) for row in rows] == [
        ("all", "all"),
        ("ja", "group"),
        ("thai", "group"),
        ("zh", "group"),
        ("latin", "group"),
        ("never", "class"),
        ("20+", "class"),
    ]
    every, ja, never = rows[0], rows[1], rows[5]
    assert (every.mean, every.minimum, every.below_95, every.below_90, every.retained) == (
        0.9741,
        0.6124,
        0.123,
        0.05,
        0.831,
    )
    assert (ja.mean, ja.below_95, ja.retained) == (None, 0.41, 0.2)
    assert (never.minimum, never.retained) == (0.61, None)


def test_report_rows_without_drift_hold_what_the_probe_found():
    keys = FULL | {"probe/zh/retained": 0.1}
    rows = wording.report_rows(result(keys, head=GONE), NAMES, wording.measured_matrix(result(head=GONE)))
    assert [(row.label, row.below_95, row.retained) for row in rows] == [
        ("all", None, 0.831),
        ("zh", None, 0.1),
        ("ja", None, 0.2),
    ]


def test_large_groups_count_live_tokens():
    assert wording.large_groups(table()) == ("latin", "ja", "zh")
    assert wording.large_groups(table(dead=range(81))) == ("ja", "zh")


def test_every_assigned_letter_of_the_basic_plane_is_left_as_it_is():
    letters = [chr(code) for code in range(0x21, 0xD800) if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt", "Nd")]
    assert [letter for letter in letters if wording.visible(letter) != letter] == []
