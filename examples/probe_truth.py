"""Is the probe right? Tokens that it calls forgotten, and retained ones, asked for in free greedy generation.

``python examples/probe_truth.py --seed 0 --json truth.json`` fine-tunes the main example's control arm (with ``--model
FOLDER`` once, and keeps it there), probes every live token teacher-forced in the guard's default contexts, and draws
300 forgotten tokens (right in at least three of four contexts at the base, wrong in at least three now) and 300
retained ones (right in at least three of four, then and now). Each is then asked for again and the model generates
freely: is the token in the answer? In lists its company is drawn anew, not the probe's; where ``--lists`` is more than
one, a context counts as most of its lists do. A token is said when most contexts say it, as the guard counts.

``probe``: the probe's contexts. ``same_prompts``: those with the very lists of the probe, so that only the decoding
differs. ``held_out``: four instructions that the probe does not use. ``pooled``: most of all answers to these eight.

Where the probe calls a token retained and a free answer lacks it, the answer is mostly a list that went astray at
another token and never came to this one: in prompts of one token free and teacher-forced answers are the same. Shorter
lists in the probe would agree better with themselves, but no better with the held-out and the pooled answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from finetune import TRAINERS, fine_tune, load_base, training_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vocabguard.config import ContextConfig, ProbeConfig
from vocabguard.guard.evaluations import greedy_answers
from vocabguard.guard.probe import EARLIER, Prober, build_prober
from vocabguard.measure.probe import PromptContext, probe_lists
from vocabguard.protect.prompts import render_context
from vocabguard.vocabulary.table import build_table

HELD_OUT = {
    "now": ("{tokens}\nNow repeat that.", 16),
    "copy": ("Copy exactly: {tokens}", 3),
    "again": ("Write {tokens} again, word for word.", 1),
    "back": ("Echo the following back to me: {tokens}", 1),
}
"""Instructions that the probe does not use, of its shapes. The first is in no fine-tune, the others in this one."""

MOST = 3  # of four contexts
BATCH = 128

Asked = tuple[int, list[int]]
"""The token that is looked for, and a prompt."""


def tuned_model(folder: Path | None, seed: int, steps: int, trainer: str) -> PreTrainedModel:
    """The control arm's model: fine-tuned now, or kept from before. Watching would change nothing, so none watches."""
    if folder is not None and (folder / "config.json").is_file():
        kept: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        return kept
    model, tokenizer = load_base()
    rows = training_rows(tokenizer, steps, seed)
    with TemporaryDirectory() as logs:
        fine_tune(model, tokenizer, rows, trainer=trainer, callbacks=[], folder=Path(logs), seed=seed)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def sorted_out(prober: Prober, base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, list[int]]:
    """Ids that the base could say, by what the probe of the tuned model says of them."""
    before, now = prober.run(base), prober.run(tuned)
    could, right = before.emitted.sum(1) >= MOST, now.emitted.sum(1)
    wrong = now.emitted.shape[1] - right
    return {
        "forgotten": now.ids[could & (wrong >= MOST)].tolist(),
        "retained": now.ids[could & (right >= MOST)].tolist(),
    }


def fresh_prompts(context: PromptContext, ids: Sequence[int], company: Sequence[int], rng: Random) -> Iterator[Asked]:
    """Each token in a list of its own, at a place and among others drawn at random."""
    for token in ids:
        words = [other for other in rng.sample(company, context.k) if other != token][: context.k - 1]
        words.insert(rng.randint(0, len(words)), token)
        yield token, shown(context, words)


def shown(context: PromptContext, words: Sequence[int]) -> list[int]:
    """The prompt of a list, up to where its copy begins."""
    prompt = [*context.before, *words]
    for between in context.between:
        prompt += [*between, *words]
    return [*prompt, *context.after]


def probe_prompts(context: PromptContext, ids: Sequence[int], prober: Prober) -> Iterator[Asked]:
    """Each token in the list in which the probe asked for it."""
    place = {token: row for row, token in enumerate(prober.ids.tolist())}
    lists = probe_lists(len(prober.ids), context, prober.seed)
    where = torch.empty(len(prober.ids), dtype=torch.int64)
    where[lists.flatten().flip(0)] = torch.arange(lists.numel()).flip(0) // lists.shape[1]  # fillers come last
    for token in ids:
        yield token, shown(context, prober.ids[lists[where[place[token]]]].tolist())


def found(model: PreTrainedModel, asked: Sequence[Asked], context: PromptContext, end: int) -> Tensor:
    """(n,) bool: the token is in the free greedy answer, which may be twice as long as the list."""
    right = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        answers = greedy_answers(model, [prompt for _, prompt in part], [end], 2 * context.k)
        right += [token in answer for (token, _), answer in zip(part, answers, strict=True)]
    return torch.tensor(right)


