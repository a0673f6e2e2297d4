"""What models say when they are asked for tokens, words and natural text: of one, or of two held against each other.

The asking is the guard's (`vocabguard.measure.probe`), and so is what counts as lost (`vocabguard.measure.retention`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.files import plain
from vocabguard.measure.contexts import asked_in
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.intervals import look_alpha, z_of_look
from vocabguard.measure.probe import PromptContext, ask_words, probe
from vocabguard.measure.reference import Windows, summarise_reference, token_nll
from vocabguard.measure.retention import (
    Sample,
    Share,
    gained,
    gone,
    lost,
    lost_outright,
    outright_noise,
    reask_noise,
    said,
    said_instead,
    share_of,
    summarise_probe,
    words_lost,
)
from vocabguard.results import EXPOSURE_CLASSES, ProbeResult
from vocabguard.vocabulary.table import VocabTable

WORD_ASKS = 4
"""Times as often as a token of the sample a watched word is asked: its verdict is of its own."""

CONFIDENCE = 1 - look_alpha(1)
"""Of the intervals here: those of the guard's first look."""

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""


@dataclass(frozen=True)
class ProbePlan:
    """What models are asked, so that several are asked alike.

    Attributes:
        contexts: the asks, which the base follows best.
        ids: (n,) int64, the tokens.
        weights: (n,) float32, live tokens that each of them stands for; 0 for those that are asked beside the sample.
        frequent: (n,) bool, tokens that are often a target of the training data.
        seed: of the lists.
        words: watched words, texts and ids.
        windows: natural text; None where none is read.
        shares: what the base repeats of some other tokens, by context.
    """

    contexts: tuple[PromptContext, ...]
    ids: Tensor
    weights: Tensor
    frequent: Tensor
    seed: int
    words: tuple[tuple[str, tuple[int, ...]], ...] = ()
    windows: Windows | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def sample(self) -> Sample:
        """What each token stands for."""
        return Sample(self.weights, self.frequent)


@dataclass(frozen=True)
class Answered:
    """What one model said.

    Attributes:
        words: (w, A) bool, right answers for each watched word.
        nll: (m, L - 1) float32 of the plan's windows; None where none were read.
    """

    result: ProbeResult
    words: Tensor
    nll: Tensor | None


def ask_model(model: nn.Module, plan: ProbePlan, *, batch_tokens: int, name: str, tell: Tell) -> Answered:
    """Ask a model for everything that a plan holds.

    Args:
        batch_tokens: tokens in one forward pass.
        name: of the model, for `tell`.
    """
    total = len(plan.ids) * len(plan.contexts)

    def progress(share: float) -> None:
        tell(name, round(share * total), total)

    progress(0.0)
    result = probe(model, plan.ids, plan.contexts, seed=plan.seed, batch_tokens=batch_tokens, progress=progress)
    asks = asked_in(plan.contexts, WORD_ASKS * len(plan.contexts))
    words = ask_words(
        model, [ids for _, ids in plan.words], plan.ids, asks, seed=plan.seed, batch_tokens=batch_tokens
    )  # fmt: skip
    nll = None if plan.windows is None else token_nll(model, plan.windows, batch_tokens=batch_tokens)
    return Answered(result, words, nll)


