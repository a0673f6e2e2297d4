"""What the labels mean that TRL's trainers hand to the model: not all of them are what the data asks for.

``SFTTrainer`` needs nothing of this. TRL itself is not imported: a trainer is known by the class of its arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vocabguard.config import ConfigError
from vocabguard.guard import VocabGuard
from vocabguard.guard.observe import Targets
from vocabguard.guard.protection import needed
from vocabguard.results import NotApplicable

_SAMPLED = (
    "{trainer} trains on completions that the model itself writes, pulled or pushed as their reward says: "
    "they are no targets of the data, and none are counted"
)
_MIXED = (
    "{trainer} hands desirable and undesirable completions to the model alike: what is asked for cannot be told, and "
    "nothing is counted"
)
_UNCOUNTED = {"GRPO": _SAMPLED, "RLOO": _SAMPLED, "KTO": _MIXED}
_NO_ECHO = (
    "echo: DPOTrainer trains on pairs of a chosen and a rejected completion, and nothing to repeat has a rejected one; "
    "allowed: echo in supervised fine-tuning, or echo.enabled=false"
)


def targets_of(args: Any, guard: VocabGuard) -> Targets | NotApplicable | None:
    """How a trainer's targets are to be counted.

    Args:
        args: the trainer's arguments.
        guard: whose settings may ask for echo.

    Returns:
        `chosen_targets` for preferences, a reason where labels are no targets of the data, None where they are.

    Raises:
        ConfigError: for echo among preferences.
    """
    names = {kind.__name__.removesuffix("Config") for kind in type(args).__mro__}
    for name, reason in _UNCOUNTED.items():
        if name in names:
            return NotApplicable(reason.format(trainer=f"{name}Trainer"))
    if "DPO" not in names:
        return None
    if needed(guard.config, guard.rules, "echo"):
        raise ConfigError(_NO_ECHO)
    return chosen_targets


def chosen_targets(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Targets of a batch of preferences: those of the chosen completions.

    The loss pulls the tokens of chosen completions and pushes those of rejected ones, so only the former are what the
    data asks for; a rejected completion's tokens are inputs. The reference model's forward pass is none of ours.

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
