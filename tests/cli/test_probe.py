"""`vocabguard probe`: what it finds of damage that is known, what it says, what its file is good for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocabguard.compare.options import Bars
from vocabguard.compare.summary import load_scan
from vocabguard.compare.verdicts import probe_verdict

Run = Callable[..., int]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ZEROED = range(1000, 1800)
# What is asked in most tests: enough to tell a tenth of the vocabulary from nothing, in seconds.
FEW = ("--sample", "96", "--asks", "2", "--text-tokens", "0")


@pytest.fixture(scope="module")
def zeroed(changed_assets: Any) -> Path:
    """The embedded base without 800 of its output rows."""

    def change(head: Tensor) -> None:
        head[ZEROED.start : ZEROED.stop] = 0

    folder: Path = changed_assets(change)
    return folder


@pytest.fixture(scope="module")
def probed(zeroed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A probe's file and what it printed as JSON."""
    out = tmp_path_factory.mktemp("probe") / "lost.safetensors"
    told = told_by("probe", zeroed, ASSETS, *FEW, "--json", "--out", out)
    return out, told


def told_by(*arguments: object) -> dict[str, Any]:
    import contextlib
    import io
    import sys

    from vocabguard.cli.app import main

    out, before = io.StringIO(), sys.argv
    sys.argv = ["vocabguard", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = before
    told: dict[str, Any] = json.loads(out.getvalue())
    assert int(left.value.code or 0) == int(told["findings"])
    return told


def naive_said(folder: Path, plan: dict[str, Any], ids: list[int]) -> dict[int, int]:
    """In how many asks a model gets each token: one prompt at a time, all logits, no code of the package."""
    import zlib

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = dict.fromkeys(ids, 0)
    for context in plan["contexts"]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{plan['seed']}/{context['name']}".encode()))
        order, k = torch.randperm(len(ids), generator=generator).tolist(), context["k"]
        assert context["shots"] is None
        padded = order + order[: -len(order) % k]
        seen: set[int] = set()
        for at in range(0, len(padded), k):
            tokens = [ids[place] for place in padded[at : at + k]]
            prompt = [*context["before"], *tokens]
            for between in context["between"]:
                prompt += [*between, *tokens]
            prompt += context["after"]
            start = len(prompt)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0]
            for place, token in enumerate(tokens):
                if token not in seen:
                    right[token] += int(logits[start + place - 1].argmax()) == token
                seen.add(token)
    return right


def test_what_is_lost_is_what_a_naive_probe_says(zeroed: Path, probed: tuple[Path, dict[str, Any]]) -> None:
    out, told = probed
    vectors, summary, _ = load_scan(out)
    plan, ids = summary["probe"]["plan"], vectors["probe/ids"].tolist()
    before, now = naive_said(ASSETS, plan, ids), naive_said(zeroed, plan, ids)
    lost = {token for token in ids if before[token] == 2 and now[token] == 0}
    assert {token for token in range(8192) if vectors["lost"][token]} == lost
    assert told["lost_count"] == len(lost) >= 4
    assert set(told["lost"][0]) >= {"id", "text", "group", "probability", "probability_at_base", "instead"}
    assert lost >= {token for token in ids if token in ZEROED and before[token] == 2}
    known = [token for token in ids if before[token] == 2]
    weights = dict(zip(ids, vectors["probe/weights"].tolist(), strict=True))
    share = sum(weights[token] for token in lost) / sum(weights[token] for token in known)
    assert told["numbers"]["lost"] == pytest.approx(share)


def test_the_verdict_holds_the_truth(probed: tuple[Path, dict[str, Any]]) -> None:
    told = probed[1]
    truth = 800 / 8014
    low, high = 1 - told["numbers"]["retained_high"], 1 - told["numbers"]["retained_low"]
    assert low < truth < high
    assert told["verdict"]["level"] == "lost"
    assert "96 sampled of 8,014 live tokens" in told["verdict"]["sentence"]
    assert any("were not sampled" in one for one in told["verdict"]["not_measured"])
    # Of two asks the base's own noise is known.
    assert not any("--asks 2" in one for one in told["verdict"]["not_measured"])
    assert told["findings"] is True
    assert told["where"]["head"] == told["where"]["forgotten"]
    assert told["outright"]["count"] == told["lost_count"]
    assert told["outright"]["by_chance"] < 0.01


