"""Tensors of a checkpoint as rows that are read by memory map, and let go of behind the reader."""

from __future__ import annotations

import json
import mmap
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

from vocabguard.snapshot import Baseline, CopiedBaseline

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

    It is a `vocabguard.snapshot.Baseline`, as `FileBaseline` is; that one keeps what it has read mapped.

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
        """Path and tensor, for people; `vocabguard.snapshot.reopen_baseline` wants a `FileBaseline`'s."""
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
    """(rows,) float32 L2 norms, by numpy in a few threads; see `vocabguard.measure.rowwise` for why not by torch."""
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


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return (lines[0][:limit] if lines else "") or type(error).__name__


def some(names: Collection[str], shown: int = 6) -> str:
    """A few names for an error message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{sorted(names)[:shown]}{more}"


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entries of a file that `safe_open` has accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    return 8 + length, entries
