"""The only room that talks between processes.

Every function but `report_failure` must be called by all ranks together, and is the identity where torch.distributed is
missing, not initialised, or has a world of one.

The guard talks on a gloo group of its own. Before each piece of talk the ranks exchange a flag of health. A rank whose
guard fails sends its flag at once, without waiting: training, on its own group, goes on there; the others find the flag
where they next talk, whatever about, and raise `PeerFaultError`. So no rank waits for one that is silent for good.
Every flag has one shape, which a rank in fault need not know the others' talk for; a few numbers ride along in it.
"""

from __future__ import annotations

import atexit
import pickle
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vocabguard.results import VocabGuardError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others; then its guard disables itself."""

WORDS = 3
"""Numbers that ride along in a flag of health."""


class PeerFaultError(VocabGuardError, RuntimeError):
    """The guard of another process, or this one's, has failed: there is nothing to talk about any more."""


@dataclass
class _Line:
    """The guard's own group.

    torch.distributed keeps the groups alive. A reference of ours would outlive `destroy_process_group`, and a group
    that dies with the interpreter aborts the process.

    Attributes:
        of_group: weak reference to the group, which is over gloo, whatever training uses.
        of_world: the same of the default group that it was made for.
        opened: whether a run goes on.
        failed: rank of the guard that failed, as far as known here.
        sent: this rank's message that it failed, which the others may not have read yet.
    """

    of_group: weakref.ref[Any]
    of_world: weakref.ref[Any]
    opened: bool = False
    failed: int | None = None
    sent: Any = None

    @property
    def group(self) -> Any:
        """The group itself."""
        return self.of_group()

    @property
    def stands(self) -> bool:
        """Whether the default group is still the one it was made for."""
        return self.group is not None and self.of_world() is dist.group.WORLD


_lines: list[_Line] = []  # at most one: of the default group as it is now


def world_size() -> int:
    """Number of processes that train together, at least 1."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _initialised() else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that prints and writes."""
    return rank() == 0


def init_group() -> None:
    """Initialise the guard's process group: a run begins, and earlier faults are forgotten.

    Raises:
        RuntimeError: if the other processes do not open theirs within `PATIENCE`, or torch is built without gloo.
    """
    if world_size() == 1:
        return
    try:
        line = _line()
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank()} of {world_size()} did not reach the others' guards ({error}); each needs its own"
        ) from error
    line.opened, line.failed, line.sent = True, None, None


def shutdown_group() -> None:
    """The last talk of a run, so that none of its messages is left for the next one. Nothing if none is open."""
    if (line := _open()) is None:
        return
    if line.sent is not None:
        line.sent.wait()
    elif line.failed is None:
        dist.all_reduce(_flag(None), group=line.group)
    _shutdown()


def report_failure() -> None:
    """This rank's guard has failed: let the others know where they next talk. Does not wait, may be called at will."""
    if (line := _open()) is not None and line.failed is None:
        line.failed = rank()
        line.sent = dist.all_reduce(_flag(rank()), group=line.group, async_op=True)


def raise_if_peer_failed() -> None:
    """Raise `PeerFaultError` if the guard of any process has failed."""
    _ask()


def meets() -> bool:
    """Whether the guard of any process has failed; for those that have failed to call too, all at the same place."""
    if (line := _open()) is None:
        return False
    try:
        if line.sent is not None:
            line.sent.wait()
            return True
        raise_if_peer_failed()
    except RuntimeError:  # a guard has failed, or its process has ended
        return True
    return False


def any_in_step(mask: Tensor) -> Tensor:
    """Where a bool mask is set on any rank, in the middle of a step and by the training's own process group.

    No flag of health comes before it: a rank whose guard has failed must call it too. Where that group reaches the
    mask's device, as NCCL does, the host does not wait.
    """
    if world_size() == 1:
        return mask
    return _in_step(mask, torch.uint8, dist.ReduceOp.MAX).to(mask.device) > 0


def sum_in_step(sums: Tensor) -> Tensor:
    """The sum over all ranks of a float tensor; see `any_in_step`."""
    if world_size() == 1:
        return sums
    result = _in_step(sums, sums.dtype, dist.ReduceOp.SUM)
    return result.to(sums.device)


class Piece:
    """A piece of talk: one flag of health, then messages between which nothing happens that may fail.

    All ranks must make the same calls. Every one returns a new tensor, the same on all ranks.

    Args:
        *words: at most `WORDS` integers of this rank, each below 2^40.

    Attributes:
        words: their sums over all ranks.

    Raises:
        PeerFaultError: if the guard of any process has failed.

    Example:
        >>> piece = Piece(7)
        >>> piece.words[0], piece.total(torch.tensor([1, 2])).tolist(), piece.gathered(torch.tensor([1, 2])).tolist()
        (7, [1, 2], [[1, 2]])
    """

    def __init__(self, *words: int) -> None:
        self.words = _ask(*words)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of a tensor of any shape, of an integer or floating dtype, the same on every rank.

        Raises:
            TypeError: for a bool tensor, which has no sum.
        """
        if tensor.dtype == torch.bool:
            raise TypeError("tensor is of dtype torch.bool; allowed: integer and floating dtypes")
        return _reduce(tensor, "SUM")

    def largest(self, tensor: Tensor) -> Tensor:
        """Element by element the largest value of all ranks."""
        return _reduce(tensor, "MAX")

    def any_bits(self, masks: Tensor) -> Tensor:
        """Bitwise or over all ranks of a uint8 tensor of any shape."""
        return _reduce(masks, "BOR")

    def gathered(self, own: Tensor) -> Tensor:
        """(ranks, ...) every rank's tensor, of one shape on all; half of what a sum of tensors so long would send."""
        if world_size() == 1:
            return own.detach().clone()[None]
        here = own.detach().to("cpu").contiguous()
        everyones = here.new_empty(world_size(), *here.shape)
        dist.all_gather(list(everyones.unbind()), here, group=_line().group)
        return everyones.to(own.device)


