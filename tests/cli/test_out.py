"""What commands write: a regular file, a link's target, and nothing that they read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A small model as a file and as a folder, data, and a scan to report."""
    rows = {"lm_head.weight": torch.randn(24, 8), "model.embed_tokens.weight": torch.randn(24, 8)}
    (tmp_path / "model").mkdir()
    for file in ("model/model.safetensors", "model.safetensors"):
        save_file(rows, tmp_path / file)
    (tmp_path / "data.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 3, encoding="utf-8")
    return tmp_path


def arguments(places: Path, command: str, out: Path) -> list[Any]:
    """A command that writes to `out`."""
    return {
        "scan": ["scan", places / "model.safetensors", places / "model", "--out", out],
        "coverage": ["coverage", ASSETS, places / "data.jsonl", "--out", out],
        "replay": ["replay", places / "data.jsonl", "--tokenizer", ASSETS, "--out", out, "--targets", "1"],
        "echo": ["echo", ASSETS, "--ids", out, "--targets", "1"],
        "report": ["report", places / "scan.safetensors", "--out", out],
    }[command]


COMMANDS = ["scan", "coverage", "replay", "echo", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_where_a_command_writes(
    places: Path, run: Callable[..., int], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        assert run(*arguments(places, "scan", places / "scan.safetensors")) == 0
    fifo, folder, kept, link = places / "fifo.jsonl", places / "folder.jsonl", places / "kept.jsonl", places / "l.jsonl"
    os.mkfifo(fifo)
    folder.mkdir()
    for out, said in {
        fifo: "is a FIFO", folder: "is a folder", places / "gone" / "new.jsonl": "does not exist",
        places / ("n" * 300 + ".jsonl"): "cannot be written",
    }.items():  # fmt: skip
        capsys.readouterr()
        assert run(*arguments(places, command, out)) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
    assert fifo.is_fifo()
    assert [*folder.iterdir()] == []
    kept.write_text("before", encoding="utf-8")
    link.symlink_to(kept)
    assert run(*arguments(places, command, link)) == 0
    assert link.is_symlink()
    assert kept.read_bytes() != b"before"
    (places / "loop.jsonl").symlink_to(places / "loop.jsonl")
    assert run(*arguments(places, command, places / "loop.jsonl")) == 2
    assert not [*places.rglob("*.tmp")]


@pytest.mark.parametrize(
    ("command", "read"),
    [
        ("scan", "model.safetensors"), ("scan", "model/model.safetensors"), ("coverage", "data.jsonl"),
        ("replay", "data.jsonl"), ("report", "scan.safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("linked", [False, True])
def test_what_a_command_reads_is_not_written_over(
    places: Path, run: Callable[..., int], command: str, read: str, linked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        assert run(*arguments(places, "scan", places / "scan.safetensors")) == 0
    before, out = (places / read).read_bytes(), places / read
    if linked:
        out = places / "link.jsonl"
        out.symlink_to(places / read)
    capsys.readouterr()
    assert run(*arguments(places, command, out)) == 2
    assert "is read here, and would be lost" in capsys.readouterr().err
    assert (places / read).read_bytes() == before


def test_a_scan_may_be_written_again_beside_the_model(places: Path, run: Callable[..., int]) -> None:
    for _ in range(2):
        assert run(*arguments(places, "scan", places / "model" / "scan.safetensors")) == 0
