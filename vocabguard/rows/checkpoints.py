"""Tensors of a checkpoint as rows that are read by memory map, and let go of behind the reader."""

from __future__ import annotations

import json
import math
import mmap
import re
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.files import one_line, read_json, some
from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.baselines import COMMON_NAMES, Baseline, CopiedBaseline

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes that a thread may leave mapped behind it when it asks for the next block.
_KEPT_MAPPED = 2**20
# Elements of a block whose float32 buffer stays in the cache.
_BLOCK = 2**17
_MOST_THREADS = 4


@dataclass
class _Behind:
    """What a thread has read and may still have mapped."""

    parts: list[slice] = field(default_factory=list)
    rows: int = 0


class MappedRows:
    """One tensor of a safetensors file; pages that have been read are unmapped again, so that memory stays small.

    It is a `vocabguard.rows.baselines.Baseline`, as `FileBaseline` is; that one keeps what it has read mapped.

    Args:
        path: the file.
        key: the tensor's name in it.

    Raises:
        ValueError: for a file that cannot be read, or a tensor that is missing, not 2-D, empty or not of floats.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        names = safetensors_names(path)
        if key not in names:
            raise ValueError(f"{path}: no tensor {key!r}; it holds {some(names)}")
        start, entry = _header(path)
        shape, dtype = tuple(entry[key]["shape"]), entry[key]["dtype"]
        check_rows(f"{path}: tensor {key!r}", shape, dtype, dtype in _FLOATS)
        self.rows, self.width = shape
        self.dtype = _FLOATS[dtype]
        self._row_bytes = self.width * self.dtype.itemsize
        self._offset = start + int(entry[key]["data_offsets"][0])
        with path.open("rb") as file:
            # A private mapping: torch asks for a writable buffer, the file itself cannot be written to through it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._behind: defaultdict[int, _Behind] = defaultdict(_Behind)  # by thread

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, in the file's dtype, valid as long as these rows. Not to be written to.

        Args:
            part: with a start and a stop, and no step.
        """
        count = max(0, min(part.stop, self.rows) - part.start)
        if count == 0:
            return torch.empty(0, self.width, dtype=self.dtype)
        behind = self._behind[threading.get_ident()]
        if behind.rows * self._row_bytes >= _KEPT_MAPPED:
            self._let_go(behind)
        behind.parts.append(part)
        behind.rows += part.stop - part.start
        first = self._offset + part.start * self._row_bytes
        flat = torch.frombuffer(self._map, dtype=self.dtype, count=count * self.width, offset=first)
        return flat.view(count, self.width)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time: the rows' slice and `chunk` of it."""
        return slices_of(self, size)

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        return f"{self.key} in {self.path} (memory map)"

    def reference(self) -> dict[str, str]:
        """Path and tensor, for people; `vocabguard.rows.baselines.reopen_baseline` wants a `FileBaseline`'s."""
        return {"kind": "file", "path": str(self.path), "key": self.key}

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms, computed at first use."""
        return norms_of(self)

    def _let_go(self, behind: _Behind) -> None:
        """Unmap what a thread read before: if it still looks at it, it faults it in again from the page cache."""
        for old in behind.parts:
            first = self._offset + old.start * self._row_bytes
            first -= first % mmap.PAGESIZE
            end = min(self._offset + old.stop * self._row_bytes, len(self._map))
            if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system decides
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
        behind.parts.clear()
        behind.rows = 0


class TensorStore(Protocol):
    """The tensors of a checkpoint, by name."""

    @property
    def names(self) -> Collection[str]:
        """All of them."""

    def rows(self, name: str) -> Baseline:
        """One 2-D floating-point tensor, as rows.

        Raises:
            ValueError: if it is missing, not 2-D, empty or not of floats.
        """

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU.

        Raises:
            ValueError: if it is missing or cannot be read.
        """


class SafetensorsStore:
    """Tensors of one or more safetensors files.

    Args:
        files: name -> the file that holds it.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)

    @property
    def names(self) -> Collection[str]:
        """All of them."""
        return self.files.keys()

    def rows(self, name: str) -> MappedRows:
        """One tensor as rows; see `MappedRows`."""
        return MappedRows(self._file(name), name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        path = self._file(name)
        if name not in safetensors_names(path):
            raise ValueError(f"{path}: no tensor {name!r}; its index says it is there")
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"no tensor {name!r}; there are {some(self.names)}")
        return self.files[name]


class LoadedStore:
    """Tensors that ``torch.load`` has mapped.

    Args:
        tensors: by name.
        path: for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.tensors, self.path = dict(tensors), path

    @property
    def names(self) -> Collection[str]:
        """All of them."""
        return self.tensors.keys()

    def rows(self, name: str) -> Baseline:
        """One tensor as rows."""
        found = self.tensor(name)
        check_rows(f"{self.path}: tensor {name!r}", tuple(found.shape), str(found.dtype), found.dtype.is_floating_point)
        return CopiedBaseline(found)

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name!r}; it holds {some(self.names)}")
        return self.tensors[name].detach()