def test_an_untouched_copy_is_fine(tmp_path: Path) -> None:
    shutil.copytree(ASSETS, tmp_path / "copy")
    told = told_by("probe", tmp_path / "copy", ASSETS, *FEW, "--json")
    assert (told["verdict"]["level"], told["findings"], told["lost_count"]) == ("fine", False, 0)
    assert told["verdict"]["sentence"].startswith("No loss found: all ")
    assert "could be lost unseen" in told["verdict"]["sentence"]


def test_a_damaged_layer_is_never_fine(tmp_path: Path, run: Run, capsys: Any) -> None:
    shutil.copytree(ASSETS, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight")]
    tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)) * tensors[name].std()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    told = told_by("scan", ASSETS, tmp_path / "tuned", "--probe", "--sample", "64", "--json")
    assert told["probe"]["verdict"]["level"] in ("lost", "harder")
    assert told["probe"]["reference"]["nll_rise_low"] > 0.1
    assert told["findings"] is True
    assert told["head"]["below_0.95"] == 0
    assert run("scan", ASSETS, tmp_path / "tuned") == 0
    said = capsys.readouterr().out
    assert "body: block 0 changed by" in said
    assert "Not measured: what the model can say: --probe asks it." in said
    assert run("scan", ASSETS, tmp_path / "tuned", "--no-body") == 0
    assert "Not measured: the body: --no-body was given; what the model can say" in capsys.readouterr().out


def test_without_a_base(zeroed: Path, run: Run, capsys: Any) -> None:
    assert run("probe", zeroed, *FEW) == 0
    said = capsys.readouterr().out
    assert said.startswith("Without a base model a loss cannot be measured. The model repeats ")
    assert "not repeated" in said
    told = told_by("probe", zeroed, *FEW, "--json", "--threshold", "0.02")
    assert told["verdict"]["level"] == "unsaid"
    assert told["numbers"]["repeated_high"] < 0.98
    assert "lost" not in told
    told = told_by("probe", ASSETS, *FEW, "--json", "--threshold", "0.5")
    assert (told["verdict"]["level"], told["findings"]) == ("unknown", False)


