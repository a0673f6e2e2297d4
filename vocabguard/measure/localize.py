"""Where a forgotten token was lost: in its output row, in its input row, in other rows, or in the body between them.

The base's rows of the forgotten tokens are put back while the probe asks again, then those of all tokens: a row that
grew drowns others whose own rows are whole. Nothing of the model is written to and no matrix is copied: logits are
taken anew from the hidden states, and input vectors are exchanged on the way in. With tied weights too the two are told
apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.measure.kernels import RowReader
from vocabguard.measure.neighbors import pick_rows
from vocabguard.measure.probe import PromptContext, probe
from vocabguard.measure.retention import gone, said
from vocabguard.measure.retention import lost as lost_tokens
from vocabguard.results import NotApplicable, ProbeResult
from vocabguard.rows.adapters import plain_module
from vocabguard.rows.baselines import Baseline

_CHUNK = 2**22


@dataclass(frozen=True)
class HeadOrBody:
    """Forgotten tokens, and with which of the base's rows they are said again.

    Attributes:
        ids: (n,) int64, tokens said at the base and not now.
        with_head: (n,) bool, said with the base's output rows.
        with_rows: (n,) bool, said with the base's output and input rows.
        with_all: (n,) bool, said with these, or with those of all tokens.

    Example:
        >>> head, rows, every = torch.tensor([[True, False, False], [True, True, False], [True, True, False]])
        >>> HeadOrBody(torch.tensor([3, 5, 8]), with_head=head, with_rows=rows, with_all=every).counts
        {'forgotten': 3, 'head': 1, 'input': 1, 'other_rows': 0, 'body': 1}
    """

    ids: Tensor
    with_head: Tensor
    with_rows: Tensor
    with_all: Tensor

    @property
    def counts(self) -> dict[str, int]:
        """``forgotten`` tokens, and how many are said again with what.

        ``head``: their output rows suffice; ``input``: with their input rows; ``other_rows``: only with the rows of all
        tokens, so that others drown them; ``body``: with no rows.
        """
        head = int(self.with_head.sum())
        inputs = int((self.with_rows & ~self.with_head).sum())
        others = int((self.with_all & ~self.with_rows & ~self.with_head).sum())
        body = len(self.ids) - head - inputs - others
        return {"forgotten": len(self.ids), "head": head, "input": inputs, "other_rows": others, "body": body}


@dataclass(frozen=True)
class End:
    """A matrix's module in the model, and its rows at the base.

    Attributes:
        module: called in the forward pass; a linear layer (head) or an embedding, with an adapter's wrappers.
        baseline: its rows before.
        rows: those that the forward pass uses now; None where they are the module's ``weight``.
    """

    module: nn.Module
    baseline: Baseline
    rows: RowReader | None = None


def head_or_body(
    model: nn.Module, base: ProbeResult, now: ProbeResult, contexts: Sequence[PromptContext], head: End,
    embedding: End | None, *, seed: int, batch_tokens: int, most: int = 256,
) -> HeadOrBody | NotApplicable:  # fmt: skip
    """Ask for forgotten tokens again, with the base's rows of all of them put back.

    They are asked for among as many others of the probe, since a list of forgotten tokens only would be harder. Those
    that are said now in the new lists are left out. Those that do not come back are asked for with the base's rows of
    all tokens: its output rows, and then its input rows too.

    Args:
        model: as it is now; see `vocabguard.measure.probe.probe` for it, `contexts`, `seed` and `batch_tokens`.
        base: the probe at the base; `now` asked for the same tokens in the same contexts, later.
        embedding: the input rows; None leaves them as they are.
        most: of more forgotten tokens, so many evenly spaced ones are asked for.

    Example:
        >>> from types import SimpleNamespace
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=self.head(torch.eye(4)[input_ids]))
        >>> model, ids, ask = Parrot(), torch.arange(4), [PromptContext("one", before=(), after=(), k=1)]
        >>> model.head = nn.Linear(4, 4, bias=False)
        >>> model.head.weight.data = torch.eye(4)
        >>> base = probe(model, ids, ask, seed=0, batch_tokens=8)
        >>> model.head.weight.data[2] = 0  # token 2 cannot be said any more
        >>> now = probe(model, ids, ask, seed=0, batch_tokens=8)
        >>> head = End(model.head, CopiedBaseline(torch.eye(4)))
        >>> head_or_body(model, base, now, ask, head, None, seed=0, batch_tokens=8).counts
        {'forgotten': 1, 'head': 1, 'input': 0, 'other_rows': 0, 'body': 0}
    """
    lost = lost_tokens(base, now)
    ids = torch.cat([_evenly(now.ids[lost], most), _evenly(now.ids[~lost], most)]).sort().values
    asked: dict[str, Any] = {"seed": seed, "batch_tokens": batch_tokens}
    still = torch.isin(ids, now.ids[lost]) & gone(probe(model, ids, contexts, **asked))
    if not bool(still.any()):
        none = torch.empty(0, dtype=torch.bool)
        return HeadOrBody(ids[still], none, none, none)
    with output_rows_back(head, ids[still]) as called:
        with_head = said(probe(model, ids, contexts, **asked))[still]
        if not called:
            return NotApplicable(f"{type(model).__name__} computes its logits without calling its head")
        with_rows = with_head
        if embedding is not None:
            with input_rows_back(embedding, ids[still]):
                with_rows = said(probe(model, ids, contexts, **asked))[still]
    if bool((with_head | with_rows).all()):
        return HeadOrBody(ids[still], with_head, with_rows, with_rows)
    # In the same lists: where rows stand still this says exactly what was said before.
    with_all = with_rows | _with_all(model, ids, contexts, head, embedding, asked)[still]
    return HeadOrBody(ids[still], with_head, with_rows, with_all)


def _with_all(
    model: nn.Module, ids: Tensor, contexts: Sequence[PromptContext], head: End, embedding: End | None,
    asked: dict[str, Any],
) -> Tensor:  # fmt: skip
    """(n,) bool: said with the base's output rows of all tokens, alone or with its input rows."""
    with output_rows_back(head, None):
        back = said(probe(model, ids, contexts, **asked))
        if embedding is not None:
            with input_rows_back(embedding, None):
                back |= said(probe(model, ids, contexts, **asked))
    return back


