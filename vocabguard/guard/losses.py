"""The loss of the data's targets apart from that of the echo targets, so that nobody thinks that training broke."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vocabguard import collective
from vocabguard.guard.faults import Faults
from vocabguard.measure.exposure import targets_of
from vocabguard.protect.rows import IGNORE

_KINDS = ("data", "echo")
_UNTOLD = (
    "vocabguard: loss/data and loss/echo leave batches with echo rows out: the model's output holds neither logits nor "
    "log_probs of every position, as fused losses do"
)

logger = logging.getLogger("vocabguard")


@torch.no_grad()
def target_losses(logits: Tensor, labels: Tensor, chosen: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of some targets.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T) int; `IGNORE` where there is no target.
        chosen: (B,) or (B, T) bool, rows or positions (of labels) whose targets count.
        shift: whether position t predicts label t + 1.

    Returns:
        The sum in nats, float32, and the number of targets, int64; both scalars on the logits' device.
    """
    wide = chosen[:, None].expand(labels.shape) if chosen.ndim == 1 else chosen
    targets, counted = targets_of(labels, shift), targets_of(wide, shift)
    keep = (targets != IGNORE) & counted.to(targets.device)
    # Few targets are chosen, so only their logits are brought to float32.
    picked = (logits[:, :-1] if shift else logits)[keep.to(logits.device)]
    total = cross_entropy(picked.float(), targets[keep].to(picked.device), reduction="sum")
    return total, keep.sum().to(picked.device)


def summed_losses(output: Any, labels: Tensor, chosen: Tensor, shift: bool) -> tuple[Tensor, Tensor] | None:
    """The same from what a model returned: its ``logits``, or the ``log_probs`` of the targets that TRL's head gives.

    Args:
        output: of a model.
        labels: (B, T) int.
        chosen: see `target_losses`.
        shift: see `target_losses`.

    Returns:
        None where the output has neither for every position.
    """
    logits, told = _field(output, "logits"), _field(output, "log_probs")
    if logits is not None and logits.shape[:2] == labels.shape:
        return target_losses(logits, labels, chosen, shift)
    targets = targets_of(labels, shift)
    if told is None or told.shape != targets.shape:
        return None
    wide = chosen[:, None].expand(labels.shape) if chosen.ndim == 1 else chosen
    keep = ((targets != IGNORE) & targets_of(wide, shift).to(targets.device)).to(told.device)
    return -told.detach().float().masked_fill(~keep, 0.0).sum(), keep.sum()


class LossMeter:
    """Adds up both losses from check to check, from the outputs of the model's training forward passes.

    Args:
        shift: whether the model shifts its labels.
    """

    def __init__(self, shift: bool) -> None:
        self._shift = shift
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._told = False

    def add(self, output: Any, kwargs: Mapping[str, Any], labels: Tensor | None, echo: Tensor | None) -> None:
        """Take in one forward pass.

        Args:
            output: of the model; its ``loss`` is used where there is one, `summed_losses` for the echo targets.
            kwargs: the forward pass's; ``num_items_in_batch`` says what the loss was divided by.
            labels: (B, T) of the batch; without them nothing is counted.
            echo: (B,) or (B, T) bool, True at echo rows; None without any.
        """
        if labels is None:
            return
        loss = _field(output, "loss")
        targets = (targets_of(labels, self._shift) != IGNORE).sum()
        if echo is None:
            of_echo, echoed = torch.zeros((), device=labels.device), torch.zeros_like(targets)
        elif (found := summed_losses(output, labels, echo, self._shift)) is not None:
            of_echo, echoed = found
        else:
            if not self._told:
                self._told = True
                logger.warning(_UNTOLD)
            return
        if loss is not None:
            divided_by = kwargs.get("num_items_in_batch")
            whole = loss.detach().float().mean() * (targets if divided_by is None else divided_by)
        elif (found := summed_losses(output, labels, torch.ones_like(labels).bool(), self._shift)) is not None:
            whole, _ = found
        else:
            return
        self._book("echo", of_echo, echoed)
        self._book("data", whole.to(of_echo.device) - of_echo, targets.to(echoed.device) - echoed)

    def take(self) -> dict[str, float]:
        """``loss/data`` and ``loss/echo`` over all processes: means in nats a target since the last call.

        There is none without targets.
        """
        own = [[float(booked.get(name, 0)) for name in _KINDS] for booked in (self._sums, self._counts)]
        self._sums, self._counts = {}, {}
        sums, counts = collective.total(torch.tensor(own, dtype=torch.float64)).tolist()
        return {f"loss/{name}": sums[at] / counts[at] for at, name in enumerate(_KINDS) if counts[at] > 0}

    def _book(self, name: str, total: Tensor, count: Tensor) -> None:
        # On the device: a number on the CPU would wait for it at every batch.
        if name in self._sums:
            self._sums[name] += total.double() if total.device.type != "mps" else total
            self._counts[name] += count
        else:
            self._sums[name] = total.double() if total.device.type != "mps" else total.clone()
            self._counts[name] = count.clone()

    def hook(self, model: nn.Module, current: Any, faults: Faults) -> Any:
        """Follow the training forward passes of a model.

        Args:
            model: its forward hook is used.
            current: gives (labels or None, echo mask or None) of the batch in the model, where labels do not reach it.
            faults: contains exceptions.
        """

        def after(module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or faults.down:
                return
            with faults.contain("telling losses apart"):
                known, echo = current()
                labels = kwargs.get("labels")
                self.add(output, kwargs, labels if isinstance(labels, Tensor) else known, echo)

        return model.register_forward_hook(after, with_kwargs=True)


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None
