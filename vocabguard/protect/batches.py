"""Echo rows appended to a batch that is made of tensors already."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vocabguard.protect.collator import EchoError
from vocabguard.protect.rows import IGNORE, EchoRow


def add_rows(batch: Any, rows: Sequence[EchoRow], pad: int) -> Tensor:
    """Append rows to a padded batch, in place, and return where they are: (B + n,) bool on the batch's device.

    Rows are padded on the side on which the batch is. A batch whose rows are joined into one (by position ids that
    begin anew, or by sequence lengths) is refused: there, echo rows have to come through the collate function.

    Args:
        batch: a mapping with ``input_ids`` and ``labels`` (B, T), and what else the model takes.
        pad: id of the padding token.

    Raises:
        EchoError: if the batch cannot take such rows; it is not changed then.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> add_rows(batch, [EchoRow(input_ids=(8, 9), labels=(-100, 9))], pad=0)
        tensor([False,  True])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [8, 9, 0]], [[5, 6, 7], [-100, 9, -100]])
    """
    if not isinstance(batch, MutableMapping):
        raise EchoError(f"the batch is a {type(batch).__name__}; allowed: a dict, or a collate function from `guard`")
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.ndim != 2 or labels.ndim != 2:
        raise EchoError(f"the batch holds {sorted(batch)}; echo rows need 'input_ids' and 'labels' of shape (B, T)")
    if _joined(batch):
        raise EchoError("the batch joins several rows into one; use the guard's collate function in the dataloader")
    left = _padded_left(batch)
    width = max([ids.shape[1], *(len(row.input_ids) for row in rows)])
    grown = {key: _grown(key, batch, rows, width, pad, left) for key in batch if isinstance(batch[key], Tensor)}
    mask = torch.zeros(len(ids) + len(rows), dtype=torch.bool, device=ids.device)
    mask[len(ids) :] = True
    batch.update(grown)
    return mask


def _grown(
    key: str, batch: MutableMapping[str, Any], rows: Sequence[EchoRow], width: int, pad: int, left: bool
) -> Tensor:
    """One tensor of the batch with the rows' part below it."""
    old, ids = batch[key], batch["input_ids"]
    fill, parts = _row_parts(key, rows, pad)
    # Labels of an encoder-decoder have a width of their own.
    apart = key == "labels" and old.shape[1:] != ids.shape[1:]
    if parts is None or old.ndim != 2 or (old.shape != ids.shape and not apart):
        shape = tuple(old.shape)
        raise EchoError(f"the batch holds {key!r} of shape {shape}, of which an echo row knows nothing")
    wide = max([old.shape[1], *(len(part) for part in parts)]) if apart else width
    result = torch.full((len(old) + len(rows), wide), fill, dtype=old.dtype, device=old.device)
    begin = wide - old.shape[1] if left else 0
    result[: len(old), begin : begin + old.shape[1]] = old
    for place, part in enumerate(parts, start=len(old)):
        begin = wide - len(part) if left else 0
        result[place, begin : begin + len(part)] = torch.tensor(part, dtype=old.dtype, device=old.device)
    return result


def _row_parts(key: str, rows: Sequence[EchoRow], pad: int) -> tuple[int, list[Sequence[int]] | None]:
    """The fill value of a key and every row's values; None for a key that means nothing for an echo row."""
    ids = [row.input_ids for row in rows]
    known: dict[str, tuple[int, list[Sequence[int]]]] = {
        "input_ids": (pad, list(ids)),
        "labels": (IGNORE, [row.labels for row in rows]),
        "attention_mask": (0, [[1] * len(row) for row in ids]),
        "token_type_ids": (0, [[0] * len(row) for row in ids]),
        "position_ids": (0, [range(len(row)) for row in ids]),
    }
    return known.get(key, (0, None))


def _joined(batch: MutableMapping[str, Any]) -> bool:
    """Whether rows are joined: positions that begin anew within a row, or lengths of its parts."""
    positions = batch.get("position_ids")
    anew = isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions[:, 1:] == 0).any())
    masked = isinstance(batch.get("attention_mask"), Tensor)
    return any(key.startswith("cu_seq_lens") for key in batch) or (anew and not masked)


def _padded_left(batch: MutableMapping[str, Any]) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any() and (mask[:, -1] != 0).all())
