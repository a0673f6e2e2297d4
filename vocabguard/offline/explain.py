"""One token under the microscope: its cut, its rows before and after, its neighbours, what the models say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.measure.neighbors import intruders, nearest_rows
from vocabguard.measure.probe import PromptContext, probe, probe_applicable, said
from vocabguard.offline.scan import Scan
from vocabguard.offline.scan_summary import category_of
from vocabguard.offline.tensors import one_line
from vocabguard.prompts import render_context
from vocabguard.results import MatrixName, NotApplicable, ProbeResult
from vocabguard.snapshot import Baseline

CONTEXTS = {
    "repeat": "Repeat this: {tokens}",
    "above": "{tokens}\nPlease repeat the above content.",
    "exactly": "Copy exactly: {tokens}",
    "say": 'Say "{tokens}" once more.',
}
"""Ways of asking, in text."""

_LIST = 8
_SEED = 0
_FILLERS = 64


@dataclass(frozen=True)
class RowFacts:
    """One token's row in one matrix; ranks are among live rows, 0 is the most changed.

    Attributes:
        cosine: with its base row.
        cosine_rank: by cosine, lowest first.
        residual: cosine without the shared shift.
        l2: length of the displacement.
        l2_rank: by it, longest first.
        norm_ratio: norm now over norm at the base.
        base_norm: norm at the base.
        base_norm_quantile: share in [0, 1] of live rows with a smaller norm at the base.
        live: live rows.
    """

    cosine: float
    cosine_rank: int
    residual: float
    l2: float
    l2_rank: int
    norm_ratio: float
    base_norm: float
    base_norm_quantile: float
    live: int


@dataclass(frozen=True)
class Neighbour:
    """A row near another one.

    Attributes:
        id: in the tuned vocabulary.
        text: what it decodes to.
        category: of the token.
        cosine: with the token's row.
        intruder: a control token, a byte or a token of another script than the one looked at.
    """

    id: int
    text: str
    category: str
    cosine: float
    intruder: bool


@dataclass(frozen=True)
class Emission:
    """What a model said when it was asked for one token, in C contexts.

    Attributes:
        said: whether it was the most likely one in more than half of them.
        contexts: the share of the contexts in which it was.
        probability: mean over the contexts.
        instead: text of what came in its place most often; None where it always came.
    """

    said: bool
    contexts: float
    probability: float
    instead: str | None


def row_facts(scan: Scan, name: MatrixName, base: Baseline | NotApplicable, token: int) -> RowFacts | NotApplicable:
    """A token's row in numbers.

    Args:
        scan: of the pair.
        name: which matrix.
        base: its base rows, in the order of the tuned vocabulary.
        token: id in that vocabulary.
    """
    drift = scan.drift(name)
    if isinstance(drift, NotApplicable):
        return drift
    if isinstance(base, NotApplicable):
        return base
    live = scan.live
    norms = base.norms
    others = norms[live & norms.isfinite()]
    return RowFacts(
        cosine=float(drift.cosine[token]),
        cosine_rank=int((drift.cosine[live] < drift.cosine[token]).sum()),
        residual=float(drift.residual[token]),
        l2=float(drift.l2[token]),
        l2_rank=int((drift.l2[live] > drift.l2[token]).sum()),
        norm_ratio=float(drift.norm_ratio[token]),
        base_norm=float(norms[token]),
        base_norm_quantile=float((others < norms[token]).double().mean()) if len(others) else float("nan"),
        live=int(live.sum()),
    )


def neighbours(rows: Baseline, scan: Scan, token: int, count: int = 8) -> tuple[Neighbour, ...]:
    """The tokens whose rows point most nearly the same way, chunk by chunk; padded rows are left out.

    Args:
        rows: before or after, in the order of the tuned vocabulary.
        scan: for texts and groups.
        token: whose neighbours.
        count: how many.
    """
    ids = torch.tensor([token])
    near = nearest_rows(rows, ids, min(count, rows.rows), scan.table.padded)
    strange = intruders(scan.table, ids, near.ids)[0].tolist()
    return tuple(
        Neighbour(i, scan.table.text(i), category_of(scan.table, i), cosine, intruder)
        for i, cosine, intruder in zip(near.ids[0].tolist(), near.cosine[0].tolist(), strange, strict=True)
        if i >= 0
    )


def load_model(path: Path) -> nn.Module:
    """A causal language model of a folder.

    Raises:
        ValueError: if there is none, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # one for each model, where that is no terminal too
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, so no model can be loaded from it")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), local_files_only=True, dtype="auto")
    except Exception as error:  # loading raises what it likes
        raise ValueError(f"{path}: the model cannot be loaded ({one_line(error)})") from error
    found: nn.Module = model
    reason = probe_applicable(found)
    if reason is not None:
        raise ValueError(f"{path}: {reason.reason}")
    return found.eval()


def contexts_for(tokenizer: Any, count: int = _LIST) -> list[PromptContext]:
    """The ways of asking, rendered by the tokenizer.

    Raises:
        ValueError: if the chat template does not render a user's turn.
    """
    return [render_context(tokenizer, name, text, count) for name, text in CONTEXTS.items()]


def emissions(
    model: nn.Module, scan: Scan, tokens: Sequence[int], contexts: Sequence[PromptContext]
) -> dict[int, Emission]:
    """Ask a model for tokens of the tuned vocabulary, among other live tokens.

    Raises:
        ValueError: if a prompt is longer than the model takes.
    """
    live = scan.live.nonzero().flatten()
    spread = live[torch.linspace(0, len(live) - 1, min(_FILLERS, len(live))).long()] if len(live) else live
    ids = torch.unique(torch.cat([torch.tensor(list(tokens), dtype=torch.int64), spread]))
    result = probe(model, ids, contexts, seed=_SEED, batch_tokens=8192)
    return {token: _emission(result, scan, token) for token in tokens}


@contextlib.contextmanager
def swapped(model: nn.Module, name: MatrixName, token: int, row: Tensor) -> Iterator[None]:
    """The model with another row in one matrix, and as it was afterwards.

    Args:
        model: a causal language model.
        name: ``head`` or ``embedding``; with tied weights either changes both.
        token: which row.
        row: (width,) what it is to be.
    """
    getter = "get_output_embeddings" if name == "head" else "get_input_embeddings"
    weight: Tensor = getattr(model, getter)().weight.data
    before = weight[token].clone()
    weight[token] = row.to(weight.dtype)
    try:
        yield
    finally:
        weight[token] = before


def _emission(result: ProbeResult, scan: Scan, token: int) -> Emission:
    row = int((result.ids == token).nonzero()[0])
    wrong = result.instead[row][~result.emitted[row]]
    return Emission(
        said=bool(said(result)[row]),
        contexts=float(result.emitted[row].float().mean()),
        probability=float(result.probability[row].mean()),
        instead=scan.table.text(int(wrong.mode().values)) if len(wrong) else None,
    )
