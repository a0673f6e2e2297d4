"""``vocabguard echo``: the data set that keeps every token sayable, as chats or as token ids."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vocabguard.cli.app import InputError
from vocabguard.cli.common import (
    MOST_TARGETS,
    MOST_TOKENS,
    check_most,
    check_new_file,
    load_tokenizer,
    show_next,
    working,
)
from vocabguard.config import EchoConfig
from vocabguard.files import one_line
from vocabguard.report.commands import Next, command
from vocabguard.text import percent

if TYPE_CHECKING:
    from vocabguard.data.echo_rows import EchoTally
    from vocabguard.vocabulary.table import VocabTable


def echo(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer: a folder, or a name on the Hugging Face hub.")],
    ids: Annotated[Path | None, typer.Option(help="Write JSON lines of input_ids and labels: exact.")] = None,
    chats: Annotated[Path | None, typer.Option(help="Write JSON lines of messages: text, some tokens merge.")] = None,
    targets: Annotated[int, typer.Option(help="How often each token is a target.")] = 20,
    list_tokens: Annotated[int, typer.Option(help="Tokens in a list; a row has twice as many and the prompt.")] = 8000,
    needs: Annotated[Path | None, typer.Option(help="Coverage, scan or probe file: only tokens in need by it.")] = None,
    below: Annotated[int | None, typer.Option(help="In need: fewer data targets than this (default 5).")] = None,
    cosine: Annotated[float | None, typer.Option(help="In need: a cosine below this.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Never echo: an id, a text, or re:PATTERN.")] = None,
    instruction: Annotated[list[str] | None, typer.Option(help="A way of asking, with one {tokens}.")] = None,
    separator: Annotated[str, typer.Option(help="Between the tokens of a chat; \\n and \\t are read.")] = "\\n",
    chat_template: Annotated[Path | None, typer.Option(help="File with another chat template.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffles.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")] = False,
) -> None:
    """Write lists of shuffled tokens that the assistant repeats; every live token is a target --targets times.

    Control tokens, unreachable and padded ids are never in it. As ids the counts are exact; in chats neighbours may
    merge when they are encoded again, and the share that survives is counted and said.

    Exit code 0: written; 2: bad input.
    """
    from vocabguard.data.echo_rows import echo_lists, write_chats, write_ids
    from vocabguard.protect.prompts import render_echo
    from vocabguard.vocabulary.table import build_table

    if ids is None and chats is None:
        raise InputError("choose an output: --ids rows.jsonl (exact token ids) or --chats chats.jsonl (text)")
    if needs is None and (below is not None or cosine is not None):
        raise InputError("--below and --cosine need --needs FILE, which vocabguard coverage or scan wrote with --out")
    check_most(
        ("--targets", targets, MOST_TARGETS), ("--list-tokens", list_tokens, MOST_TOKENS), ("--cosine", cosine, 2)
    )
    for option, path in (("--ids", ids), ("--chats", chats)):
        if path is not None:
            check_new_file(option, path, [one for one in (needs, chat_template) if one is not None])
    loaded = load_tokenizer(tokenizer, chat_template)
    instructions = instruction or EchoConfig().instructions
    written: dict[str, EchoTally] = {}
    try:
        table = build_table(loaded, 1 + max(loaded.get_vocab().values()))
        chosen = _chosen(table, loaded, needs, below, cosine, exclude or [])
        lists = echo_lists(chosen, targets, list_tokens, Random(seed))
        prompts = [render_echo(loaded, "--instruction", text) for text in instructions]
        with working("writing and counting rows"):
            if ids is not None:
                written[str(ids)] = write_ids(ids, lists, prompts, Random(seed))
            if chats is not None:
                between = separator.replace("\\n", "\n").replace("\\t", "\t")
                written[str(chats)] = write_chats(
                    chats, lists, instructions, Random(seed), tokenizer=loaded, table=table, separator=between
                )
    except (ValueError, OSError) as error:
        raise InputError(one_line(error, None)) from error
    if as_json:
        told: dict[str, Any] = {"schema": 1, "tokens": len(chosen), "targets": targets}
        told |= {"files": {name: asdict(tally) for name, tally in written.items()}}
        sys.stdout.write(json.dumps(told) + "\n")
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(chosen):,} tokens, {targets} targets each:")
    for name, tally in written.items():
        console.print(f"  {name}: {_told(tally)}")
    count = f"{command('vocabguard', 'coverage', tokenizer)} DATA {command(*written)}"
    show_next([Next("Add the rows to your data, and count the targets again", count)])


def _require_same(file: Path, tokenizer: Any) -> None:
    """Refuse a file that was measured with another tokenizer.

    Raises:
        ValueError: where their vocabularies differ.
    """
    from vocabguard.data.counts import vocabulary_in
    from vocabguard.data.coverage import vocabulary_hash

    known = vocabulary_in(file)
    if known is not None and known != vocabulary_hash(tokenizer):
        raise ValueError(f"{file}: was measured with another tokenizer")


def _told(tally: EchoTally) -> str:
    said = f"{tally.conversations:,} conversations, {tally.targets:,} targets, longest {tally.longest:,} tokens"
    if tally.survived == 1.0:
        return f"{said}; counted: every token exactly as asked"
    return f"{said}; encoded again {percent(tally.survived)} survive, {tally.tokens_lost:,} tokens are lost"


def _chosen(
    table: VocabTable, tokenizer: Any, needs: Path | None, below: int | None, cosine: float | None, exclude: list[str]
) -> list[int]:
    from vocabguard.data.echo_rows import holds_lost, needy_ids
    from vocabguard.protect.plan import allowed_ids

    items = [int(item) if item.isdigit() else item for item in exclude]
    if needs is None:
        all_ids: list[int] = allowed_ids(table, tokenizer, items).tolist()
        return all_ids
    _require_same(needs, tokenizer)
    if below is None and cosine is None and not holds_lost(needs):
        below = 5
    needy, trained = needy_ids(needs, len(table), below=below, cosine=cosine)
    allowed = allowed_ids(table.with_trained(trained), tokenizer, items)
    found: list[int] = allowed[needy[allowed]].tolist()
    if not found:
        raise ValueError(f"{needs}: no live token is in need by it; nothing is written")
    return found
