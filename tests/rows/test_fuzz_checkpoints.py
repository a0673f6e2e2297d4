"""Damaged input of many kinds: one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vocabguard.cli.app import main

Damage = Callable[[Path], Path]
"""Damages a folder with a sharded and a single model, an adapter and a ckpt; returns what to scan."""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vocabguard", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one tiny model, without a tokenizer."""
    folder = tmp_path_factory.mktemp("healthy")
    rows = {"lm_head.weight": torch.randn(24, 8), "model.embed_tokens.weight": torch.randn(24, 8)}
    for name in ("single", "sharded", "adapter"):
        (folder / name).mkdir()
    save_file(rows, folder / "single" / "model.safetensors")
    (folder / "single" / "config.json").write_text('{"tie_word_embeddings": false}')
    weight_map = {}
    for place, (key, value) in enumerate(rows.items()):
        save_file({key: value}, folder / "sharded" / f"m-{place}.safetensors")
        weight_map[key] = f"m-{place}.safetensors"
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    lora = {"lora_A.weight": torch.randn(2, 8), "lora_B.weight": torch.randn(24, 2)}
    save_file({f"base_model.model.lm_head.{key}": value for key, value in lora.items()},
              folder / "adapter" / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "peft_type": "LORA"}')
    torch.save({"state_dict": rows}, folder / "last.ckpt")
    return folder


def damages() -> Iterator[tuple[str, Damage]]:
    yield from _truncated()
    yield from _headers()
    yield from _json_garbage()
    yield from _wrong_content()
    yield from _wrong_paths()


def _truncated() -> Iterator[tuple[str, Damage]]:
    def cut(path: str, share: float) -> Damage:
        def do(folder: Path) -> Path:
            content = (folder / path).read_bytes()
            (folder / path).write_bytes(content[: int(len(content) * share)])
            return folder / (path if path.endswith(".ckpt") else Path(path).parent)

        return do

    shares = [n / 30 for n in range(30)]
    for path in (
        "single/model.safetensors",
        "sharded/m-0.safetensors",
        "adapter/adapter_model.safetensors",
        "last.ckpt",
    ):
        yield from ((f"cut {path} {share:.2f}", cut(path, share)) for share in shares)


def _headers() -> Iterator[tuple[str, Damage]]:
    def header(number: int) -> Damage:
        def do(folder: Path) -> Path:
            path = folder / "single" / "model.safetensors"
            path.write_bytes(struct.pack("<Q", number) + path.read_bytes()[8:])
            return path

        return do

    for number in (0, 1, 2**16, 2**31, 2**40, 2**62, 2**63 + 1, 2**64 - 1):
        yield f"header length {number}", header(number)

    def scramble(seed: int) -> Damage:
        def do(folder: Path) -> Path:
            path = folder / "single" / "model.safetensors"
            content = bytearray(path.read_bytes())
            length = struct.unpack("<Q", content[:8])[0]
            generator = random.Random(seed)
            for _ in range(20):
                content[8 + generator.randrange(length)] = generator.choice(b'\x00\xff{}[]"\\')
            path.write_bytes(content)
            return path

        return do

    yield from ((f"scrambled header {seed}", scramble(seed)) for seed in range(40))


def _json_garbage() -> Iterator[tuple[str, Damage]]:
    garbage = ["", "{", "[]", "null", "1", '"x"', "\x00", "{'a': 1}", "[" * 5000, '{"weight_map": 3}',
               '{"weight_map": {"lm_head.weight": 3}}', '{"weight_map": {"lm_head.weight": "gone.safetensors"}}',
               '{"weight_map": {"lm_head.weight": "../single/model.safetensors"}}', '{"weight_map": {}}',
               '{"weight_map": {"lm_head.weight": "m-1.safetensors"}}']  # fmt: skip

    def write(path: str, content: str) -> Damage:
        def do(folder: Path) -> Path:
            (folder / path).write_text(content)
            return (folder / path).parent

        return do

    for number, content in enumerate(garbage):
        yield f"index {number}", write("sharded/model.safetensors.index.json", content)
    for number, content in enumerate(garbage[:9]):
        yield f"config {number}", write("single/config.json", content)
        yield f"adapter config {number}", write("adapter/adapter_config.json", content)
    for number, alpha in enumerate(("null", '"x"', "true", "[1]")):
        yield f"lora_alpha {number}", write("adapter/adapter_config.json", f'{{"r": 2, "lora_alpha": {alpha}}}')
    for number, content in enumerate(("{", "[]", '{"version": 1}', "null")):
        yield f"tokenizer {number}", write("single/tokenizer.json", content)


