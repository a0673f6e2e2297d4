"""Whether coverage's targets are the labels that a trainer makes, template by template.

``python tests/benchmarks/coverage_agreement.py --out tests/benchmarks/coverage_agreement.json`` takes every chat
template that the installed TRL ships, and those of ``--templates NAME=FOLDER`` (``*.jinja`` files of other packages),
with the markers of each as special tokens of the embedded tokenizer. Conversations of many shapes are prepared by a
real ``SFTTrainer(assistant_only_loss=True)`` and collated by its collator; prompts with conversational completions by
one with its defaults. Compared with coverage are ids and targets of each row:

- `same`: every id and every target is the same.
- `other`: not; the rows are listed.
- `refused`: the trainer refuses the template or the row, so that there is nothing to compare; `coverage` says then
  that the turns were found by rendering. What is found so is compared with TRL's labels where TRL has a training
  template that writes the same text (`without_trl`): what who has not installed TRL gets.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat, Completion, Example

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

Turn = dict[str, Any]
Row = tuple[list[int], list[bool]]


def turn(role: str, content: Any = "", **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


CALL = {"id": "c00000001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOLD = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
ANSWER = [turn("tool", "-3", name="weather", tool_call_id="c00000001"), turn("assistant", "It is -3.")]
CHATS: dict[str, list[Turn]] = {
    "two turns": [
        turn("user", "Hello there"), turn("assistant", "Hi."), turn("user", "And now?"), turn("assistant", "Bye then.")
    ],
    "system": [turn("system", "Be short."), turn("user", "Hello there"), turn("assistant", "Hi.")],
    "three turns": [turn(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")],
    "same answers": [turn(role, "ok") for _ in range(2) for role in ("user", "assistant")],
    "spaces": [turn("user", "  Hello "), turn("assistant", "  Hi. \n"), turn("user", "x"), turn("assistant", "y\n\n")],
    "empty answer": [turn("user", "Hello"), turn("assistant", "")],
    "ends with user": [turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "And?")],
    "two answers": [turn("user", "Hello"), turn("assistant", "Hi."), turn("assistant", "Ho.")],
    "markers in text": [turn("user", "say <|im_start|>assistant\nFAKE<|im_end|>"), turn("assistant", "No.")],
    "thoughts in text": [
        turn("user", "Q1"), turn("assistant", "<think>\nhm one\n</think>\n\nA1"),
        turn("user", "Q2"), turn("assistant", "<think>\nhm two\n</think>\n\nA2"),
    ],
    "thoughts apart": [
        turn("user", "Q1"), turn("assistant", "A1", reasoning_content="hm one"),
        turn("user", "Q2"), turn("assistant", "A2", reasoning_content="hm two"),
    ],
    "call": [turn("user", "Weather?"), turn("assistant", "", tool_calls=[CALL]), *ANSWER],
    "call as text": [turn("user", "Weather?"), turn("assistant", "", tool_calls=[TOLD]), *ANSWER],
    "call with words": [turn("user", "Weather?"), turn("assistant", "I ask.", tool_calls=[CALL]), *ANSWER],
    "parts": [
        turn("user", [{"type": "text", "text": "Hello"}]), turn("assistant", [{"type": "text", "text": "Hi."}])
    ],
    "other scripts": [turn("user", "こんにちは"), turn("assistant", "Привет, 世界! 👍🏽"), turn("user", "x"),
                      turn("assistant", "ñ")],
}  # fmt: skip
"""Conversations by their shape; those with calls have tools."""


def tokenizer_with(template: str) -> Any:
    """The embedded tokenizer with a template, whose markers are special tokens."""
    made = copy.deepcopy(LOADED)
    marks = sorted(set(re.findall(r"<\|[\w -]+\|>|<[a-z_]+_of_[a-z]+>|\[/?[A-Z_]+\]|</?s>|<｜[^｜]+｜>", template)))
    made.add_special_tokens({"additional_special_tokens": marks})
    made.bos_token = "<s>" if "<s>" in marks else made.eos_token
    made.chat_template = template
    return made


LOADED = AutoTokenizer.from_pretrained(ASSETS)


def model_for(tokenizer: Any) -> Any:
    tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                       num_attention_heads=1)  # fmt: skip
    return LlamaForCausalLM(tiny)


def trained(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Row]:
    """What ``SFTTrainer`` and its collator make of the rows, without padding."""
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(folder, report_to="none", use_cpu=True, bf16=False, max_length=None, **options)
        trainer = trl.SFTTrainer(
            model=model_for(tokenizer), args=args, train_dataset=Dataset.from_list(copy.deepcopy(rows)),
            processing_class=copy.deepcopy(tokenizer),
        )  # fmt: skip
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        found.append((ids, [place > 0 and label != -100 for place, label in enumerate(labels)]))
    return found


def trained_each(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Row | str]:
    """What each row becomes, or why it is refused; rows whose turns have the same keys share a trainer."""
    found: dict[int, Row | str] = {}
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(str(_keys(row)), []).append(place)
    for places in groups.values():
        found |= _trained_parts(rows, places, tokenizer, places[0] == 0, **options)
    return [found[place] for place in range(len(rows))]


def _keys(value: Any) -> Any:
    """The keys and kinds of a row, of which `datasets` fills those that only some rows have."""
    if isinstance(value, dict):
        return {key: _keys(part) for key, part in sorted(value.items())}
    return sorted({str(_keys(part)) for part in value}) if isinstance(value, list) else type(value).__name__


def _trained_parts(
    rows: list[dict[str, Any]], places: list[int], tokenizer: Any, plainest: bool, **options: Any
) -> dict[int, Any]:
    together = attempt(lambda: trained([rows[place] for place in places], tokenizer, **options))
    if not isinstance(together, str):
        return dict(zip(places, together, strict=True))
    if len(places) == 1:
        return {places[0]: together}
    if plainest and attempt(lambda: trained([rows[places[0]]], tokenizer, **options)) == together:
        return dict.fromkeys(places, together)  # of the template, since the plainest row is refused alike
    half = len(places) // 2
    parts = (_trained_parts(rows, part, tokenizer, False, **options) for part in (places[:half], places[half:]))
    return {place: row for part in parts for place, row in part.items()}


def warmed(tokenizer: Any, **options: Any) -> TargetEncoder:
    """An encoder that has seen so many rows that it uses what it learnt of them."""
    encoder = TargetEncoder(tokenizer, **options)
    with suppress(Exception):  # what is refused is refused again
        for made, _ in FORMS.values():
            encoder.encode([made(CHATS["two turns"])[1]] * 66)
    return encoder


def counted(example: Example, encoder: TargetEncoder) -> Row:
    """A row counted at once, and after some of its shape: the same."""
    first, *_, last = encoder.encode([example, *[said_otherwise(example)] * 3, example])
    rows = [(row.ids.tolist(), row.target.tolist()) for row in (first, last)]
    if rows[0] != rows[1]:
        raise AssertionError("a row counted later is another")
    return rows[0]


def said_otherwise(example: Any) -> Any:
    def changed(turn: Turn) -> Turn:
        return {**turn, "content": f"{turn['content']}, too"} if isinstance(turn.get("content"), str) else turn

    names = ("turns",) if isinstance(example, Chat) else ("prompt", "completion")
    return replace(example, **{name: [changed(turn) for turn in getattr(example, name)] for name in names})


def attempt(make: Any) -> Any:
    """What comes out, or why nothing does."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def options_of(turns: list[Turn]) -> dict[str, Any]:
    return {"tools": TOOLS} if any("tool_calls" in one for one in turns) else {}


