"""A checkpoint's vocabulary rows, found by name without building its model.

| what | read |
|---|---|
| a folder with ``model.safetensors``, or its shards and their index | by memory map |
| one ``.safetensors`` file | by memory map |
| a folder with ``pytorch_model.bin`` or its shards; ``.bin``, ``.pt``, ``.pth``, Lightning's ``.ckpt`` | ``torch.load`` with ``weights_only`` and ``mmap`` |
| a PEFT adapter's folder | its rows on those of the base: see `vocabguard.offline.adapter` |
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vocabguard.offline.tensors import (
    LoadedStore,
    SafetensorsStore,
    TensorStore,
    load_torch_file,
    one_line,
    safetensors_names,
    some,
)
from vocabguard.results import MatrixName, NotApplicable
from vocabguard.snapshot import COMMON_NAMES, Baseline

ADAPTER_CONFIG = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_TORCH_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """The vocabulary rows of one checkpoint.

    Attributes:
        path: where it lies.
        head: the output rows, or why there are none.
        embedding: the input rows, or why there are none.
        keys: the tensors' names, as far as there are tensors of their own.
        tied: whether the checkpoint has no head, so that the embedding serves as one.
    """

    path: Path
    head: Baseline | NotApplicable
    embedding: Baseline | NotApplicable
    keys: Mapping[MatrixName, str]
    tied: bool

    def matrix(self, name: MatrixName) -> Baseline | NotApplicable:
        """``head`` or ``embedding``."""
        return self.head if name == "head" else self.embedding

    @property
    def rows(self) -> int:
        """V: the most rows that one of them has; 0 where there is neither."""
        return max((m.rows for m in (self.head, self.embedding) if not isinstance(m, NotApplicable)), default=0)


def open_checkpoint(
    path: str | Path, *, keys: Mapping[MatrixName, str] | None = None, base: Checkpoint | None = None
) -> Checkpoint:
    """Find the vocabulary rows of a checkpoint.

    A checkpoint without a head's tensor is a tied one, unless its ``config.json`` says otherwise.

    Args:
        path: a folder or a file; see the module.
        keys: names of the tensors where they are not the well-known ones.
        base: what an adapter sits on; other checkpoints do not need it.

    Raises:
        ValueError: for a path that holds no checkpoint, a damaged one, or one without vocabulary rows.
    """
    path = Path(path).expanduser().resolve()
    if (path / ADAPTER_CONFIG).is_file():
        from vocabguard.offline.adapter import open_adapter

        if base is None:
            raise ValueError(f"{path} is an adapter, not a model; allowed here: a model's folder or file")
        return open_adapter(path, base)
    store, config = open_store(path), read_config(path)
    found = {name: _key(name, store.names, (keys or {}).get(name), path) for name in COMMON_NAMES}
    embedding_key, head_key = found["embedding"], found["head"]
    if embedding_key is None and head_key is None:
        raise ValueError(
            f"{path}: no tensor of output or input rows under a well-known name; it holds {some(store.names)}; "
            "name them with --head and --embedding"
        )
    embedding = _rows(store, embedding_key, "input")
    tied = head_key is None and not isinstance(embedding, NotApplicable) and config.get("tie_word_embeddings", True)
    return Checkpoint(
        path=path,
        head=embedding if tied else _rows(store, head_key, "output"),
        embedding=embedding,
        keys={name: key for name, key in found.items() if key is not None},
        tied=tied,
    )


def open_store(path: Path) -> TensorStore:
    """The tensors of a folder or a file.

    Args:
        path: absolute.

    Raises:
        ValueError: if it holds no checkpoint, or a damaged one.
    """
    if path.is_dir():
        return _folder_store(path)
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    if path.suffix == ".safetensors":
        return SafetensorsStore(dict.fromkeys(safetensors_names(path), path))
    if path.suffix in _TORCH_SUFFIXES:
        return LoadedStore(_state_dict(path), path)
    raise ValueError(f"{path}: a {path.suffix or 'nameless'} file; allowed: .safetensors, {', '.join(_TORCH_SUFFIXES)}")


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder with that of its text model laid over it; empty where there is none.

    Raises:
        ValueError: if it is no JSON object.
    """
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file is not one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}; expected a JSON object")
    return found


def read_index(file: Path) -> dict[str, Path]:
    """Tensor name -> shard, of an index that transformers wrote.

    Raises:
        ValueError: if it is none, or a shard lies elsewhere or is missing.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{file}: no 'weight_map' of tensor names to file names in it")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(
                f"{file}: shard {shard!r} lies in another folder; allowed: names of files beside the index"
            )
        if not (file.parent / shard).is_file():
            raise ValueError(f"{file}: shard {shard!r} is missing")
    return {key: file.parent / shard for key, shard in weight_map.items()}


def _folder_store(folder: Path) -> TensorStore:
    if (folder / INDEX).is_file():
        return SafetensorsStore(read_index(folder / INDEX))
    if (folder / SINGLE).is_file():
        return SafetensorsStore(dict.fromkeys(safetensors_names(folder / SINGLE), folder / SINGLE))
    if (folder / _TORCH_INDEX).is_file():
        shards = sorted(set(read_index(folder / _TORCH_INDEX).values()))
        return LoadedStore({key: value for shard in shards for key, value in _state_dict(shard).items()}, folder)
    if (folder / _TORCH_SINGLE).is_file():
        return LoadedStore(_state_dict(folder / _TORCH_SINGLE), folder / _TORCH_SINGLE)
    raise ValueError(
        f"{folder}: no checkpoint in this folder; expected {SINGLE}, {INDEX}, {_TORCH_SINGLE}, {_TORCH_INDEX} or "
        f"{ADAPTER_CONFIG}"
    )


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: those under ``state_dict``, as Lightning has it, or all of them."""
    loaded = load_torch_file(path)
    inner = loaded.get("state_dict", loaded)
    tensors = (
        {key: value for key, value in inner.items() if isinstance(value, Tensor)} if isinstance(inner, dict) else {}
    )
    if not tensors:
        raise ValueError(f"{path}: no tensors in it; it holds {some([str(key) for key in loaded])}")
    return tensors


def _rows(store: TensorStore, key: str | None, kind: str) -> Baseline | NotApplicable:
    return NotApplicable(f"the checkpoint has no {kind} rows") if key is None else store.rows(key)


def _key(name: MatrixName, keys: Collection[str], asked: str | None, path: Path) -> str | None:
    """The matrix's tensor: as asked, under a well-known name, or under one with a wrapper's prefix before it."""
    if asked is not None:
        if asked not in keys:
            raise ValueError(f"{path}: no tensor {asked!r} for --{name}; it holds {some(keys)}")
        return asked
    known = COMMON_NAMES[name]
    exact = next((key for key in known if key in keys), None)
    if exact is not None:
        return exact
    # Without the names that are common words: inside a prefix they are some layer's.
    endings = tuple(f".{key}" for key in known if key not in ("output.weight", "wte.weight"))
    found = [key for key in keys if key.endswith(endings)]
    top = min((key.count(".") for key in found), default=0)
    shallowest = [key for key in found if key.count(".") == top]
    if len(shallowest) > 1:
        raise ValueError(f"{path}: several tensors may be the {name}: {some(shallowest)}; name one with --{name}")
    return shallowest[0] if shallowest else None