def _wrong_content() -> Iterator[tuple[str, Damage]]:
    def tensors(path: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
        def do(folder: Path) -> Path:
            found = load_file(folder / path)
            change(found)
            save_file(found, folder / path)
            return (folder / path).parent

        return do

    head, lora = "lm_head.weight", "base_model.model.lm_head.lora_"
    for name, rows in {
        "narrow": torch.randn(24, 7), "flat": torch.randn(24), "cube": torch.randn(2, 3, 4),
        "whole": torch.ones(24, 8).int(),
        "no rows": torch.randn(0, 8), "no width": torch.randn(24, 0), "flags": torch.ones(24, 8).bool(),
        "a number": torch.tensor(1.0), "bytes": torch.ones(24, 8, dtype=torch.uint8),
    }.items():  # fmt: skip
        yield f"head: {name}", tensors("single/model.safetensors", lambda t, rows=rows: t.update({head: rows}))
    yield "nothing known", tensors("single/model.safetensors", lambda t: (t.clear(), t.update(x=torch.ones(2, 2))))
    yield "empty file of tensors", tensors("single/model.safetensors", lambda t: t.clear())
    for name, part in {
        "A": torch.randn(3, 8), "A ": torch.randn(2, 7), "A  ": torch.randn(2), "B": torch.randn(23, 2),
        "B ": torch.randn(24, 3),
    }.items():  # fmt: skip
        key = f"{lora}{name.strip()}.weight"
        yield (
            f"adapter: {name}",
            tensors("adapter/adapter_model.safetensors", lambda t, key=key, part=part: t.update({key: part})),
        )
    for name in ("A", "B"):
        yield (
            f"adapter without {name}",
            tensors("adapter/adapter_model.safetensors", lambda t, key=f"{lora}{name}.weight": t.pop(key)),
        )

    def replaced(content: Any) -> Damage:
        def do(folder: Path) -> Path:
            if isinstance(content, bytes):
                (folder / "last.ckpt").write_bytes(content)
            else:
                torch.save(content, folder / "last.ckpt")
            return folder / "last.ckpt"

        return do

    for number, content in enumerate(
        (b"", b"junk", b"PK\x03\x04" + b"\x00" * 50, pickle.dumps({"a": 1}), pickle.dumps(print), {"state_dict": 3},
         {"state_dict": {}}, {}, [1], 3, {"state_dict": {"lm_head.weight": [1, 2]}}, {"a": torch.ones(2)},
         {"state_dict": {"lm_head.weight": torch.ones(3)}}, torch.ones(3), {"code": Path("x")})
    ):  # fmt: skip
        yield f"ckpt {number}", replaced(content)


def _wrong_paths() -> Iterator[tuple[str, Damage]]:
    def gone(*paths: str, scan: str) -> Damage:
        def do(folder: Path) -> Path:
            for path in paths:
                (folder / path).unlink()
            return folder / scan

        return do

    yield "not there", gone(scan="nothing")
    yield "not there either", gone(scan="nothing.safetensors")
    yield "empty folder", gone("single/model.safetensors", "single/config.json", scan="single")
    yield "missing shard", gone("sharded/m-1.safetensors", scan="sharded")
    yield "adapter without tensors", gone("adapter/adapter_model.safetensors", scan="adapter")
    yield "a text file", gone(scan="single/config.json")
    yield "folder of folders", gone(scan=".")

    def folder_for_file(path: str) -> Damage:
        def do(folder: Path) -> Path:
            (folder / path).unlink()
            (folder / path).mkdir()
            return folder / path

        return do

    for path in ("single/model.safetensors", "last.ckpt"):
        yield f"folder named {path}", folder_for_file(path)


ALL = dict(damages())


def test_there_are_many() -> None:
    assert len(ALL) >= 200


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_damaged_input_is_one_line(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], side: str
) -> None:
    good, failures = healthy / "single", []
    for name, damage in ALL.items():
        folder = tmp_path / "work"
        shutil.copytree(healthy, folder)
        bad = damage(folder)
        code = run(monkeypatch, "scan", *((bad, good) if side == "base" else (good, bad)), "--json")
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        if code != 2 or len(lines) != 1 or not lines[0].startswith("vocabguard: ") or said.out:
            failures.append((name, code, said.err[-300:], said.out[:80]))
        shutil.rmtree(folder)
    assert failures == []


def test_healthy_ones_are_scanned(healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("single", "sharded", "last.ckpt"):
        assert run(monkeypatch, "scan", healthy / "single", healthy / name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["head"]["cosine_min"] == pytest.approx(1)
    assert run(monkeypatch, "scan", healthy / "single", healthy / "adapter", "--json") == 1