def test_watched_words(zeroed: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(ASSETS)
    gone, kept = words.decode([1161]), "the"
    (tmp_path / "words.txt").write_text(f"{gone}\n\n{kept}\n", encoding="utf-8")
    told = told_by("probe", zeroed, ASSETS, *FEW, "--json", "--watch", tmp_path / "words.txt")
    assert [(word["text"], word["known"], word["lost"]) for word in told["words"]] == [
        (gone, True, True),
        (kept, True, False),
    ]
    assert any(one.startswith("1 of 2 watched words") for one in told["verdict"]["findings"])


def test_of_a_single_ask_the_noise_is_said_to_be_unknown(zeroed: Path, run: Run, capsys: Any) -> None:
    run("probe", zeroed, ASSETS, "--sample", "24", "--asks", "1", "--text-tokens", "0", "--json")
    missing = json.loads(capsys.readouterr().out)["verdict"]["not_measured"]
    assert any("asked again, which takes --asks 2" in one for one in missing)


def test_the_same_command_makes_the_same_bytes(zeroed: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    (tmp_path / "lines.txt").write_text("the data\nand the rest\n", encoding="utf-8")
    lines = {
        "probe": (zeroed, ASSETS, "--sample", "24", "--asks", "1", "--text-tokens", "64"),
        "scan": (ASSETS, zeroed),
        "coverage": (ASSETS, tmp_path / "lines.txt"),
    }
    for command, line in lines.items():
        files = [tmp_path / f"{command}-{number}.safetensors" for number in range(2)]
        for file in files:
            run(command, *line, "--out", file)
        hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        assert len(hashes) == 1, command
    capsys.readouterr()


def test_evidence(probed: tuple[Path, dict[str, Any]], zeroed: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    evidence = load_scan(probed[0])[1]["evidence"]
    rows = load_file(zeroed / "model.safetensors")["lm_head.weight"]
    assert evidence["tuned"]["rows_sha256"]["head"] == hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert evidence["base"]["sha256"] != evidence["tuned"]["sha256"]
    assert evidence["base"]["rows_sha256"]["embedding"] == evidence["tuned"]["rows_sha256"]["embedding"]
    assert {"vocabguard", "torch", "transformers", "python"} <= evidence["versions"].keys()
    assert evidence["arguments"]["sample"] == 96
    assert evidence["arguments"]["seed"] == 0
    assert run("report", probed[0], "--out", tmp_path / "page.html") == 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert evidence["tuned"]["sha256"] in page
    assert evidence["tokenizer"]["vocabulary"] in page
    capsys.readouterr()


def test_the_file_goes_into_echo_replay_and_report(
    probed: tuple[Path, dict[str, Any]], tmp_path: Path, run: Run, capsys: Any
) -> None:
    out, told = probed
    lost = {int(token) for token in load_scan(out)[0]["lost"].nonzero().flatten()}
    assert run("echo", ASSETS, "--needs", out, "--ids", tmp_path / "echo.jsonl", "--targets", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "echo.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {token for row in rows for token in row["labels"] if token >= 0} - {1} == lost
    words = AutoTokenizer.from_pretrained(ASSETS)
    texts = [words.decode([token]) for token in sorted(lost)] + ["the data", "and the rest"]
    (tmp_path / "corpus.txt").write_text("\n".join(text for text in texts if text.strip()), encoding="utf-8")
    capsys.readouterr()
    assert run("replay", tmp_path / "corpus.txt", "--tokenizer", ASSETS, "--needs", out, "--targets", "1", "--out",
               tmp_path / "rows.txt", "--json") == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["needed"] == len(lost)
    assert "the rest" not in (tmp_path / "rows.txt").read_text(encoding="utf-8")
    assert run("report", out, "--json") == 1
    shown = json.loads(capsys.readouterr().out)["sources"][0]
    assert (shown["kind"], shown["level"]) == ("probe", "lost")
    assert told["verdict"]["sentence"] in shown["verdict"]


def test_an_earlier_probe_is_a_base(zeroed: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    before = tmp_path / "before.safetensors"
    assert run("probe", ASSETS, *FEW, "--out", before) == 0
    told, direct = (told_by("probe", zeroed, base, *more, "--json") for base, more in ((before, ()), (ASSETS, FEW)))
    for key in ("lost", "lost_count", "numbers", "groups", "outright"):
        assert told[key] == direct[key], key
    capsys.readouterr()
    assert run("probe", zeroed, before, "--sample", "12") == 2
    assert "fixes what is asked" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_alone_and_against_an_earlier_probe(tmp_path: Path, run: Run, capsys: Any) -> None:
    """Its own configuration says where its base is; asked alone, and with the answers of its base in a file."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(ASSETS), config)
    model.peft_config["default"].base_model_name_or_path = str(ASSETS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(2.0)
    model.save_pretrained(tmp_path / "adapter")
    few, base = ("--sample", 64, "--text-tokens", 256), tmp_path / "base.safetensors"
    assert run("probe", ASSETS, *few, "--out", base) == 0
    assert run("probe", tmp_path / "adapter", *few, "--json") == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run("probe", tmp_path / "adapter", base, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"]["level"] == "lost"
    assert told["numbers"]["lost"] > 0.5 > alone["numbers"]["repeated"]
    config.base_model_name_or_path = str(tmp_path / "nowhere")
    config.save_pretrained(tmp_path / "adapter")
    assert run("probe", tmp_path / "adapter", *few) == 2
    assert "is not on this machine" in capsys.readouterr().err


def test_a_loss_that_noise_may_explain_is_not_called_fine() -> None:
    """Ten of nineteen lost, where asking again would lose as many: neither a finding nor fine."""
    numbers = {"asked": 93, "known": 19, "lost": 0.53, "retained_low": 0.23, "retained_high": 0.73,
               "tokens_retained_high": 1.0, "retained": 0.47, "noise": 0.29}  # fmt: skip
    told = {"asked": {"tokens": 93, "live": 93, "whole": True}, "numbers": numbers, "groups": {}, "words": [],
            "outright": {"known": 19, "count": 0, "low": 0.0, "by_chance": None}, "lost_count": 10, "gained_count": 0,
            "reference": {}}  # fmt: skip
    found = probe_verdict(told, Bars(0.02))
    assert (found["level"], found["findings"]) == ("unknown", [])
    assert "not enough evidence of more than noise" in found["sentence"]
    assert probe_verdict(told | {"numbers": numbers | {"retained_high": 0.99}}, Bars(0.02))["level"] != "lost"
    sure = told | {"numbers": numbers | {"tokens_retained_high": 0.73}}
    assert probe_verdict(sure, Bars(0.02))["level"] == "lost"


def test_other_sources_are_refused(probed: tuple[Path, dict[str, Any]], tmp_path: Path, run: Run, capsys: Any) -> None:
    """Files about another tokenizer go with nothing of this one."""
    other = tmp_path / "other"
    shutil.copytree(ASSETS, other)
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["＠＠new"])
    words.save_pretrained(other)
    (tmp_path / "lines.txt").write_text("the data\n", encoding="utf-8")
    run("coverage", other, tmp_path / "lines.txt", "--out", tmp_path / "counts.safetensors")
    for line in (
        ("probe", other, probed[0]), ("echo", other, "--needs", probed[0], "--ids", tmp_path / "e.jsonl"),
        ("replay", tmp_path / "lines.txt", "--tokenizer", other, "--needs", probed[0], "--out", tmp_path / "r.txt"),
        ("scan", ASSETS, ASSETS, "--coverage", tmp_path / "counts.safetensors"),
    ):  # fmt: skip
        capsys.readouterr()
        assert run(*line) == 2, line
        said = capsys.readouterr().err
        assert "another tokenizer" in said
        assert len(said.strip().splitlines()) == 1


def test_added_tokens_do_not_hinder(zeroed: Path, tmp_path: Path) -> None:
    """A tuned model with more tokens at its end is asked in the base's words for what both have."""
    folder = tmp_path / "grown"
    model, words = AutoModelForCausalLM.from_pretrained(zeroed), AutoTokenizer.from_pretrained(zeroed)
    words.add_tokens([f"＠＠{number}" for number in range(40)])
    model.resize_token_embeddings(8256)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    told = told_by("probe", folder, ASSETS, *FEW, "--json")
    assert told["asked"]["live"] == 8014
    assert told["verdict"]["level"] == "lost"


def test_with_counts(zeroed: Path, tmp_path: Path) -> None:
    counts = {"data_target": {str(token): 20 if token < 4000 else 0 for token in range(8, 8160)}}
    (tmp_path / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    told = told_by(
        "probe", zeroed, ASSETS, "--sample", "96", "--asks", "2", "--coverage", tmp_path / "counts.json", "--json"
    )
    assert told["classes"].keys() == {"never", "1-4", "5-19", "20+"}
    assert told["classes"]["never"]["known"] + told["classes"]["20+"]["known"] == told["numbers"]["known"]
    assert 0 < told["numbers"]["skill"] <= 1
    assert told["reference"]["never/targets"] > told["reference"]["1-4/targets"] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("nothing",), "nothing: not found"),
        ((ASSETS, "nothing"), "nothing: not found"),
        ((ASSETS, "--device", "cuda:99"), "--device is 'cuda:99'; allowed here: cpu"),
        ((ASSETS, "--dtype", "float3"), "--dtype is 'float3'; allowed: auto"),
        ((ASSETS, "--device-map", "x"), "--device-map is 'x'; allowed: auto"),
        ((ASSETS, "--device", "cpu", "--device-map", "auto"), "allowed: one of them"),
        ((ASSETS, "--watch", "none.txt"), "--watch none.txt: cannot be read"),
        ((ASSETS, "--texts", "none.txt"), "--texts none.txt: not found"),
        ((ASSETS, "--out", "no/where.safetensors"), "does not exist"),
        ((ASSETS, "--sample", "99999999999"), "--sample is 99999999999; allowed: at most"),
        ((ASSETS / "model.safetensors", "--tokenizer", ASSETS), "no config.json"),
        ((ASSETS / "model.safetensors",), "needs a tokenizer"),
        ((ASSETS, "--out", ASSETS / "model.safetensors"), "is read here, and would be lost"),
    ],
)
def test_bad_options(
    line: tuple[object, ...], said: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("probe", *line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err


def test_a_zeroed_row_is_not_where_it_was(zeroed: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    """Such rows have no cosine, so that no share counts them."""
    assert run("scan", ASSETS, zeroed) == 1
    said = capsys.readouterr().out
    assert "800 live output rows are zero now and were not at the base" in said
    assert run("scan", ASSETS, zeroed, "--out", tmp_path / "s.safetensors", "--json") == 1
    capsys.readouterr()
    assert run("report", tmp_path / "s.safetensors", "--json") == 1
    assert "800 live rows are zero now" in json.loads(capsys.readouterr().out)["sources"][0]["verdict"]
    assert run("repair", ASSETS, zeroed, "--out", tmp_path / "repaired", "--no-ask") == 0
    again, base = (
        load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (tmp_path / "repaired", ASSETS)
    )
    assert torch.equal(again, base)
