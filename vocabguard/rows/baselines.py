"""The baseline: the rows against which drift is measured, copied from a model or read from a checkpoint on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vocabguard.files import replacing
from vocabguard.results import MatrixName
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.sharding import ShardBaseline, local_rows

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DIGEST_ROWS = 64
# torch works on so many elements on one core; more it splits, which stalls where another process holds a core.
_SERIAL = 2**15
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


class Baseline(Protocol):
    """Rows that stay as they are: `CopiedBaseline` or `FileBaseline`."""

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
        """What `reopen_baseline` needs to find the rows again, JSON-able; empty if they live in memory only."""

    @property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms on the CPU, not finite where a row is not. Computed once: the rows never change."""


class CopiedBaseline:
    """A copy of the rows in memory, in the model's dtype.

    Args:
        tensor: (rows, width), on the CPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def rows(self) -> int:
        """Rows held."""
        return self.tensor.shape[0]

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.tensor.shape[1]

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) view on the CPU. Not to be written to."""
        return self.tensor[part]

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time: the rows' slice and `chunk` of it."""
        return _chunks(self, size)

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        megabytes = self.tensor.nbytes / 2**20
        return f"copy in memory ({megabytes:.0f} MiB, {_dtype_name(self.tensor.dtype)})"

    def reference(self) -> dict[str, str]:
        """Empty: a copy in memory cannot be found again. `save_baseline` it first."""
        return {}

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms, computed at first use."""
        return _norms(self)


class FileBaseline:
    """One tensor of a safetensors file, read through a memory map and never as a whole.

    Args:
        path: the file.
        key: the tensor's name in it.

    Raises:
        ValueError: for a file that cannot be read, or a tensor that is missing or not 2-D.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._file = _open(path)
        if key not in self._file.keys():  # noqa: SIM118 (a safe_open handle has no __contains__)
            raise ValueError(f"snapshot.source {path}: no tensor {key!r}; it holds {_some(self._file.keys())}")
        self._rows: Any = self._file.get_slice(key)
        shape = tuple(self._rows.get_shape())
        if len(shape) != 2:
            raise ValueError(f"snapshot.source {path}: tensor {key!r} has shape {shape}; allowed: (rows, width)")
        self._shape = shape

    @property
    def rows(self) -> int:
        """Rows held."""
        return int(self._shape[0])

    @property
    def width(self) -> int:
        """Elements a row."""
        return int(self._shape[1])

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, in the file's dtype. Not to be written to."""
        rows = self._rows[part]
        assert isinstance(rows, Tensor)
        return rows

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time: the rows' slice and `chunk` of it."""
        return _chunks(self, size)

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

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms, computed at first use."""
        return _norms(self)

    def _digest(self) -> str:
        """SHA-256 of the bytes of evenly spaced rows."""
        digest = hashlib.sha256()
        for row in range(0, self.rows, max(1, self.rows // _DIGEST_ROWS)):
            digest.update(self.chunk(slice(row, row + 1)).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def copy_baseline(matrix: VocabMatrix) -> CopiedBaseline | ShardBaseline:
    """Copy a matrix's rows to the CPU, in its own dtype; in float32 where an adapter has changed them.

    Args:
        matrix: read as it is now; of one that is spread over processes, each copies its own rows.
    """
    if (shard := matrix.shard) is not None:
        return ShardBaseline(local_rows(matrix.weight.detach()).to("cpu", copy=True), shard, matrix.rows)
    if matrix.adapter is not None:
        return CopiedBaseline(torch.cat([rows.to("cpu", copy=True) for _, rows in matrix.chunks(2**14)]))
    return CopiedBaseline(matrix.weight.detach().to("cpu", copy=True).contiguous())


def open_baseline(path: str | Path, matrix: VocabMatrix) -> FileBaseline:
    """Find a matrix's rows in a safetensors checkpoint.

    The tensor is the one that bears the parameter's name in the model, else a well-known name. A checkpoint without a
    head is a tied one: there the embedding serves as the head's baseline.

    Args:
        path: a ``.safetensors`` file, or a folder with ``model.safetensors`` or its shards and their index.
        matrix: the matrix whose baseline is looked for; its shape must be the tensor's.

    Raises:
        ValueError: for a path without a checkpoint, a checkpoint without the rows, or rows of another shape.
    """
    files = _tensor_files(Path(path))
    key = _pick_key(files, matrix)
    if key is None:
        raise ValueError(
            f"snapshot.source {path}: no tensor for the {matrix.name}, looked for {list(matrix.parameter_names())} and "
            f"{list(COMMON_NAMES[matrix.name])}; it holds {_some(files)}"
        )
    baseline = FileBaseline(files[key], key)
    if (baseline.rows, baseline.width) != (matrix.rows, matrix.width):
        raise ValueError(
            f"snapshot.source {path}: {key!r} is {baseline.rows} x {baseline.width}, the model's {matrix.name} is "
            f"{matrix.rows} x {matrix.width}; allowed: the same shape, or null to copy the model's rows at the start"
        )
    return baseline


def save_baseline(baseline: Baseline, path: str | Path, key: str) -> FileBaseline:
    """Write the rows into a safetensors file of their own.

    Args:
        baseline: the rows.
        path: the file; its folder must exist. Replaced if it is there.
        key: the tensor's name in it.

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
    for field in ("shape", "digest"):
        if field in reference and reference[field] != now[field]:
            raise ValueError(
                f"baseline {baseline.describe()} is not the one the run started with: {field} is {now[field]}, "
                f"was {reference[field]}"
            )
    return baseline