def summarise_answers(
    plan: ProbePlan, base: Answered | None, now: Answered, table: VocabTable, live: Tensor,
    data_target: Tensor | None = None, *, top: int = 20, least_targets: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the answers tell, as JSON-able values; NaN becomes None.

    Args:
        base: None leaves one side: what the model repeats, not what it lost.
        live: (V,) bool, the tokens that the sample was drawn from.
        data_target: (V,) int64 targets of the training data, if they are known.
        top: tokens in each list.
        least_targets: of the text, below which a part counts as not measured.

    Returns:
        ``asked``; ``numbers``: see `vocabguard.measure.retention.summarise_probe`, of one side ``asked``, ``repeated``
        with its interval, and ``noise``; ``groups`` and ``classes``, of each a share with its interval; of two sides
        ``outright``, ``lost``, ``gained`` and ``instead``, of one side ``unsaid``; ``words``; ``reference``.
    """
    parts = _parts(table, live, data_target)
    found: dict[str, Any] = {"asked": _asked(plan, live)}
    if base is None:
        found |= _one_side(plan, now, table, parts, data_target, top)
    else:
        found |= _two_sides(plan, base, now, table, parts, data_target, top)
    found["words"] = _words(plan, base, now)
    found["reference"] = _reference(plan, base, now, parts, least_targets)
    told: dict[str, Any] = plain(found)
    return told


def _parts(table: VocabTable, live: Tensor, data_target: Tensor | None) -> dict[str, dict[str, Tensor]]:
    counts = table.group[live].bincount(minlength=len(table.names)).tolist()
    found = {"groups": {name: table.mask(name) for name, n in zip(table.names, counts, strict=True) if n}}
    if data_target is not None:
        classes = exposure_classes(data_target)
        found["classes"] = {name: classes == place for place, name in enumerate(EXPOSURE_CLASSES)}
    return found


def _asked(plan: ProbePlan, live: Tensor) -> dict[str, Any]:
    drawn = int((plan.weights > 0).sum())
    return {
        "tokens": drawn,
        "beside": len(plan.ids) - drawn,
        "live": int(live.sum()),
        "whole": drawn == int(live.sum()),
        "asks": [context.name for context in plan.contexts],
        "base_follows": dict(plan.shares),
        "seed": plan.seed,
        "confidence": CONFIDENCE,
    }


def _two_sides(
    plan: ProbePlan, base: Answered, now: Answered, table: VocabTable, parts: Mapping[str, Mapping[str, Tensor]],
    data_target: Tensor | None, top: int,
) -> dict[str, Any]:  # fmt: skip
    z, ids, weights = z_of_look(1), plan.ids, plan.weights
    knew, missing, new = said(base.result), lost(base.result, now.result), gained(base.result, now.result)
    found: dict[str, Any] = {
        "numbers": summarise_probe(base.result, now.result, {}, sample=plan.sample),
        "outright": _outright(base.result, now.result, weights, z),
    }
    for kind, masks in parts.items():
        found[kind] = {
            name: _share("retained", share_of(~missing, knew & mask[ids], weights, z), "known")
            for name, mask in masks.items()
        }
    lines = _lines(plan, base, now, table, data_target)
    order = torch.argsort(now.result.probability.mean(1) - base.result.probability.mean(1), stable=True)
    # Those that were asked for beside the sample stand for no others, and have lists of their own.
    drawn = weights > 0
    gone_now = [place for place in order.tolist() if missing[place] and drawn[place]]
    come_now = [place for place in order.flip(0).tolist() if new[place] and drawn[place]]
    found |= {
        "lost": [lines(place) for place in gone_now[:top]],
        "lost_count": len(gone_now),
        "gained": [lines(place) for place in come_now[:top]],
        "gained_count": len(come_now),
        "instead": _instead(now.result, missing & drawn, table, top),
    }
    return found


def _outright(base: ProbeResult, now: ProbeResult, weights: Tensor, z: float) -> dict[str, Any]:
    """Tokens that were always got and now never are; see `vocabguard.measure.retention.lost_outright`."""
    always = base.emitted.all(1)
    share = share_of(lost_outright(base, now), always, weights, z)
    return {
        "count": int((lost_outright(base, now) & (weights > 0)).sum()),
        **_share("lost", share, "known"),
        "by_chance": outright_noise(base.emitted),
    }


def _share(name: str, share: Share, count: str) -> dict[str, float | int]:
    return {count: share.count, name: share.value, "low": share.low, "high": share.high}


def _lines(
    plan: ProbePlan, base: Answered | None, now: Answered, table: VocabTable, data_target: Tensor | None
) -> Callable[[int], dict[str, Any]]:
    """What makes a line of a list, given the token's place in the plan."""
    instead = said_instead(now.result)

    def line(place: int) -> dict[str, Any]:
        token, other = int(plan.ids[place]), int(instead[place])
        told = {
            "id": token,
            "text": table.text(token),
            "group": table.group_of(token),
            "asks_right": int(now.result.emitted[place].sum()),
            "probability": float(now.result.probability[place].mean()),
            "instead": None if other < 0 else table.text(other),
            "data_target": None if data_target is None else int(data_target[token]),
        }
        if base is not None:
            told["asks_right_at_base"] = int(base.result.emitted[place].sum())
            told["probability_at_base"] = float(base.result.probability[place].mean())
        return told

    return line


def _instead(now: ProbeResult, missing: Tensor, table: VocabTable, top: int) -> list[dict[str, Any]]:
    """What is said in the place of lost tokens, the commonest first."""
    counts = Counter(now.instead[missing][~now.emitted[missing]].tolist())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]
    return [{"id": token, "text": table.text(token), "answers": count} for token, count in ordered]


