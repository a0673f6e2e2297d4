"""Coverage as a function over batches, for engines that spread data over machines.

`CountBatch` maps a batch of columns to the counts in it, as `datasets.Dataset.map(batched=True)` and Ray Data's
``map_batches`` call it; `total_counts` adds up what comes out. Neither reads files nor starts processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocabguard.data.choices import Kind, Loss
from vocabguard.data.counting import count_rows
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Examples
from vocabguard.data.render import Trainer
from vocabguard.data.tables import WHOLE


class CountBatch:
    """Counts the targets and inputs of a batch of rows.

    Args:
        kind, columns, roles: see `readers.read_examples`.
        loss, eos, max_length, trainer: see `TargetEncoder`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/assets")
        >>> counted = CountBatch(tokenizer)({"text": ["the data", "the"]})
        >>> targets, inputs = total_counts([counted], len(tokenizer))
        >>> int(targets.sum()), int(inputs.sum())
        (5, 7)
    """

    def __init__(
        self, tokenizer: Any, *, kind: Kind | None = None, columns: Sequence[str] = (),
        roles: Mapping[str, str] | None = None, loss: Loss = "assistant", eos: bool = True,
        max_length: int | None = None, trainer: Trainer = "trl",
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._reading: tuple[Any, ...] = (kind, tuple(columns), dict(roles or {}))
        self._options: dict[str, Any] = {"loss": loss, "eos": eos, "max_length": max_length, "trainer": trainer}

    @cached_property
    def _encoder(self) -> TargetEncoder:
        return TargetEncoder(self._tokenizer, **self._options)

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoder, which each process makes for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """The counts of a batch.

        Args:
            batch: lists or arrays by column, equally long.

        Returns:
            ``id``, ``targets`` and ``inputs``: a value for each token that occurs; ``rows``: the rows of the batch in
            the first place, then zeros.

        Raises:
            DataError: for a row that cannot be used.
        """
        columns = {name: _listed(values) for name, values in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not rows:
            return {"id": [], "targets": [], "inputs": [], "rows": []}
        kind, names, roles = self._reading
        reader = Examples((), kind, names, roles, bool(self._tokenizer.chat_template), WHOLE, False)
        examples = reader.of_rows((f"row {place} of a batch", row) for place, row in enumerate(rows))
        found = count_rows(self._encoder, list(examples))
        targets, inputs = found.counts.tolist()
        told = [len(rows), *[0] * (len(targets) - 1)][: len(targets)]
        return {"id": found.ids.tolist(), "targets": targets, "inputs": inputs, "rows": told}


def total_counts(counted: Iterable[Mapping[str, Any]], size: int) -> tuple[Tensor, Tensor]:
    """(size,) int64 targets and inputs, added up.

    Args:
        counted: what `CountBatch` gave, in batches or in rows.
        size: V, one more than the highest id.
    """
    total = np.zeros((2, size), dtype=np.int64)
    for part in counted:
        ids = np.atleast_1d(np.asarray(part["id"], dtype=np.int64))
        for place, name in enumerate(("targets", "inputs")):
            np.add.at(total[place], ids, np.asarray(part[name], dtype=np.int64))
    return torch.from_numpy(total[0].copy()), torch.from_numpy(total[1].copy())


def _listed(values: Any) -> list[Any]:
    return list(map(_plain, values.tolist() if isinstance(values, np.ndarray) else values))


def _plain(value: Any) -> Any:
    """Arrays inside rows, as Ray gives them, are lists."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
