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

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vocabguard", "explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "tuned"
    shutil.copytree(ASSETS, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3497] = torch.randn(128, generator=torch.Generator().manual_seed(0)) / 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_json(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, ASSETS, tuned, "3497", "5000", "--json") == 1
    lost, fine = json.loads(capsys.readouterr().out)["tokens"]
    assert (lost["id"], lost["kind"]) == (3497, "lost_in_head")
    assert (fine["id"], fine["kind"]) == (5000, "fine")
    assert run(monkeypatch, ASSETS, tuned, "5000", "--json") == 0
    capsys.readouterr()


def test_screen(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "c.json").write_text('{"data_target": {"3497": 2}}')
    assert run(monkeypatch, ASSETS, tuned, " A", "--coverage", tmp_path / "c.json") == 1
    said = capsys.readouterr().out
    for words in (
        "id 3497, latin",
        "lost in the head",
        "a target 2 times",
        "nearest then",
        "tuned, base output row back",
    ):
        assert words in said


def test_files_cannot_be_asked(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    files = (ASSETS / "model.safetensors", tuned / "model.safetensors")
    assert run(monkeypatch, *files, "3497") == 1
    assert "Not asked: there is no tokenizer to write prompts with." in capsys.readouterr().out
    assert run(monkeypatch, *files, "3497", "--tokenizer", ASSETS) == 1
    assert "has no config.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "said"), [("99999", "not one token"), ("two words here", "is not one token"), ("", "not one token")]
)
def test_bad_tokens(token: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, ASSETS, ASSETS, token) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0] or "allowed" in lines[0]