def free_generation(
    model: PreTrainedModel,
    ids: Sequence[int],
    contexts: Sequence[PromptContext],
    end: int,
    *,
    company: Sequence[int],
    lists: int,
    seed: int,
) -> Tensor:
    """(lists, n, C) bool: the token is in the answer; a context of one token is asked once."""
    columns = []
    for context in contexts:
        draws = []
        for draw in range(lists if context.k > 1 else 1):
            rng = Random(f"{seed}/{context.name}/{draw}")
            draws.append(found(model, list(fresh_prompts(context, ids, company, rng)), context, end))
        columns.append(torch.stack(draws * (lists // len(draws))))
    return torch.stack(columns, dim=2)


def most(flags: Tensor, dim: int) -> Tensor:
    """True where more than half along a dimension are."""
    return flags.sum(dim) * 2 > flags.shape[dim]


def agreement(said: dict[str, Tensor]) -> dict[str, float]:
    """Shares in [0, 1] of verdicts that are the probe's, by what it called the tokens, and of all of them."""
    right = {kind: flags == (kind == "retained") for kind, flags in said.items()}
    shares = {kind: float(flags.float().mean()) for kind, flags in right.items()}
    return {**shares, "all": float(torch.cat([flags.flatten() for flags in right.values()]).float().mean())}


def told(flags: dict[str, Tensor]) -> dict[str, Any]:
    """What (lists, n, C) flags say of the tokens, by what the probe called them."""
    return {
        "agreement": agreement({kind: most(most(one, 0), 1) for kind, one in flags.items()}),
        "agreement_one_list": agreement({kind: most(one, 2) for kind, one in flags.items()}),
        "in_the_answer": {kind: one.float().mean(dim=(0, 1)).tolist() for kind, one in flags.items()},
    }


def measure(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    lists: int,
    seed: int,
) -> dict[str, Any]:
    """Probe both models, draw tokens, ask for them freely."""
    table = build_table(tokenizer, base.get_output_embeddings().weight.shape[0])
    # Short lists too, as in 0.1.0: a free answer to a list of 16 goes astray at its first miss.
    contexts = {name: ContextConfig(*way) for name, way in EARLIER.items()}
    prober = build_prober(ProbeConfig(whole_vocabulary=True, contexts=contexts), tokenizer, table, None, 0)
    sorts, rng = sorted_out(prober, base, tuned), Random(seed)
    drawn = {kind: rng.sample(ids, min(count, len(ids))) for kind, ids in sorts.items()}
    held_out = [render_context(tokenizer, name, text, k) for name, (text, k) in HELD_OUT.items()]
    end = int(tokenizer.eos_token_id)
    company = table.live.nonzero().flatten().tolist()

    def freely(model: PreTrainedModel, contexts: Sequence[PromptContext]) -> dict[str, Tensor]:
        return {
            kind: free_generation(model, ids, contexts, end, company=company, lists=lists, seed=seed)
            for kind, ids in drawn.items()
        }

    def same(ids: Sequence[int]) -> Tensor:
        columns = [found(tuned, list(probe_prompts(one, ids, prober)), one, end) for one in prober.contexts]
        return torch.stack(columns, dim=1)[None]

    probed, others = freely(tuned, prober.contexts), freely(tuned, held_out)
    pooled = {kind: torch.cat([probed[kind], others[kind]], dim=2).transpose(1, 2).flatten(0, 1) for kind in drawn}
    return {
        "probed": len(prober.ids),
        "sorts": {kind: len(ids) for kind, ids in sorts.items()},
        "drawn": {kind: len(ids) for kind, ids in drawn.items()},
        "lists": lists,
        "base": told(freely(base, prober.contexts))["in_the_answer"],
        "same_prompts": told({kind: same(ids) for kind, ids in drawn.items()}),
        "probe": told(probed),
        "held_out": told(others),
        "pooled": {"agreement": agreement({kind: most(flags, 0) for kind, flags in pooled.items()})},
    }


def show(numbers: dict[str, Any]) -> None:
    """Print the agreements."""
    drawn = ", ".join(f"{numbers['drawn'][kind]} of {count:,} {kind}" for kind, count in numbers["sorts"].items())
    table = Table(title=f"Free greedy generation agrees with the probe: {drawn} tokens", title_justify="left")
    table.add_column("")
    for column in ("forgotten", "retained", "all"):
        table.add_column(column, justify="right")
    lists = numbers["lists"]
    rows = {
        "same prompts": numbers["same_prompts"]["agreement"],
        "probe's contexts": numbers["probe"]["agreement_one_list"],
        f"probe's contexts, most of {lists} lists": numbers["probe"]["agreement"],
        "held-out contexts": numbers["held_out"]["agreement_one_list"],
        f"held-out contexts, most of {lists} lists": numbers["held_out"]["agreement"],
        "all eight, most answers": numbers["pooled"]["agreement"],
    }
    for name, shares in rows.items():
        table.add_row(name, *(f"{100 * share:.1f} %" for share in shares.values()))
    Console(highlight=False).print(table)


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tune and of what is drawn")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trainer", choices=sorted(TRAINERS), default="hf")
    parser.add_argument("--count", type=int, default=300, help="tokens of each kind")
    parser.add_argument("--lists", type=int, default=5, help="lists in which a token is asked for, a context")
    parser.add_argument("--model", type=Path, help="folder of the tuned model: read if it is there, else written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base, tokenizer = load_base()
    tuned = tuned_model(arguments.model, arguments.seed, arguments.steps, arguments.trainer)
    numbers = measure(base, tuned, tokenizer, count=arguments.count, lists=arguments.lists, seed=arguments.seed)
    show(numbers)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
