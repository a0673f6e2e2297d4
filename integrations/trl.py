"""What the labels mean that TRL's trainers hand to the model: not all of them are targets.

``SFTTrainer`` needs nothing of this. TRL itself is not imported: a trainer is known by the class of its arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vocabguard.config import ConfigError
from vocabguard.guard.batches import Targets
from vocabguard.results import NotApplicable

_SAMPLED = (
    "{trainer} trains on completions that the model itself writes, pulled or pushed as their reward says: "
    "they are no targets of the data, and none are counted"
)
_MIXED = (
    "{trainer} hands desirable and undesirable completions to the model alike: which are targets cannot be told, and "
    "nothing is counted"
)
_NOWHERE = (
    "{trainer} hands chosen and rejected completions to the model and does not say where they begin: which are targets "
    "cannot be told, and nothing is counted (`targets=` may tell it; ORPOTrainer and DPOTrainer are counted without)"
)
_UNCOUNTED = {"GRPO": _SAMPLED, "RLOO": _SAMPLED, "KTO": _MIXED, "CPO": _NOWHERE}
_NO_ECHO = (
    "echo: {trainer} trains on pairs of a chosen and a rejected completion, and nothing to repeat has a rejected one; "
    "allowed: echo in supervised fine-tuning, or echo.enabled=false"
)


def trainers_targets(args: Any, *, echo: bool) -> Targets | NotApplicable | None:
    """How a trainer's targets are to be counted.

    Args:
        echo: whether echo may be switched on.

    Returns:
        `chosen_targets` or `chosen_rows` for preferences, a reason where labels are no targets of the data, None where
        they are.

    Raises:
        ConfigError: for echo among preferences.
    """
    names = {kind.__name__.removesuffix("Config") for kind in type(args).__mro__}
    for name, reason in _UNCOUNTED.items():
        if name in names:
            return NotApplicable(reason.format(trainer=f"{name}Trainer"))
    for name, found in {"DPO": chosen_targets, "ORPO": chosen_rows}.items():
        if name in names:
            if echo:
                raise ConfigError(_NO_ECHO.format(trainer=f"{name}Trainer"))
            return found
    return None


def chosen_targets(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Targets of a batch of preferences: those of the chosen completions.

    The loss pulls the tokens of chosen completions and pushes those of rejected ones, so only the former are
    targets; a rejected completion's tokens are inputs. The reference model's forward pass is none of ours.

    Args:
        batch: a mapping with ``input_ids`` (2 n, T), n chosen rows above n rejected ones, and either ``labels`` of that
            shape or, before the trainer makes them, a ``completion_mask``.

    Returns:
        (2 n, T) inputs and (n, T - 1) targets, -100 where there is none; None for another batch.
    """
    ids, labels, completion = (batch.get(name) for name in ("input_ids", "labels", "completion_mask"))
    if labels is None and isinstance(ids, Tensor) and isinstance(completion, Tensor):
        labels = ids.masked_fill(completion == 0, -100)
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or len(labels) % 2:
        return None
    return ids, labels[: len(labels) // 2, 1:]


def chosen_rows(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Targets of a batch of ``ORPOTrainer``: all of the chosen rows, their prompts too.

    Its loss is the cross-entropy of the chosen row as a whole, and an odds ratio that pulls the chosen completion and
    pushes the rejected one (Hong et al. 2024, "ORPO", and TRL's ``ORPOTrainer.concatenated_forward``).

    Args:
        batch: what the model is called with, ``input_ids`` and ``attention_mask`` (2 n, T), n chosen rows above n
            rejected ones; or what the collate function gives, ``chosen_input_ids`` and ``chosen_attention_mask``
            (n, T).

    Returns:
        (2 n, T) or (n, T) inputs and (n, T - 1) targets, -100 where there is none; None for another batch, such as an
        encoder-decoder's.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    whole = isinstance(ids, Tensor)
    if not whole:
        ids, mask = batch.get("chosen_input_ids"), batch.get("chosen_attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or "decoder_input_ids" in batch:
        return None
    if whole and len(ids) % 2:
        return None
    chosen = len(ids) // 2 if whole else len(ids)
    return ids, ids[:chosen].masked_fill(mask[:chosen] == 0, -100)[:, 1:]
