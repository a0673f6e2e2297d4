"""How far the body of a tuned checkpoint moved from its base's, block by block: every tensor but the vocabulary rows.

Tensors are read piece by piece, so that memory does not grow with the model. Rows that stand still say nothing of the
layers between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vocabguard.files import one_line
from vocabguard.results import NotApplicable
from vocabguard.rows.baselines import Baseline, one_torch_thread
from vocabguard.rows.checkpoints import Checkpoint, adapted_modules
from vocabguard.rows.tensors import ADAPTER_CONFIG, COMMON_NAMES, MATRICES, TensorStore, open_store

ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float8_e4m3fn": 2.0**-3, "float8_e5m2": 2.0**-2}
"""Largest relative change that writing a tensor in these types makes."""

# Elements that are read at a time, and of them those that are converted and added up at a time.
_PIECE, _CACHED = 2**20, 2**16
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
# Beside the vocabulary rows these are biases over it.
_OF_HEAD = tuple(f".{name}" for name in ("lm_head.bias", "embed_out.bias"))

_Pieces = Iterable[tuple[Tensor, Tensor]]


@dataclass
class BlockDrift:
    """A block's change, its tensors taken together as one vector.

    Attributes:
        name: the number of the layer, with what stands before it where there are several stacks; ``outside`` for what
            is in no layer.
        tensors: compared.
        changed: of these, in which at least one element is another one.
        base_sq: squared norm at the base.
        now_sq: squared norm now.
        dot: inner product of both.
        step_sq: squared norm of the difference.
        worst: name and relative change of the tensor that changed most.
        broken: tensors with NaN or Inf now.
    """

    name: str
    tensors: int = 0
    changed: int = 0
    base_sq: float = 0.0
    now_sq: float = 0.0
    dot: float = 0.0
    step_sq: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    broken: int = 0

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm at the base; NaN of nothing."""
        return _ratio(self.step_sq, self.base_sq)

    @property
    def cosine(self) -> float:
        """Of both, in [-1, 1]; NaN where one is zero."""
        product = math.sqrt(self.base_sq * self.now_sq)
        return max(-1.0, min(1.0, self.dot / product)) if product > 0 else math.nan

    def take(self, name: str, pieces: _Pieces) -> None:
        """Add a tensor, given as pieces of it at the base and now."""
        base_sq = now_sq = dot = step_sq = 0.0
        for before, after in pieces:
            # Most tensors of most pairs are the same, or none is.
            same = before.dtype == after.dtype and torch.equal(before, after)
            for one in _sums(before, before if same else after):
                base_sq, now_sq, dot, step_sq = base_sq + one[0], now_sq + one[1], dot + one[2], step_sq + one[3]
        self.tensors += 1
        self.changed += step_sq != 0
        if not math.isfinite(now_sq):
            self.broken += 1
            return
        relative = _ratio(step_sq, base_sq)
        if relative > self.worst[1] or not self.worst[0]:
            self.worst = name, relative
        self.base_sq += base_sq
        self.now_sq += now_sq
        self.dot += dot
        self.step_sq += step_sq


@dataclass(frozen=True)
class BodyDrift:
    """What became of the body.

    Attributes:
        blocks: in the model's order, what lies in no layer last.
        only_base: tensors that the tuned checkpoint lacks.
        only_tuned: tensors that the base lacks.
        unlike: tensors that cannot be compared, and why.
        dtypes: types of the elements at the base and now.
    """

    blocks: tuple[BlockDrift, ...]
    only_base: tuple[str, ...] = ()
    only_tuned: tuple[str, ...] = ()
    unlike: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

    @property
    def identical(self) -> bool:
        """Whether every tensor of the body is there on both sides and the same."""
        return not (self.only_base or self.only_tuned or self.unlike) and not any(one.changed for one in self.blocks)

    @property
    def rounded(self) -> bool:
        """Whether all changes are no larger than what writing the weights in the tuned side's type makes."""
        if self.dtypes[0] == self.dtypes[1]:
            return False
        most = max((ROUNDING.get(kind, 0.0) for kind in self.dtypes[1]), default=0.0)
        return all(one.worst[1] <= most for one in self.blocks) and not any(one.broken for one in self.blocks)


