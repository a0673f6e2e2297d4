"""The baseline: the rows against which drift is measured, copied from a model or read from a file."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
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
from safetensors.torch import save_file
from torch import Tensor

from vocabguard.files import one_line, replacing, some
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.sharding import ShardBaseline
from vocabguard.rows.streams import on_host

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of rows, by their names in safetensors files."""

_DIGEST_ROWS = 64
# Bytes that a thread may leave mapped behind it when it asks for the next block.
_KEPT_MAPPED = 2**20
# Elements that torch does not split between cores: beside another process, each barrier costs more than the sums.
_SERIAL = 2**15
# Elements of a block whose float32 buffer stays in the cache.
_BLOCK = 2**17
_MOST_THREADS = 4


class Baseline(Protocol):
    """Rows that stay as they are."""

    @property
    def rows(self) -> int:
        """Rows held."""

    @property
    def width(self) -> int:
        """Elements a row."""

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, in the dtype in which they are kept. Not to be written to."""

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time: the rows' slice and `chunk` of it."""

    def describe(self) -> str:
        """Where the rows are kept, in words."""

    def reference(self) -> dict[str, str]:
        """What `reopen_baseline` needs to find the rows again, JSON-able; empty if they lie in no file."""

    @property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms on the CPU, not finite where a row is not. Computed once: the rows never change."""


class ChunkedRows:
    """What a `Baseline` with a `chunk` of its own need not write again."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width

    def chunk(self, part: slice) -> Tensor:
        """See `Baseline`."""
        raise NotImplementedError

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Baseline`.

        Raises:
            ValueError: for a size below 1.
        """
        if size < 1:
            raise ValueError(f"chunk size is {size}; allowed: at least 1")
        for start in range(0, self.rows, size):
            part = slice(start, min(start + size, self.rows))
            yield part, self.chunk(part)

    def reference(self) -> dict[str, str]:
        """Empty: such rows lie in no file."""
        return {}

    @cached_property
    def norms(self) -> Tensor:
        """See `Baseline`. Of a copy and of its file the same to the last bit: a resumed run goes on alike."""
        size = max(1, _SERIAL // max(1, self.width))
        norms = [torch.linalg.vector_norm(part.detach().float(), dim=-1) for _, part in self.chunks(size)]
        return torch.cat(norms) if norms else torch.empty(0)


class CopiedBaseline(ChunkedRows):
    """(rows, width) on the CPU: a copy in the model's dtype, unless it says that it is kept in another place."""

    def __init__(self, tensor: Tensor, place: str = "") -> None:
        super().__init__(*tensor.shape)
        self.tensor, self._place = tensor, place
        self._saved: dict[str, str] = {}

    def keep_reference(self, saved: dict[str, str]) -> None:
        """Remember in which file the rows are, too."""
        self._saved = saved

    def reference(self) -> dict[str, str]:
        """Where the rows have been saved; empty before."""
        return self._saved

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) view on the CPU. Not to be written to."""
        return self.tensor[part]

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        megabytes, dtype = self.tensor.nbytes / 2**20, str(self.tensor.dtype).removeprefix("torch.")
        return self._place or f"copy in memory ({megabytes:.0f} MiB, {dtype})"


@dataclass
class _Behind:
    """What a thread has read and may still have mapped."""

    parts: list[slice] = field(default_factory=list)
    rows: int = 0


class FileBaseline(ChunkedRows):
    """One tensor of a safetensors file; pages that have been read are unmapped again, so that memory stays small.

    Raises:
        ValueError: for a file that cannot be read, or a tensor that is missing, not 2-D, empty or not of floats.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        start, entry = _entry(path, key)
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        check_rows(f"{path}: tensor {key!r}", shape, dtype, dtype in FLOATS)
        super().__init__(*shape)
        self.dtype = FLOATS[dtype]
        self._row_bytes = self.width * self.dtype.itemsize
        self._offset = start + int(entry["data_offsets"][0])
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

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        return f"{self.key} in {self.path} (memory map)"

    def reference(self) -> dict[str, str]:
        """Path, tensor, shape and a digest of some rows, so that another file in its place is noticed."""
        return {
            "kind": "file",
            "path": str(self.path),
            "key": self.key,
            "shape": f"{self.rows} x {self.width}",
            "digest": self._digest(),
        }

    def _digest(self) -> str:
        """SHA-256 of the bytes of evenly spaced rows."""
        digest = hashlib.sha256()
        for row in range(0, self.rows, max(1, self.rows // _DIGEST_ROWS)):
            digest.update(self.chunk(slice(row, row + 1)).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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


def copy_baseline(matrix: VocabMatrix) -> CopiedBaseline | ShardBaseline:
    """Copy a matrix's rows as they are now to the CPU, in its own dtype; in float32 where an adapter has changed them.

    Of a matrix that is spread over processes, each copies its own rows.
    """
    if (shard := matrix.shard) is not None:
        return ShardBaseline(on_host(matrix.own()), shard)
    if matrix.adapter is not None:
        return CopiedBaseline(torch.cat([rows.to("cpu", copy=True) for _, rows in matrix.chunks(2**14)]))
    return CopiedBaseline(on_host(matrix.weight))


def save_baseline(baseline: Baseline, path: str | Path, key: str) -> FileBaseline:
    """Write the rows into a safetensors file of their own.

    Args:
        path: the file; its folder must exist. Replaced if it is there.

    Returns:
        The baseline as read from the file, whose `reference` outlives the process.
    """
    # A run that is killed meanwhile leaves no half file to resume from.
    with replacing(path) as new:
        save_file({key: baseline.chunk(slice(0, baseline.rows)).contiguous()}, str(new), metadata={"format": "pt"})
    return FileBaseline(Path(path).resolve(), key)


def reopen_baseline(reference: Mapping[str, str]) -> FileBaseline:
    """Open the rows that a `FileBaseline.reference` names.

    Raises:
        ValueError: if it is no reference to a file, or the file no longer holds those rows.
    """
    if reference.get("kind") != "file" or not {"path", "key"} <= reference.keys():
        raise ValueError(f"baseline reference is {dict(reference)}; allowed: kind 'file' with path and key")
    baseline = FileBaseline(Path(reference["path"]), reference["key"])
    now = baseline.reference()
    for name in ("shape", "digest"):
        if name in reference and reference[name] != now[name]:
            raise ValueError(
                f"baseline {baseline.describe()} is not the one the run started with: {name} is {now[name]}, "
                f"was {reference[name]}"
            )
    return baseline


def in_memory(baseline: FileBaseline, matrix: VocabMatrix) -> CopiedBaseline | FileBaseline:
    """The rows of a file in pinned memory, if they are compared with rows on a CUDA device; else as they are."""
    if matrix.device.type != "cuda" or matrix.shard is not None:
        return baseline
    kept = CopiedBaseline(baseline.chunk(slice(0, baseline.rows)).clone().pin_memory())
    kept.keep_reference(baseline.reference())
    return kept


def matches(baseline: Baseline, matrix: VocabMatrix, chunk_rows: int = 4096) -> bool:
    """Whether the model's rows are the baseline's, after rounding to the model's dtype; read up to a difference."""
    if (baseline.rows, baseline.width) != (matrix.rows, matrix.width):
        return False
    return all(
        torch.equal(baseline.chunk(part).to(now.device, now.dtype), now) for part, now in matrix.chunks(chunk_rows)
    )


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


def check_rows(what: str, shape: tuple[int, ...], dtype: str, is_float: bool) -> None:
    """Refuse what is no matrix of rows.

    Args:
        dtype: as it is called where it was found.
        is_float: whether that is one of 16 bits or more.

    Raises:
        ValueError: if it is not 2-D, is empty or is not of floats.
    """
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what} has shape {shape}; allowed: (rows, width), neither of them 0")
    if not is_float:
        raise ValueError(f"{what} is of {dtype}; allowed: {', '.join(FLOATS)} (a quantised matrix has no rows to read)")


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


def _entry(path: Path, key: str) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and a tensor's entry in the header.

    The whole header is parsed where that cannot be avoided only: of 400,000 names it takes seconds.

    Raises:
        ValueError: for a file that cannot be read, or a tensor that is missing.
    """
    if not path.is_file():
        safetensors_names(path)  # says why
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            file.get_slice(key)
    except (OSError, SafetensorError, ValueError) as error:
        names = safetensors_names(path)
        raise ValueError(f"{path}: no tensor {key!r}; it holds {some(names)}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    # Inside a text of the metadata quotes would have backslashes before them.
    found = re.search(re.escape(json.dumps(key).encode()) + rb"\s*:\s*(\{[^{}]*\})", header)
    entry: dict[str, Any] = json.loads(header)[key] if found is None else json.loads(found[1])
    return 8 + length, entry


def norms_of(rows: Baseline) -> Tensor:
    """(rows,) float32 L2 norms, nearly exact, by numpy in a few threads; see `vocabguard.measure.kernels` for why."""
    norms = np.empty(rows.rows, dtype=np.float32)
    size = max(1, _BLOCK // max(1, rows.width))
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