@contextlib.contextmanager
def output_rows_back(head: End, ids: Tensor | None) -> Iterator[list[bool]]:
    """The model with the base's output rows of some tokens: their logits are made anew from what enters the head.

    Args:
        ids: (n,) int64; None takes all rows, a chunk at a time, but those that are not finite at the base.

    Yields a list that is empty until the head is called.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> head, hidden = nn.Linear(2, 3, bias=False), torch.tensor([[1.0, 2.0]])
        >>> head.weight.data = torch.zeros(3, 2)
        >>> with output_rows_back(End(head, CopiedBaseline(torch.ones(3, 2))), torch.tensor([1])):
        ...     head(hidden).tolist()
        [[0.0, 3.0, 0.0]]
    """
    called = list[bool]()
    bias = getattr(plain_module(head.module), "bias", None)
    some = None if ids is None else (ids, _base_rows(head, ids))

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        called.append(True)
        hidden, changed = args[0], output.clone()
        for places, rows in _all_rows(head) if some is None else [some]:
            at = places.to(output.device)
            shift = None if bias is None else bias[places.to(bias.device)]
            logits = nn.functional.linear(hidden, rows.to(hidden.device, hidden.dtype), shift)
            changed.index_copy_(-1, at, logits.to(output.dtype))
        return changed

    hook = head.module.register_forward_hook(after)
    try:
        yield called
    finally:
        hook.remove()


@contextlib.contextmanager
def input_rows_back(embedding: End, ids: Tensor | None) -> Iterator[None]:
    """The model with the base's input rows of some tokens, scaled as the model scales its own.

    Args:
        ids: (n,) int64, ascending; None takes all rows, but those that are not finite at the base.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> embedding = nn.Embedding.from_pretrained(torch.zeros(3, 1))
        >>> with input_rows_back(End(embedding, CopiedBaseline(torch.ones(3, 1))), torch.tensor([1])):
        ...     embedding(torch.tensor([0, 1])).tolist()
        [[0.0], [1.0]]
    """
    some = None if ids is None else (ids, _base_rows(embedding, ids), _rows_now(embedding, ids))

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs: Tensor = args[0]
        own_ids, rows, own_rows = _rows_of(embedding, torch.unique(inputs).cpu()) if some is None else some
        chosen = torch.isin(inputs, own_ids.to(inputs.device))
        places = torch.searchsorted(own_ids, inputs[chosen].cpu())
        base = rows[places].to(output.device, torch.float32)
        own, vectors = own_rows[places].to(output.device), output[chosen].float()
        if not torch.equal(own, vectors):
            base *= _scale(own, vectors)
        changed = output.clone()
        changed[chosen] = base.to(output.dtype)
        return changed

    hook = embedding.module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def _scale(own: Tensor, vectors: Tensor) -> Tensor:
    """(n, 1): what the model multiplies rows with; a row that is zero now shows none, and gets the others' median."""
    squares = own.square().sum(1, keepdim=True)
    found, shown = (own * vectors).sum(1, keepdim=True) / squares.clamp(min=1e-30), squares > 0
    usual = found[shown].median() if bool(shown.any()) else found.new_tensor(1.0)
    return torch.where(shown, found, usual)


def _all_rows(end: End) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and rows of the baseline, a chunk at a time, without those that are not finite."""
    for part, rows in end.baseline.chunks(max(1, _CHUNK // end.baseline.width)):
        sound = rows.isfinite().all(1)
        yield torch.arange(part.start, part.stop)[sound], rows[sound]


def _rows_of(end: End, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the ids whose base row is finite, with their rows at the base and now."""
    ids = ids[ids < end.baseline.rows]
    rows = _base_rows(end, ids)
    sound = rows.isfinite().all(1)
    return ids[sound], rows[sound], _rows_now(end, ids[sound])


def _base_rows(end: End, ids: Tensor) -> Tensor:
    """(n, width) of the baseline, in its dtype."""
    return torch.cat([end.baseline.chunk(slice(token, token + 1)) for token in ids.tolist()])


def _rows_now(end: End, ids: Tensor) -> Tensor:
    """(n, width) float32 on the CPU, as the forward pass uses them."""
    if end.rows is not None:
        return pick_rows(end.rows, ids).cpu()
    weight = end.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()[ids.to(weight.device)].cpu().float()


def _evenly(ids: Tensor, most: int) -> Tensor:
    """At most so many of the ids, evenly spaced."""
    return ids if len(ids) <= most else ids[torch.linspace(0, len(ids) - 1, most).long()]
