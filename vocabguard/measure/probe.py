"""Asking a causal language model to repeat tokens, teacher-forced, and comparing what it says with what it said.

One prompt shows a list of tokens, once or several times, and then the list again: at each place of the last one the
model should find the token most likely that stands there. Lists are shuffled ids, because a token that only survives
among its usual neighbours is lost. What the answers say about a run: `vocabguard.measure.retention`.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.measure.recall import LogitMoments
from vocabguard.results import NotApplicable, ProbeResult
from vocabguard.rows.models import (
    core_of,
    has_head,
    input_device,
    is_encoder_decoder,
    logits_width,
    longest_prompt,
    looks_ahead,
    parameters_of,
)

_LOGITS_AT_ONCE = 2**25
_LOGITS_IN_FLOAT = 2**22


@dataclass(frozen=True)
class PromptContext:
    """One way of asking, as token ids.

    A prompt is ``before + list + between[0] + list + ... + after``, and the list once more is the answer. With `shots`
    it is a line for each token, ``token + after + token + between[0]``, the first ones of other tokens.

    Attributes:
        before: ids before the first list.
        after: ids before the copy that is asked for.
        k: tokens in a list.
        between: ids between the lists that are shown; a list is shown once more than there are of these.
        shots: lines of other tokens before the k lines that are asked; None asks for lists.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    k: int
    between: tuple[tuple[int, ...], ...] = ()
    shots: int | None = None


def probe_applicable(model: nn.Module) -> NotApplicable | None:
    """Why a model cannot be asked to repeat tokens, or None if it can.

    Judged by ``config.is_encoder_decoder``, the class's name, and whether ``forward`` takes ``input_ids``. A class
    of one's own that says nothing by these is taken to be a causal language model.

    >>> probe_applicable(nn.Linear(2, 2)).reason
    'Linear.forward does not take input_ids; `call=` may say how it is called'
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
        return NotApplicable(f"{name}.forward does not take input_ids; `call=` may say how it is called")
    return None


def probe(
    model: nn.Module, ids: Tensor, contexts: Sequence[PromptContext], *, seed: int, batch_tokens: int,
    progress: Callable[[float], None] | None = None, moments: LogitMoments | None = None,
) -> ProbeResult:  # fmt: skip
    """Ask for every token once in every context.

    The lists depend on the ids, the seed and the context alone, so two probes of one run differ by the model only. The
    last list is filled up with other ids, whose results are dropped; with fewer than k ids lists are shorter. The model
    is asked in evaluation mode, without gradients, outside of compiled code; modes, generators and gradients stay.

    Args:
        model: causal language model, called as ``model(input_ids=...)`` and giving ``.logits``.
        ids: (n,) int64, the tokens asked for.
        contexts: the ways of asking; at least one.
        batch_tokens: prompt tokens in one forward pass. Fewer are taken where the logits would exceed 2**25 numbers.
        progress: called with the share in [0, 1] that is done, after each forward pass.
        moments: takes up the logits of every token at the places that are asked.

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
        found = []
        for done, context in enumerate(contexts):
            tell = None if progress is None else _part_of(progress, done, len(contexts))
            found.append(_probe_context(model, ids, context, seed, batch_tokens, tell, moments))
    probability, rank, instead = (torch.stack(columns, dim=1) for columns in zip(*found, strict=True))
    return ProbeResult(
        contexts=tuple(context.name for context in contexts), ids=ids,
        emitted=(instead == ids[:, None]) & (rank == 0), probability=probability, rank=rank, instead=instead,
    )  # fmt: skip


Answers = tuple[Tensor, Tensor, Tensor]
"""Probability (float32), rank (int64) and most likely token (int64), of one shape."""


def _part_of(progress: Callable[[float], None], done: int, count: int) -> Callable[[float], None]:
    """Tells of a part as of a share of the whole."""
    return lambda share: progress((done + share) / count)