def body_drift(
    base: Checkpoint, tuned: Checkpoint, progress: Callable[[str, int, int], None] | None = None
) -> BodyDrift | NotApplicable:
    """Measure every tensor of the body against the base's.

    Tensors are matched by name; a wrapper's prefix before all names of one side, as Lightning writes it, is seen
    through. Of an adapter those are measured that it changes; the others are the base's.

    Args:
        progress: called with ``body``, the tensors done and the tensors there are.
    """
    try:
        # Each operation is small, so that waiting for all cores would cost more than it saves.
        with one_torch_thread():
            if (tuned.path / ADAPTER_CONFIG).is_file():
                return _of_adapter(base, tuned.path, progress)
            return _of_stores(base, tuned, progress)
    except (ValueError, OSError) as error:
        return NotApplicable(one_line(error))


def _of_stores(
    base: Checkpoint, tuned: Checkpoint, progress: Callable[[str, int, int], None] | None
) -> BodyDrift | NotApplicable:
    before, after = open_store(base.path), open_store(tuned.path)
    theirs, ours = _stripped(base, before), _stripped(tuned, after)
    names = [name for name in theirs if name in ours]
    if not theirs and not ours:
        return NotApplicable("both files hold vocabulary rows only")
    blocks, unlike = _Blocks(), dict[str, str]()
    kinds: tuple[set[str], set[str]] = (set(), set())
    for done, name in enumerate(names, start=1):
        forms = before.form(theirs[name]), after.form(ours[name])
        why = _unlike(*forms)
        if why:
            unlike[name] = why
        else:
            kinds[0].add(forms[0][1])
            kinds[1].add(forms[1][1])
            pieces = zip(
                before.pieces(theirs[name], _PIECE), after.pieces(ours[name], _PIECE), strict=True
            )  # fmt: skip
            blocks.take(name, pieces)
        if progress is not None:
            progress("body", done, len(names))
    return BodyDrift(
        blocks.ordered(), tuple(sorted(theirs.keys() - ours.keys())), tuple(sorted(ours.keys() - theirs.keys())),
        unlike, (frozenset(kinds[0]), frozenset(kinds[1])),
    )  # fmt: skip


def _of_adapter(base: Checkpoint, folder: Path, progress: Callable[[str, int, int], None] | None) -> BodyDrift:
    blocks, unlike = _Blocks(), dict[str, str]()
    found = list(adapted_modules(folder, base))
    for done, (name, rows, now) in enumerate(found, start=1):
        if isinstance(now, NotApplicable):
            unlike[name] = now.reason
        elif (now.rows, now.width) != (rows.rows, rows.width):
            unlike[name] = f"it is {now.rows} x {now.width}, the base's {rows.rows} x {rows.width}"
        else:
            blocks.take(name, _row_pieces(rows, now))
        if progress is not None:
            progress("body", done, len(found))
    return BodyDrift(blocks.ordered(), unlike=unlike)


def _row_pieces(base: Baseline, now: Baseline) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _PIECE // base.width)
    for (_, one), (_, other) in zip(base.chunks(size), now.chunks(size), strict=True):
        yield one.float().flatten(), other.float().flatten()


def _sums(before: Tensor, after: Tensor) -> Iterator[tuple[float, float, float, float]]:
    """Squared norms of both, their inner product, the squared norm of their difference, part by part.

    The parts stay in the cache, so that each element comes from memory once; a product of one is of float32.
    """
    for one, other in zip(_parts(before), _parts(after), strict=True):
        a = one.float()
        if before is after:
            square = torch.dot(a, a).item()
            yield square, square, square, 0.0
            continue
        b = other.float()
        step = b - a
        yield torch.dot(a, a).item(), torch.dot(b, b).item(), torch.dot(a, b).item(), torch.dot(step, step).item()


