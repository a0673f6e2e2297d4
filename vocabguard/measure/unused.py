"""Rows that are known to be unused: what under-trained tokens are compared with (`vocabguard.measure.undertrained`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vocabguard.measure.chunks import Chunks

FEWEST_UNUSED = 4
"""Fewer rows known as unused say nothing about what an unused row looks like."""

# Rows that were only pushed are the same up to rounding: cosines of 0.99999 in SmolLM2, of 0.9995 in a Gemma 3 of 4
# bits a weight. Both have chat markers at 0.990 to 0.993.
_ALIKE = 0.999
_SAMPLED = 512
# In standard deviations of the logarithm.
_USUAL_NORM = 6.0


def known_unused(output: Chunks, idle: Tensor, reserved: Tensor, control: Tensor) -> Tensor:
    """Rows that no training can have given a meaning: the idle ones, and reserved or control tokens left alone.

    A name does not suffice: of Gemma 3's 6,242 ``<unusedN>`` a third have rows unlike the others', and chat models give
    reserved tokens a role. Rows that were only pushed are alike. So of the reserved tokens those count that are alike
    (cosine of at least 0.999 to the one that has the most such neighbours); where fewer than four are, such control
    tokens of any name. A trained chat marker is not among them: SmolLM2's ``<|im_start|>`` has a cosine of 0.993. Where
    no four are alike, as at an initialisation, reserved tokens count by their names, if the norm of their row is the
    usual one.

    Args:
        output: the output rows, or the input rows where there are none; read once.
        idle: (V,) bool, rows beyond the tokenizer and tokens that no text gives; taken as they are.
        reserved: (V,) bool, control tokens that are named as reserved or unused.
        control: (V,) bool, all control tokens.

    Returns:
        (V,) bool.

    Example:
        >>> rows = torch.tensor([[9.0, 1.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.001], [3.0, 4.7]])
        >>> every = torch.ones(6, dtype=torch.bool)
        >>> known_unused(lambda: [(slice(0, 6), rows)], ~every, ~every, every).tolist()
        [False, True, True, True, True, False]
    """
    ids = control.nonzero().flatten()
    if len(ids) == 0:
        return idle
    rows = torch.cat([part[control[where].to(part.device)].detach().float().cpu() for where, part in output()])
    norms = rows.norm(dim=1)
    rows /= norms[:, None]
    named = reserved[ids]
    for pool in (named, torch.ones_like(named)):
        alike = pool & _alike(rows, pool)
        if int(alike.sum()) >= FEWEST_UNUSED:
            break
    else:
        alike = named & _usual(norms.log(), named)
    found = idle.clone()
    found[ids[alike]] = True
    return found


def not_measured(unused: Tensor) -> str | None:
    """Why no row can be compared with unused ones, in words; None where they can.

    Example:
        >>> not_measured(torch.zeros(9, dtype=torch.bool))
        'no row is known to be unused, 4 are needed'
    """
    count = int(unused.sum())
    if count >= FEWEST_UNUSED:
        return None
    return f"{count or 'no'} {'row is' if count < 2 else 'rows are'} known to be unused, {FEWEST_UNUSED} are needed"


def spread_of(values: Tensor) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for in a normal distribution.

    Example:
        >>> spread_of(torch.tensor([1.0, 2.0, 3.0, 4.0, 500.0]))
        (3.0, 1.4826)
    """
    median = values.median()
    return median.item(), 1.4826 * (values - median).abs().median().item()


def _alike(directions: Tensor, pool: Tensor) -> Tensor:
    """(n,) bool: which of n rows of length 1 are alike to that one of the pool which has the most rows alike."""
    known = directions[pool & directions.isfinite().all(dim=1)]
    if len(known) == 0:
        return torch.zeros_like(pool)
    sample = known[:: math.ceil(len(known) / _SAMPLED)]
    centre = sample[(sample @ sample.T >= _ALIKE).sum(dim=1).argmax()]
    return directions @ centre >= _ALIKE


def _usual(log_norms: Tensor, pool: Tensor) -> Tensor:
    """(n,) bool: which norms are like most of the pool's; half and double of their median are."""
    known = log_norms[pool & log_norms.isfinite()]
    if len(known) == 0:
        return torch.zeros_like(pool)
    middle, spread = spread_of(known)
    return (log_norms - middle).abs() <= max(_USUAL_NORM * spread, math.log(2))
