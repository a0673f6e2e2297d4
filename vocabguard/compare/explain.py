"""One token under the microscope: its cut, its rows before and after, its neighbours, what the models say."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.compare.scan import Scan, fitted
from vocabguard.compare.summary import category_of
from vocabguard.files import plain
from vocabguard.measure.contexts import choose_asks
from vocabguard.measure.localize import End, input_rows_back, output_rows_back
from vocabguard.measure.neighbors import intruders, nearest_rows
from vocabguard.measure.probe import PromptContext, probe
from vocabguard.measure.retention import gone, said
from vocabguard.measure.undertrained import unused_distances
from vocabguard.measure.unused import not_measured
from vocabguard.results import DEGRADED, MatrixName, NotApplicable, ProbeResult
from vocabguard.rows.baselines import Baseline, norms_of
from vocabguard.rows.tensors import MATRICES

ASKS = 8
"""How often a single token is asked: its verdict is of its own."""

_SEED = 0
_FILLERS = 64
_BATCH = 8192


@dataclass(frozen=True)
class TokenRow:
    """One token's row in one matrix; ranks are among live rows, 0 is the most changed.

    Attributes:
        cosine_rank: by cosine, lowest first.
        residual: cosine without the shared shift.
        l2: length of the displacement.
        l2_rank: by it, longest first.
        norm_ratio: norm now over norm at the base.
        base_norm_quantile: share in [0, 1] of live rows with a smaller norm at the base.
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
    """A row near another one; an intruder is a control token, a byte or a token of another script."""

    id: int
    text: str
    category: str
    cosine: float
    intruder: bool


@dataclass(frozen=True)
class Emission:
    """What a model said when it was asked for one token, C times.

    Attributes:
        said: whether it was the most likely one in more than half of the asks.
        gone: whether it was in fewer than half.
        contexts: the share of the asks in which it was.
        probability: mean over the contexts.
        instead: text of what came in its place most often; None where it always came.
    """

    said: bool
    gone: bool
    contexts: float
    probability: float
    instead: str | None


def token_row(scan: Scan, name: MatrixName, base: Baseline | NotApplicable, token: int) -> TokenRow | NotApplicable:
    """A token's row in numbers; ``base`` and ``token`` are in the order of the tuned vocabulary."""
    drift = scan.drift(name)
    if isinstance(drift, NotApplicable):
        return drift
    if isinstance(base, NotApplicable):
        return base
    live = scan.live
    norm = _placed("base_norm", norms_of(base), live, token)
    return TokenRow(
        cosine=float(drift.cosine[token]), cosine_rank=int((drift.cosine[live] < drift.cosine[token]).sum()),
        residual=float(drift.residual[token]), l2=float(drift.l2[token]),
        l2_rank=int((drift.l2[live] > drift.l2[token]).sum()), norm_ratio=float(drift.norm_ratio[token]),
        live=int(live.sum()), **norm,
    )  # fmt: skip


def neighbours(rows: Baseline, scan: Scan, token: int, count: int = 8) -> tuple[Neighbour, ...]:
    """The tokens whose rows point most nearly the same way, chunk by chunk; padded rows are left out.

    The rows are in the order of the tuned vocabulary.
    """
    ids = torch.tensor([token])
    near = nearest_rows(rows, ids, min(count, rows.rows), scan.table.padded)
    strange = intruders(scan.table, ids, near.ids)[0].tolist()
    return tuple(
        Neighbour(i, scan.table.text(i), category_of(scan.table, i), cosine, intruder)
        for i, cosine, intruder in zip(near.ids[0].tolist(), near.cosine[0].tolist(), strange, strict=True)
        if i >= 0
    )


def asks_of(model: nn.Module, scan: Scan, pool: Sequence[PromptContext], asks: int = ASKS) -> tuple[PromptContext, ...]:
    """The asks that the base model follows best, of a pool, as the guard chooses them.

    Args:
        model: the base.
        scan: tells which tokens are live.

    Raises:
        ValueError: if all prompts are longer than the model takes.
    """
    return choose_asks(model, pool, _spread(scan), asks, seed=_SEED + 1, batch_tokens=_BATCH).contexts


def _spread(scan: Scan) -> Tensor:
    """Some live tokens, evenly spaced."""
    live = scan.live.nonzero().flatten()
    return live[torch.linspace(0, len(live) - 1, min(_FILLERS, len(live))).long()] if len(live) else live


def emissions(
    model: nn.Module, scan: Scan, tokens: Sequence[int], contexts: Sequence[PromptContext]
) -> dict[int, Emission]:
    """Ask a model for tokens of the tuned vocabulary, among other live tokens.

    Raises:
        ValueError: if a prompt is longer than the model takes.
    """
    ids = torch.unique(torch.cat([torch.tensor(list(tokens), dtype=torch.int64), _spread(scan)]))
    result = probe(model, ids, contexts, seed=_SEED, batch_tokens=_BATCH)
    return {token: _emission(result, scan, token) for token in tokens}


