"""What a repair did: which tokens can be said, and a language-model loss, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.measure.probe import probe, retained, said, stratified_sample
from vocabguard.offline.explain import contexts_for
from vocabguard.offline.scan import Scan

_LIST = 16
_WINDOW = 256
_SEED = 7


def recall_of(
    models: Mapping[str, nn.Module], scan: Scan, tokenizer: Any, lost: Tensor, sample: int
) -> dict[str, float | int | None]:
    """Ask models for live tokens and compare them with the base.

    Args:
        models: ``base``, and others such as ``tuned`` and ``repaired``, all of the tuned vocabulary's ids.
        scan: for live rows and groups.
        tokenizer: writes the prompts.
        lost: (V,) bool, rows that were repaired.
        sample: tokens to ask for, stratified by group; 0 asks for all live ones.

    Returns:
        ``tokens``; for each other model ``<name>`` and ``<name>_lost``, the share in [0, 1] of tokens said at the base
        (of all, and of the repaired rows) that it says; ``returned``, the share of the loss that ``repaired`` gives
        back, where both are there and something was lost.

    Raises:
        ValueError: if a prompt is longer than a model takes, or the chat template fails.
    """
    strata = scan.table.group.long()
    size = sample or int(scan.live.sum())
    ids = stratified_sample(strata, scan.live, size, _SEED)
    contexts = contexts_for(tokenizer, _LIST)
    asked = {name: probe(model, ids, contexts, seed=_SEED, batch_tokens=8192) for name, model in models.items()}
    base = asked.pop("base")
    found: dict[str, float | int | None] = {"tokens": len(ids), "said_at_base": int(said(base).sum())}
    for name, result in asked.items():
        found[name] = _number(retained(base, result))
        found[f"{name}_lost"] = _number(retained(base, result, lost[ids]))
    before, after = found.get("tuned"), found.get("repaired")
    gone = None if before is None else 1 - before
    found["returned"] = (after - before) / gone if gone and after is not None and before is not None else None
    return found


@torch.no_grad()
def text_loss(model: nn.Module, tokenizer: Any, file: Path, most: int = 2**16) -> float:
    """Mean cross entropy in nats of a text's tokens.

    Args:
        model: a causal language model.
        tokenizer: cuts the text.
        file: UTF-8 text.
        most: tokens read.

    Raises:
        ValueError: if the file cannot be read or has fewer than two tokens.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file}: cannot be read as UTF-8 ({error})") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most], dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(f"--text {file}: has {len(ids)} tokens; needed: at least 2")
    total, count = 0.0, 0
    for window in torch.split(ids, _WINDOW):
        if len(window) > 1:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return total / count


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
