"""What all processes agree on before anything is measured: rows, matrices, who has what, who sees which data.

One small exchange settles it. Where processes differ, each says the same in words: what cannot be measured is off, or
the guard is, and training goes on. Without it a process would wait for others that measure something else.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.guard.layout import Layout, Replicas, layout_of, replicas_of
from vocabguard.results import MatrixName, NotApplicable, VocabGuardError
from vocabguard.rows.matrices import VocabMatrix

Matrices = Mapping[MatrixName, VocabMatrix | NotApplicable]

_DIGEST_ROWS = 64
_STAGES = "; a model that is cut into pipeline stages is not followed"


class RefusedError(VocabGuardError, RuntimeError):
    """The guard cannot work in this setting; the message says why. All processes raise it together."""


@dataclass(frozen=True)
class MatrixFound:
    """What one process found of one matrix.

    Attributes:
        reason: why it cannot be followed; empty where it can.
        kind: how it is kept, in words.
        shape: (V, width).
        span: first element, the one after the last, first and last column where it is split by columns; None where the
            process has all of it.
        elements: how many it has.
        digest: of some rows, where the process has all of them.
    """

    reason: str = ""
    kind: str = ""
    shape: tuple[int, int] = (0, 0)
    span: tuple[int, ...] | None = None
    elements: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Found:
    """What one process found.

    Attributes:
        rows: V; None where it found none, and `error` says why.
        tied: whether head and embedding are one matrix; None where one of them cannot be followed.
    """

    rows: int | None
    error: str
    tied: bool | None
    matrices: Mapping[MatrixName, MatrixFound]
    layout: Layout
    versions: str


@dataclass(frozen=True)
class Agreement:
    """What came of it, for this process.

    Attributes:
        rows: V.
        matrices: with who speaks for what, or why they are not followed.
        differ: what was refused because processes differ, in words.
        alike: matrices that all processes have whole and the same, so that each need read a share only.
    """

    rows: int
    matrices: dict[MatrixName, VocabMatrix | NotApplicable]
    replicas: Replicas
    differ: tuple[str, ...] = ()
    alike: frozenset[str] = frozenset()


def agree_on(model: nn.Module, matrices: Matrices, rows: Callable[[], int]) -> Agreement:
    """Exchange what each process found. All processes must call it together.

    Args:
        rows: gives V, or raises a ValueError where there is nothing to watch.

    Raises:
        ValueError: what `rows` raised, where it did on all processes.
        RefusedError: where processes differ in what the guard needs.
    """
    error, count = "", None
    try:
        count = rows()
    except ValueError as failed:
        error = str(failed)
    everyone = collective.everyone(found_here(model, matrices, count, error))
    verdict = judged(everyone)
    me = collective.rank()
    mine: dict[MatrixName, VocabMatrix | NotApplicable] = {}
    for name, matrix in matrices.items():
        reason, speakers = verdict[name]
        if isinstance(matrix, NotApplicable) or reason:
            mine[name] = NotApplicable(reason or getattr(matrix, "reason", ""))
        else:
            told = [one.matrices[name] for one in everyone]
            mine[name] = matrix
            if len(everyone) > 1:
                mine[name] = replace(matrix, speaks=me in speakers, spans=_spans(told, speakers))
    replicas = replicas_of([one.layout for one in everyone], me)
    # What every process says alike, such as of a frozen head, is no difference.
    alike = {name: {one.matrices[name].reason for one in everyone} for name in matrices}
    differ = [reason for name, (reason, _) in verdict.items() if reason and alike[name] != {reason}]
    differ += [] if replicas.refused is None else [replicas.refused.reason]
    digests = {name: {one.matrices[name].digest for one in everyone} for name in matrices}
    same = frozenset(name for name, told in digests.items() if len(everyone) > 1 and len(told) == 1 and told != {""})
    found = everyone[0].rows
    assert found is not None
    return Agreement(found, mine, replicas, tuple(dict.fromkeys(differ)), same)


def found_here(model: nn.Module, matrices: Matrices, rows: int | None, error: str) -> Found:
    """What this process brings to the exchange."""
    head, embedding = matrices["head"], matrices["embedding"]
    followed = isinstance(head, VocabMatrix) and isinstance(embedding, VocabMatrix)
    tied = head.tied if followed and isinstance(head, VocabMatrix) else None
    own = getattr(sys.modules.get("vocabguard"), "__version__", "")
    versions = f"vocabguard {own}, torch {torch.__version__}"
    told = {name: _matrix_found(matrix) for name, matrix in matrices.items()}
    return Found(rows, error, tied, told, layout_of(model), versions)


def _matrix_found(matrix: VocabMatrix | NotApplicable) -> MatrixFound:
    if isinstance(matrix, NotApplicable):
        return MatrixFound(reason=matrix.reason)
    shard, held = matrix.shard, matrix.held
    shape, kind = (matrix.rows, matrix.width), str(matrix.dtype).removeprefix("torch.")
    kind = f"{kind} in {'a parameter' if held is None else held.engine}"
    if matrix.adapter is not None:
        kind += f" with {matrix.adapter.kind}"
    if shard is None:
        digest = "" if matrix.adapter is not None else _digest(matrix.own())
        return MatrixFound("", f"{kind}, whole", shape, None, shape[0] * shape[1], digest)
    columns = () if shard.columns is None else (shard.columns.start, shard.columns.stop)
    return MatrixFound("", f"{kind}, in parts", shape, (shard.start, shard.stop, *columns), shard.elements)


def _digest(rows: Tensor) -> str:
    """SHA-256 of the bytes of evenly spaced rows; empty where nobody is there to compare them, or they are odd."""
    if collective.world_size() == 1 or type(rows) is not Tensor or rows.device.type == "meta":
        return ""
    some = rows[:: max(1, len(rows) // _DIGEST_ROWS)].to("cpu", copy=True).contiguous()
    return hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()


def judged(everyone: Sequence[Found]) -> dict[MatrixName, tuple[str, frozenset[int]]]:
    """Compare what all processes found.

    Returns:
        For each matrix why it is not followed, or an empty text; and the ranks that speak for its elements.

    Raises:
        ValueError: where no process found anything to watch, for one reason.
        RefusedError: where processes differ in what the guard needs.
    """
    errors = [one.error for one in everyone]
    if all(errors) and len(set(errors)) == 1:
        raise ValueError(errors[0])
    for what, values in (
        ("versions differ", [one.versions for one in everyone]),
        ("the vocabulary differs", [_rows_told(one) + (_STAGES if any(errors) else "") for one in everyone]),
    ):
        if len(set(values)) > 1:
            raise RefusedError(_differs(what, values))
    found = {name: _one_matrix(name, [one.matrices[name] for one in everyone]) for name in everyone[0].matrices}
    missing = [{one.matrices[name].reason != "" for one in everyone} == {True, False} for name in found]
    if all(missing):
        raise RefusedError("; ".join(reason for reason, _ in found.values()))
    ties = [one.tied for one in everyone]
    if len(set(ties)) > 1 and not any(reason for reason, _ in found.values()):
        told = _differs("tied differs", ["tied" if tied else "untied" for tied in ties])
        found = dict.fromkeys(found, (f"head and input embedding cannot be followed: {told}", frozenset()))
    return found


def _rows_told(found: Found) -> str:
    return f"{found.rows:,} rows" if found.rows is not None else f"none ({found.error})"


def _one_matrix(name: MatrixName, everyone: Sequence[MatrixFound]) -> tuple[str, frozenset[int]]:
    told = [one.reason or f"{one.shape[0]:,} x {one.shape[1]:,}, {one.kind}" for one in everyone]
    if len(set(told)) > 1:
        missing = any(one.reason for one in everyone)
        return f"the {name} differs between processes: {_differs('', told)}{_STAGES if missing else ''}", frozenset()
    first = everyone[0]
    if first.reason:
        return first.reason, frozenset()
    if first.span is None:
        return "", frozenset(range(len(everyone)))
    # Of processes with the same elements the first one speaks.
    speakers = {one.span: place for place, one in reversed(list(enumerate(everyone))) if one.elements}
    covered = sum(everyone[place].elements for place in speakers.values())
    if covered != first.shape[0] * first.shape[1]:
        wanted = first.shape[0] * first.shape[1]
        return f"the {name} is followed in {covered:,} of its {wanted:,} elements only: {first.kind}", frozenset()
    return "", frozenset(speakers.values())


def _spans(everyone: Sequence[MatrixFound], speakers: frozenset[int]) -> tuple[tuple[int, int], ...] | None:
    """Where the elements of every process begin and end, if none has another's; see `Shard`."""
    spans = [one.span for one in everyone if one.span is not None and len(one.span) == 2]
    silent = [one for place, one in enumerate(everyone) if place not in speakers and one.elements]
    return None if silent or len(spans) < len(everyone) else tuple((span[0], span[1]) for span in spans)


def _differs(what: str, values: Sequence[str]) -> str:
    """What each process says, those that say the same together."""
    said: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        said.setdefault(value, []).append(rank)
    parts = [f"process {', '.join(map(str, ranks[:8]))}: {value}" for value, ranks in said.items()]
    return (f"{what}: " if what else "") + "; ".join(parts[:4])
