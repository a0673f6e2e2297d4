"""A model of one's own, asked by a function of the user's, as the probe asks Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.config import ConfigError
from vocabguard.measure.probe import undisturbed
from vocabguard.rows.models import core_of, input_device

Call = Callable[[nn.Module, Tensor], Tensor]
"""Takes the model and (B, T) int64 ids on its device, gives (B, T, V) logits: place t says what comes at t + 1."""

_TRIED = 4
"""Ids of the trial, of two rows."""


class CalledModel(nn.Module):
    """What the probe and the reference text ask in the model's place.

    Args:
        model: as it was attached.
        call: asks it.
        rows: V, of the output matrix.

    Example:
        >>> inner = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> asked = CalledModel(inner, lambda model, ids: model(ids), rows=8)
        >>> asked(input_ids=torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 8])
    """

    def __init__(self, model: nn.Module, call: Call, rows: int) -> None:
        super().__init__()
        self.model, self._call, self._rows = model, call, rows
        self.config: Any = getattr(core_of(model), "config", None)

    def forward(self, input_ids: Tensor) -> Any:
        """The logits of (B, T) ids, as ``.logits``."""
        return SimpleNamespace(logits=self._call(self.model, input_ids))

    def get_output_embeddings(self) -> Any:
        """What says how many logits a place has."""
        return SimpleNamespace(weight=torch.empty(self._rows, 0))

    def tried(self) -> CalledModel:
        """This one, after it was asked once.

        Raises:
            ConfigError: if that fails, or gives something else than logits.
        """
        ids = torch.zeros(2, _TRIED, dtype=torch.int64, device=input_device(self.model))
        try:
            with undisturbed(self), torch.no_grad():
                found = self._call(self.model, ids)
        except Exception as error:  # a function of the user's
            raise ConfigError(f"call: asking the model fails with {type(error).__name__}: {error}") from error
        shape = tuple(found.shape) if isinstance(found, Tensor) else None
        if shape is None or shape[:2] != tuple(ids.shape) or len(shape) != 3 or shape[2] < self._rows:
            got = f"a tensor of shape {shape}" if shape is not None else type(found).__name__
            wanted = f"logits of shape {(*ids.shape, self._rows)}"
            raise ConfigError(f"call gives {got} for ids of shape {tuple(ids.shape)}; allowed: {wanted}")
        return self