def _parts(piece: Tensor) -> Iterable[Tensor]:
    # Of models of many experts most tensors are small, and there are tens of thousands of them.
    return (piece,) if len(piece) <= _CACHED else torch.split(piece, _CACHED)


class _Blocks:
    """Blocks by name, made as their tensors come."""

    def __init__(self) -> None:
        self._drifts: dict[tuple[str, int], BlockDrift] = {}

    def take(self, name: str, pieces: _Pieces) -> None:
        place = _place(name)
        self._drifts.setdefault(place, BlockDrift("")).take(name, pieces)

    def ordered(self) -> tuple[BlockDrift, ...]:
        stacks = {stack for stack, number in self._drifts if number >= 0}
        places = sorted(self._drifts, key=lambda place: (place[1] < 0, place))
        return tuple(_named(self._drifts[place], place, several=len(stacks) > 1) for place in places)


def _named(drift: BlockDrift, place: tuple[str, int], *, several: bool) -> BlockDrift:
    stack, number = place
    name = "outside" if number < 0 else f"{stack}.{number}" if several else str(number)
    values = {key: value for key, value in vars(drift).items() if key != "name"}
    return BlockDrift(name, **values)


def _place(name: str) -> tuple[str, int]:
    """The stack of layers that a tensor belongs to and the layer's number; -1 in none."""
    found = _NUMBER.search(name)
    return ("", -1) if found is None else (name[: found.start()], int(found[1]))


def _stripped(checkpoint: Checkpoint, store: TensorStore) -> dict[str, str]:
    """The body's tensors, by their names without what a wrapper put before all of them."""
    before = _wrapper(checkpoint)
    own = set(checkpoint.keys.values())
    # A tied head that was saved all the same is no part of the body.
    heads = {name for name in store.names for known in COMMON_NAMES["head"] if f".{name}".endswith(f".{known}")}
    kept = [name for name in store.names if name not in own | heads and not f".{name}".endswith(_OF_HEAD)]
    return {name.removeprefix(before): name for name in kept}


def _wrapper(checkpoint: Checkpoint) -> str:
    """What stands before the well-known name of the vocabulary rows."""
    for matrix in MATRICES[::-1]:
        key = checkpoint.keys.get(matrix)
        names = [name for name in COMMON_NAMES[matrix] if key is not None and f".{key}".endswith(f".{name}")]
        if key is not None and names:
            longest = max(names, key=len)
            return key[: len(key) - len(longest)]
    return ""


def _unlike(base: tuple[tuple[int, ...], str], now: tuple[tuple[int, ...], str]) -> str:
    """Why two tensors cannot be held against each other; empty where they can."""
    if base[0] != now[0]:
        return f"its shape is {list(now[0])}, at the base {list(base[0])}"
    other = [kind for _, kind in (base, now) if kind not in _FLOATS]
    if other and base[1] != now[1]:
        return f"it is of {now[1]}, at the base of {base[1]}"
    return ""


def _ratio(one: float, other: float) -> float:
    return math.sqrt(one / other) if other > 0 else math.nan if not one else math.inf


def body_as_json(found: BodyDrift | NotApplicable) -> dict[str, Any]:
    """The drift as plain values; see `BodyDrift`."""
    if isinstance(found, NotApplicable):
        return {"not_applicable": found.reason}
    return {
        "identical": found.identical,
        "rounded": found.rounded,
        "blocks": [
            {
                "block": one.name, "relative": one.relative, "cosine": one.cosine, "tensors": one.tensors,
                "changed": one.changed, "broken": one.broken,
                "worst": {"tensor": one.worst[0], "relative": one.worst[1]},
            }
            for one in found.blocks
        ],
        "only_base": list(found.only_base),
        "only_tuned": list(found.only_tuned),
        "unlike": dict(found.unlike),
    }  # fmt: skip
