"""Steps whose targets on other processes are not known yet.

An averaged gradient holds the pull of all processes' targets, and which they were takes a message. To send one in every
step would make every process wait for the slowest, so row norms and masks of the steps stay where the gradient is, and
one packed message tells the masks of many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabguard.vocabulary.table import fit_rows

_BYTES = 2**26
_FEWEST, _MOST = 8, 256


def packed(masks: Tensor) -> Tensor:
    """Eight flags a byte, so that a message is small.

    Args:
        masks: (n, V) bool.

    Returns:
        (n, ceil(V / 8)) uint8 on the same device; bitwise or of such tensors is that of the masks.

    Example:
        >>> packed(torch.tensor([[True, False, True, False, False, False, False, False, True]])).tolist()
        [[5, 1]]
    """
    count, rows = masks.shape
    bits = torch.nn.functional.pad(masks, (0, -rows % 8)).view(count, -1, 8).to(torch.uint8)
    return (bits << _places(masks.device)).sum(dim=-1, dtype=torch.uint8)


def unpacked(masks: Tensor, rows: int) -> Tensor:
    """(n, rows) bool of what `packed` gave.

    >>> unpacked(torch.tensor([[5, 1]], dtype=torch.uint8), rows=9).int().tolist()
    [[1, 0, 1, 0, 0, 0, 0, 0, 1]]
    """
    return ((masks[..., None] >> _places(masks.device)) & 1).flatten(1)[:, :rows].bool()


def _places(device: torch.device) -> Tensor:
    # Made on the device: a list of numbers would be sent there.
    return torch.arange(8, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class PendingStep:
    """One optimizer step, on the gradient's device.

    Attributes:
        norms: (V,) float32 row norms of the gradient; 0 for rows that this process does not have.
        targets: (V,) bool, this process's targets.
        inputs: (V,) bool, this process's inputs; None where they are not needed.
        sampled: whether push is taken in this step.
    """

    norms: Tensor
    targets: Tensor
    inputs: Tensor | None
    sampled: bool


class PendingSteps:
    """Steps that wait for the other processes' masks, in order.

    Args:
        rows: V.

    Attributes:
        most: how many may wait: what 64 MiB hold, between 8 and 256.

    Example:
        >>> steps = PendingSteps(rows=3)
        >>> mine = torch.tensor([True, False, False])
        >>> steps.put(PendingStep(torch.tensor([1.0, 2.0, 3.0]), mine, None, sampled=False))
        >>> theirs = torch.tensor([[0b100]], dtype=torch.uint8)  # of another process, whose target was the last row
        >>> [step.targets.tolist() for step in steps.take(lambda masks: masks | theirs)], len(steps)
        ([[True, False, True]], 0)
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._steps: list[PendingStep] = []
        self.most = max(_FEWEST, min(_MOST, _BYTES // (5 * max(1, rows))))

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def full(self) -> bool:
        """Whether the masks must be exchanged before more steps come."""
        return len(self._steps) >= self.most

    def put(self, step: PendingStep) -> None:
        """Keep one step."""
        self._steps.append(step)

    def take(self, any_of: Callable[[Tensor], Tensor]) -> Iterator[PendingStep]:
        """The steps, with the targets and inputs of all processes; none waits any more.

        Args:
            any_of: bitwise or over all processes of an (n, B) uint8 tensor, on its device; called at most once.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        asked = [step for step in steps if step.inputs is not None]
        masks = [step.targets for step in steps] + [step.inputs for step in asked if step.inputs is not None]
        everyones = unpacked(any_of(packed(torch.stack(masks))), self._rows)
        inputs = iter(everyones[len(steps) :])
        for step, targets in zip(steps, everyones, strict=False):
            yield PendingStep(step.norms, targets, None if step.inputs is None else next(inputs), step.sampled)

    def resize(self, rows: int) -> None:
        """Follow a resized matrix; new rows have had no gradient."""
        self._rows = rows
        self._steps = [
            PendingStep(
                fit_rows(step.norms, rows, 0), fit_rows(step.targets, rows, False),
                None if step.inputs is None else fit_rows(step.inputs, rows, False), step.sampled,
            )
            for step in self._steps
        ]  # fmt: skip

    def to(self, device: torch.device) -> None:
        """Bring them to another device."""
        self._steps = [
            PendingStep(
                step.norms.to(device), step.targets.to(device),
                None if step.inputs is None else step.inputs.to(device), step.sampled,
            )
            for step in self._steps
        ]  # fmt: skip
