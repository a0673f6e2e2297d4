"""The tensors of a checkpoint by name, from safetensors and torch files, and which of them hold vocabulary rows."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vocabguard.files import one_line, read_json, some
from vocabguard.results import MatrixName
from vocabguard.rows.baselines import CopiedBaseline, FileBaseline, check_rows, safetensors_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
COMMON_NAMES: dict[MatrixName, tuple[str, ...]] = {
    "head": ("lm_head.weight", "embed_out.weight", "output.weight", "cls.predictions.decoder.weight"),
    "embedding": (
        "model.embed_tokens.weight",
        "embed_tokens.weight",
        "transformer.wte.weight",
        "wte.weight",
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "shared.weight",
        "model.shared.weight",
        "gpt_neox.embed_in.weight",
        "model.decoder.embed_tokens.weight",
        "transformer.word_embeddings.weight",
        "backbone.embeddings.weight",
        "tok_embeddings.weight",
    ),
}
"""Names under which well-known models keep their rows."""

MATRICES: tuple[MatrixName, ...] = ("head", "embedding")

# Inside a prefix such a name is some layer's.
_COMMON_WORDS = ("output.weight", "wte.weight")

# Types of elements by their names in safetensors files; older builds of torch lack some.
_ELEMENTS = {
    name: found
    for name, kind in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if (found := getattr(torch, kind, None)) is not None
}  # fmt: skip


class TensorStore:
    """The tensors of a checkpoint, by name.

    Args:
        sources: of each the safetensors file that holds it, or what ``torch.load`` has mapped.
        path: of the checkpoint, for messages.
    """

    def __init__(self, sources: Mapping[str, Path | Tensor], path: Path) -> None:
        self._sources, self._path = dict(sources), path
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}

    @property
    def names(self) -> Collection[str]:
        """All of them."""
        return self._sources.keys()

    def rows(self, name: str) -> CopiedBaseline | FileBaseline:
        """One 2-D floating-point tensor, as rows.

        Raises:
            ValueError: if it is missing, not 2-D, empty or not of floats.
        """
        found = self._source(name)
        if isinstance(found, Path):
            return FileBaseline(found, name)
        what = f"{self._path}: tensor {name!r}"
        _require_memory(what, found)
        check_rows(what, tuple(found.shape), str(found.dtype), found.dtype.is_floating_point)
        return CopiedBaseline(found.detach(), f"{name} in {self._path} (memory map)")

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU.

        Raises:
            ValueError: if it is missing or cannot be read.
        """
        found = self._source(name)
        if isinstance(found, Tensor):
            _require_memory(f"{self._path}: tensor {name!r}", found)
            return found.detach()
        if name not in safetensors_names(found):
            raise ValueError(f"{found}: no tensor {name!r}; its index says it is there")
        with safe_open(str(found), framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and the type of the elements as torch calls it; as the file does where torch knows none such."""
        found = self._source(name)
        if isinstance(found, Tensor):
            return tuple(found.shape), str(found.dtype).removeprefix("torch.")
        entry = self._entry(found, name)[1]
        kind = _ELEMENTS.get(entry["dtype"])
        return tuple(entry["shape"]), str(entry["dtype"] if kind is None else kind).removeprefix("torch.")

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """A tensor's elements in order, at most so many at a time: 1-D, on the CPU, in its own dtype.

        A file is read, not mapped, so that no more than a piece is in memory.

        Raises:
            ValueError: if it is missing, or of a type or layout that cannot be read.
            OSError: if the file cannot be read.
        """
        found = self._source(name)
        if isinstance(found, Tensor):
            _require_memory(f"{self._path}: tensor {name!r}", found)
            yield from torch.split(found.detach().flatten(), size)
            return
        start, entry = self._entry(found, name)
        kind = _ELEMENTS.get(entry["dtype"])
        if kind is None:
            raise ValueError(f"{found}: tensor {name!r} is of {entry['dtype']}; allowed: {', '.join(_ELEMENTS)}")
        total, begin = math.prod(entry["shape"]), start + int(entry["data_offsets"][0])
        with found.open("rb") as file:
            file.seek(begin)
            for done in range(0, total, size):
                count = min(size, total - done)
                buffer = bytearray(count * kind.itemsize)
                if file.readinto(buffer) != len(buffer):
                    raise ValueError(f"{found}: ends inside tensor {name!r}")
                yield torch.frombuffer(buffer, dtype=kind)

    def sampled(self, name: str, places: int, size: int) -> bytes:
        """The bytes of a tensor at evenly spaced places, the first and the last among them; all of a small one's.

        Args:
            size: bytes at each place.

        Raises:
            ValueError: if it is missing or of a layout that cannot be read.
            OSError: if the file cannot be read.
        """
        found = self._source(name)
        if isinstance(found, Tensor):
            _require_memory(f"{self._path}: tensor {name!r}", found)
            whole = found.detach().contiguous().flatten().view(torch.uint8).numpy()
            return b"".join(whole[at : at + size].tobytes() for at in _places(len(whole), places, size))
        start, entry = self._entry(found, name)
        begin, end = (start + int(offset) for offset in entry["data_offsets"])
        parts = []
        with found.open("rb") as file:
            for at in _places(end - begin, places, size):
                file.seek(begin + at)
                parts.append(file.read(min(size, end - begin - at)))
        return b"".join(parts)

    def _entry(self, file: Path, name: str) -> tuple[int, dict[str, Any]]:
        """Where the file's data begins, and what its header says of a tensor; a header is parsed once."""
        if file not in self._headers:
            safetensors_names(file)  # refuses what is none
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                self._headers[file] = 8 + length, json.loads(opened.read(length))
        start, header = self._headers[file]
        if name not in header:
            raise ValueError(f"{file}: no tensor {name!r}; its index says it is there")
        return start, header[name]

    def _source(self, name: str) -> Path | Tensor:
        if name not in self._sources:
            raise ValueError(f"{self._path}: no tensor {name!r}; it holds {some(self.names)}")
        return self._sources[name]


def _places(total: int, places: int, size: int) -> list[int]:
    """Where to begin reading, without an overlap."""
    if total <= places * size:
        return list(range(0, total, size))
    return [(total - size) * place // (places - 1) for place in range(places)]


def open_store(path: Path) -> TensorStore:
    """The tensors of a model's folder or of a file.

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
        return TensorStore(dict.fromkeys(safetensors_names(path), path), path)
    if path.suffix in TORCH_SUFFIXES:
        return TensorStore(_state_dict(path), path)
    raise ValueError(f"{path}: a {path.suffix or 'nameless'} file; allowed: .safetensors, {', '.join(TORCH_SUFFIXES)}")


def open_adapter_store(folder: Path) -> TensorStore:
    """The tensors of a PEFT adapter.

    Raises:
        ValueError: if there are none, or damaged ones.
    """
    safe, pickled = (folder / name for name in ADAPTER_FILES)
    if safe.is_file():
        return TensorStore(dict.fromkeys(safetensors_names(safe), safe), safe)
    if pickled.is_file():
        return TensorStore(_tensors(load_torch_file(pickled)), pickled)
    raise ValueError(f"{folder}: {ADAPTER_CONFIG} without its tensors; expected {safe.name} or {pickled.name}")


def tensors_named(wanted: Sequence[str], names: Collection[str]) -> list[str]:
    """The tensor under the first of the wanted names that is there, else all under one with a prefix before it.

    Of prefixed names only the shallowest count.

    >>> tensors_named(["lm_head.weight"], ["model.lm_head.weight", "model.norm.weight"])
    ['model.lm_head.weight']
    """
    exact = [name for name in wanted if name in names]
    if exact:
        return exact[:1]
    endings = tuple(f".{name}" for name in wanted if name not in _COMMON_WORDS)
    found = [name for name in names if name.endswith(endings)]
    top = min((name.count(".") for name in found), default=0)
    return [name for name in found if name.count(".") == top]


def load_torch_file(path: Path) -> dict[str, Any]:
    """What ``torch.load`` gives for a file of tensors, mapped and without running code of it.

    Raises:
        ValueError: if it is missing, damaged, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'not found'}")
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling raises what it likes
        raise ValueError(f"{path}: torch.load(weights_only=True, mmap=True) fails ({one_line(error)})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}; allowed: a state dict")
    return loaded


def safetensors_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, of a model's folder.

    Raises:
        ValueError: for an index or a file that cannot be read.
    """
    index, single = folder / INDEX, folder / SINGLE
    return read_index(index) if index.is_file() else dict.fromkeys(safetensors_names(single), single)


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
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return TensorStore(safetensors_files(folder), folder)
    if (folder / _TORCH_INDEX).is_file():
        shards = sorted(set(read_index(folder / _TORCH_INDEX).values()))
        return TensorStore({key: value for shard in shards for key, value in _state_dict(shard).items()}, folder)
    if (folder / _TORCH_SINGLE).is_file():
        return TensorStore(_state_dict(folder / _TORCH_SINGLE), folder / _TORCH_SINGLE)
    raise ValueError(
        f"{folder}: no checkpoint in this folder; expected {SINGLE}, {INDEX}, {_TORCH_SINGLE}, {_TORCH_INDEX} or "
        f"{ADAPTER_CONFIG}"
    )


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: those under ``state_dict``, as Lightning has it, or all of them."""
    loaded = load_torch_file(path)
    inner = loaded.get("state_dict", loaded)
    tensors = _tensors(inner) if isinstance(inner, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: no tensors in it; it holds {some([str(key) for key in loaded])}")
    return tensors


def _require_memory(what: str, tensor: Tensor) -> None:
    """Refuse tensors whose rows do not lie in memory one after the other.

    Raises:
        ValueError: for one that is sparse, nested, or of no device.
    """
    layout = str(tensor.layout).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ValueError(f"{what} is {'nested' if tensor.is_nested else layout}; allowed: a dense tensor")
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on the device {tensor.device.type!r}, without values; allowed: one with values")


def _tensors(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