def safetensors_names(path: Path) -> list[str]:
    """Names of a safetensors file's tensors.

    Raises:
        ValueError: if the file is missing, truncated or no safetensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'not found'}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return list(file.keys())
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({one_line(error)})") from error


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


def check_rows(what: str, shape: tuple[int, ...], dtype: str, is_float: bool) -> None:
    """Refuse what is no matrix of rows.

    Args:
        what: named in the message.
        shape: of the tensor.
        dtype: of the tensor, as it is called there.
        is_float: whether that is one of 16 bits or more.

    Raises:
        ValueError: if it is not 2-D, is empty or is not of floats.
    """
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what} has shape {list(shape)}; allowed: (rows, width), neither of them 0")
    if not is_float:
        raise ValueError(
            f"{what} is of {dtype}; allowed: {', '.join(_FLOATS)} (a quantised matrix has no rows to read)"
        )


def slices_of(rows: Baseline, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Walk over rows that have a `chunk`: slices of at most ``size`` and the rows.

    Raises:
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"chunk size is {size}; allowed: at least 1")
    for start in range(0, rows.rows, size):
        part = slice(start, min(start + size, rows.rows))
        yield part, rows.chunk(part)


def norms_of(rows: Baseline) -> Tensor:
    """(rows,) float32 L2 norms, by numpy in a few threads; see `vocabguard.measure.kernels` for why not by torch."""
    norms = np.empty(rows.rows, dtype=np.float32)
    size = max(1, _BLOCK // rows.width)
    blocks, turn = rows.chunks(size), threading.Lock()

    def work() -> None:
        buffer = np.empty((min(size, rows.rows), rows.width), dtype=np.float32)
        with np.errstate(all="ignore"):
            while True:
                with turn:
                    block = next(blocks, None)
                if block is None:
                    return
                wide = _widened(block[1], buffer)
                # Squares first: a sum is added up pairwise, which `einsum` does not do.
                np.sqrt(np.square(wide, out=wide).sum(axis=1), out=norms[block[0]])

    threads = min(torch.get_num_threads(), _MOST_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="vocabguard") as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return torch.from_numpy(norms)


@torch.no_grad()
def _widened(rows: Tensor, buffer: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows as float32 in the buffer."""
    wide = buffer[: len(rows)]
    if rows.dtype is torch.bfloat16:  # numpy does not know it: the upper half of a float32
        bits = rows.detach().view(torch.int16).numpy().view(np.uint16)
        np.left_shift(bits, 16, out=wide.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(wide, rows.detach().numpy(), casting="same_kind")
    return wide


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch work on one core here: for many small operations, each of which would else wait for all cores.

    Where another process holds one of them, an operation on a vector of V elements takes 100 times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entries of a file that `safe_open` has accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    return 8 + length, entries


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


_PREFIX = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdaptedRows:
    """Rows of a base with an adapter on them, in float32 as the forward pass adds them up.

    Attributes:
        base: the rows beneath.
        left: (V, r) float32 with the scaling in it; None without LoRA.
        right: (r, width) float32.
        magnitude: (V,) float32, DoRA's norm of each row; None without.
        replaced: ids and (n, width) rows put in the place of others; None without.
    """

    base: Baseline
    left: Tensor | None = None
    right: Tensor | None = None
    magnitude: Tensor | None = None
    replaced: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int:
        """Rows of the base."""
        return self.base.rows

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.base.width

    @torch.no_grad()
    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) float32 on the CPU, new."""
        rows = self.base.chunk(part).to(torch.float32, copy=True)
        if self.left is not None and self.right is not None:
            rows += self.left[part] @ self.right
        if self.magnitude is not None:
            rows *= (self.magnitude[part] / rows.norm(dim=1))[:, None]
        if self.replaced is not None:
            ids, values = self.replaced
            here = (ids >= part.start) & (ids < part.stop)
            rows[ids[here] - part.start] = values[here].float()
        return rows

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time: the rows' slice and `chunk` of it."""
        return slices_of(self, size)

    def describe(self) -> str:
        """Where the rows come from, in words."""
        return f"adapter on {self.base.describe()}"

    def reference(self) -> dict[str, str]:
        """Empty: the rows lie in no file."""
        return {}

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms, computed at first use."""
        return norms_of(self)


def open_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """The rows of a base with a PEFT adapter.

    Args:
        folder: with ``adapter_config.json`` and the adapter's tensors.
        base: the model that it was trained on.

    Returns:
        A checkpoint whose rows are `AdaptedRows` or, saved as a whole, rows of the adapter's own file. Rows that the
        adapter leaves alone are not applicable: they are the base's.

    Raises:
        ValueError: for a damaged adapter, or one of another kind or shape than its base.
    """
    config, store = read_json(folder / ADAPTER_CONFIG), _adapter_store(folder)
    found: dict[MatrixName, Baseline | None] = {
        name: _adapted(name, store, config, base, folder) for name in COMMON_NAMES
    }
    if base.tied and found["head"] is None and config.get("trainable_token_indices"):
        found["head"] = found["embedding"]  # PEFT ties its new rows, too
    untouched = "the adapter leaves the {} rows as they are, so they cannot have drifted"
    head, embedding = found["head"], found["embedding"]
    return Checkpoint(
        path=folder,
        head=NotApplicable(untouched.format("output")) if head is None else head,
        embedding=NotApplicable(untouched.format("input")) if embedding is None else embedding,
        keys={},
        tied=head is not None and head is embedding,
    )


def _adapter_store(folder: Path) -> TensorStore:
    safe, pickled = (folder / name for name in _WEIGHTS)
    if safe.is_file():
        return SafetensorsStore(dict.fromkeys(safetensors_names(safe), safe))
    if pickled.is_file():
        tensors = {key: value for key, value in load_torch_file(pickled).items() if isinstance(value, Tensor)}
        return LoadedStore(tensors, pickled)
    raise ValueError(f"{folder}: {ADAPTER_CONFIG} without its tensors; expected {' or '.join(_WEIGHTS)}")


def _adapted(
    name: MatrixName, store: TensorStore, config: dict[str, Any], base: Checkpoint, folder: Path
) -> Baseline | None:
    """One matrix with the adapter on it; None if the adapter has nothing for it."""
    module = _module(name, store, base)
    if module is None:
        return None
    here = f"{_PREFIX}{module}."
    parts = {key.removeprefix(here) for key in store.names if key.startswith(here)}
    if "weight" in parts:
        return store.rows(here + "weight")
    rows = store.rows(f"{here}base_layer.weight") if "base_layer.weight" in parts else base.matrix(name)
    if isinstance(rows, NotApplicable):
        raise ValueError(f"{folder}: adapts {module!r}, and {base.path} has none: {rows.reason}")
    if any("token_adapter" in part for part in parts):
        return _with_tokens(rows, store.tensor(f"{here}token_adapter.trainable_tokens_delta"), config, module, folder)
    return _with_lora(rows, store, here, config, folder)


def _module(name: MatrixName, store: TensorStore, base: Checkpoint) -> str | None:
    """The adapted module that is the matrix."""
    own = base.keys.get(name)
    known = (own,) if own else COMMON_NAMES[name]
    modules = {re.split(r"\.(?:base_layer|lora_|token_adapter|weight)", key)[0] for key in store.names}
    wanted = [key.removesuffix(".weight") for key in known]
    return next((module for module in wanted if _PREFIX + module in modules), None)


def _with_tokens(rows: Baseline, values: Tensor, config: dict[str, Any], module: str, folder: Path) -> AdaptedRows:
    asked = config.get("trainable_token_indices")
    if isinstance(asked, dict):
        asked = next((ids for key, ids in asked.items() if module.endswith(str(key))), None)
    if (
        not isinstance(asked, list)
        or not all(isinstance(i, int) for i in asked)
        or values.shape != (len(asked), rows.width)
    ):
        raise ValueError(
            f"{folder}: trainable_token_indices of {module!r} do not fit its trained rows, {list(values.shape)}"
        )
    ids = torch.tensor(asked, dtype=torch.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows.rows:
        raise ValueError(f"{folder}: trainable_token_indices go to {int(ids.max())}; the base has {rows.rows} rows")
    return AdaptedRows(rows, replaced=(ids, values))


def _with_lora(rows: Baseline, store: TensorStore, here: str, config: dict[str, Any], folder: Path) -> AdaptedRows:
    dora = f"{here}lora_magnitude_vector"
    magnitude = next((store.tensor(key).float() for key in (dora, f"{dora}.weight") if key in store.names), None)
    if f"{here}lora_embedding_A" in store.names:
        if magnitude is not None:
            raise ValueError(f"{folder}: DoRA on the input embedding is not read; merge the adapter and scan the model")
        left = store.tensor(f"{here}lora_embedding_A").float().T
        right = store.tensor(f"{here}lora_embedding_B").float().T
    else:
        left = store.tensor(f"{here}lora_B.weight").float()
        right = store.tensor(f"{here}lora_A.weight").float()
    shapes = list(left.shape), list(right.shape)
    if (
        left.ndim != 2
        or right.ndim != 2
        or left.shape[1] != right.shape[0]
        or (left.shape[0], right.shape[1]) != (rows.rows, rows.width)
    ):
        raise ValueError(
            f"{folder}: LoRA parts of shapes {shapes} do not make the base's {rows.rows} x {rows.width} rows"
        )
    scaling = _scaling(config, here.removeprefix(_PREFIX).rstrip("."), left.shape[1], folder)
    return AdaptedRows(rows, left=(left * scaling).contiguous(), right=right.contiguous(), magnitude=magnitude)


def _scaling(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """Alpha over the rank, or over its root; by ``alpha_pattern`` where a pattern ends the module's name."""
    patterns = config.get("alpha_pattern") or {}
    fits = (value for pattern, value in patterns.items() if re.search(rf"(?:^|\.){pattern}$", module))
    alpha = next(fits, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: lora_alpha is {alpha!r}; expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
