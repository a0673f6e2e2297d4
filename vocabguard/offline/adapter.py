"""The rows that a PEFT adapter makes of its base's, chunk by chunk and without merging anything on disk.

LoRA (on the head ``W + s B A``, on the embedding ``W + s (B A)^T``; rank-stabilised too; DoRA on the head),
``modules_to_save`` and trainable tokens. What else an adapter does leaves the rows alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vocabguard.offline.checkpoint import ADAPTER_CONFIG, Checkpoint, read_json
from vocabguard.offline.tensors import (
    LoadedStore,
    SafetensorsStore,
    TensorStore,
    load_torch_file,
    norms_of,
    safetensors_names,
    slices_of,
)
from vocabguard.results import MatrixName, NotApplicable
from vocabguard.snapshot import COMMON_NAMES, Baseline

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