def matches(baseline: Baseline, matrix: VocabMatrix, chunk_rows: int = 4096) -> bool:
    """Whether the model's rows are the baseline's, after rounding to the model's dtype.

    Args:
        baseline: the rows expected.
        matrix: the rows found; both are read in chunks up to the first difference.
        chunk_rows: rows a chunk.
    """
    if (baseline.rows, baseline.width) != (matrix.rows, matrix.width):
        return False
    return all(
        torch.equal(baseline.chunk(part).to(now.device, now.dtype), now) for part, now in matrix.chunks(chunk_rows)
    )


def _chunks(baseline: Baseline, size: int) -> Iterator[tuple[slice, Tensor]]:
    if size < 1:
        raise ValueError(f"chunk size is {size}; allowed: at least 1")
    for start in range(0, baseline.rows, size):
        part = slice(start, min(start + size, baseline.rows))
        yield part, baseline.chunk(part)


@torch.no_grad()
def _norms(baseline: Baseline) -> Tensor:
    size = max(1, _SERIAL // max(1, baseline.width))
    norms = [torch.linalg.vector_norm(rows.float(), dim=-1) for _, rows in baseline.chunks(size)]
    return torch.cat(norms) if norms else torch.empty(0)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    path = path.expanduser().resolve()
    if path.is_dir():
        if (path / _INDEX).is_file():
            weight_map = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {key: path / file for key, file in weight_map.items()}
        path = path / _SINGLE
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(
            f"snapshot.source {path}: not found; allowed: a .safetensors file, or a folder with {_SINGLE} or {_INDEX}"
        )
    return dict.fromkeys(_open(path).keys(), path)


def _open(path: Path) -> Any:
    """A memory-mapped safetensors file."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"snapshot.source {path}: cannot be read as safetensors ({error})") from error


def _pick_key(keys: Collection[str], matrix: VocabMatrix) -> str | None:
    """The tensor that belongs to the matrix, best evidence first."""
    names = matrix.parameter_names()
    found = _first(names, keys) or _only_suffix(names, keys) or _first(COMMON_NAMES[matrix.name], keys)
    if found is not None:
        return found
    if matrix.name == "head":
        return _first(COMMON_NAMES["embedding"], keys) or _only_suffix(COMMON_NAMES["embedding"], keys)
    return _first(COMMON_NAMES["head"], keys) if matrix.tied else None


def _first(names: Collection[str], keys: Collection[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def _only_suffix(names: Collection[str], keys: Collection[str]) -> str | None:
    """The one tensor whose name is a parameter's but for a prefix (``model.``) on either side."""
    found = {key for key in keys for name in names if key.endswith("." + name) or name.endswith("." + key)}
    return found.pop() if len(found) == 1 else None


def _some(keys: Collection[str], shown: int = 8) -> str:
    """A few names for an error message."""
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{sorted(keys)[:shown]}{more}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
