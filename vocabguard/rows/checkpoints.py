"""The vocabulary rows of a checkpoint on disk: of a model's folder or file, of a PEFT adapter on its base."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from vocabguard.files import full_path, one_line, read_json, some
from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.adapters import LowRank, Replaced, replaced_rows, updated_rows
from vocabguard.rows.baselines import Baseline, ChunkedRows, CopiedBaseline, FileBaseline
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.tensors import (
    ADAPTER_CONFIG,
    COMMON_NAMES,
    INDEX,
    MATRICES,
    SINGLE,
    TORCH_SUFFIXES,
    TensorStore,
    open_adapter_store,
    open_store,
    tensors_named,
)

_ALLOWED = (
    f"allowed: a .safetensors file, or a folder with {SINGLE} or {INDEX}; a {', '.join(TORCH_SUFFIXES)} file, or a "
    "folder with pytorch_model.bin or its index; a PEFT adapter's folder whose base is on this machine"
)
_PREFIX = "base_model.model."
_LARGEST_ALPHA = 1e30  # of a float32 with room for the product


@dataclass(frozen=True)
class Checkpoint:
    """The vocabulary rows of one checkpoint.

    Attributes:
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
        path: a folder or a file; see `vocabguard.rows.tensors.open_store`.
        keys: names of the tensors where they are not the well-known ones.
        base: what an adapter sits on; other checkpoints do not need it.

    Raises:
        ValueError: for a path that holds no checkpoint, a damaged one, or one without vocabulary rows.
    """
    path = full_path(path)
    if (path / ADAPTER_CONFIG).is_file():
        if base is None:
            raise ValueError(f"{path} is an adapter, not a model; allowed here: a model's folder or file")
        return _open_adapter(path, base)
    store, config = open_store(path), _read_config(path)
    found = {name: _key(name, store.names, (keys or {}).get(name), path) for name in MATRICES}
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


def open_baseline(path: str | Path, matrix: VocabMatrix) -> CopiedBaseline | FileBaseline:
    """Find a live matrix's rows in a checkpoint.

    The tensor is the one that bears the parameter's name in the model, else a well-known name. A checkpoint without a
    head is a tied one: there the embedding serves as the head's baseline. Rows with an adapter on them are computed and
    kept in memory; all others stay on disk.

    Args:
        path: of a checkpoint, see `open_checkpoint`; the base of an adapter is where its configuration says.
        matrix: the matrix whose baseline is looked for; its shape must be the tensor's.

    Raises:
        ValueError: for a path without a checkpoint, a checkpoint without the rows, or rows of another shape.
    """
    path = full_path(path)
    if (path / ADAPTER_CONFIG).is_file():
        baseline, what = _adapter_baseline(path, matrix), f"the adapted {matrix.name}"
    else:
        try:
            store = open_store(path)
        except ValueError as error:
            raise ValueError(f"snapshot.source {error}; {_ALLOWED}") from error
        key = _key_of(matrix, store.names)
        if key is None:
            raise ValueError(
                f"snapshot.source {path}: no tensor for the {matrix.name}, looked for "
                f"{list(matrix.parameter_names())} and {list(COMMON_NAMES[matrix.name])}; it holds {some(store.names)}"
            )
        try:
            baseline, what = store.rows(key), repr(key)
        except ValueError as error:
            raise ValueError(f"snapshot.source {error}") from error
    if (baseline.rows, baseline.width) != (matrix.rows, matrix.width):
        raise ValueError(
            f"snapshot.source {path}: {what} is {baseline.rows} x {baseline.width}, the model's {matrix.name} is "
            f"{matrix.rows} x {matrix.width}; allowed: the same shape, or null to copy the model's rows at the start"
        )
    return baseline


def _adapter_baseline(folder: Path, matrix: VocabMatrix) -> CopiedBaseline | FileBaseline:
    """The rows of an adapter on its base; the base's own where it leaves them alone."""
    try:
        base = full_path(str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")))
        if not base.exists():
            raise ValueError(f"{folder}: its base {str(base)!r} is not on this machine; {_ALLOWED}")
        found = open_checkpoint(folder, base=open_checkpoint(base)).matrix(matrix.name)
    except ValueError as error:
        raise ValueError(f"snapshot.source {error}") from error
    if isinstance(found, NotApplicable):
        return open_baseline(base, matrix)
    if isinstance(found, (CopiedBaseline, FileBaseline)):
        return found
    return CopiedBaseline(torch.cat([rows for _, rows in found.chunks(2**14)]))


def _key_of(matrix: VocabMatrix, names: Collection[str]) -> str | None:
    """The tensor that belongs to a live matrix, best evidence first; what is not sure is not guessed."""
    own = matrix.parameter_names()
    shorter = [name for name in names if any(mine.endswith(f".{name}") for mine in own)]
    kinds = [own, shorter if len(shorter) == 1 else [], COMMON_NAMES[matrix.name]]
    if matrix.name == "head":
        kinds.append(COMMON_NAMES["embedding"])
    elif matrix.tied:
        kinds.append(COMMON_NAMES["head"])
    found = (tensors_named(wanted, names) for wanted in kinds)
    return next((names[0] for names in found if len(names) == 1), None)


def _key(name: MatrixName, keys: Collection[str], asked: str | None, path: Path) -> str | None:
    """The matrix's tensor: as asked, under a well-known name, or under one with a wrapper's prefix before it."""
    if asked is not None:
        if asked not in keys:
            raise ValueError(f"{path}: no tensor {asked!r} for --{name}; it holds {some(keys)}")
        return asked
    found = tensors_named(COMMON_NAMES[name], keys)
    if len(found) > 1:
        raise ValueError(f"{path}: several tensors may be the {name}: {some(found)}; name one with --{name}")
    return found[0] if found else None


def _rows(store: TensorStore, key: str | None, kind: str) -> Baseline | NotApplicable:
    return NotApplicable(f"the checkpoint has no {kind} rows") if key is None else store.rows(key)


def _read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder with that of its text model laid over it; empty where there is none."""
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


class AdaptedBaseline(ChunkedRows):
    """Rows of a base with an adapter on them, in float32 as the forward pass adds them up.

    LoRA and DoRA make updates, trained tokens replaced rows.
    """

    def __init__(self, base: Baseline, updates: Sequence[LowRank] = (), replaced: Sequence[Replaced] = ()) -> None:
        super().__init__(base.rows, base.width)
        self.base, self.updates, self.replaced = base, updates, replaced

    @torch.no_grad()
    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) float32 on the CPU, new."""
        rows = updated_rows(self.base.chunk(part).float(), part, self.updates)
        return replaced_rows(rows, part, self.replaced)

    def describe(self) -> str:
        """Where the rows come from, in words."""
        return f"adapter on {self.base.describe()}"


def _open_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """The rows of a base with a PEFT adapter.

    Args:
        folder: with ``adapter_config.json`` and the adapter's tensors.

    Returns:
        A checkpoint whose rows are `AdaptedBaseline` or, saved as a whole, rows of the adapter's own file. Rows that
        the adapter leaves alone are not applicable: they are the base's.

    Raises:
        ValueError: for a damaged adapter, or one of another kind or shape than its base.
    """
    config, store = read_json(folder / ADAPTER_CONFIG), open_adapter_store(folder)
    found: dict[MatrixName, Baseline | None] = {name: _adapted(name, store, config, base, folder) for name in MATRICES}
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


def adapted_modules(folder: Path, base: Checkpoint) -> Iterator[tuple[str, Baseline, Baseline | NotApplicable]]:
    """What an adapter changes beside the vocabulary rows: a tensor's name, its rows at the base, and now or why not.

    Args:
        folder: the adapter's.
        base: the model that it sits on.

    Raises:
        ValueError: for a damaged adapter.
    """
    config, store, below = read_json(folder / ADAPTER_CONFIG), open_adapter_store(folder), open_store(base.path)
    known = {name.removesuffix(".weight") for name in (*base.keys.values(), *COMMON_NAMES["head"])}
    modules = {re.split(r"\.(?:base_layer|lora_|token_adapter|weight$|modules_to_save)", key)[0] for key in store.names}
    for module in sorted(module.removeprefix(_PREFIX) for module in modules if module.startswith(_PREFIX)):
        name, here = f"{module}.weight", f"{_PREFIX}{module}."
        if module in known or name not in below.names or len(below.form(name)[0]) != 2:
            continue
        rows = below.rows(name)
        try:
            now = (
                store.rows(f"{here}weight")
                if f"{here}weight" in store.names
                else _with_lora(rows, store, here, config, folder)
            )
        except ValueError as error:
            yield name, rows, NotApplicable(one_line(error))
            continue
        yield name, rows, now


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


def _with_tokens(rows: Baseline, values: Tensor, config: dict[str, Any], module: str, folder: Path) -> AdaptedBaseline:
    asked = config.get("trainable_token_indices")
    if isinstance(asked, dict):
        asked = next((ids for key, ids in asked.items() if module.endswith(str(key))), None)
    if (
        not isinstance(asked, list)
        or not all(isinstance(i, int) and 0 <= i < rows.rows for i in asked)
        or values.shape != (len(asked), rows.width)
    ):
        raise ValueError(
            f"{folder}: trainable_token_indices of {module!r} do not fit its trained rows, {list(values.shape)}, and "
            f"the base's {rows.rows} rows"
        )
    ids = torch.tensor(asked, dtype=torch.int64)
    return AdaptedBaseline(rows, replaced=[Replaced(ids, values)])


def _with_lora(rows: Baseline, store: TensorStore, here: str, config: dict[str, Any], folder: Path) -> AdaptedBaseline:
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
    shapes, rank = (list(left.shape), list(right.shape)), left.shape[-1] if left.ndim else 0
    if shapes != ([rows.rows, rank], [rank, rows.width]):
        raise ValueError(
            f"{folder}: LoRA parts of shapes {shapes} do not make the base's {rows.rows} x {rows.width} rows"
        )
    if rank == 0 or (magnitude is not None and magnitude.shape != (rows.rows,)):
        told = "rank 0" if magnitude is None else f"DoRA lengths of shape {list(magnitude.shape)}"
        raise ValueError(f"{folder}: LoRA of {rows.rows} rows with {told}")
    scaling = _scaling(config, here.removeprefix(_PREFIX).rstrip("."), rank, folder)
    return AdaptedBaseline(rows, [LowRank(left, right, scaling, magnitude)])


def _scaling(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """Alpha over the rank, or over its root; by ``alpha_pattern`` where a pattern ends the module's name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: alpha_pattern is {_shown(patterns)}; expected an object")
    alpha = next((value for key, value in patterns.items() if _fits(key, module, folder)), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < _LARGEST_ALPHA:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: lora_alpha is {_shown(alpha)}; expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fits(pattern: str, module: str, folder: Path) -> bool:
    """Whether a pattern of an adapter's configuration, a regular expression, ends a module's name."""
    try:
        return regex.search(rf"(?:^|\.){pattern}$", module, timeout=1.0) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        why = one_line(error) or type(error).__name__
        raise ValueError(f"{folder / ADAPTER_CONFIG}: alpha_pattern {_shown(pattern)} is no pattern ({why})") from error


def _shown(value: Any) -> str:
    """A value for a message, cut off where it is long."""
    return repr(value)[:60]