def _one_side(
    plan: ProbePlan, now: Answered, table: VocabTable, parts: Mapping[str, Mapping[str, Tensor]],
    data_target: Tensor | None, top: int,
) -> dict[str, Any]:  # fmt: skip
    z, ids, every = z_of_look(1), plan.ids, torch.ones(len(plan.ids), dtype=torch.bool)
    right = said(now.result)
    whole = share_of(right, every, plan.weights, z)
    found: dict[str, Any] = {
        "numbers": {
            "asked": whole.count, "repeated": whole.value, "repeated_low": whole.low, "repeated_high": whole.high,
            "noise": reask_noise(now.result.emitted),
        }
    }  # fmt: skip
    for kind, masks in parts.items():
        found[kind] = {
            name: _share("repeated", share_of(right, mask[ids], plan.weights, z), "asked")
            for name, mask in masks.items()
        }
    silent = gone(now.result)
    order = torch.argsort(now.result.probability.mean(1), stable=True).tolist()
    chosen = [place for place in order if silent[place] and plan.weights[place] > 0]
    lines = _lines(plan, None, now, table, data_target)
    return found | {
        "unsaid": [lines(place) for place in chosen[:top]],
        "unsaid_count": len(chosen),
        "instead": _instead(now.result, silent, table, top),
    }


def _words(plan: ProbePlan, base: Answered | None, now: Answered) -> list[dict[str, Any]]:
    if not plan.words:
        return []
    known, missing = words_lost(now.words if base is None else base.words, now.words)
    return [
        {
            "text": text, "ids": list(ids), "asks": now.words.shape[1], "asks_right": int(now.words[row].sum()),
            "asks_right_at_base": None if base is None else int(base.words[row].sum()),
            "known": bool(known[row]), "lost": None if base is None else bool(missing[row]),
        }
        for row, (text, ids) in enumerate(plan.words)
    ]  # fmt: skip


def _reference(
    plan: ProbePlan, base: Answered | None, now: Answered, parts: Mapping[str, Mapping[str, Tensor]], least: int
) -> dict[str, float]:
    if plan.windows is None or now.nll is None:
        return {}
    if base is None or base.nll is None:
        found = summarise_reference(plan.windows, now.nll, now.nll, {}, z=0.0)
        return {key: found[key] for key in ("nll", "targets") if key in found}
    masks = {name: mask for kind in parts.values() for name, mask in kind.items()}
    found = summarise_reference(plan.windows, base.nll, now.nll, masks, z=z_of_look(1), least=least)
    # The mean itself says little without its base's.
    before = base.nll[plan.windows.measured & base.nll.isfinite()]
    return found | {"nll_at_base": float(before.double().mean()) if len(before) else math.nan}


def plan_as_json(plan: ProbePlan) -> dict[str, Any]:
    """The plan without its vectors, for `plan_of_json`."""
    return {
        "contexts": [
            {
                "name": one.name, "before": list(one.before), "after": list(one.after), "k": one.k,
                "between": [list(ids) for ids in one.between], "shots": one.shots,
            }
            for one in plan.contexts
        ],
        "seed": plan.seed,
        "words": [[text, list(ids)] for text, ids in plan.words],
        "shares": dict(plan.shares),
    }  # fmt: skip


