"""Asking a causal language model to repeat tokens, teacher-forced, and comparing what it says with what it said.

One prompt is ``before + list + after + list``: at each place of the second list the model should find the token most
likely that stands there. Lists are shuffled ids, because a token that only survives among its usual neighbours is lost.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.results import NotApplicable, ProbeResult
from vocabguard.rows.models import core_of, has_head, is_encoder_decoder, looks_ahead, parameters_of, text_config_of

_LOGITS_AT_ONCE = 2**25
_LOGITS_IN_FLOAT = 2**22


@dataclass(frozen=True)
class PromptContext:
    """One way of asking, as token ids.

    Attributes:
        before: ids before the list.
        after: ids between the list and its copy.
        k: tokens in a list.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    k: int


def probe_applicable(model: nn.Module) -> NotApplicable | None:
    """Why a model cannot be asked to repeat tokens, or None if it can.

    Judged by ``config.is_encoder_decoder``, the class's name, and whether ``forward`` takes ``input_ids``. A class
    of one's own that says nothing by these is taken to be a causal language model.

    >>> probe_applicable(nn.Linear(2, 2)).reason
    'Linear.forward does not take input_ids'
    """
    core = core_of(model)
    name = type(core).__name__
    if is_encoder_decoder(core):
        return NotApplicable(f"{name} is an encoder-decoder; the probe continues a prompt, as causal models do")
    other = re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+", name)
    if other:
        return NotApplicable(f"{name} ({other[0]}) does not predict next tokens")
    if looks_ahead(core):
        return NotApplicable(f"{name} sees what comes after a place, so a prompt would show it the answer")
    if not has_head(core):
        return NotApplicable(f"{name} has no output matrix over the vocabulary")
    if not _accepts(core, "input_ids"):
        return NotApplicable(f"{name}.forward does not take input_ids")
    return None


def probe(
    model: nn.Module, ids: Tensor, contexts: Sequence[PromptContext], *, seed: int, batch_tokens: int
) -> ProbeResult:
    """Ask for every token once in every context.

    The lists depend on the ids, the seed and the context alone, so two probes of one run differ by the model only. The
    last list is filled up with other ids, whose results are dropped; with fewer than k ids lists are shorter. The model
    is asked in evaluation mode, without gradients, outside of compiled code; modes, generators and gradients stay.

    Args:
        model: causal language model, called as ``model(input_ids=...)`` and giving ``.logits``.
        ids: (n,) int64, the tokens asked for.
        contexts: the ways of asking; at least one.
        batch_tokens: prompt tokens in one forward pass. Fewer are taken where the logits would exceed 2**25 numbers.

    Returns:
        What was said, on the CPU. Of equal logits the first counts as emitted; rank counts strictly larger ones. Where
        the model gives NaN nothing is emitted and the probability is 0.

    Raises:
        ValueError: if there is no context, or if a prompt is longer than the model's ``max_position_embeddings``.

    Example:
        A model that says what it heard, but 0 for a 3:

        >>> from types import SimpleNamespace
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=9 * torch.eye(4)[input_ids % 3])
        >>> found = probe(Parrot(), torch.arange(4), [PromptContext("one", (), (), k=1)], seed=0, batch_tokens=8)
        >>> found.emitted.flatten().tolist(), found.instead.flatten().tolist()
        ([True, True, True, False], [0, 1, 2, 0])
    """
    if not contexts:
        raise ValueError("contexts is empty; the probe needs at least one")
    ids = ids.detach().to("cpu", torch.int64)
    model = getattr(model, "_orig_mod", model)
    with undisturbed(model), torch.no_grad():
        found = [_probe_context(model, ids, context, seed, batch_tokens) for context in contexts]
    probability, rank, instead = (torch.stack(columns, dim=1) for columns in zip(*found, strict=True))
    return ProbeResult(
        contexts=tuple(context.name for context in contexts), ids=ids,
        emitted=(instead == ids[:, None]) & (rank == 0), probability=probability, rank=rank, instead=instead,
    )  # fmt: skip


Answers = tuple[Tensor, Tensor, Tensor]
"""Probability (float32), rank (int64) and most likely token (int64), of one shape."""


def _probe_context(
    model: nn.Module, ids: Tensor, context: PromptContext, seed: int, batch_tokens: int
) -> tuple[Tensor, ...]:
    if not len(ids):
        return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    lists = probe_lists(len(ids), context, seed)
    count, k = lists.shape
    before, after = (
        torch.tensor(part, dtype=torch.int64).expand(count, -1) for part in (context.before, context.after)
    )
    # The last token of the copy is only an answer, never read.
    prompts = torch.cat([before, ids[lists], after, ids[lists[:, :-1]]], dim=1)
    _check_length(model, context.name, prompts.shape[1])
    per_batch = _rows_per_batch(model, prompts.shape[1], k, batch_tokens)
    batches = zip(torch.split(prompts, per_batch), torch.split(ids[lists], per_batch), strict=True)
    parts = [_answers(_last_logits(model, batch, k), wanted) for batch, wanted in batches]
    where = lists.flatten()[: len(ids)]
    answers = []
    for column in zip(*parts, strict=True):
        in_list_order = torch.cat(column).flatten()[: len(ids)]
        answers.append(torch.empty_like(in_list_order).index_copy_(0, where, in_list_order))
    return tuple(answers)


