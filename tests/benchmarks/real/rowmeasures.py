"""Candidates for a measure of rows: each gives the judged tokens a number, higher where a loss is more likely.

Notation: ``w`` are output rows, ``h`` hidden states before them; a zero marks the base.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from real.rowstates import Replayed, States
from torch import Tensor

from vocabguard.measure.exposure import CLASS_STARTS
from vocabguard.measure.recall import LogitMoments, estimate_recall, moment_features
from vocabguard.results import ProbeResult

BEST, SAMPLED, SHRINK = 16, 2048, 0.3
PROBED = (128, 384)
Scores = dict[str, Tensor]


def candidates(run: Replayed) -> Scores:
    """(n,) float of each candidate, by name."""
    return {**_rows(run), **_exposure(run), **_neighbors(run), **_text(run), **_copying(run), **_recall(run)}


def _rows(run: Replayed) -> Scores:
    """Row geometry alone, and L2 as softmax sees it: without what all rows share, over the spread of hidden states."""
    w0, w = run.rows0[run.ids], run.rows[run.ids]
    shift = (run.rows - run.rows0).mean(0)
    own = w - w0 - shift
    spread = run.now["text"] - run.now["text"].mean(0)
    return {
        "row: 1 - cosine": 1 - torch.cosine_similarity(w, w0),
        "row: 1 - residual cosine": 1 - torch.cosine_similarity(w - shift, w0),
        "row: L2": (w - w0).norm(dim=1),
        "row: L2 without the shared shift": own.norm(dim=1),
        "row: L2 seen by softmax": (own @ spread.T).square().mean(1).sqrt(),
    }


def _exposure(run: Replayed) -> Scores:
    found = {"exposure: few data targets": -run.target[run.ids].double()}
    return found if run.push is None else {**found, "exposure: push so far": run.push[run.ids]}


def _neighbors(run: Replayed) -> Scores:
    """The nearest row of all, and the chance that it comes in a token's place where something is repeated."""
    w0, w = run.rows0[run.ids], run.rows[run.ids]
    near, place = _nearest(run.rows0, run.ids)
    asks0, asks = run.base["asks"].mean((0, 1)), run.now["asks"].mean((0, 1))
    then, now = (w0 - run.rows0[place]) @ asks0, (w - run.rows[place]) @ asks
    return {
        "neighbour: cosine at the base": near,
        "neighbour: rise of cosine": _nearest(run.rows, run.ids)[0] - near,
        "neighbour: margin at asks": -now,
        "neighbour: fall of margin at asks": then - now,
    }


def _nearest(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    directions = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)
    near = directions[ids] @ directions.T
    near[torch.arange(len(ids)), ids] = -torch.inf
    found: tuple[Tensor, Tensor] = near.max(1)
    return found


def _text(run: Replayed) -> Scores:
    """Log-probability of every token at places of text: its mean now, at the base, and the fall.

    Of places that are the same for all tokens, mean log-probability and mean logit differ by a number that all tokens
    share: ranks by one, by the other, and by the logit against that of often-asked rows are the same.
    """
    frequent = run.target >= CLASS_STARTS[-1]
    places: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in ("text", "chats"):
        places[kind] = run.base[kind], run.now[kind]
    often = frequent[run.now["text_targets"]]
    places["text, frequent targets"] = run.base["text"][often], run.now["text"][often]
    places["text, rare targets"] = run.base["text"][~often], run.now["text"][~often]
    places["asks"] = run.base["asks"].flatten(0, 1), run.now["asks"].flatten(0, 1)
    found: Scores = {}
    for name, (h0, h) in places.items():
        level0, level = run.rows0[run.ids] @ h0.mean(0), run.rows[run.ids] @ h.mean(0)
        found |= {f"{name}: log p now": -level, f"{name}: log p at the base": -level0, f"{name}: fall": level0 - level}
    h0, h = run.base["text"], run.now["text"]
    before, after = (
        hidden @ rows[run.ids].T - states["text_total"][:, None]
        for hidden, rows, states in ((h0, run.rows0, run.base), (h, run.rows, run.now))
    )
    best = before.topk(BEST, dim=0)
    found["text, a token's best places: fall"] = best.values.mean(0) - after.gather(0, best.indices).mean(0)
    found["text, a token's best places: log p now"] = -after.topk(BEST, dim=0).values.mean(0)
    return found


