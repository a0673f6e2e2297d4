"""``vocabguard report``: pages, JSON, exit codes, and bad input as one line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from vocabguard.cli.app import InputError, build, main
from vocabguard.cli.report import read
from vocabguard.report.limits import Limits
from vocabguard.report.page import render
from vocabguard.report.sentences import as_json
from vocabguard.results import CheckResult, NotApplicable, RowDrift, TokenReport, Transition, Watch, WatchedMatrix
from vocabguard.runlog import RunWriter, row_vectors

ROWS = 40
ASSETS = Path(__file__).parents[2] / "examples" / "assets"
GONE = NotApplicable("not here")


def make_run(folder: Path, below: int = 10, retained: float = 0.9) -> Path:
    """A run of 40 live rows of which `below` are at cosine 0.9, the others at 1."""
    cosine = torch.ones(ROWS)
    cosine[:below] = 0.9
    none = torch.zeros(ROWS, dtype=torch.bool)
    share = {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()), "below_0.95": below / ROWS}
    scalars = {f"vocabguard/head/{key}": value for key, value in share.items()}
    worst = TokenReport(0, "</script>語", "latin", "unknown", 0.9, math.nan, 0, 0, None, None, None)
    result = CheckResult(
        step=30, head=RowDrift(cosine, cosine, 1 - cosine, cosine, none, none), embedding=GONE, exposure=GONE,
        classes=torch.zeros(ROWS, dtype=torch.uint8), probe=None,
        scalars=scalars | {"vocabguard/probe/retained": retained}, worst=(worst,),
        transitions=(Transition("bad", "firing", "critical", "vocabguard/head/below_0.95", 0.25, 30, "bad."),),
    )  # fmt: skip
    writer = RunWriter(folder)
    head = WatchedMatrix("head", ROWS, 4, "float32", False, False, "a copy")
    writer.start({"seed": 1}, Watch(head, GONE, None, GONE, ROWS, 0, None), ("latin",))
    writer.check(result)
    writer.rows(30, row_vectors(result, torch.zeros(ROWS, dtype=torch.uint8), ~none))
    return folder


def make_scan(path: Path, below: int = 10, **changes: Any) -> Path:
    """A scan's file of the same rows, as its documentation has it."""
    cosine = np.where(np.arange(ROWS) < below, 0.9, 1.0).astype(np.float32)
    numbers = {"cosine_mean": float(cosine.mean()), "cosine_min": 0.9, "below_0.95": below / ROWS, "below_0.90": 0.0}
    summary = {
        "schema": 1, "base": "base/", "tuned": "<tuned>", "tied": {"base": False, "tuned": False}, "judged": "head",
        "matched": {"by": "id", "rows": ROWS, "added": 0, "removed": 0}, "residual_over": "live rows",
        "tokens": {"rows": ROWS, "live": ROWS, "control": 0, "unreachable": 0, "padded": 0, "never_trained": 0},
        "head": numbers | {"groups": {"latin": numbers}, "l2_histogram": {"edges": [], "counts": []}},
        "embedding": {"not_applicable": "it has no rows"},
    } | changes  # fmt: skip
    vectors = {
        "group": torch.zeros(ROWS, dtype=torch.uint8),
        "live": torch.ones(ROWS, dtype=torch.bool),
        "head/cosine": torch.from_numpy(cosine),
        "head/residual": torch.from_numpy(cosine.copy()),
    }
    header = {"kind": "vocabguard.scan", "summary": json.dumps(summary), "groups": '["latin"]'}
    texts = json.dumps([f"<b>{token}</b>" for token in range(ROWS)])
    safetensors.torch.save_file(vectors, str(path), metadata=header | {"texts": texts})
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(build(("report",)), ["report", *map(str, arguments)])


def test_writes_the_page_and_says_the_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(make_run(tmp_path / "run"))
    assert done.exit_code == 1
    assert "10 of 40 live head rows (25.0 %) have drifted below cosine 0.95" in done.stdout
    assert "&lt;/script&gt;語" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 1),
        (("--threshold", "0.25"), 1),
        (("--threshold", "0.25", "--threshold-forgotten", "0.11"), 0),
        (("--threshold", "0.24", "--threshold-forgotten", "0.11"), 1),
    ],
)
def test_the_exit_code_follows_both_thresholds(tmp_path, arguments, code):
    assert call(make_run(tmp_path / "run"), "--out", tmp_path / "a.html", *arguments).exit_code == code