@dataclass(frozen=True)
class Telling:
    """What a work of several ranks has to tell: of one shape on all of them.

    Attributes:
        gathered: whether it wants every rank's tensor, as `Piece.gathered` gives them; else their sum.
    """

    tensor: Tensor
    gathered: bool = False


Talk = Generator[Telling, Tensor, T]
"""A work that yields what it has to tell, gets what came of it, and returns its result."""


def together(works: Sequence[Talk[T]]) -> list[T]:
    """Do several works: what all of them have to tell next goes in one piece of talk, one message of each kind.

    Example:
        >>> def share(of: float) -> Talk[float]:
        ...     whole = yield Telling(torch.tensor(of))
        ...     return of / whole.item()
        >>> together([share(2.0), share(3.0)])
        [1.0, 1.0]
    """
    results: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(works)))
    while answers:
        asked: dict[int, Telling] = {}
        for place, answer in answers.items():
            try:
                asked[place] = works[place].send(answer)
            except StopIteration as end:
                results[place] = end.value
        answers = _answered(asked) if asked else {}
    return [results[place] for place in range(len(works))]


def _answered(asked: dict[int, Telling]) -> dict[int, Any]:
    piece, answers = Piece(), {}
    for kind in dict.fromkeys((told.gathered, told.tensor.dtype) for told in asked.values()):
        some = {place: told.tensor for place, told in asked.items() if (told.gathered, told.tensor.dtype) == kind}
        message = torch.cat([tensor.detach().cpu().flatten() for tensor in some.values()])
        found = piece.gathered(message) if kind[0] else piece.total(message)
        parts = found.split_with_sizes([tensor.numel() for tensor in some.values()], dim=-1)
        for (place, tensor), part in zip(some.items(), parts, strict=True):
            answers[place] = part.reshape([*found.shape[:-1], *tensor.shape]).to(tensor.device)
    return answers


def total(tensor: Tensor) -> Tensor:
    """`Piece.total`, as a piece by itself."""
    return Piece().total(tensor)


def largest(tensor: Tensor) -> Tensor:
    """`Piece.largest`, as a piece by itself."""
    return Piece().largest(tensor)


def any_of(mask: Tensor) -> Tensor:
    """Where a bool mask, of the same shape on every rank, is set on any; the mask itself in a world of one."""
    if world_size() == 1:
        return mask
    return largest(mask.to(torch.uint8)) > 0


def agree(value: T) -> T:
    """Rank 0's value, small and picklable, on every rank; what the others pass is not looked at."""
    if world_size() == 1:
        return value
    sent = bytearray(pickle.dumps(value)) if is_main() else bytearray()
    size = _ask(len(sent))[0]
    box = torch.frombuffer(sent, dtype=torch.uint8) if is_main() else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(box, src=0, group=_line().group)
    if is_main():
        return value
    received: T = pickle.loads(box.numpy().tobytes())
    return received


def everyone(value: T) -> list[T]:
    """Every rank's value, small and picklable, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    raise_if_peer_failed()
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_line().group)
    return found


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _line() -> _Line:
    """The group of the guard's own, made at first use."""
    if not _lines or not _lines[0].stands:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        _lines[:] = [_Line(weakref.ref(group), weakref.ref(dist.group.WORLD))]
    return _lines[0]


def _shutdown() -> None:
    """Leave the group, here only. Where it lasts until the interpreter ends, its threads may abort the process."""
    if _lines and _lines[0].stands and _initialised():
        dist.destroy_process_group(_lines[0].group)
    _lines.clear()


atexit.register(_shutdown)


def _open() -> _Line | None:
    """The line of the run that goes on, if there is one."""
    known = world_size() > 1 and bool(_lines) and _lines[0].stands
    return _lines[0] if known and _lines[0].opened else None


def _ask(*words: int) -> list[int]:
    """Exchange the flag of health; gives the sums of `WORDS` numbers, those that are not given being 0."""
    given = [*words, *[0] * (WORDS - len(words))]
    if world_size() == 1:
        return given
    line = _line()
    if line.failed is None:
        flag = _flag(None, given)
        dist.all_reduce(flag, group=line.group)
        failed = flag[: world_size()].nonzero().flatten().tolist()
        line.failed = failed[0] if failed else None
        given = flag[world_size() :].tolist()
    if line.failed is not None:
        raise PeerFaultError(f"the guard of process {line.failed} of {world_size()} has failed")
    return given


def _flag(failed: int | None, words: Sequence[int] = (0,) * WORDS) -> Tensor:
    """(world + WORDS,) int64: nonzero at a failed rank; and what rides along."""
    flag = torch.tensor([0] * world_size() + [*words])
    if failed is not None:
        flag[failed] = 1
    return flag


def _in_step(tensor: Tensor, dtype: torch.dtype, how: Any) -> Tensor:
    """By the training's own group, on a device that it reaches."""
    reached = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    there = tensor.device if tensor.device.type in reached or not reached else torch.device(reached[0])
    result = tensor.detach().to(there, dtype, copy=True)
    work = dist.all_reduce(result, op=how, async_op=True)
    assert work is not None
    work.wait()
    return result


def _reduce(tensor: Tensor, how: Literal["SUM", "MAX", "BOR"]) -> Tensor:
    """A new tensor, element by element over all ranks, where all of them are known to take part."""
    if world_size() == 1:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    result = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    # By name, since torch.distributed has no ReduceOp where it is not built.
    dist.all_reduce(result, op=getattr(dist.ReduceOp, how), group=_line().group)
    return result.to(tensor.device)
