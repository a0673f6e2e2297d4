"""Ways to damage a file: bytes, trees of JSON, tensors. All are drawn from a generator with a seed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 2**63, 1e308, -0.5, 0.5, "", " ", "x", "x\ny", "\ud800", "\x00",
    "[bold]x[/bold]", "[/]", "~nobody/x", "(", "(a+)+$", "a" * 5000, [], [[]], [None], [1, 2, 3], {}, {"": ""},
    {"a": None}, {"0": -1}, "NaN", "1e999", "../../x", "/", "{{7*7}}", "<script>alert(1)</script>",
)  # fmt: skip
"""Values that stand for others in a tree of JSON."""


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree, as the keys that lead there; of a long list the first three and the last."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*at, key))
    elif isinstance(tree, list):
        chosen = range(len(tree)) if len(tree) < 5 else (0, 1, 2, len(tree) - 1)
        for index in chosen:
            yield from places(tree[index], (*at, index))


def with_value(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy of a tree with another value at a place."""
    if not at:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[at[0]] = with_value(copied[at[0]], at[1:], value)
    return copied


def without(tree: Any, at: tuple[Any, ...]) -> Any:
    """A copy of a tree without a place, which is not its root."""
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(at) == 1:
        del copied[at[0]]
    else:
        copied[at[0]] = without(copied[at[0]], at[1:])
    return copied


def bent(tree: Any, rng: Random) -> Any:
    """A tree with one to three places changed: another value, none, or a number of another size."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        # The shallow places are those that are read first.
        at = rng.choice([place for place in found if len(place) <= rng.choice((1, 2, 4, 9))])
        gone = at and rng.random() < 0.25
        tree = without(tree, at) if gone else with_value(tree, at, rng.choice(HOSTILE))
    return tree


def bend_json(path: Path, rng: Random) -> None:
    """Change a file that holds one JSON value."""
    tree = bent(json.loads(path.read_text(encoding="utf-8")), rng)
    path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))


def bend_lines(path: Path, rng: Random) -> None:
    """Change a file of JSON lines: one of them, their order, or how many there are."""
    lines = path.read_bytes().splitlines()
    if path.suffix == ".json":
        bend_json(path, rng)
        return
    if not lines:
        path.write_bytes(b"{}\n")
        return
    at = rng.randrange(len(lines))
    how = rng.randrange(5)
    if how < 3:
        lines[at] = json.dumps(bent(json.loads(lines[at]), rng)).encode("utf-8", "surrogatepass")
    elif how == 3:
        lines.insert(at, rng.choice((b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'"x"', b"[" * 3000)))
    else:
        del lines[at]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def bend_bytes(path: Path, rng: Random) -> None:
    """Cut a file, or change some of its bytes."""
    content = bytearray(path.read_bytes())
    how = rng.randrange(4)
    if how == 0 or not content:
        content = content[: rng.randrange(len(content) + 1)]
    elif how == 1:
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif how == 2:
        at = rng.randrange(len(content))
        content[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 100))))
    else:
        content = bytearray(rng.choice((b"", b"\x00", b"{", b"null", b"\xff" * 100, b"PK\x03\x04" + b"\x00" * 60)))
    path.write_bytes(bytes(content))


def bend_header(path: Path, rng: Random) -> None:
    """Change the header of a safetensors file as a tree, or its length."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.15:
        path.write_bytes(struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1))) + content[8:])
        return
    header = json.dumps(bent(json.loads(content[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "a number": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0),
    "no rows": lambda: torch.zeros(0, 16),
    "no width": lambda: torch.zeros(96, 0),
    "flat": lambda: torch.zeros(96),
    "few rows": lambda: torch.randn(5, 16),
    "more rows": lambda: torch.randn(120, 16),
    "narrow": lambda: torch.randn(96, 15),
    "cube": lambda: torch.zeros(2, 3, 4),
    "whole": lambda: torch.ones(96, 16, dtype=torch.int64),
    "flags": lambda: torch.ones(96, 16, dtype=torch.bool),
    "bytes": lambda: torch.ones(96, 16, dtype=torch.uint8),
    "eighths": lambda: torch.zeros(96, 16).to(torch.float8_e4m3fn),
    "half": lambda: torch.randn(96, 16).half(),
    "double": lambda: torch.randn(96, 16).double(),
    "not numbers": lambda: torch.full((96, 16), torch.nan),
    "infinite": lambda: torch.full((96, 16), torch.inf),
    "huge": lambda: torch.full((96, 16), 3e38),
    "tiny": lambda: torch.full((96, 16), 1e-45),
    "zeros": lambda: torch.zeros(96, 16),
    "negative counts": lambda: torch.full((96,), -5),
}
"""Tensors in the place of others."""


def bend_tensors(path: Path, rng: Random) -> None:
    """Change tensors of a safetensors file: another in their place, none, another name."""
    found, metadata = load_file(path), _metadata(path)
    for _ in range(rng.choice((1, 1, 2))):
        if not found:
            break
        name = rng.choice(sorted(found))
        how = rng.random()
        if how < 0.7:
            found[name] = TENSORS[rng.choice(sorted(TENSORS))]()
        elif how < 0.85:
            del found[name]
        else:
            found[rng.choice(("x", "", "a\nb", "lm_head.weight", f"{name}.weight", "[bold]"))] = found.pop(name)
    save_file(found, path, metadata=metadata)


def _metadata(path: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as opened:
        told: dict[str, str] | None = opened.metadata()
        return told


def bend_metadata(path: Path, rng: Random) -> None:
    """Change JSON inside the metadata of a file of ours."""
    found, metadata = load_file(path), dict(_metadata(path) or {})
    name = rng.choice(sorted(metadata)) if metadata else "x"
    try:
        metadata[name] = json.dumps(bent(json.loads(metadata.get(name, "0")), rng))
    except ValueError:
        metadata[name] = str(rng.choice(HOSTILE)).encode("utf-8", "replace").decode()
    save_file(found, path, metadata=metadata)


def bend_path(path: Path, rng: Random) -> None:
    """Put something else in a file's place."""
    path.unlink()
    how = rng.randrange(5)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.symlink_to(path.with_name("gone"))


CKPT: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(96, 16).to_sparse(),
    "compressed": lambda: torch.eye(96, 16).to_sparse_csr(),
    "meta": lambda: torch.empty(96, 16, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(96, 16), 0.1, 0, torch.qint8),
    "complex": lambda: torch.randn(96, 16, dtype=torch.complex64),
    "a view": lambda: torch.randn(192, 16)[::2],
    "turned": lambda: torch.randn(16, 96).T,
    "expanded": lambda: torch.randn(1, 16).expand(96, 16),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(96, 16)),
    "conjugate": lambda: torch.randn(96, 16, dtype=torch.complex64).conj(),
    "a list": lambda: [1, 2],
    "a text": lambda: "x",
    "none": lambda: None,
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)]),
    **TENSORS,
}
"""What a torch file may hold in the place of rows."""


def bend_torch(path: Path, rng: Random) -> None:
    """Change what a torch file holds."""
    whole = torch.load(path, weights_only=True)
    state = whole.get("state_dict", whole)
    names = [name for name in state if "embed" in name or "lm_head" in name]
    how = rng.random()
    if how < 0.8:
        state[rng.choice(names)] = CKPT[rng.choice(sorted(CKPT))]()
    elif how < 0.9:
        whole = rng.choice((state, {"state_dict": None}, {"state_dict": {}}, [state], {"state_dict": {1: 2}}, 3))
    else:
        state[rng.choice((1, None, "a\nb", ("x",)))] = state.pop(rng.choice(names))
    torch.save(whole, path)