def _copying(run: Replayed) -> Scores:
    """Log-probability of a token where it would be repeated, by a linear map from input rows to hidden states.

    The map is fitted on the hidden states at which the probe asks for its own tokens.
    """
    now = _copied(run.inputs, run.now, run.rows, run.ids)
    then = _copied(run.inputs0, run.base, run.rows0, run.ids)
    head, body = _copied(run.inputs0, run.base, run.rows, run.ids), _copied(run.inputs, run.now, run.rows0, run.ids)
    return {
        "copying: log p now": -now, "copying: log p at the base": -then, "copying: fall": then - now,
        "copying: fall by the rows alone": then - head, "copying: fall by the body alone": then - body,
    }  # fmt: skip


def _copied(inputs: Tensor, states: States, rows: Tensor, ids: Tensor) -> Tensor:
    query = linear_map(inputs[states["probed"]], states["asks"].mean(1))(inputs[ids])
    others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    return (query * rows[ids]).sum(1) - (query @ rows[others].T).logsumexp(1)


def linear_map(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of (m, e) on (m, d), with an intercept."""
    centre, mean = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    eye = SHRINK * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + eye, (x - centre).T @ (y - mean))
    return lambda new: (new - centre) @ weights + mean


def _recall(run: Replayed) -> Scores:
    """The product's measure, from probes of 128 tokens (a short run's) and of more; and by the asks alone."""
    # Of no more tokens than are looked at.
    ids = torch.unique(torch.cat([run.ids, run.now["probed"]]))
    base, then = _heard(run.base, run.rows0[ids], ids)
    now, later = _heard(run.now, run.rows[ids], ids)
    found: Scores = {}
    for name, kinds in {"": slice(None), ", asks alone": slice(1)}.items():
        features = torch.cat([moment_features(base[kinds]), moment_features(now[kinds])], dim=1)
        for size in PROBED:
            estimate = estimate_recall(features, *(_first(probe, size) for probe in (then, later)))
            if estimate is not None:
                found[f"recall: {size} probed{name}"] = -estimate.nats[torch.searchsorted(ids, run.ids)]
    return found


def _heard(states: States, rows: Tensor, ids: Tensor) -> tuple[list[LogitMoments], ProbeResult]:
    """Logits of some tokens at asks and in text, and the probe's answers; ids become places among the (n,) `ids`."""
    kinds, place = [LogitMoments(), LogitMoments()], torch.full((int(ids.max()) + 1,), len(ids))
    place[ids] = torch.arange(len(ids))
    probed = place[states["probed"]]
    wanted = probed[:, None].expand(-1, states["asks"].shape[1])
    # A column more, for targets of the text that are none of the tokens.
    more = torch.cat([rows, torch.zeros_like(rows[:1])])
    asked = states["asks"] @ more.T
    kinds[0].add(asked.flatten(0, 1), wanted.flatten())
    targets = states["text_targets"]
    inside = targets < len(place)
    kinds[1].add(states["text"] @ more.T, torch.where(inside, place[targets.where(inside, ids[0])], len(ids)))
    chance = (asked.gather(2, wanted[:, :, None]).squeeze(2) - states["asks_total"]).exp()
    none = torch.zeros(chance.shape, dtype=torch.int64)
    return kinds, ProbeResult(tuple("abcd"), probed, chance > 0.5, chance, none, none)


def _first(probe: ProbeResult, size: int) -> ProbeResult:
    """The probe of some of its tokens, evenly."""
    rows = torch.arange(0, len(probe.ids), len(probe.ids) // size)[:size]
    kept = {name: getattr(probe, name)[rows] for name in ("ids", "emitted", "probability", "rank", "instead")}
    return ProbeResult(probe.contexts, **kept)
