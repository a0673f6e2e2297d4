from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Run = Callable[..., int]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def tuned(changed_assets: Any) -> Path:
    def change(head: Tensor) -> None:
        head[3497] = torch.randn(128, generator=torch.Generator().manual_seed(0)) / 4

    return changed_assets(change)


def test_json(tuned: Path, run: Run, capsys: Any) -> None:
    assert run("explain", ASSETS, tuned, "3497", "5000", "--json") == 1
    lost, fine = json.loads(capsys.readouterr().out)["tokens"]
    assert (lost["id"], lost["kind"]) == (3497, "lost_in_head")
    assert (fine["id"], fine["kind"]) == (5000, "fine")
    assert run("explain", ASSETS, tuned, "5000", "--json") == 0
    capsys.readouterr()


def test_screen(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    (tmp_path / "c.json").write_text('{"data_target": {"3497": 2}}')
    assert run("explain", ASSETS, tuned, " A", "--coverage", tmp_path / "c.json") == 1
    said = capsys.readouterr().out
    for words in (
        "id 3497, Latin",
        "lost in the head",
        "a target 2 times",
        "nearest then",
        "tuned, base output row back",
    ):
        assert words in said


def test_files_cannot_be_asked(tuned: Path, run: Run, capsys: Any) -> None:
    files = (ASSETS / "model.safetensors", tuned / "model.safetensors")
    assert run("explain", *files, "3497") == 1
    assert "Not probed: there is no tokenizer to write prompts with." in capsys.readouterr().out
    assert run("explain", *files, "3497", "--tokenizer", ASSETS) == 1
    assert "has no config.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "said"), [("99999", "not one token"), ("two words here", "is not one token"), ("", "not one token")]
)
def test_bad_tokens(token: str, said: str, run: Run, capsys: Any) -> None:
    assert run("explain", ASSETS, ASSETS, token) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0] or "allowed" in lines[0]
