"""Where a forgotten token was lost: in its output row, in its input row, or in the body between them.

The base's rows of the forgotten tokens are put back while the probe asks again. Nothing of the model is written to and
no matrix is copied: the logits of these tokens are taken anew from the hidden states, and their input vectors are
exchanged on the way in. With tied weights too the two are told apart.
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


@dataclass(frozen=True)
class HeadOrBody:
    """Forgotten tokens, and with which of the base's rows they are said again.

    Attributes:
        ids: (n,) int64, tokens said at the base and not now.
        with_head: (n,) bool, said with the base's output rows.
        with_rows: (n,) bool, said with the base's output and input rows.

    Example:
        >>> yes = torch.tensor([True, False, False])
        >>> HeadOrBody(torch.tensor([3, 5, 8]), with_head=yes, with_rows=torch.tensor([True, True, False])).counts
        {'forgotten': 3, 'head': 1, 'input': 1, 'body': 1}
    """

    ids: Tensor
    with_head: Tensor
    with_rows: Tensor

    @property
    def counts(self) -> dict[str, int]:
        """``forgotten`` tokens, of which ``head``: output rows suffice; ``input``: both do; ``body``: neither does."""
        head = int(self.with_head.sum())
        inputs = int((self.with_rows & ~self.with_head).sum())
        return {"forgotten": len(self.ids), "head": head, "input": inputs, "body": len(self.ids) - head - inputs}


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
    that are said now in the new lists are left out.

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
        {'forgotten': 1, 'head': 1, 'input': 0, 'body': 0}
    """
    lost = lost_tokens(base, now)
    ids = torch.cat([_evenly(now.ids[lost], most), _evenly(now.ids[~lost], most)]).sort().values
    asked: dict[str, Any] = {"seed": seed, "batch_tokens": batch_tokens}
    still = torch.isin(ids, now.ids[lost]) & gone(probe(model, ids, contexts, **asked))
    if not bool(still.any()):
        none = torch.empty(0, dtype=torch.bool)
        return HeadOrBody(ids[still], none, none)
    with output_rows_back(head, ids[still]) as called:
        with_head = said(probe(model, ids, contexts, **asked))[still]
        if not called:
            return NotApplicable(f"{type(model).__name__} computes its logits without calling its head")
        if embedding is None:
            return HeadOrBody(ids[still], with_head, with_head)
        with input_rows_back(embedding, ids[still]):
            return HeadOrBody(ids[still], with_head, said(probe(model, ids, contexts, **asked))[still])


@contextlib.contextmanager
def output_rows_back(head: End, ids: Tensor) -> Iterator[list[bool]]:
    """The model with the base's output rows of some tokens: their logits are made anew from what enters the head.

    Yields a list that is empty until the head is called.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> head, hidden = nn.Linear(2, 3, bias=False), torch.tensor([[1.0, 2.0]])
        >>> head.weight.data = torch.zeros(3, 2)
        >>> with output_rows_back(End(head, CopiedBaseline(torch.ones(3, 2))), torch.tensor([1])):
        ...     head(hidden).tolist()
        [[0.0, 3.0, 0.0]]
    """
    rows, called = _base_rows(head, ids), list[bool]()
    bias = getattr(plain_module(head.module), "bias", None)

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        called.append(True)
        hidden = args[0]
        shift = None if bias is None else bias[ids.to(bias.device)]
        logits = nn.functional.linear(hidden, rows.to(hidden.device, hidden.dtype), shift)
        return output.index_copy(-1, ids.to(output.device), logits.to(output.dtype))

    hook = head.module.register_forward_hook(after)
    try:
        yield called
    finally:
        hook.remove()


@contextlib.contextmanager
def input_rows_back(embedding: End, ids: Tensor) -> Iterator[None]:
    """The model with the base's input rows of some tokens (ascending), scaled as the model scales its own.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> embedding = nn.Embedding.from_pretrained(torch.zeros(3, 1))
        >>> with input_rows_back(End(embedding, CopiedBaseline(torch.ones(3, 1))), torch.tensor([1])):
        ...     embedding(torch.tensor([0, 1])).tolist()
        [[0.0], [1.0]]
    """
    rows, own_rows = _base_rows(embedding, ids), _rows_now(embedding, ids)

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs: Tensor = args[0]
        chosen = torch.isin(inputs, ids.to(inputs.device))
        places = torch.searchsorted(ids, inputs[chosen].cpu())
        base = rows[places].to(output.device, torch.float32)
        own, vectors = own_rows[places].to(output.device), output[chosen].float()
        if not torch.equal(own, vectors):
            base *= (own * vectors).sum(1, keepdim=True) / own.square().sum(1, keepdim=True).clamp(min=1e-30)
        changed = output.clone()
        changed[chosen] = base.to(output.dtype)
        return changed

    hook = embedding.module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


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
