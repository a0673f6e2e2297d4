"""How hard natural text is to predict, token by token, and how much harder than at the base.

The probe sees whether a token can still be repeated; this sees what the whole model makes of a text, body included, and
needs no skill beyond language modelling. Windows of text are read teacher-forced, and every figure is paired: the same
target in the same window, at the base and now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.measure.probe import undisturbed
from vocabguard.measure.recall import LogitMoments
from vocabguard.rows.models import input_device, logits_width, longest_prompt, parameters_of

_LOGITS_AT_ONCE = 2**25
_LOGITS_IN_FLOAT = 2**22
_FILLING = 1 / 16
"""Largest share of a forward pass that is filling, where windows of several lengths are read together."""

LEAST_TARGETS = 200
"""Targets below which a part counts as not measured."""

LEAST_WINDOWS = 5
"""Windows below which a part counts as not measured: an interval needs some to compare."""

RARE, FREQUENT = ("never", "1-4"), ("5-19", "20+")
"""Exposure classes that are held against each other."""

PREDICTED = math.log(8)
"""Negative log-likelihood up to which the base predicted a target: a chance of 1 in 8 or more.

Of what the base did not predict nothing can be lost. There, a fine-tune's own vocabulary shifts the likelihoods of all
other tokens, which says nothing about them.
"""


@dataclass(frozen=True)
class Windows:
    """Pieces of text as token ids.

    Attributes:
        ids: (n, L) int64, filled up on the right with an id that no target depends on.
        lengths: (n,) int64, ids of each window; at least 2.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def measured(self) -> Tensor:
        """(n, L - 1) bool, places of `targets` that are no filling."""
        return torch.arange(1, self.ids.shape[1]) < self.lengths[:, None]

    @property
    def targets(self) -> Tensor:
        """(n, L - 1) int64, the ids that are predicted: each but a window's first."""
        return self.ids[:, 1:]


def cut_windows(texts: Sequence[Sequence[int]], *, window: int, max_tokens: int, prefix: Sequence[int] = ()) -> Windows:
    """Texts in windows that do not overlap; a text is never joined to the next.

    Args:
        texts: ids of each text, without special tokens.
        window: ids in a window at most, with its prefix.
        max_tokens: targets at most. Of more windows some are taken, evenly from the first text to the last.
        prefix: ids before each window, such as the token that begins a sequence; they are no targets.

    Raises:
        ValueError: if no window has a target, or `window` has no room for one.

    Example:
        >>> windows = cut_windows([[5, 6, 7, 8, 9], [4], [3, 2]], window=3, max_tokens=100)
        >>> windows.ids.tolist(), windows.lengths.tolist()
        ([[5, 6, 7], [8, 9, 8], [3, 2, 3]], [3, 2, 2])
    """
    # Without a prefix the first id of a window has nothing before it that could predict it.
    room, first = window - len(prefix), 0 if prefix else 1
    if room < 1 + first:
        raise ValueError(f"window is {window}; allowed: at least {len(prefix) + 1 + first}")
    pieces = [list(text[at : at + room]) for text in texts for at in range(0, len(text), room)]
    pieces = [piece for piece in pieces if len(piece) > first]
    if not pieces:
        raise ValueError("the texts hold no target; allowed: texts of two tokens or more")
    taken = [[*prefix, *piece] for piece in _evenly(pieces, max_tokens, first)]
    longest = max(map(len, taken))
    # Filled with an id of its own: a causal model does not look there, and no special token raises a warning.
    filled = [ids + [ids[0]] * (longest - len(ids)) for ids in taken]
    return Windows(torch.tensor(filled, dtype=torch.int64), torch.tensor([len(ids) for ids in taken]))


