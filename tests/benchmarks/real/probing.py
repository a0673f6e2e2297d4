"""Is the probe right where nothing is lost, and does it say what the model would write?

`null_run`: a fine-tune at a learning rate of 1e-6, and every probe among other neighbours than the base's: nothing is
lost, so no interval may leave 1 and no rule may fire. `agreement`: the probe is teacher-forced; here the model writes
the list freely and greedily, and each place is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from real.data import training_rows
from real.models import load_base
from transformers import DataCollatorForSeq2Seq

from vocabguard.config import load_config
from vocabguard.guard.evaluations import greedy_answers
from vocabguard.guard.probe import Prober, build_prober
from vocabguard.measure.probe import probe_lists, prompts_of
from vocabguard.measure.retention import summarise_probe
from vocabguard.results import NotApplicable
from vocabguard.vocabulary.table import build_table

LOOKS = 20


def prober_of(model: Any, tokenizer: Any, tokens: int, seed: int) -> Prober:
    """The guard's prober by default settings, but for the sample."""
    table = build_table(tokenizer, model.get_output_embeddings().weight.shape[0])
    config = load_config({"probe": {"sample": tokens}}).probe
    return build_prober(config, tokenizer, table, NotApplicable("not counted"), seed)


def null_run(cache: Path, name: str, seed: int, tokens: int) -> dict[str, Any]:
    """Twenty probes of a run in which nothing is lost.

    Returns:
        ``base``: share repeated at the base; ``beside``: of the probes, how many intervals of ``tokens_retained`` or
        ``nats`` do not hold what nothing is; ``fired``: how many times ``tokens_forgotten`` would fire.
    """
    torch.manual_seed(seed)
    model, tokenizer = load_base(cache, name)
    prober = prober_of(model, tokenizer, tokens, seed)
    base = prober.run(model)
    rule = load_config().alerts["tokens_forgotten"]
    rows = training_rows(tokenizer, steps=LOOKS, batch=2, copies=1, longest=32, seed=seed)
    collate, optimizer = DataCollatorForSeq2Seq(tokenizer), torch.optim.AdamW(model.parameters(), lr=1e-6)
    sample = prober.sample(torch.zeros(len(prober.population.live), dtype=torch.uint8))
    told: dict[str, Any] = {"base": summarise_probe(base, base, {})["base"], "tokens": 0, "nats": 0, "fired": 0}
    for look in range(1, LOOKS + 1):
        model.train()
        model(**collate(rows[2 * look - 2 : 2 * look])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        prober.seed = seed + 1000 * look  # other neighbours
        found = summarise_probe(base, prober.run(model), {}, sample=sample, look=look)
        told["tokens"] += not found["tokens_retained_low"] <= 1 <= found["tokens_retained_high"]
        told["nats"] += not found["nats_low"] <= 0 <= found["nats_high"]
        told["fired"] += found["tokens_retained_high"] < rule.threshold
        told["last"] = {key: round(value, 4) for key, value in found.items()}
    return told


@torch.no_grad()
def agreement(cache: Path, name: str, tokens: int) -> dict[str, Any]:
    """Verdicts by teacher-forced answers against verdicts by what the model writes freely.

    Written freely, a list that goes astray at one token is lost from there on, which says nothing of the tokens that
    follow. So places are compared up to the first one at which the model writes another token, that one too.

    Returns:
        ``tokens``; ``places`` compared, and the share in [0, 1] of them that are right, or wrong, in both ways
        (``agree``); ``reached``, the share of all places that are compared; ``contexts`` with the base's shares.
    """
    model, tokenizer = load_base(cache, name)
    model.eval()
    prober = prober_of(model, tokenizer, tokens, 0)
    result = prober.run(model)
    forced = {token: row for row, token in enumerate(prober.ids.tolist())}
    compared = alike = every = 0
    for column, context in enumerate(prober.contexts):
        positions = probe_lists(len(prober.ids), context, prober.seed)
        prompts = prompts_of(prober.ids[positions], context)[0]
        # The first place of the copy is where the model begins to write.
        begins = prompts[:, : prompts.shape[1] - context.k + 1].tolist()
        answers: list[list[int]] = []
        for at in range(0, len(begins), 16):
            answers += greedy_answers(model, begins[at : at + 16], [tokenizer.eos_token_id], context.k)
        for one, answer in zip(prober.ids[positions].tolist(), answers, strict=True):
            every += len(one)
            for place, token in enumerate(one):
                written = place < len(answer) and answer[place] == token
                compared, alike = compared + 1, alike + (written == bool(result.emitted[forced[token], column]))
                if not written:
                    break
    told = {"tokens": len(prober.ids), "places": compared, "agree": alike / compared, "reached": compared / every}
    return told | {"contexts": {key: round(value, 3) for key, value in prober.shares.items()}}