def test_json_is_all_of_standard_output_and_writes_no_page_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(make_run(tmp_path / "run"), make_run(tmp_path / "other", below=4), "--json")
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [source["below_0.95"] for source in found["sources"]] == [0.25, 0.1]
    assert found["comparison"]["below_0.95"] == {"only_first": 6, "only_second": 0, "both": 4}
    assert found["page"] is None
    assert not (tmp_path / "report.html").exists()
    done = call(tmp_path / "run", "--json", "--out", "page.html")
    assert json.loads(done.stdout)["page"] == "page.html"
    assert (tmp_path / "page.html").exists()


def test_a_scan_makes_a_page_and_compares_with_a_run(tmp_path):
    scan, page = make_scan(tmp_path / "scan.safetensors", below=3), tmp_path / "page.html"
    done = call(scan, "--out", page, "--json")
    assert done.exit_code == 1
    (source,) = json.loads(done.stdout)["sources"]
    assert (source["kind"], source["live"], source["below_0.95"], source["retained"]) == ("scan", 40, 0.075, None)
    assert source["groups"]["latin"]["tokens"] == 40
    text = page.read_text("utf-8")
    assert "&lt;b&gt;0&lt;/b&gt;" in text
    assert "Tuned: &lt;tuned&gt;" in text
    assert "said now" not in text
    done = call(make_run(tmp_path / "run"), scan, "--out", page, "--json")
    assert json.loads(done.stdout)["comparison"]["below_0.95"] == {"only_first": 7, "only_second": 0, "both": 3}


def test_a_real_scan_is_read(tmp_path, monkeypatch):
    weights = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    tuned = weights.clone()
    tuned[7] = -weights[7]
    for name, head in (("base", weights), ("tuned", tuned)):
        safetensors.torch.save_file({"lm_head.weight": head.clone()}, str(tmp_path / f"{name}.safetensors"))
    found = tmp_path / "scan.safetensors"
    arguments = ["scan", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), "--out", str(found)]
    scanned = CliRunner().invoke(build(("scan",)), arguments)
    assert scanned.exit_code == 1, scanned.output
    (source,) = json.loads(call(found, "--json").stdout)["sources"]
    assert source["below_0.95"] == pytest.approx(1 / ROWS)
    assert source["cosine_min"] == pytest.approx(-1, abs=1e-6)


def test_a_scans_page_shows_lengths_and_names_odd_rows(tmp_path, changed_assets):
    def change(head: Tensor) -> None:
        head[1000:1200] += torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
        head[3497] *= 30  # " A"

    tuned, found, page = changed_assets(change), tmp_path / "scan.safetensors", tmp_path / "page.html"
    assert CliRunner().invoke(build(("scan",)), ["scan", str(ASSETS), str(tuned), "--out", str(found)]).exit_code == 1
    assert call(found, "--out", page).exit_code == 1
    text = page.read_text("utf-8")
    lengths = text[text.index('id="lengths"') :]
    assert "L2, 8,014 live rows: Half of the rows moved less than 0," in lengths
    assert lengths[: lengths.index("</section>")].count("<title>") >= 2, "bars with what they hold"
    assert "Never trained at the base: ␣парол, ␣geomet, " in text
    assert "live rows have a norm out of line (the median row&#39;s is 1.000 times what it was): ␣A, " in text


def test_a_run_folder_that_holds_texts_names_every_token(tmp_path):
    run, page = make_run(tmp_path / "run"), tmp_path / "page.html"
    assert call(run, "--out", page).exit_code == 1
    assert "&lt;row␣38&gt;" in page.read_text("utf-8")
    (run / "texts.json").write_text(json.dumps([f"word {i}" for i in range(ROWS)]), encoding="utf-8")
    assert call(run, "--out", page).exit_code == 1
    text = page.read_text("utf-8")
    assert "word␣38" in text
    assert "&lt;row" not in text
    (run / "texts.json").write_text("[1]", encoding="utf-8")
    assert f"{run / 'texts.json'} holds no list of texts" in str(call(run, "--out", page).exception)