def plan_of_json(told: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> ProbePlan:
    """The plan that `plan_as_json` and `plan_vectors` describe.

    Raises:
        KeyError: for something that is missing.
        ValueError: for shapes that do not fit each other.
    """
    contexts = tuple(
        PromptContext(
            str(one["name"]), tuple(map(int, one["before"])), tuple(map(int, one["after"])), int(one["k"]),
            tuple(tuple(map(int, ids)) for ids in one["between"]), None if one["shots"] is None else int(one["shots"]),
        )
        for one in told["contexts"]
    )  # fmt: skip
    ids, weights, frequent = (vectors[f"probe/{name}"] for name in ("ids", "weights", "frequent"))
    if not contexts or ids.ndim != 1 or weights.shape != ids.shape or frequent.shape != ids.shape:
        raise ValueError("its tokens and their weights do not fit each other")
    if not len(ids) or int(ids.min()) < 0 or any(one.k < 1 for one in contexts):
        raise ValueError("it holds no tokens that can be probed")
    windows = None
    if "reference/ids" in vectors:
        windows = Windows(vectors["reference/ids"].to(torch.int64), vectors["reference/lengths"].to(torch.int64))
    words = tuple((str(text), tuple(map(int, word))) for text, word in told["words"])
    shares = {str(name): float(share) for name, share in told["shares"].items()}
    return ProbePlan(contexts, ids.long(), weights.float(), frequent.bool(), int(told["seed"]), words, windows, shares)


def plan_vectors(plan: ProbePlan) -> dict[str, Tensor]:
    """The plan's tensors by their names in a file."""
    found = {"probe/ids": plan.ids, "probe/weights": plan.weights, "probe/frequent": plan.frequent}
    if plan.windows is not None:
        found |= {"reference/ids": plan.windows.ids.int(), "reference/lengths": plan.windows.lengths}
    return found


def answer_vectors(answered: Answered, side: str = "") -> dict[str, Tensor]:
    """Answers as tensors by their names in a file.

    Args:
        side: ``base_`` for the base's.
    """
    result = answered.result
    found = {
        f"probe/{side}said": result.emitted, f"probe/{side}probability": result.probability,
        f"probe/{side}rank": result.rank.int(), f"probe/{side}instead": result.instead,
    }  # fmt: skip
    if answered.words.numel():
        found[f"words/{side}said"] = answered.words
    return found if answered.nll is None else found | {f"reference/{side}nll": answered.nll}


def answers_of(vectors: Mapping[str, Tensor], plan: ProbePlan, side: str = "") -> Answered:
    """The answers that `answer_vectors` describes.

    Raises:
        KeyError: for something that is missing.
        ValueError: for shapes that do not fit the plan.
    """
    emitted, probability, rank, instead = (
        vectors[f"probe/{side}{name}"] for name in ("said", "probability", "rank", "instead")
    )
    shape = (len(plan.ids), len(plan.contexts))
    if any(one.shape != shape for one in (emitted, probability, rank, instead)):
        raise ValueError(f"its answers do not fit the {shape[0]} tokens in {shape[1]} asks")
    words = vectors.get(f"words/{side}said", torch.zeros(0, WORD_ASKS * len(plan.contexts)))
    if len(words) != len(plan.words):
        raise ValueError(f"it has answers for {len(words)} words; watched are {len(plan.words)}")
    nll = vectors.get(f"reference/{side}nll")
    if nll is not None and (plan.windows is None or nll.shape != plan.windows.targets.shape):
        raise ValueError("its reading does not fit its text")
    names = tuple(context.name for context in plan.contexts)
    result = ProbeResult(names, plan.ids, emitted.bool(), probability.float(), rank.long(), instead.long())
    return Answered(result, words.bool(), nll)


def loss_low(told: Mapping[str, Any]) -> float:
    """Share in [0, 1] of the tokens said at the base that is lost for sure: the low end of two intervals.

    Args:
        told: what `summarise_answers` gave of two sides.
    """
    high, outright = told["numbers"].get("tokens_retained_high"), told["outright"]
    of_all = 0.0 if high is None else 1 - high
    chance = outright["by_chance"]
    # Without a chance, of a single ask, nothing is known of the noise.
    if chance is None or not outright["known"]:
        return max(0.0, of_all)
    # Its share is of the tokens that the base always gets, the other one of all that it says.
    alone = (outright["low"] - chance) * outright["known"] / told["numbers"]["known"]
    return float(max(0.0, of_all, alone))


def words_of(told: Mapping[str, Any], kind: str) -> Sequence[str]:
    """Texts of the watched words that are ``lost`` or ``known``."""
    return [word["text"] for word in told["words"] if word[kind]]
