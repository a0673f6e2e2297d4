"""The rows that PEFT adapters make of a matrix, chunk by chunk: the formulas, and the adapters of a live model.

LoRA on the head gives rows ``W + s B A``, on the input embedding ``W + s (B A)^T``; s is alpha over the rank or, rank
stabilised, over its root. DoRA (arXiv 2402.09353) rescales that to learned lengths. Trainable tokens replace some rows,
``modules_to_save`` all of them. Adapters are known by what they have: PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vocabguard.results import NotApplicable

_CHUNK_ROWS = 1024
# Kinds of LoRA whose forward pass is that of a matrix of rows; each by its class's name in PEFT.
_KNOWN_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant", "MiCALinearVariant", "MiCAEmbeddingVariant"}


@dataclass(frozen=True)
class LowRank:
    """One adapter's update of the rows.

    Attributes:
        left: (V, r) parameter.
        right: (r, width) parameter.
        scale: factor of their product.
        magnitude: learned lengths, (V,) of the rows or, of an embedding, (width,) of the columns; None without DoRA.
        by_column: whether the lengths are those of columns.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None
    by_column: bool = False

    def delta(self, part: slice, device: torch.device) -> Tensor:
        """(n, width) float32: what is added to some rows."""
        left, right = self.factors(part, device)
        return (left @ right) * self.scale

    def factors(self, part: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """(n, r) and (r, width) float32: the factors of `delta` but for the scale."""
        return self.left[part].to(device).float(), self.right.to(device).float()


@dataclass(frozen=True)
class Replaced:
    """(n,) int64 ids on the CPU, and the (n, width) rows that an adapter puts in their place."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class AdaptedRows:
    """The rows as the forward pass uses them: those of a frozen base with the active adapters on them.

    Attributes:
        base: (V, width) parameter beneath.
        updates: of the active adapters; none where they are merged or disabled.
        replaced: of the active adapters; none where they are merged or disabled.
    """

    kind: str
    base: Tensor
    updates: tuple[LowRank, ...]
    replaced: tuple[Replaced, ...]
    trained: tuple[Tensor, ...]

    @property
    def trainable(self) -> bool:
        """Whether the rows can move by gradient."""
        return any(parameter.requires_grad for parameter in self.trained)

    def same(self, other: AdaptedRows) -> bool:
        """Whether two ends of a tied matrix are adapted by the same memory."""
        return self._identity() == other._identity()

    @torch.no_grad()
    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows, at most ``size`` at a time.

        Yields:
            The rows' slice and (<= size, width) rows on the base's device: views of the base in its dtype where no
            adapter has changed anything yet, else float32. Nothing of the matrix's size is made.
        """
        base = self.base.detach()
        # At the start of a run all updates are zero: then rows keep their dtype, and a copy its size.
        updates = [one for one in self.updates if one.magnitude is not None or bool(one.left.any())]
        lengths = [column_lengths(base, one) if one.by_column else None for one in updates]
        for start in range(0, base.shape[0], size):
            part = slice(start, min(start + size, base.shape[0]))
            rows = updated_rows(base[part].float(), part, updates, lengths) if updates else base[part]
            yield part, replaced_rows(rows, part, self.replaced)

    def _identity(self) -> tuple[Any, ...]:
        low = [(one.left.data_ptr(), one.right.data_ptr(), one.scale, one.magnitude is None) for one in self.updates]
        return (*low, *(one.rows.data_ptr() for one in self.replaced))


def updated_rows(
    base: Tensor, part: slice, updates: Sequence[LowRank], lengths: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Some rows with updates on them, in the order of the forward pass.

    Args:
        base: (n, width) float32, the rows ``part`` of the base.
        lengths: of each update `column_lengths`, or None where its lengths are not those of columns.

    Returns:
        (n, width) float32, new where there is an update.
    """
    rows = base
    for one, length in zip(updates, lengths or [None] * len(updates), strict=True):
        if one.magnitude is None:
            rows = torch.addmm(rows, *one.factors(part, base.device), alpha=one.scale)
            continue
        # Lengths are those of the base with this adapter alone, whatever came before it.
        delta = one.delta(part, base.device)
        if length is not None:
            rows = (rows + delta) * (one.magnitude.to(rows) / length)
        else:
            factor = one.magnitude[part].to(rows) / torch.linalg.vector_norm(base + delta, dim=1)
            rows = (rows + delta) * factor[:, None]
    return rows


def replaced_rows(rows: Tensor, part: slice, replaced: Sequence[Replaced]) -> Tensor:
    """(n, width) the rows ``part`` with others in the place of some; new where there are any."""
    for one in replaced:
        here = ((one.ids >= part.start) & (one.ids < part.stop)).nonzero().flatten()
        if len(here):
            places = (one.ids[here] - part.start).to(rows.device)
            # Out of place: the rows may be a view of the base.
            rows = rows.index_copy(0, places, one.rows.detach()[here.to(one.rows.device)].to(rows))
    return rows


def column_lengths(base: Tensor, one: LowRank) -> Tensor:
    """(width,) float32: lengths of the base's columns with one adapter alone."""
    squares = torch.zeros(base.shape[1], device=base.device)
    for start in range(0, base.shape[0], _CHUNK_ROWS):
        part = slice(start, min(start + _CHUNK_ROWS, base.shape[0]))
        squares += (base[part].float() + one.delta(part, squares.device)).square_().sum(dim=0)
    return squares.sqrt_()


def adapter_of(module: nn.Module) -> AdaptedRows | NotApplicable | None:
    """What adapters make of a module's rows.

    Args:
        module: a module with rows, or PEFT's wrapper of one.

    Returns:
        None without an adapter, and where the rows are a parameter of their own (``modules_to_save``); a
        `NotApplicable` for adapters whose rows cannot be told chunk by chunk.
    """
    layer: Any = _inside(module)
    if not _adapts(layer):
        return None
    kind = type(layer).__name__
    if _adapts(layer.base_layer):
        return NotApplicable(f"it has one adapter over another ({kind}), whose rows are not told apart")
    if any(hasattr(parameter, "to_local") or hasattr(parameter, "ds_tensor") for parameter in layer.parameters()):
        return NotApplicable("its adapter is spread over processes, and such rows are not read")
    if hasattr(layer, "trainable_tokens_delta"):
        return _with_tokens(layer)
    if hasattr(layer, "lora_A") and not hasattr(layer, "parameter_name"):
        return _with_lora(layer)
    package = type(layer).__module__.rpartition(".")[0].rpartition(".")[2] or kind
    return NotApplicable(f"it is adapted by {package} ({kind}), whose rows are not read")


def plain_module(module: nn.Module) -> nn.Module:
    """The module beneath PEFT's wrappers whose ``weight`` is a parameter: the base's, or a saved module's own."""
    layer: Any = _inside(module)
    while _adapts(layer):
        layer = _inside(layer.base_layer)
    return cast(nn.Module, layer)


def plain_name(name: str) -> str:
    """A parameter's dotted name as it is without PEFT.

    >>> plain_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    parts = name.removeprefix("base_model.model.").split(".")
    kept, saved = [], False
    for part in parts:
        if saved or part in ("base_layer", "original_module", "token_adapter"):
            saved = False
        elif part == "modules_to_save":
            saved = True
        else:
            kept.append(part)
    return ".".join(kept)


def _inside(module: Any) -> Any:
    """The layer inside a wrapper that trains next to adapters; its active copy, where it keeps copies."""
    if hasattr(module, "token_adapter"):
        return module.token_adapter
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = () if module.disable_adapters else module.active_adapters
    return next((copies[name] for name in active if name in copies), module.original_module)


def _adapts(layer: Any) -> bool:
    return isinstance(getattr(layer, "base_layer", None), nn.Module) and hasattr(layer, "active_adapters")


def _active(layer: Any) -> list[str]:
    """Adapters that the forward pass adds to the base; merged ones are in the base already."""
    return [] if layer.disable_adapters or layer.merged_adapters else list(layer.active_adapters)


def _with_tokens(layer: Any) -> AdaptedRows:
    deltas = layer.trainable_tokens_delta
    replaced = tuple(
        Replaced(torch.as_tensor(layer.token_indices[name], dtype=torch.int64), deltas[name])
        for name in _active(layer)
        if name in deltas
    )
    return AdaptedRows("trainable tokens", layer.base_layer.weight, (), replaced, tuple(deltas.values()))


def _with_lora(layer: Any) -> AdaptedRows | NotApplicable:
    base = layer.base_layer.weight
    embedded = len(layer.lora_embedding_A) > 0
    lefts, rights = (layer.lora_embedding_A, layer.lora_embedding_B) if embedded else (layer.lora_B, layer.lora_A)
    lengths = getattr(layer, "lora_magnitude_vector", {})
    variants = {type(one).__name__ for one in getattr(layer, "lora_variant", {}).values()}
    if not variants <= _KNOWN_VARIANTS:
        return NotApplicable(f"it is adapted by a kind of LoRA ({', '.join(variants)}), whose rows are not read")
    updates = []
    for name in _active(layer):
        if name not in lefts:
            continue
        left, right = (lefts[name].T, rights[name].T) if embedded else (lefts[name].weight, rights[name].weight)
        if (left.shape[0], right.shape[1]) != tuple(base.shape):
            return NotApplicable(
                f"its adapter {name!r} makes {left.shape[0]} x {right.shape[1]} rows for a base of "
                f"{base.shape[0]} x {base.shape[1]}"
            )
        magnitude = lengths[name].weight.detach().flatten() if name in lengths else None
        updates.append(LowRank(left.detach(), right.detach(), float(layer.scaling[name]), magnitude, embedded))
    parts = (lefts, rights, lengths)
    trained = tuple(parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters())
    kind = "DoRA" if any(one.magnitude is not None for one in updates) else "LoRA"
    return AdaptedRows(kind, base, tuple(updates), (), trained)