def _emission(result: ProbeResult, scan: Scan, token: int) -> Emission:
    row = int((result.ids == token).nonzero()[0])
    wrong = result.instead[row][~result.emitted[row]]
    return Emission(
        said=bool(said(result)[row]),
        gone=bool(gone(result)[row]),
        contexts=float(result.emitted[row].float().mean()),
        probability=float(result.probability[row].mean()),
        instead=scan.table.text(int(wrong.mode().values)) if len(wrong) else None,
    )


@dataclass(frozen=True)
class Sides:
    """The rows of both sides in the order of the tuned vocabulary, and the models, or why they cannot be asked."""

    scan: Scan
    base: Mapping[MatrixName, Baseline | NotApplicable]
    tuned: Mapping[MatrixName, Baseline | NotApplicable]
    base_model: nn.Module | None
    tuned_model: nn.Module | None
    no_models: str | None

    @classmethod
    def of(cls, scan: Scan, models: tuple[nn.Module, nn.Module] | str) -> Sides:
        """From a scan, with both models or why there are none."""
        own = torch.arange(len(scan.table))
        base = {name: fitted(scan.base.matrix(name), scan.match.base_ids) for name in MATRICES}
        tuned = {name: fitted(scan.tuned.matrix(name), own) for name in MATRICES}
        if isinstance(models, str):
            return cls(scan, base, tuned, None, None, models)
        return cls(scan, base, tuned, *models, None)


def story(sides: Sides, tokenizer: Any, token: int, contexts: Sequence[PromptContext]) -> dict[str, Any]:
    """Everything about one token, JSON-able; what was not measured says why.

    Args:
        tokenizer: of the tuned vocabulary; None leaves the cut out.
        token: id in that vocabulary.
        contexts: ways of asking; not used without models.

    Returns:
        ``id``, ``text``, ``category``, ``live``, ``cut``, ``trained``, ``head`` and ``embedding`` (`TokenRow`),
        ``neighbours`` (``then``, ``now``), ``emission`` (``then``, ``now``, ``head_row_back``, ``both_rows_back``),
        ``data_target``, ``kind``, ``diagnosis``, ``advice``.
    """
    scan = sides.scan
    rows = {name: token_row(scan, name, sides.base[name], token) for name in MATRICES}
    emission = _asked(sides, token, contexts)
    found: dict[str, Any] = {
        "id": token,
        "base_id": int(scan.match.base_ids[token]),
        "text": scan.table.text(token),
        "category": category_of(scan.table, token),
        "live": bool(scan.live[token]),
        "cut": None if tokenizer is None else cut_of(tokenizer, scan.table.text(token), token),
        "trained": _trained(sides, token),
        "head": rows["head"],
        "embedding": rows["embedding"],
        "neighbours": _neighbours(sides, token),
        "emission": emission,
        "not_asked": sides.no_models,
        "data_target": None if scan.data_target is None else int(scan.data_target[token]),
    }
    kind = judge(scan, token, rows, emission)
    told = {"kind": kind, "diagnosis": _DIAGNOSES[kind], "advice": _ADVICE[kind]}
    story: dict[str, Any] = plain(found | told)
    return story