def _probe_context(
    model: nn.Module, ids: Tensor, context: PromptContext, seed: int, batch_tokens: int,
    progress: Callable[[float], None] | None, moments: LogitMoments | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if not len(ids):
        return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    lists = probe_lists(len(ids), context, seed)
    found = ask_lists(model, ids[lists], context, batch_tokens=batch_tokens, progress=progress, moments=moments)
    where = lists.flatten()[: len(ids)]
    answers = []
    for column in found:
        in_list_order = column.flatten()[: len(ids)]
        answers.append(torch.empty_like(in_list_order).index_copy_(0, where, in_list_order))
    return tuple(answers)


def ask_lists(
    model: nn.Module, lists: Tensor, context: PromptContext, *, batch_tokens: int,
    progress: Callable[[float], None] | None = None, moments: LogitMoments | None = None,
) -> Answers:  # fmt: skip
    """Ask for every list in one context. The caller sees to modes, generators and gradients (`undisturbed`).

    Args:
        lists: (n, k) int64 token ids.
        batch_tokens: prompt tokens in one forward pass.
        progress: called with the share in [0, 1] that is done, after each forward pass.
        moments: takes up the logits of every token at the places that are asked.

    Returns:
        Probability (float32), rank (int64) and most likely token (int64) of each place, (n, k), on the CPU.

    Raises:
        ValueError: if a prompt is longer than the model's ``max_position_embeddings``.

    Example:
        >>> from types import SimpleNamespace
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=9 * torch.eye(4)[input_ids])
        >>> ask_lists(Parrot(), torch.tensor([[1, 2]]), PromptContext("x", (), (), k=1), batch_tokens=8)[2]
        tensor([[2, 1]])
    """
    prompts, places = prompts_of(lists, context)
    _check_length(model, context.name, prompts.shape[1])
    per_batch = _rows_per_batch(model, prompts.shape[1], prompts.shape[1] - int(places[0]), batch_tokens)
    batches = zip(torch.split(prompts, per_batch), torch.split(lists, per_batch), strict=True)
    parts: list[Answers] = []
    for number, (batch, wanted) in enumerate(batches, start=1):
        parts.append(_answers(_logits_at(model, batch, places), wanted, moments))
        if progress is not None:
            progress(min(1.0, number * per_batch / len(lists)))
    probability, rank, instead = (torch.cat(column) for column in zip(*parts, strict=True))
    return probability, rank, instead


def prompts_of(lists: Tensor, context: PromptContext) -> tuple[Tensor, Tensor]:
    """Prompts of one length, and the places whose logits answer.

    Args:
        lists: (n, k) int64 token ids.

    Returns:
        (n, T) int64 prompts, and (k,) int64 places: the logits at place j say which token comes at j + 1. The last
        token of a copy is only an answer and never read, so it is left out.

    Example:
        >>> context = PromptContext("twice", before=(1,), after=(2,), k=2, between=((3,),))
        >>> prompts, places = prompts_of(torch.tensor([[7, 8]]), context)
        >>> prompts.tolist(), places.tolist()
        ([[1, 7, 8, 3, 7, 8, 2, 7]], [6, 7])
        >>> pairs = PromptContext("pairs", before=(), after=(2,), k=1, between=((3,),), shots=1)
        >>> prompts, places = prompts_of(torch.tensor([[7], [8]]), pairs)
        >>> prompts.tolist(), places.tolist()
        ([[8, 2, 8, 3, 7, 2], [7, 2, 7, 3, 8, 2]], [5])
    """
    count, k = lists.shape

    def fixed(ids: tuple[int, ...]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64).expand(count, -1)

    before, after, between = fixed(context.before), fixed(context.after), [fixed(ids) for ids in context.between]
    if context.shots is None:
        shown = [part for ids in between for part in (ids, lists)]
        prompts = torch.cat([before, lists, *shown, after, lists[:, :-1]], dim=1)
        return prompts, torch.arange(prompts.shape[1] - k, prompts.shape[1])
    examples = torch.roll(lists, -1, dims=0)[:, : context.shots]
    tokens = torch.cat([examples, lists], dim=1)[:, :, None]
    lines = [torch.cat([token, after, token, *between], dim=1) for token in tokens.unbind(1)]
    line, lead = lines[0].shape[1], before.shape[1]
    places = lead + line * (examples.shape[1] + torch.arange(k)) + after.shape[1]
    return torch.cat([before, *lines], dim=1)[:, : int(places[-1]) + 1], places


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


def ask_words(
    model: nn.Module, words: Sequence[Sequence[int]], fillers: Tensor, contexts: Sequence[PromptContext], *,
    seed: int, batch_tokens: int,
) -> Tensor:  # fmt: skip
    """Ask for words of one or several tokens, each in one piece, in a list with other tokens.

    Args:
        words: ids of each; none may have more than a context's k.
        fillers: (n,) int64 other tokens, at least one.
        contexts: an ask each.
        seed: of places and neighbours.

    Returns:
        (w, C) bool: every token of the word was the most likely one in its place.

    Raises:
        ValueError: if a word has more tokens than a list, or a prompt is longer than the model takes.

    Example:
        >>> from types import SimpleNamespace
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=9 * torch.eye(8)[input_ids % 7])
        >>> one = PromptContext("one", (), (), k=1)
        >>> ask_words(Parrot(), [[3], [7]], torch.arange(8), [one], seed=0, batch_tokens=64)
        tensor([[ True],
                [False]])
    """
    model = getattr(model, "_orig_mod", model)
    said = torch.zeros(len(words), len(contexts), dtype=torch.bool)
    if not words:
        return said
    with undisturbed(model), torch.no_grad():
        for column, context in enumerate(contexts):
            lists, places = _word_lists(words, fillers, context, seed)
            _, rank, instead = ask_lists(model, lists, context, batch_tokens=batch_tokens)
            right = (instead == lists) & (rank == 0)
            for row, (line, begin) in enumerate(places):
                said[row, column] = bool(right[line, begin : begin + len(words[row])].all())
    return said


def _word_lists(
    words: Sequence[Sequence[int]], fillers: Tensor, context: PromptContext, seed: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Lists that hold all words, (n, k) int64, and for each word its list and the place at which it begins there.

    At least half of a list is other tokens, unless a word is longer than that.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/words/{context.name}".encode()))
    if longest := max((len(word) for word in words if len(word) > context.k), default=0):
        raise ValueError(f"probe.watch: a word of {longest} tokens; allowed: at most {context.k}, as in a list")
    lists: list[list[int]] = []
    for row in torch.randperm(len(words), generator=generator).tolist():
        held = sum(len(words[other]) for other in lists[-1]) if lists else context.k
        if held + len(words[row]) > context.k // 2:
            lists.append([])
        lists[-1].append(row)
    rows, places = [], [(0, 0)] * len(words)
    for line, members in enumerate(lists):
        spare = context.k - sum(len(words[row]) for row in members)
        others = fillers[torch.randint(len(fillers), (spare,), generator=generator)].tolist()
        parts: list[tuple[int | None, Sequence[int]]] = [*((row, words[row]) for row in members)]
        parts += [(None, [token]) for token in others]
        one: list[int] = []
        for place in torch.randperm(len(parts), generator=generator).tolist():
            row_here, ids = parts[place]
            if row_here is not None:
                places[row_here] = (line, len(one))
            one += ids
        rows.append(one)
    return torch.tensor(rows, dtype=torch.int64), places


def _check_length(model: nn.Module, name: str, length: int) -> None:
    longest = longest_prompt(model)
    if longest is not None and length > longest:
        raise ValueError(f"probe.contexts.{name}: a prompt has {length} tokens; the model takes at most {longest}")


def _rows_per_batch(model: nn.Module, length: int, last: int, batch_tokens: int) -> int:
    logits_a_row = (last if _accepts(model, "logits_to_keep") else length) * logits_width(model)
    return max(1, min(batch_tokens // length, _LOGITS_AT_ONCE // max(1, logits_a_row)))


def _logits_at(model: nn.Module, prompts: Tensor, places: Tensor) -> Tensor:
    """(B, k, V) logits at the places, in the model's dtype; only those are computed where the model can."""
    last = prompts.shape[1] - int(places[0])
    options: dict[str, Any] = {"logits_to_keep": last, "use_cache": False}
    accepted = {name: value for name, value in options.items() if _accepts(model, name)}
    logits: Tensor = model(input_ids=prompts.to(input_device(model)), **accepted).logits
    return logits[:, (places - prompts.shape[1]).to(logits.device)]


def _answers(logits: Tensor, wanted: Tensor, moments: LogitMoments | None) -> Answers:
    """What (B, k, V) logits say about the (B, k) wanted ids, as (B, k) CPU tensors; a few places in float at a time."""
    flat, ids = logits.flatten(0, 1), wanted.flatten().to(logits.device)
    places = max(1, _LOGITS_IN_FLOAT // flat.shape[1])
    split = zip(torch.split(flat, places), torch.split(ids, places), strict=True)
    parts = [_answer_part(some.float(), part_ids, moments) for some, part_ids in split]
    probability, rank, instead = (torch.cat(column).view(wanted.shape).cpu() for column in zip(*parts, strict=True))
    return probability, rank, instead


def _answer_part(logits: Tensor, ids: Tensor, moments: LogitMoments | None) -> Answers:
    if moments is not None:
        moments.add(logits, ids)
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
    # A kind of device without a module of its own in torch (XLA's, lazy tensors) has no generator to be had there.
    silent = ("cpu", "meta", "mps")
    devices = {p.device for p in model.parameters() if p.device.type not in silent and hasattr(torch, p.device.type)}
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