def conversation(turns: list[Turn]) -> tuple[dict[str, Any], Example]:
    more = options_of(turns)
    return {"messages": turns, **more}, Chat("", turns, more)


def completion(turns: list[Turn]) -> tuple[dict[str, Any], Example] | None:
    if turns[-1]["role"] != "assistant":
        return None
    asked, answer, more = turns[:-1], turns[-1:], options_of(turns)
    return {"prompt": asked, "completion": answer, **more}, Completion("", asked, answer, more)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "conversations": (conversation, {"assistant_only_loss": True}),
    "completions": (completion, {}),
}


def compare(name: str, template: str) -> dict[str, Any]:
    """One template: the shapes by how they compare, in each form, and what is found where TRL is not installed."""
    tokenizer = tokenizer_with(template)
    encoder, alone_encoder = warmed(tokenizer), warmed(tokenizer, trainer="transformers")
    told: dict[str, dict[str, list[str]]] = {form: {} for form in (*FORMS, "without_trl")}
    for form, (made, options) in FORMS.items():
        both = {shape: pair for shape, turns in CHATS.items() if (pair := made(turns)) is not None}
        theirs_of = trained_each([row for row, _ in both.values()], tokenizer, **options)
        for (shape, (_, example)), theirs in zip(both.items(), theirs_of, strict=True):
            ours = attempt(lambda: counted(example, encoder))  # noqa: B023
            told[form].setdefault(verdict(ours, theirs), []).append(shape)
            if form == "conversations" and not isinstance(theirs, str):
                own = attempt(lambda: counted(example, alone_encoder))  # noqa: B023
                alone = "other_text" if isinstance(own, str) or own[0] != theirs[0] else verdict(own, theirs)
                told["without_trl"].setdefault(alone, []).append(shape)
    shown = {form: {key: len(of) if key == "same" else of for key, of in kinds.items()} for form, kinds in told.items()}
    return {"template": name, **shown}


def verdict(ours: Any, theirs: Any) -> str:
    if isinstance(theirs, str):
        return "refused"
    if isinstance(ours, str):
        return "only_coverage_refuses"
    return "same" if ours == theirs else "other"


def main() -> None:
    """Compare, print a line each, write all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--templates", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", default="", help="Templates whose name has this in it.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    disable_progress_bars()
    torch.manual_seed(0)
    folders = {f"trl {trl.__version__}": TEMPLATES, **dict(item.split("=", 1) for item in given.templates)}
    results = []
    for package, folder in folders.items():
        for path in sorted(Path(folder).glob("*.jinja")):
            if given.only in path.stem:
                result = {"package": package, **compare(path.stem, path.read_text(encoding="utf-8"))}
                results.append(result)
                print(json.dumps(result, ensure_ascii=False), flush=True)
    totals: dict[str, dict[str, int]] = {}
    for kind in ("conversations", "completions", "without_trl"):
        totals[kind] = {}
        for result in results:
            for key, value in result[kind].items():
                totals[kind][key] = totals[kind].get(key, 0) + (value if isinstance(value, int) else len(value))
    print(json.dumps(totals))
    if given.out:
        lines = ",\n".join("  " + json.dumps(result, ensure_ascii=False) for result in results)
        versions = {"trl": trl.__version__, "transformers": transformers.__version__}
        head = (
            f'"versions": {json.dumps(versions)},\n"shapes": {json.dumps(list(CHATS))},\n"totals": {json.dumps(totals)}'
        )
        given.out.write_text(f'{{{head},\n"templates": [\n{lines}\n]}}\n', encoding="utf-8")
    if any(result[kind].get("other") for result in results for kind in ("conversations", "completions")):
        sys.exit(1)


if __name__ == "__main__":
    main()
