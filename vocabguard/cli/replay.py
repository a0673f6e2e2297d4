"""``vocabguard replay``: the fewest rows of a corpus that have the missing tokens as targets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vocabguard.cli.app import InputError
from vocabguard.cli.common import (
    MOST_TARGETS,
    MOST_TOKENS,
    Column,
    DataKind,
    Grid,
    Roles,
    check_most,
    check_new_file,
    check_threshold,
    load_tokenizer,
    read_roles,
    read_shard,
    row_progress,
    show_next,
    working,
)
from vocabguard.files import one_line, replacing, write_lines
from vocabguard.report.commands import Next, command
from vocabguard.text import percent
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from torch import Tensor

    from vocabguard.data.encode import TargetEncoder
    from vocabguard.data.readers import Example
    from vocabguard.data.replay import Replay
    from vocabguard.data.replay_shards import Part
    from vocabguard.data.tables import DataFile
    from vocabguard.vocabulary.table import VocabTable

_POOL = 10_000  # a pool of that size keeps every row


def replay(
    corpus: Annotated[list[str], typer.Argument(help="Data files, folders of them, glob patterns.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: a folder, or a name on the Hugging Face hub.")],
    out: Annotated[Path, typer.Option(help="Write the chosen rows: .jsonl, or .txt for plain text.")],
    coverage: Annotated[
        Path | None, typer.Option(help="File of `vocabguard coverage`: only what it lacks is needed.")
    ] = None,
    needs: Annotated[
        Path | None, typer.Option(help="File of `vocabguard probe MODEL BASE --out`: only lost tokens are needed.")
    ] = None,
    targets: Annotated[int, typer.Option(help="Targets wanted for each live token.")] = 20,
    kind: DataKind = None,
    column: Annotated[list[str] | None, typer.Option(help="Name of the column.")] = None,
    role: Roles = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; the rest does not count.")] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: write the candidates of the I-th of N parts of the rows, for `replay merge`.")
    ] = "1/1",
    pool: Annotated[
        int,
        typer.Option(
            help="Candidate pool, as a multiple of what is needed; larger finds fewer rows and uses more memory."
        ),
    ] = 8,
    threshold: Annotated[
        float | None, typer.Option(help="Exit with 1 if more than this share of the tokens in need stays so.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")] = False,
) -> None:
    """Choose rows of CORPUS so that, mixed into the training data, every live token is a target --targets times.

    `vocabguard replay merge A B ...` chooses from files of --out that were written with --shard 1/N to N/N on N
    machines; the other options are given to all alike.

    Exit code 0: written; 1: a larger share than the threshold allows stays in need; 2: bad input.
    """
    from vocabguard.data.coverage import vocabulary_hash
    from vocabguard.data.encode import TargetEncoder
    from vocabguard.data.readers import data_files, read_examples
    from vocabguard.data.replay import find_candidates, find_replay, needed_targets, written_rows
    from vocabguard.data.replay_shards import Part, is_note, need_hash, save_part
    from vocabguard.vocabulary.table import build_table

    check_threshold(threshold)
    check_most(("--targets", targets, MOST_TARGETS), ("--max-length", max_length, MOST_TOKENS), ("--pool", pool, _POOL))
    roles, part, merging = read_roles(role), read_shard(shard), corpus[0] == "merge" and not Path(corpus[0]).exists()
    loaded = load_tokenizer(tokenizer)
    try:
        table = build_table(loaded, 1 + max(loaded.get_vocab().values()))
        wanted = table.live if needs is None else table.live & _lost_of(needs, loaded, len(table))
        need = needed_targets(wanted, targets, _targets_of(coverage, loaded))
        encoder = TargetEncoder(loaded, max_length=max_length)
        named = data_files(corpus[1:] if merging else corpus)
        files = [file for file in named if not merging or not is_note(file)]
        check_new_file("--out", out, [file for file in files if isinstance(file, Path)])
        rules = Part(
            shard, 0, vocabulary_hash(loaded), encoder.renderer.identity(False), need_hash(need), max_length, pool,
            tuple(corpus),
        )  # fmt: skip
        rows = _rows_of_parts(files, rules) if merging else None

        def read() -> Iterator[Example]:
            chats = bool(loaded.chat_template)
            return iter(
                read_examples(files, kind=kind, columns=column or (), roles=roles, chats=chats, shard=part)  # type: ignore[arg-type]
            )

        if part.count > 1:
            with row_progress() as advance:
                candidates, _, read_rows = find_candidates(read, encoder, need, pool=pool, progress=advance)
            _write(out, written_rows(read, [candidate.index for candidate in candidates]))
            save_part(out, replace(rules, rows=read_rows))
            _tell_part(len(candidates), read_rows, shard, out, as_json)
            return
        with row_progress() as advance:
            found = find_replay(read, encoder, need, pool=pool, progress=advance)
        found = found if rows is None else replace(found, rows=rows)
        _write(out, written_rows(read, found.chosen))
        with working("counting the written rows"):
            told = _verified(found, iter(read_examples([out])), encoder, table, out)
    except (ValueError, OSError) as error:
        raise InputError(one_line(error, 2000)) from error
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "file": str(out), **told}) + "\n")
    else:
        _print(told, out)
        count = f"{command('vocabguard', 'coverage', tokenizer)} DATA {command(out)}"
        show_next([Next("Mix the rows into your data, and count the targets again", count)])
    if threshold is not None and told["unmet_share"] > threshold:
        raise typer.Exit(1)


def _rows_of_parts(files: Sequence[DataFile], rules: Part) -> int:
    """The rows of the corpus whose parts the files are, if they were chosen as is chosen now."""
    from vocabguard.data.replay_shards import check_alike, check_parts, load_part

    parts = [load_part(Path(str(file))) for file in files]
    names = [str(file) for file in files]
    rows = check_parts(parts, names)
    own = replace(rules, shard=parts[0].shard, rows=parts[0].rows, corpus=parts[0].corpus)
    check_alike([parts[0], own], [names[0], "what is asked for now"])
    return rows


def _tell_part(count: int, rows: int, shard: str, out: Path, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "file": str(out), "rows": rows, "candidates": count}) + "\n")
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{count:,} of {rows:,} rows of part {shard} are candidates: {out}", markup=False)
    console.print("`vocabguard replay merge` with the files of all parts and the same options chooses from them.")


def _targets_of(coverage: Path | None, tokenizer: Any) -> Tensor | None:
    from vocabguard.data.coverage import load_coverage, vocabulary_hash

    if coverage is None:
        return None
    counted = load_coverage(coverage)
    if counted.source.vocabulary != vocabulary_hash(tokenizer):
        raise ValueError(f"{coverage}: was counted with another tokenizer, {counted.source.tokenizer}")
    return counted.data_target


def _lost_of(needs: Path, tokenizer: Any, rows: int) -> Tensor:
    """(V,) bool: the tokens that a probe found lost."""
    from vocabguard.data.counts import vocabulary_in
    from vocabguard.data.coverage import vocabulary_hash
    from vocabguard.data.echo_rows import needy_ids

    known = vocabulary_in(needs)
    if known is not None and known != vocabulary_hash(tokenizer):
        raise ValueError(f"{needs}: was measured with another tokenizer")
    found = needy_ids(needs, rows, below=None, cosine=None)[0]
    if not bool(found.any()):
        raise ValueError(f"{needs}: the probe found no lost token, so no row is needed; nothing is written")
    return found


def _verified(
    found: Replay, written: Iterator[Example], encoder: TargetEncoder, table: VocabTable, out: Path
) -> dict[str, Any]:
    """The numbers of the result, after the written rows were read and counted."""
    from vocabguard.data.replay import count_targets_in

    counted = count_targets_in(written, encoder, len(table))
    wrong = (found.need > 0) & (counted != found.covered)
    if bool(wrong.any()):
        raise ValueError(f"{out}: {int(wrong.sum())} tokens are not in it as often as chosen; the corpus has changed")
    needed = found.need > 0
    groups = {}
    for name in table.names:
        of_group = needed & table.mask(name)
        if bool(of_group.any()):
            groups[name] = _numbers(found, of_group)
    every = _numbers(found, needed)
    share = 1 - every["met"] / every["needed"]
    return {"rows": found.rows, "chosen": len(found.chosen), "unmet_share": share, **every, "groups": groups}


def _numbers(found: Replay, of_group: Tensor) -> dict[str, int]:
    import torch

    return {
        "needed": int(of_group.sum()),
        "met": int((found.met & of_group).sum()),
        "in_no_row": int((of_group & ~found.available).sum()),
        "targets": int(torch.minimum(found.covered, found.need)[of_group].sum()),
        "targets_needed": int(found.need[of_group].sum()),
    }


def _write(out: Path, examples: Iterator[Example]) -> None:
    as_text = out.suffix == ".txt"
    if not as_text and out.suffix != ".jsonl":
        raise ValueError(f"--out is {out}; allowed: a name that ends in .jsonl or .txt")
    with replacing(out) as new:
        write_lines(new, (_line(example) if as_text else json.dumps(_row(example)) for example in examples))


def _line(example: Example) -> str:
    from vocabguard.data.readers import Text

    if not isinstance(example, Text) or "\n" in example.text or "\r" in example.text:
        raise ValueError(f"{example.place}: is no single line of text; allowed with --out *.jsonl")
    return example.text


def _row(example: Example) -> dict[str, Any]:
    from vocabguard.data.readers import Completion, Preference, Text, TokenRows

    if isinstance(example, Text):
        return {"text": example.text}
    if isinstance(example, TokenRows):
        labels = [one if asked else -100 for one, asked in zip(example.ids.tolist(), example.target, strict=True)]
        return {"input_ids": example.ids.tolist(), "labels": labels}
    if isinstance(example, Completion):
        row: dict[str, Any] = {"prompt": example.prompt, "completion": example.completion}
    elif isinstance(example, Preference):
        row = {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
    else:
        row = {"messages": example.turns}
    options = dict(example.options)
    tools = options.pop("tools", None)
    return {**row, **({"tools": tools} if tools else {}), **({"chat_template_kwargs": options} if options else {})}


def _print(told: dict[str, Any], out: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{told['chosen']:,} of {told['rows']:,} rows are enough: {out}", markup=False)
    console.print(
        f"Of {told['needed']:,} tokens in need {told['met']:,} ({percent(1 - told['unmet_share'])}) get all their "
        f"targets; {told['in_no_row']:,} are in no row."
    )
    names = ("met", "", "in no row", "targets", "of")
    grid = Grid([Column("", words=True), Column("in need"), *(Column(name, spare=name == "of") for name in names)])
    for name, part in {"all": told, **told["groups"]}.items():
        numbers = (part["in_no_row"], part["targets"], part["targets_needed"])
        met = (f"{part['needed']:,}", f"{part['met']:,}", percent(part["met"] / part["needed"]))
        bold = "bold" if name == "all" else ""
        grid.add("all" if name == "all" else label_of(name), *met, *(f"{number:,}" for number in numbers), style=bold)
    console.print(grid)