def cut_of(tokenizer: Any, text: str, token: int) -> dict[str, Any]:
    """How the tokenizer cuts the token's own text: ids, pieces, whether it is one id, whether that is the token."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return {
        "ids": ids,
        "pieces": tokenizer.convert_ids_to_tokens(ids),
        "one_id": len(ids) == 1,
        "round_trip": ids == [token],
        "decoded": tokenizer.decode([token]),
    }


def judge(  # noqa: PLR0911 (one for each diagnosis)
    scan: Scan, token: int, rows: Mapping[MatrixName, TokenRow | NotApplicable], emission: Mapping[str, Emission]
) -> str:
    """Which of the diagnoses fits; a key of the sentences below."""
    if not bool(scan.match.mask[token]):
        return "new"
    if not bool(scan.table.trained[token]):
        return "never_trained"
    if not bool(scan.table.live[token]):
        return "not_live"
    judged = rows[scan.judged] if scan.judged else None
    drifted = isinstance(judged, TokenRow) and not judged.cosine >= DEGRADED
    if "now" not in emission:
        return "drifted" if drifted else "kept"
    if emission["now"].said:
        return "said_but_drifted" if drifted else "fine"
    if not emission["then"].said:
        return "never_said"
    if not emission["now"].gone:
        return "unclear"
    for key, kind in (("head_row_back", "lost_in_head"), ("both_rows_back", "lost_in_rows")):
        if key in emission and emission[key].said:
            return kind
    return "lost_in_body"


_DIAGNOSES = {
    "new": "It has no row in the base, so there is nothing that training could have lost.",
    "never_trained": "It was never trained at the base, so nothing was lost.",
    "not_live": "It is a control token, a padded row, or a token that no text gives; its drift is no loss of speech.",
    "drifted": "Its row has drifted below cosine 0.95; whether it is still repeated was not measured.",
    "kept": "Its row is where it was; whether it is still repeated was not measured.",
    "said_but_drifted": "It is still repeated, though its row has drifted below cosine 0.95.",
    "fine": "It is repeated as before, and its row is near where it was.",
    "never_said": "Not measured: the base does not repeat it, so a loss cannot be seen this way.",
    "unclear": "Not enough evidence: the base repeats it, the tuned model in half of the asks.",
    "lost_in_head": "The base repeats it, the tuned model does not; the base's output row is enough: lost in the head.",
    "lost_in_rows": "The base repeats it, the tuned model does not; the base's output and input row bring it back.",
    "lost_in_body": "The base repeats it, the tuned model does not, with the base's rows neither: lost in the body.",
}  # fmt: skip

_ADVICE = {
    "new": "Give it targets in the training data: at least 20.",
    "never_trained": "Do not count on it; if it is needed, give it targets in the training data.",
    "not_live": "Nothing to do, unless your chat format needs it.",
    "drifted": "Run this where both models can be loaded, or put the row back with `vocabguard repair`.",
    "kept": "Run this where both models can be loaded to be sure.",
    "said_but_drifted": "Echo it in the next training, before it is lost.",
    "fine": "Nothing to do.",
    "never_said": "If it is needed, give it targets in the training data: at least 20.",
    "unclear": "Look at the probabilities below; echo it in the next training.",
    "lost_in_head": "Put it back with `vocabguard repair`; in the next training, echo it.",
    "lost_in_rows": "Train a little more with echo, or put both rows back by hand.",
    "lost_in_body": "Rows will not do: train a little more with echo or with replayed text that has it.",
}

LOST = frozenset({"drifted", "lost_in_head", "lost_in_rows", "lost_in_body"})
"""Diagnoses that count as findings."""


def _asked(sides: Sides, token: int, contexts: Sequence[PromptContext]) -> dict[str, Emission]:
    """What both models say, and the tuned one with base rows put back if it no longer says the token."""
    base, tuned, scan = sides.base_model, sides.tuned_model, sides.scan
    if base is None or tuned is None or not contexts or not bool(scan.match.mask[token]):
        return {}

    def ask(model: nn.Module) -> Emission:
        return emissions(model, scan, [token], contexts)[token]

    found = {"then": ask(base), "now": ask(tuned)}
    if found["now"].said or not found["then"].said:
        return found
    ids = torch.tensor([token])
    head = _end(tuned, "head", sides.base["head"])
    # In a tied model one row is both: either both are put back or none.
    embedding = _end(tuned, "embedding", sides.base["head" if scan.tuned.tied else "embedding"])
    if head is None:
        return found
    with output_rows_back(head, ids), contextlib.ExitStack() as inputs:
        if scan.tuned.tied and embedding is not None:
            inputs.enter_context(input_rows_back(embedding, ids))
        found["head_row_back"] = ask(tuned)
        if embedding is not None and not found["head_row_back"].said and not scan.tuned.tied:
            inputs.enter_context(input_rows_back(embedding, ids))
            found["both_rows_back"] = ask(tuned)
    return found


def _end(model: nn.Module, name: MatrixName, base: Baseline | NotApplicable) -> End | None:
    """One matrix of a model with its base rows; None where there are none."""
    if isinstance(base, NotApplicable):
        return None
    module: nn.Module = getattr(model, "get_output_embeddings" if name == "head" else "get_input_embeddings")()
    return End(module, base)


def _trained(sides: Sides, token: int) -> dict[str, Any]:
    """The indicators of "Fishing for Magikarp": norm of the input row, distance of the output row to unused ones."""
    scan = sides.scan
    found: dict[str, Any] = {"trained": bool(scan.table.trained[token])}
    inputs, outputs = sides.base["embedding"], sides.base["head"]
    if not isinstance(inputs, NotApplicable):
        found |= _placed("input_norm", norms_of(inputs), scan.live, token)
    if isinstance(outputs, NotApplicable):
        return found
    reason = not_measured(scan.unused)
    if reason is not None:
        found["distance_not_measured"] = reason
    else:
        distances = unused_distances(lambda: outputs.chunks(max(1, 2**20 // outputs.width)), scan.unused)
        found |= _placed("distance_to_unused", distances, scan.live, token)
    return found


def _placed(name: str, values: Tensor, live: Tensor, token: int) -> dict[str, float]:
    """A value, and the share of live rows that have a smaller one."""
    others = values[live & values.isfinite()]
    below = float((others < values[token]).double().mean()) if len(others) else float("nan")
    return {name: float(values[token]), f"{name}_quantile": below}


def _neighbours(sides: Sides, token: int) -> dict[str, Any]:
    name = sides.scan.judged or "head"
    found = {}
    for key, side in (("then", sides.base), ("now", sides.tuned)):
        rows = side[name]
        if not isinstance(rows, NotApplicable):
            found[key] = [asdict(one) for one in neighbours(rows, sides.scan, token)]
    return found