def test_a_tokenizer_gives_the_texts(tmp_path):
    assets = Path(__file__).parents[2] / "examples" / "assets"
    run = make_run(tmp_path / "run")
    done = call(run, "--tokenizer", tmp_path)
    assert done.exit_code != 0
    assert "no tokenizer in this folder" in str(done.exception)
    done = call(run, "--tokenizer", assets)
    assert "it has 8160 ids, the matrix has 40 rows" in str(done.exception)


def damaged(folder: Path, name: str, content: bytes) -> Path:
    make_run(folder)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: at / "nowhere", "does not exist"),
        (lambda at: at, "is not a run folder"),
        (lambda at: damaged(at / "a", "run.json", b'{"schema": 99}'), "has schema 99"),
        (lambda at: damaged(at / "a", "run.json", b"[]"), "is not a vocabguard run"),
        (lambda at: damaged(at / "a", "run.json", b'{"schema": 1}'), "KeyError"),
        (lambda at: damaged(at / "a", "run.json", b'{"schema":' + b"[" * 100_000), "not a"),
        (lambda at: damaged(at / "a", "checks.jsonl", b"[]\n[]\n"), "cannot be read as a run folder"),
        (lambda at: damaged(at / "a", "rows-30.safetensors", b"torn"), "cannot be read as a run folder"),
        (lambda at: damaged(at, "file", b"text") / "file", "is no file of `vocabguard scan --out`"),
        (lambda at: make_scan(at / "s.safetensors", schema=9), "schema 9"),
        (lambda at: make_scan(at / "s.safetensors", tokens=None), "is no file of `vocabguard scan --out` (TypeError"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, make, said):
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["vocabguard", "report", str(make(tmp_path)), "--out", str(page)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("vocabguard: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.out == ""
    assert not page.exists()


def changed(value: Any, rnd: random.Random) -> Any:
    """The same JSON with one random part of it gone or of another kind."""
    if isinstance(value, dict) and value and rnd.random() < 0.85:
        key = rnd.choice(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        return rest if rnd.random() < 0.2 else rest | {key: changed(value[key], rnd)}
    if isinstance(value, list) and value and rnd.random() < 0.85:
        place = rnd.randrange(len(value))
        return [*value[:place], changed(value[place], rnd), *value[place + 1 :]]
    return rnd.choice([None, 5, -1, 1e308, "x", [], {}, True, "\ud800"])


def damage(path: Path, rnd: random.Random) -> None:
    """Cut, flip or empty a file, or change the JSON in it."""
    content = bytearray(path.read_bytes())
    way = rnd.choice(["cut", "flip", "json", "json"] if path.suffix != ".safetensors" else ["cut", "flip"])
    if way == "cut":
        content = content[: rnd.randrange(len(content))]
    elif way == "flip":
        for _ in range(rnd.choice([1, 20])):
            content[rnd.randrange(min(len(content), 3000))] = rnd.randrange(256)
    else:
        lines = (
            [json.loads(line) for line in content.split(b"\n") if line]
            if path.suffix == ".jsonl"
            else [json.loads(content)]
        )
        content = bytearray("\n".join(json.dumps(changed(line, rnd)) for line in lines).encode() + b"\n")
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_gives_a_page_or_one_clear_error(tmp_path, seed):
    rnd = random.Random(seed)
    name = rnd.choice(["run.json", "checks.jsonl", "alerts.jsonl", "rows-30.safetensors", "scan.safetensors"])
    source = make_scan(tmp_path / name) if name.startswith("scan") else make_run(tmp_path / "run")
    damage(source if source.is_file() else source / name, rnd)
    data, refused = None, ""
    try:
        data = read(source)
    except InputError as error:
        refused = str(error)
    if data is None:
        assert refused
        assert "\n" not in refused
        return
    render(data).encode("utf-8")
    json.dumps(as_json(data, Limits()), allow_nan=False)


def test_a_page_that_cannot_be_written_is_bad_input(tmp_path):
    run = make_run(tmp_path / "run")
    assert "does not exist" in str(call(run, "--out", tmp_path / "no" / "page.html").exception)
    assert "cannot be written" in str(call(run, "--out", run).exception)
