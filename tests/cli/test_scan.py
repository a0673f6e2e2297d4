from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vocabguard.cli.app import main
from vocabguard.offline.scan_summary import load_scan

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vocabguard", "scan", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base with 200 head rows turned."""
    folder = tmp_path_factory.mktemp("pair") / "tuned"
    shutil.copytree(ASSETS, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][1000:1200] += torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_json_and_file(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "rows.safetensors"
    assert run(monkeypatch, ASSETS, tuned, "--json", "--out", out) == 1
    told = json.loads(capsys.readouterr().out)
    assert {"cosine_mean", "cosine_min", "residual_p01", "below_0.95", "below_0.90", "groups"} <= told["head"].keys()
    assert told["embedding"]["below_0.95"] == 0
    assert 0.02 < told["head"]["below_0.95"] < 0.03
    assert len(told["worst"]) == 20
    assert all(1000 <= token["id"] < 1200 for token in told["worst"])
    assert told["findings"] is True
    assert load_scan(out)[1] == told


def test_tables(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, ASSETS, tuned, "--threshold", "0.05", "--top", "3") == 0
    said = capsys.readouterr().out
    assert "8,014 live rows of the head are below cosine 0.95" in said
    for word in ("cyrillic", "input embedding", "worst live tokens", "L2 0 |", "every live row is where it was"):
        assert word in said


def test_numbers_are_whole_in_a_narrow_terminal(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    said = {}
    for columns in ("200", "70"):
        monkeypatch.setenv("COLUMNS", columns)
        run(monkeypatch, ASSETS, tuned, "--top", "3")
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        # Words may wrap, so the numbers at the end of the rows are looked at.
        said[columns] = [line[-5:] for line in lines if line and line[0] in ("all", "cyrillic", "latin")]
        said[columns] += [line[-4:] for line in lines if line and line[0].isdigit() and 1000 <= int(line[0]) < 1200]
    assert len(said["200"]) >= 6
    assert said["70"] == said["200"]


def test_a_tied_pair_has_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for name, moved in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        changed = rows.clone()
        changed[:8] += moved * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        save_file({"model.embed_tokens.weight": changed}, tmp_path / name / "model.safetensors")
    run(monkeypatch, tmp_path / "base", tmp_path / "tuned")
    said = capsys.readouterr().out
    assert "Tied in the base and the tuned" in said
    assert said.count("residual p01") == 1


def test_without_a_tokenizer(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    files = (ASSETS / "model.safetensors", tuned / "model.safetensors")
    assert run(monkeypatch, *files, "--json") == 1
    assert json.loads(capsys.readouterr().out)["head"]["groups"].keys() == {"other"}
    run(monkeypatch, *files, "--json", "--tokenizer", ASSETS)
    assert "ja" in json.loads(capsys.readouterr().out)["head"]["groups"]


def test_adapter_that_touches_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    assert run(monkeypatch, ASSETS, tmp_path) == 0
    assert "Not applicable: the adapter leaves the output rows as they are" in capsys.readouterr().out
    assert run(monkeypatch, ASSETS, tmp_path, "--json") == 0
    assert "leaves the output rows" in json.loads(capsys.readouterr().out)["head"]["not_applicable"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--coverage", "nothing"), "nothing: not found"),
        (("--coverage", "a", "--run", "b"), "one source of counts"),
        (("--run", "."), "is not a run folder"),
        (("--tokenizer", "."), "no tokenizer in this folder"),
        (("--head", "x"), "no tensor 'x' for --head"),
        (("--out", "no/where.safetensors"), "does not exist"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, ASSETS, ASSETS, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err