def _evenly(pieces: list[list[int]], most: int, first: int) -> list[list[int]]:
    """Pieces at even distances, as many as hold at most `most` targets; of a single one, its beginning."""
    targets = sum(len(piece) - first for piece in pieces)
    for count in range(min(len(pieces), len(pieces) * most // targets), 1, -1):
        taken = [pieces[place * len(pieces) // count] for place in range(count)]
        if sum(len(piece) - first for piece in taken) <= most:
            return taken
    return [pieces[0][: most + first]]


@torch.no_grad()
def token_nll(model: nn.Module, windows: Windows, *, batch_tokens: int, moments: LogitMoments | None = None) -> Tensor:
    """Negative log-likelihood of each target, given all ids before it in its window.

    The model is asked in evaluation mode, without gradients, outside of compiled code; modes, generators and gradients
    stay. Windows of about one length are read together, and logits become float32 a few places at a time.

    Args:
        model: causal language model, called as ``model(input_ids=...)`` and giving ``.logits``.
        batch_tokens: ids in one forward pass. Fewer are taken where the logits would exceed 2**25 numbers.
        moments: takes up the logits of every token at the places of the targets.

    Returns:
        (n, L - 1) float32 on the CPU, in nats; NaN where there is no target, and where the model gives NaN.

    Raises:
        ValueError: if a window is longer than the model's ``max_position_embeddings``.

    Example:
        A model for which every id but a repetition is equally unlikely:

        >>> from types import SimpleNamespace
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=torch.eye(4)[input_ids] * 3)
        >>> token_nll(Parrot(), cut_windows([[1, 1, 2]], window=3, max_tokens=9), batch_tokens=8)
        tensor([[0.1392, 3.1392]])
    """
    model = getattr(model, "_orig_mod", model)
    longest = longest_prompt(model)
    if longest is not None and windows.ids.shape[1] > longest:
        raise ValueError(f"a window has {windows.ids.shape[1]} tokens; the model takes at most {longest}")
    found = torch.full(windows.targets.shape, math.nan)
    with undisturbed(model):
        for rows, length in _batches(model, windows, batch_tokens):
            ids, counted = windows.ids[rows, :length], windows.measured[rows, : length - 1]
            # The last id of a window is only a target, and never read.
            found[rows, : length - 1] = _nll(_logits(model, ids[:, :-1]), ids[:, 1:], counted, moments)
    # A causal model's answers do not depend on the filling behind them; those about the filling are dropped.
    return found.masked_fill(~windows.measured, math.nan)


def _batches(model: nn.Module, windows: Windows, batch_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """(rows, length) of windows of about one length, as many as fit."""
    size, order = logits_width(model), torch.argsort(windows.lengths, stable=True)
    lengths, start = windows.lengths[order].tolist(), 0
    while start < len(lengths):
        stop, filled = start + 1, 0
        while stop < len(lengths):
            length, count = lengths[stop], stop + 1 - start
            filled += (length - lengths[stop - 1]) * (count - 1)
            tokens = length * count
            if tokens > batch_tokens or tokens * size > _LOGITS_AT_ONCE or filled > _FILLING * tokens:
                break
            stop += 1
        yield order[start:stop], lengths[stop - 1]
        start = stop


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, V) logits in the model's dtype."""
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters_of(model) else {}
    logits: Tensor = model(input_ids=ids.to(input_device(model)), **options).logits
    return logits


def _nll(logits: Tensor, targets: Tensor, measured: Tensor, moments: LogitMoments | None) -> Tensor:
    """(B, T) float32 on the CPU of (B, T, V) logits.

    Args:
        measured: (B, T) bool, places of targets that are no filling.
    """
    flat, ids = logits.flatten(0, 1), targets.flatten().to(logits.device)
    places = max(1, _LOGITS_IN_FLOAT // flat.shape[1])
    split = (torch.split(one, places) for one in (flat, ids, measured.flatten().to(logits.device)))
    parts = []
    for part, wanted, counted in zip(*split, strict=True):
        some = part.float()
        parts.append(nn.functional.cross_entropy(some, wanted, reduction="none"))
        if moments is not None:
            whole = bool(counted.all())  # then nothing need be copied
            moments.add(some if whole else some[counted], wanted if whole else wanted[counted])
    return torch.cat(parts).view(targets.shape).cpu()


@dataclass(frozen=True)
class Rise:
    """A mean rise of negative log-likelihood over the base, in nats a target.

    Attributes:
        mean: > 0 where the targets are harder to predict than at the base.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def paired_rise(rise: Tensor, chosen: Tensor, against: Tensor | None = None, *, z: float) -> Rise:
    """The mean rise of some targets, less that of others if these are given, with an interval.

    Targets of one window are not independent. The interval takes windows as what was drawn: the standard error is that
    of a ratio estimator, from each window's summed residuals (the cluster-robust "sandwich" of a mean), widened by
    Student's t for few windows.

    Args:
        rise: (n, m) float, of each target of each window; NaN where there is none.
        chosen: (n, m) bool, targets that count; at least one.
        against: (n, m) bool, targets whose mean is taken off; at least one.
        z: half width in standard errors, as of a normal distribution.

    Example:
        Three windows of two targets, the second of which rises more:

        >>> rise = torch.tensor([[0.1, 0.4], [0.0, 0.6], [-0.1, 0.5]])
        >>> second = torch.tensor([[False, True]]).expand(3, 2)
        >>> found = paired_rise(rise, second, z=1.0)
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (0.5, 0.424, 0.576)
        >>> round(paired_rise(rise, second, ~second, z=1.0).mean, 3)
        0.5
    """
    mean, pull = _mean_and_pull(rise.double(), chosen)
    touched = chosen.any(1)
    if against is not None:
        other, taken = _mean_and_pull(rise.double(), against)
        mean, pull, touched = mean - other, pull - taken, touched | against.any(1)
    count = int(touched.sum())
    if count < 2:
        return Rise(mean, -math.inf, math.inf)
    error = math.sqrt(count / (count - 1) * float(pull.square().sum()))
    half = _student(z, count - 1) * error
    return Rise(mean, mean - half, mean + half)


def _mean_and_pull(rise: Tensor, chosen: Tensor) -> tuple[float, Tensor]:
    """The mean, and how far each window pulls it, (n,)."""
    values, total = torch.where(chosen, rise, 0.0), chosen.sum()
    mean = values.sum() / total
    return float(mean), (values.sum(1) - mean * chosen.sum(1)) / total


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's t at a normal one (Cornish-Fisher; Abramowitz and Stegun 26.7.5)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def summarise_reference(
    windows: Windows, base: Tensor, now: Tensor, parts: Mapping[str, Tensor], *, z: float, least: int = LEAST_TARGETS
) -> dict[str, float]:
    """A text against itself at the base, as a few numbers.

    Keys: ``nll``, mean of all targets now, in nats; ``nll_rise`` and ``<part>/nll_rise`` with ``_low`` and ``_high``,
    mean rise over the base; ``targets`` and ``<part>/targets``, how many that is the mean of; ``rare_rise`` with
    ``_low`` and ``_high``, of the targets that the base predicted (`PREDICTED`) the rise of the parts `RARE` together
    less that of `FREQUENT`; ``rare/targets`` and ``frequent/targets``, how many those are. A part of fewer than `least`
    targets, or in fewer than `LEAST_WINDOWS` windows, is not measured: only its ``targets`` are there.

    Args:
        base: (n, L - 1) float32, as `token_nll` gives it.
        now: (n, L - 1) float32.
        parts: name -> (V,) bool, tokens that belong to it.
        z: half width of the intervals in standard errors.
        least: targets that a part needs.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> windows = cut_windows([[1, 2]] * 6, window=2, max_tokens=99)
        >>> never = torch.tensor([False, False, True])
        >>> found = summarise_reference(windows, torch.ones(6, 1), torch.ones(6, 1), {"never": never}, z=2, least=6)
        >>> found["targets"], found["never/nll_rise"], found["never/nll_rise_high"], "rare_rise" in found
        (6.0, 0.0, 0.0, False)
    """
    if base.shape != now.shape or base.shape != windows.targets.shape:
        shapes = [tuple(one.shape) for one in (windows.targets, base, now)]
        raise ValueError(f"targets, base and now have the shapes {shapes}; allowed: the same")
    # What a model of NaNs says of a target is no number: such targets are left out, and counted out.
    rise, measured = now - base, windows.measured & base.isfinite() & now.isfinite()
    masks = {name: measured & members[windows.targets] for name, members in parts.items()}
    found = {"nll": float(now[measured].double().mean())} if bool(measured.any()) else {}
    for name, mask in {"": measured, **masks}.items():
        inner = f"{name}/" if name else ""
        found[f"{inner}targets"] = float(mask.sum())
        if _enough(mask, least):
            found |= _named(f"{inner}nll_rise", paired_rise(rise, mask, z=z))
    predicted = measured & (base <= PREDICTED)
    rare, frequent = (predicted & _together(masks, names, measured) for names in (RARE, FREQUENT))
    if masks.keys() >= {*RARE, *FREQUENT}:
        found |= {"rare/targets": float(rare.sum()), "frequent/targets": float(frequent.sum())}
    if _enough(rare, least) and _enough(frequent, least):
        found |= _named("rare_rise", paired_rise(rise, rare, frequent, z=z))
    return found


def _together(masks: Mapping[str, Tensor], names: Sequence[str], measured: Tensor) -> Tensor:
    chosen = [masks[name] for name in names if name in masks]
    return torch.stack(chosen).any(0) if chosen else torch.zeros_like(measured)


def _enough(mask: Tensor, least: int) -> bool:
    return int(mask.sum()) >= max(1, least) and int(mask.any(1).sum()) >= LEAST_WINDOWS


def _named(name: str, rise: Rise) -> dict[str, float]:
    return {name: rise.mean, f"{name}_low": rise.low, f"{name}_high": rise.high}
