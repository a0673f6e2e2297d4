"""What measures of rows are made of: hidden states before the output rows, of a base and of a run's saved weights.

Kept for three kinds of places: the packaged reference text, chats of the kind that the run trains on (held out), and
places where the guard's probe asks for a token. The probed tokens are none of those that the judge asks for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real.data import IGNORE, validation_rows
from real.models import load_base
from real.recall import ask
from real.replay import load_weights
from real.train import Recipe
from safetensors import safe_open
from torch import Tensor

from vocabguard.config import load_config
from vocabguard.guard.reference import reference_texts, windows_of
from vocabguard.measure.probe import probe_lists, prompts_of
from vocabguard.measure.sampling import stratified_sample
from vocabguard.protect.prompts import render_pool
from vocabguard.vocabulary.table import VocabTable, build_table

CONTEXTS = ("turns", "more_turns", "lines", "items")
"""Of the probe's pool, those that the base models follow best."""
PROBED, TEXT, CHATS = 384, 2048, 32
States = dict[str, Tensor]


def _hidden(model: Any, ids: Tensor, keep: int = 0) -> tuple[Tensor, Tensor]:
    """(B, keep or T, d) float32, what the output rows are multiplied with; (B, keep or T), logsumexp of the logits."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        total = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.logsumexp(-1)
    hook.remove()
    return seen[0], total


def _states(model: Any, tokenizer: Any, probed: Tensor) -> States:
    """``text``, ``chats`` (n, d) with ``text_targets``, ``chats_targets`` (n,); ``asks`` (p, contexts, d), ``probed``.

    ``text_total`` (n,) and ``asks_total`` (p, contexts) are the logsumexp of the logits.
    """
    config = load_config({"reference": {"max_tokens": TEXT}})
    windows = windows_of(model, tokenizer, reference_texts(config.reference), config.reference)
    text = [_hidden(model, ids[None, :size]) for ids, size in zip(windows.ids, windows.lengths, strict=True)]
    chats, wanted = [], []
    for row in validation_rows(tokenizer, 48, CHATS):
        labels = torch.tensor(row["labels"])[1:]
        chats.append(_hidden(model, torch.tensor([row["input_ids"]]))[0][0, :-1][labels != IGNORE])
        wanted.append(labels[labels != IGNORE])
    pool = {context.name: context for context in render_pool(tokenizer, config.probe.contexts)}
    asks, totals = [], []
    for name in CONTEXTS:
        lists = probe_lists(len(probed), pool[name], 0)
        prompts, places = prompts_of(probed[lists], pool[name])
        keep = prompts.shape[1] - int(places[0])
        read = [_hidden(model, part, keep) for part in torch.split(prompts, 8)]
        for column, kept in zip(zip(*read, strict=True), (asks, totals), strict=True):
            flat = torch.cat([part[:, places - prompts.shape[1]] for part in column]).flatten(0, 1)[: len(probed)]
            kept.append(torch.empty_like(flat).index_copy_(0, lists.flatten()[: len(probed)], flat))
    return {
        "text": torch.cat([hidden[0, :-1] for hidden, _ in text]), "text_targets": windows.targets[windows.measured],
        "text_total": torch.cat([total[0, :-1] for _, total in text]),
        "chats": torch.cat(chats), "chats_targets": torch.cat(wanted),
        "asks": torch.stack(asks, 1), "asks_total": torch.stack(totals, 1), "probed": probed,
    }  # fmt: skip


@dataclass(frozen=True)
class Replayed:
    """A run at one moment, beside its base.

    Attributes:
        name: recipe, arm and seed.
        ids: (n,) int64, the tokens that the judge asked for.
        known: (n,) bool, the base repeats them.
        lost: (n,) bool, known and gone at the run's end.
        nats: (n,) float32, mean log-probability in the judge's asks at the end.
        again: the same of four more asks among other neighbours; None where they were not made.
        target: (V,) int64, data targets of the whole run.
        push: (V,) float32, gradient norms of steps in which a row was no target; None but at the end of a watched run.
        table: groups and live tokens.
        base, now: hidden states.
        rows0, rows: (V, d) output rows; inputs0, inputs: input rows.
    """

    name: str
    ids: Tensor
    known: Tensor
    lost: Tensor
    nats: Tensor
    again: Tensor | None
    target: Tensor
    push: Tensor | None
    table: VocabTable
    base: States
    now: States
    rows0: Tensor
    rows: Tensor
    inputs0: Tensor
    inputs: Tensor


class Replays:
    """Reads runs of the bench; keeps hidden states in a folder of its own, and writes nothing into the bench's.

    Args:
        cache: the bench's folder.
        work: where states are kept.
    """

    def __init__(self, cache: Path, work: Path) -> None:
        self._cache, self._work = cache, work
        work.mkdir(parents=True, exist_ok=True)

    def at(self, name: str, percent: int, *, again: bool = False) -> Replayed:
        """A run, ``recipe/arm-seed``, when so many percent were done; `again` asks its end four times more, once."""
        run = self._cache / name
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))
        recipe = Recipe(**told["recipe"])
        asked = torch.load(run / "asked-100-512.pt", weights_only=True)
        base = self._base_asked(recipe.model, asked["ids"])
        before = self._states_of(recipe, None, None)
        # Bases are probed once, before all seeds of the judge are known.
        known = (base["said"].sum(1) >= 3) & ~torch.isin(asked["ids"], before["probed"])
        weights, rows = run / f"weights-{percent:03d}.safetensors", run / "vocabguard" / "rows-100.safetensors"
        push = None
        if percent == 100 and rows.exists():
            with safe_open(rows, "pt") as file:
                push = file.get_tensor("exposure/push")
        after = self._states_of(recipe, name, percent)
        once_more = self._again(recipe, name, asked["ids"], again)
        rows0, inputs0 = _matrices(self._cache / "models" / recipe.model / "model.safetensors")
        rows1, inputs1 = _matrices(weights)
        return Replayed(
            name, asked["ids"], known, known & (asked["said"].sum(1) <= 1), asked["nats"].mean(1), once_more,
            torch.tensor(told["data_target"]), push, self._table(recipe), before, after, rows0, rows1, inputs0, inputs1,
        )  # fmt: skip

    def _base_asked(self, model: str, ids: Tensor) -> States:
        for path in sorted((self._cache / "asked").glob(f"{model}-*-0.pt")):
            found: States = torch.load(path, weights_only=True)
            if torch.equal(found["ids"], ids):
                return found
        raise SystemExit(f"the base of {model} was not asked for these tokens; judge the run first")

    def _load(self, recipe: Recipe, name: str | None, percent: int | None) -> tuple[Any, Any]:
        model, tokenizer = load_base(self._cache, recipe.model, untied=recipe.untied)
        if name is not None:
            load_weights(model, self._cache / name / f"weights-{percent:03d}.safetensors")
        return model.eval(), tokenizer

    def _table(self, recipe: Recipe) -> VocabTable:
        from transformers import AutoConfig, AutoTokenizer

        folder = self._cache / "models" / recipe.model
        return build_table(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).vocab_size)

    def _probed(self, recipe: Recipe) -> Tensor:
        """(p,) int64, live tokens that no judge asks for."""
        table = self._table(recipe)
        free = table.live.clone()
        for path in (self._cache / "asked").glob(f"{recipe.model}-*-0.pt"):
            free[torch.load(path, weights_only=True)["ids"]] = False
        return stratified_sample(torch.zeros(len(table), dtype=torch.int64), free, PROBED, 5)

    def _states_of(self, recipe: Recipe, name: str | None, percent: int | None) -> States:
        """Of the base where no run is named."""
        label = f"{recipe.model}-base" if name is None else f"{name.replace('/', '-')}-{percent}"
        kept = self._work / f"{label}.pt"
        if not kept.exists():
            # All runs of a model are probed for the tokens that its base was.
            probed = self._probed(recipe) if name is None else self._states_of(recipe, None, None)["probed"]
            torch.save(_states(*self._load(recipe, name, percent), probed), kept)
        found: States = torch.load(kept, weights_only=True)
        return found

    def _again(self, recipe: Recipe, name: str, ids: Tensor, wanted: bool) -> Tensor | None:
        kept = self._work / f"{name.replace('/', '-')}-again.pt"
        if not kept.exists():
            if not wanted:
                return None
            torch.save(ask(*self._load(recipe, name, 100), ids.tolist(), seed=1)[1], kept)
        found: Tensor = torch.load(kept, weights_only=True)
        return found.mean(1)


def _matrices(path: Path) -> tuple[Tensor, Tensor]:
    """Output and input rows in float32; one matrix where they are tied."""
    with safe_open(path, "pt") as file:
        names: Sequence[str] = file.keys()
        inputs = file.get_tensor("model.embed_tokens.weight").float()
        return (file.get_tensor("lm_head.weight").float() if "lm_head.weight" in names else inputs), inputs
