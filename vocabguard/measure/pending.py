"""Steps whose targets on other processes are not known yet.

An averaged gradient holds the pull of all processes' targets, and which they were takes a message. To send one in every
step would make every process wait for the slowest, so row norms and masks of the steps stay where the gradient is, and
one packed message tells the masks of many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
        number: the step's; None until it is closed.
    """

    norms: Tensor
    targets: Tensor
    inputs: Tensor | None
    sampled: bool
    number: int | None = None


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
        >>> [step.targets.tolist() for step in steps.take(steps.masks() | theirs)], len(steps)
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

    @property
    def sampled(self) -> bool:
        """Whether push is taken in any of them."""
        return any(step.sampled for step in self._steps)

    def put(self, step: PendingStep) -> None:
        """Keep one step."""
        self._steps.append(step)

    def number(self, step: int) -> Tensor | None:
        """Number those that have none yet. Gives (V,) bool, their targets; None if there are none."""
        new = [one for one in self._steps if one.number is None]
        if not new:
            return None
        kept = self._steps[: len(self._steps) - len(new)]
        self._steps = [*kept, *(replace(one, number=step) for one in new)]
        return new[0].targets if len(new) == 1 else torch.stack([one.targets for one in new]).any(0)

    def masks(self) -> Tensor:
        """(n, ceil(V / 8)) uint8, packed: targets of each step, then inputs of those that need them."""
        asked = [step.inputs for step in self._steps if step.inputs is not None]
        return packed(torch.stack([step.targets for step in self._steps] + asked))

    def squares(self, rows: Sequence[int]) -> Tensor:
        """(steps, n) float64 on the CPU: squared norms of some rows, each step's."""
        return torch.stack([step.norms[list(rows)] for step in self._steps]).cpu().double().square()

    def keep_norms(self, rows: Mapping[int, bool], norms: Tensor) -> None:
        """Put the norms of some rows, (steps, n), in their place, and 0 for those that another process speaks for."""
        mine = torch.tensor(list(rows.values()))
        for step, found in zip(self._steps, norms, strict=True):
            step.norms[list(rows)] = (found.cpu() * mine).to(step.norms)

    def take(self, everyones: Tensor) -> Iterator[PendingStep]:
        """The steps, with the targets and inputs of all processes; none waits any more.

        Args:
            everyones: bitwise or over all processes of `masks`, on its device.
        """
        steps, self._steps = self._steps, []
        masks = unpacked(everyones, self._rows)
        inputs = iter(masks[len(steps) :])
        for step, targets in zip(steps, masks, strict=False):
            yield replace(step, targets=targets, inputs=None if step.inputs is None else next(inputs))

    def resize(self, rows: int) -> None:
        """Follow a resized matrix; new rows have had no gradient."""
        self._rows = rows
        self._steps = [
            replace(
                step, norms=fit_rows(step.norms, rows, 0), targets=fit_rows(step.targets, rows, False),
                inputs=None if step.inputs is None else fit_rows(step.inputs, rows, False),
            )
            for step in self._steps
        ]  # fmt: skip

    def to(self, device: torch.device) -> None:
        """Bring them to another device."""
        self._steps = [
            replace(
                step, norms=step.norms.to(device), targets=step.targets.to(device),
                inputs=None if step.inputs is None else step.inputs.to(device),
            )
            for step in self._steps
        ]  # fmt: skip