def probe_lists(count: int, context: PromptContext, seed: int) -> Tensor:
    """(lists, k) int64 positions in the `count` probed ids: each of them once, then the fillers at the very end.

    Example:
        >>> lists = probe_lists(5, PromptContext("list", before=(), after=(), k=3), seed=0)
        >>> lists.shape, lists.flatten()[:5].sort().values.tolist()
        (torch.Size([2, 3]), [0, 1, 2, 3, 4])
    """
    # By name, so that adding a context leaves the others' lists alone. The generator reads 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{context.name}".encode()))
    order = torch.randperm(count, generator=generator)
    k = min(context.k, count)
    return torch.cat([order, order[: -count % k]]).view(-1, k)


def _check_length(model: nn.Module, name: str, length: int) -> None:
    longest = getattr(text_config_of(model), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest > 0:
        raise ValueError(f"probe.contexts.{name}: a prompt has {length} tokens; the model takes at most {longest}")


def _rows_per_batch(model: nn.Module, length: int, k: int, batch_tokens: int) -> int:
    logits_a_row = (k if _accepts(model, "logits_to_keep") else length) * _vocabulary_size(model)
    return max(1, min(batch_tokens // length, _LOGITS_AT_ONCE // max(1, logits_a_row)))


def _vocabulary_size(model: nn.Module) -> int:
    output_of = getattr(model, "get_output_embeddings", None)
    weight = getattr(output_of(), "weight", None) if callable(output_of) else None
    # Unknown: as many as Gemma 3 has, so that a batch is rather too small.
    return len(weight) if isinstance(weight, Tensor) else 2**18


def _last_logits(model: nn.Module, prompts: Tensor, k: int) -> Tensor:
    """(B, k, V) logits of the last k places, in the model's dtype."""
    options: dict[str, Any] = {"logits_to_keep": k, "use_cache": False}
    accepted = {name: value for name, value in options.items() if _accepts(model, name)}
    logits: Tensor = model(input_ids=prompts.to(_device(model)), **accepted).logits
    return logits[:, -k:]


def _answers(logits: Tensor, wanted: Tensor) -> Answers:
    """What (B, k, V) logits say about the (B, k) wanted ids, as (B, k) CPU tensors; a few places in float at a time."""
    flat, ids = logits.flatten(0, 1), wanted.flatten().to(logits.device)
    places = max(1, _LOGITS_IN_FLOAT // flat.shape[1])
    parts = [_answer_part(*part) for part in zip(torch.split(flat, places), torch.split(ids, places), strict=True)]
    probability, rank, instead = (torch.cat(column).view(wanted.shape).cpu() for column in zip(*parts, strict=True))
    return probability, rank, instead


def _answer_part(logits: Tensor, ids: Tensor) -> Answers:
    logits = logits.float()
    own = logits.gather(1, ids[:, None])
    probability = (own.squeeze(1) - logits.logsumexp(1)).exp()
    # Written so that a model of NaNs says nothing: probability 0, last rank.
    return probability.nan_to_num(0.0), logits.shape[1] - (logits <= own).sum(1), logits.argmax(1)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, eager, with forked generators; everything as before afterwards.

    >>> model = nn.Dropout().train()
    >>> with undisturbed(model):
    ...     model(torch.ones(2)), model.training
    (tensor([1., 1.]), False)
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}
    fork: dict[str, Any] = {"devices": [device.index for device in devices]}
    if devices:
        fork["device_type"] = next(iter(devices)).type
    with torch.random.fork_rng(**fork), torch.compiler.set_stance("force_eager"):
        try:
            # The flag itself: train() and eval() may be overridden and do more, such as merging adapters.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _accepts(model: nn.Module, name: str) -> bool:
    return name in parameters_of(model)


def _device(model: nn.Module) -> torch.device:
    input_of = getattr(model, "get_input_embeddings", None)
    first = input_of() if callable(input_of) else model
    return next((p.device for p in first.parameters()), torch.device("cpu"))


def said(result: ProbeResult) -> Tensor:
    """(n,) bool: the token was emitted in more than half of the contexts.

    >>> emitted, none = torch.tensor([[True, True, False], [True, False, False]]), torch.zeros(2, 3)
    >>> said(ProbeResult(("a", "b", "c"), torch.tensor([5, 9]), emitted, none, none, none))
    tensor([ True, False])
    """
    return result.emitted.sum(1) * 2 > result.emitted.shape[1]


def retained(base: ProbeResult, now: ProbeResult, mask: Tensor | None = None) -> float:
    """Of the tokens said at the base, the share in [0, 1] that is said now; NaN if the base said none of them.

    Args:
        mask: (n,) bool over the probed tokens, those to look at; None takes all.

    Raises:
        ValueError: if the two probes asked for different tokens or in different contexts.

    Example:
        >>> ids, no = torch.arange(4), torch.zeros(4, 1)
        >>> base, now = (
        ...     ProbeResult(("one",), ids, torch.tensor(emitted)[:, None], no, no, no)
        ...     for emitted in ([True, True, True, False], [True, True, False, True])
        ... )
        >>> round(retained(base, now), 3)  # 2 of 3; what was gained does not count
        0.667
    """
    if base.contexts != now.contexts:
        raise ValueError(f"the probes have different contexts: {base.contexts} and {now.contexts}")
    if not torch.equal(base.ids, now.ids):
        raise ValueError(f"the probes have different ids: {len(base.ids)} at the base, {len(now.ids)} now")
    at_base = said(base) if mask is None else said(base) & mask
    return said(now)[at_base].float().mean().item() if at_base.any() else math.nan


def said_instead(result: ProbeResult) -> Tensor:
    """(n,) int64: the wrong token said in most contexts, the earliest context winning a tie; -1 if always right.

    >>> instead, none = torch.tensor([[5, 7, 7], [9, 9, 9]]), torch.zeros(2, 3)
    >>> ids = torch.tensor([5, 9])
    >>> said_instead(ProbeResult(("a", "b", "c"), ids, instead == ids[:, None], none, none, instead))
    tensor([ 7, -1])
    """
    wrong = ~result.emitted
    same = result.instead[:, :, None] == result.instead[:, None, :]
    votes = same.sum(2).masked_fill(~wrong, 0)
    commonest = result.instead.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)
    return torch.where(wrong.any(1), commonest, -1)


def stratified_sample(strata: Tensor, eligible: Tensor, size: int, seed: int) -> Tensor:
    """A sample in which small strata are not lost.

    Every stratum gets its share of `size`, but at least ``size / (2 * strata)`` ids, or all it has; the larger strata
    pay for that. Of `size` or fewer eligible ids all are taken.

    Args:
        strata: (V,) int64 >= 0, the stratum of each id, such as its group.
        eligible: (V,) bool, the ids that may be drawn.

    Example:
        >>> strata = torch.tensor([0] * 96 + [1] * 4)
        >>> sample = stratified_sample(strata, torch.ones(100, dtype=torch.bool), size=16, seed=0)
        >>> torch.bincount(strata[sample]).tolist()
        [12, 4]
    """
    ids = eligible.nonzero().squeeze(1)
    size = max(0, min(size, len(ids)))
    sizes = torch.bincount(strata[ids])
    labels = sizes.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, quota in zip(labels, _quotas(sizes[labels].tolist(), size), strict=True):
        members = ids[strata[ids] == label]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values if chosen else ids


def _quotas(sizes: list[int], size: int) -> list[int]:
    """How many to draw of each stratum; in fractions, so that they add up to `size` and none exceeds its stratum."""
    if not sizes or size == 0:
        return [0] * len(sizes)
    shares = [Fraction(n * size, sum(sizes)) for n in sizes]
    floors = [min(n, size // (2 * len(sizes))) for n in sizes]
    above = [max(Fraction(0), share - floor) for share, floor in zip(shares, floors, strict=True)]
    scale = (size - sum(floors)) / sum(above, Fraction(0))
    exact = [floor + extra * scale for floor, extra in zip(floors, above, strict=True)]
    quotas = [int(q) for q in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: size - sum(quotas)]:
        quotas[i] += 1
    return quotas


def summarise_probe(
    base: ProbeResult, now: ProbeResult, parts: Mapping[str, Tensor], watch: Tensor
) -> dict[str, float]:
    """A probe against the base's, as a few numbers; a share is left out where the base said none of its tokens.

    Keys: ``retained``, ``<part>/retained`` and ``watch`` (retained of the (w,) watched ids), shares in [0, 1] as
    `retained` gives them, and ``probability_mean`` in [0, 1] over tokens and contexts.

    Example:
        >>> ids, no = torch.tensor([0, 2]), torch.zeros(2, 1)
        >>> base = ProbeResult(("one",), ids, torch.ones(2, 1).bool(), no, no, no)
        >>> now = ProbeResult(("one",), ids, torch.tensor([[True], [False]]), torch.tensor([[0.9], [0.1]]), no, no)
        >>> summarise_probe(base, now, parts={"ja": torch.tensor([False, False, True])}, watch=torch.tensor([0]))
        {'retained': 0.5, 'ja/retained': 0.0, 'watch': 1.0, 'probability_mean': 0.5}
    """
    shares = {"retained": retained(base, now)}
    for name, members in parts.items():
        shares[f"{name}/retained"] = retained(base, now, members[now.ids])
    shares["watch"] = retained(base, now, torch.isin(now.ids, watch.to(torch.int64)))
    shares["probability_mean"] = now.probability.mean().item() if len(now.ids) else math.nan
    return {name: value for name, value in shares.items() if not math.isnan(value)}
