"""A run folder says which tokenizer and which base it is about; two that are not about the same are told apart."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocabguard import RunLog, VocabGuard
from vocabguard.compare.evidence import evidence_of_run, unequal, weights_of
from vocabguard.data.coverage import vocabulary_hash
from vocabguard.report.compare import compare
from vocabguard.report.data import run_data
from vocabguard.report.many import side_by_side
from vocabguard.report.sentences import Limits
from vocabguard.rows.baselines import CopiedBaseline
from vocabguard.rows.checkpoints import open_checkpoint
from vocabguard.rows.fingerprint import SAMPLED, differ, fingerprint

Run = Callable[..., int]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture
def train(kit: Any, tmp_path: Path) -> Callable[..., RunLog]:
    """Two steps of the example's model under guard, with what `change` does to it first."""

    def make(
        name: str, change: Callable[[Any], object] = lambda model: None, words: Any = None, kind: Any = torch.float32
    ) -> RunLog:
        model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=kind)
        with torch.no_grad():
            change(model)
        words = AutoTokenizer.from_pretrained(ASSETS) if words is None else words
        guard = VocabGuard(tokenizer=words, probe={"enabled": False}, **kit.QUIET)
        guard.attach(model, kit.sgd(model), total_steps=2, run_dir=tmp_path / name)
        kit.loop(guard, model, kit.sgd(model), kit.batches(2))
        guard.finish()
        return RunLog.open(tmp_path / name)

    return make


def raise_first(model: Any) -> None:
    model.get_output_embeddings().weight[0] += 1


def test_a_run_says_what_it_is_about(train: Callable[..., RunLog], tmp_path: Path) -> None:
    told = train("run").meta["evidence"]
    words = AutoTokenizer.from_pretrained(ASSETS)
    assert told["tokenizer"]["vocabulary"] == vocabulary_hash(words)
    assert {"vocabguard", "torch", "transformers", "python"} <= told["versions"].keys()
    # The file of a scan has the same of its base, whatever type the model was trained in.
    before = {"base": weights_of(open_checkpoint(ASSETS))}
    for run in (told, train("rounded", kind=torch.bfloat16).meta["evidence"]):
        assert run["base"]["rows_sample"].keys() >= {"head"}
        assert unequal(run, before, "base") == ""
    other = train("other", raise_first).meta["evidence"]
    assert unequal(other, before, "base").startswith("another base (output rows ")
    page = " ".join(run_data(RunLog.open(tmp_path / "run")).about)
    assert told["tokenizer"]["vocabulary"] in page
    assert told["base"]["rows_sample"]["head"]["sha256"] in page


def test_runs_of_other_bases_are_not_compared_by_token(
    train: Callable[..., RunLog], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [run_data(train("a")), run_data(train("b")), run_data(train("c", raise_first))]
    assert compare(*shown[:2]).unmatched == ""
    assert "another base (output rows" in compare(shown[0], shown[2]).unmatched
    many = side_by_side(shown, Limits())
    assert many.unlike.startswith("c was measured with another base")
    assert [one.names for one in many.repeated] == [("a", "b")], "a run of another base is no repetition"
    for line in (("a", "c"), ("a", "b", "c")):
        assert run("report", *(tmp_path / name for name in line), "--out", tmp_path / "page.html") == 0
        assert "another base (output rows" in " ".join(capsys.readouterr().out.split())
        assert "another base (output rows" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_counts_of_a_run_go_with_its_own_tokenizer(
    train: Callable[..., RunLog], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train("run")
    tuned, other = tmp_path / "tuned", tmp_path / "other"
    shutil.copytree(ASSETS, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: one * 1.01 for name, one in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    line = ("--no-body", "--run", tmp_path / "run")
    capsys.readouterr()
    assert run("scan", ASSETS, tuned, *line) == 0
    assert capsys.readouterr().err == ""
    # Another model may still be scanned with these counts, with a word of it.
    assert run("scan", tuned, ASSETS, *line) == 0
    assert "is a run that began at another model" in capsys.readouterr().err
    shutil.copytree(ASSETS, other)
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["＠＠new"])
    words.save_pretrained(other)
    few = ("--sample", 8, "--text-tokens", 0)
    for asked in (("scan", other, other, *line), ("probe", other, *few, "--run", tmp_path / "run"),
                  ("repair", other, other, "--run", tmp_path / "run", "--out", tmp_path / "out")):  # fmt: skip
        assert run(*asked) == 2, asked
        assert "was counted with another tokenizer" in capsys.readouterr().err


def test_a_run_that_goes_on_with_another_base_is_told(
    train: Callable[..., RunLog], tmp_path: Path, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    words = AutoTokenizer.from_pretrained(ASSETS)
    other = copy.deepcopy(words)
    other.add_tokens(["＠＠new"])
    guards = []
    for name, mine in (("first", words), ("second", words), ("third", other)):
        model = AutoModelForCausalLM.from_pretrained(ASSETS)
        guard = VocabGuard(tokenizer=mine, probe={"enabled": False}, **kit.QUIET)
        saved = guards[0] if guards else None
        with caplog.at_level(logging.WARNING, "vocabguard"):
            caplog.clear()
            guard.attach(model, kit.sgd(model), run_dir=tmp_path / "run", resumed=saved)
        guards.append(guard.state_dict())
        guard.finish(check=False)
        assert ("another tokenizer" in caplog.text) == (name == "third"), caplog.text


def test_what_cannot_tell_refuses_nothing(train: Callable[..., RunLog], tmp_path: Path, run: Run) -> None:
    rows = torch.randn(200, 8)
    whole, longer = (fingerprint(CopiedBaseline(one)) for one in (rows, torch.cat([rows, rows[:1]])))
    assert whole["sampled"] == SAMPLED
    assert differ(whole, longer) is None, "rows were added"
    assert differ(whole, fingerprint(CopiedBaseline(rows.half()))) is None, "rounded otherwise"
    assert differ(whole, fingerprint(CopiedBaseline(rows.double()))) is False
    # A folder of an earlier version has no evidence, and a damaged one has anything.
    folder = train("run").folder
    told = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    whole = run_data(RunLog.open(folder))
    for evidence in (
        None, 3, {"base": 3, "tokenizer": []}, {"base": {"rows_sample": {"head": 1}}}, {"base": {"rows_sample": 3}},
        {"base": {"rows_sample": {"head": {"rows": 8192}}}, "tokenizer": {"vocabulary": 3}},
    ):  # fmt: skip
        (folder / "run.json").write_text(json.dumps(told | {"evidence": evidence}), encoding="utf-8")
        odd = run_data(RunLog.open(folder))
        compare(whole, odd)
        side_by_side([whole, odd, odd], Limits())
        assert run("scan", ASSETS, ASSETS, "--no-body", "--run", folder) == 0


class BytePieces:
    """A tokenizer whose pieces are bytes, as some of the hub's own code have them."""

    chat_template = None

    def get_vocab(self) -> dict[bytes, int]:
        return {b"a": 0}


def test_odd_tokenizers_and_large_matrices_delay_no_run(record_property: Callable[[str, object], None]) -> None:
    rows = CopiedBaseline(torch.zeros(49_152, 576))
    began = time.process_time()
    told = evidence_of_run({"head": rows}, BytePieces())
    spent = time.process_time() - began
    record_property("cpu_seconds", spent)
    assert "error" in told["tokenizer"]
    # A hash of all rows takes 0.1 s.
    assert spent < 0.05
