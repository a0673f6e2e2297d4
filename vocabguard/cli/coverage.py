"""``vocabguard coverage``: which tokens are targets of training data, before any training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vocabguard.cli.app import InputError
from vocabguard.cli.common import (
    MOST_TOKENS,
    DataKind,
    Roles,
    check_most,
    check_new_file,
    check_threshold,
    load_tokenizer,
    one_of,
    read_roles,
    read_shard,
    row_progress,
    working,
)
from vocabguard.cli.coverage_view import Shown, tell
from vocabguard.data.choices import LOSSES, RANKS
from vocabguard.data.tables import DataFile
from vocabguard.files import one_line

if TYPE_CHECKING:
    from vocabguard.data.counting import Sequences
    from vocabguard.data.coverage import Coverage
    from vocabguard.vocabulary.table import VocabTable

_PARALLEL_FROM = 2**26  # bytes of data from which starting processes, some seconds each, pays
_MOST_WORKERS = 8
# The most that is taken.
_WORKERS, _EPOCHS = 256, 1_000_000


Trainers = Annotated[
    str,
    one_of(
        ("trl", "transformers"),
        "Whose rules apply where the chat template marks no targets: trl (its training template, where TRL is "
        "installed) or transformers (always the tokenizer's own).",
    ),
]


def coverage(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer: a folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        list[str], typer.Argument(help="Data files, folders of them, glob patterns, addresses that fsspec knows.")
    ],
    kind: DataKind = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Name of the column; give it twice for prompt and completion.")
    ] = None,
    role: Roles = None,
    loss: Annotated[str, one_of(LOSSES, "Which tokens are targets.")] = "assistant",
    trainer: Trainers = "trl",
    eos: Annotated[bool, typer.Option(help="Texts and text completions end with the EOS token.")] = True,
    shard: Annotated[
        str, typer.Option(help="I/N: count the I-th of N parts of the rows; see `coverage merge`.")
    ] = "1/1",
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; the rest is cut off.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="File with another chat template.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data; multiplies the counts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the counts of all tokens (.safetensors).")] = None,
    table: Annotated[Path | None, typer.Option(help="Write a table of all tokens (.csv or .parquet).")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Exit with 1 if more than this share of live tokens is never a target.")
    ] = None,
    watch: Annotated[
        list[str] | None, typer.Option(help="A token (id or text) or a word of several, whose counts to show.")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Data to compare with, e.g. of the base model: tokens of common text.")
    ] = None,
    rank: Annotated[
        str,
        one_of(
            RANKS,
            "Which tokens at risk come first: most read in the data, commonest in --reference, or earliest merges of "
            "the tokenizer.",
        ),
    ] = "inputs",
    languages: Annotated[
        str | None,
        typer.Option(
            help="Tell the words of a script by language: codes parted by commas, like en,de,fr, or common for 22 "
            "languages. Needs lingua-language-detector."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Tokens at risk to name.")] = 20,
    workers: Annotated[int, typer.Option(help="Processes; 0 chooses by the size of the data.")] = 0,
    fast: Annotated[
        bool, typer.Option(help="Let fastokens encode, where it is installed and gives the same ids on a sample.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")] = False,
) -> None:
    """Count how often each token is a target in training data, masked as a trainer masks it.

    Tokens that are never a target are only ever pushed down. Without --threshold the exit code is 0 whatever is
    found: every data set leaves most of a vocabulary out, and only you know what share is too much.

    `vocabguard coverage merge A B ...` puts files of --out together, counted with --shard 1/N to N/N on N machines.

    Exit code 0: fine; 1: a larger share than the threshold allows; 2: bad input.
    """
    from vocabguard.data.coverage import at_risk, load_coverage, measure_coverage
    from vocabguard.data.merge import merge_coverages
    from vocabguard.data.ranking import expected_never, merge_ranks, template_ids, write_tokens
    from vocabguard.data.readers import data_files, read_examples
    from vocabguard.data.token_languages import chosen_languages, token_languages
    from vocabguard.vocabulary.table import build_table

    _check_ranges(threshold, top, workers, epochs, max_length)
    if rank not in RANKS or (rank == "reference" and not reference):
        raise InputError(f"--rank is {rank!r}; allowed: {', '.join(RANKS)}, and reference with --reference only")
    roles, part, merging = read_roles(role), read_shard(shard), tokenizer == "merge" and not Path(tokenizer).exists()
    try:
        parts = [load_coverage(file) for file in data] if merging else []
        name = parts[0].source.tokenizer if parts else tokenizer
        loaded = load_tokenizer(name, chat_template)
        vocabulary = build_table(loaded, 1 + max(loaded.get_vocab().values(), default=-1))
        codes = None if languages is None else chosen_languages(languages)
        watched, words = _watched(loaded, vocabulary, watch or ())
        files = [] if merging else data_files(data)
        for option, path in (("--out", out), ("--table", table)):
            if path is not None:
                check_new_file(option, path, [*data, *(file for file in files if isinstance(file, Path))])
        if merging:
            result = merge_coverages(parts, data)
            _check_merged(result, loaded, words)
        else:
            examples = read_examples(
                files, kind=kind, columns=column or (), roles=roles, chats=bool(loaded.chat_template), shard=part,  # type: ignore[arg-type]
                blocks=True,
            )  # fmt: skip
            with row_progress() as advance:
                result = measure_coverage(
                    examples, loaded, vocabulary, name=name, files=[str(file) for file in files], loss=loss,  # type: ignore[arg-type]
                    eos=eos, max_length=max_length, trainer=trainer, epochs=epochs,  # type: ignore[arg-type]
                    workers=workers or _workers_for(files), progress=advance, words=words, fast=fast,
                )  # fmt: skip
        if out is not None:
            result.save(out)
        with working("telling words by language"):
            spoken = None if codes is None else token_languages(vocabulary, codes)
        if table is not None:
            write_tokens(table, result, vocabulary, spoken)
        with working("counting the reference"):
            compared = _reference(reference or (), loaded, vocabulary)
    except (ValueError, OSError) as error:
        raise InputError(one_line(error, 2000)) from error
    own = template_ids(loaded) if result.tally.conversations else None
    ranks = merge_ranks(loaded, len(vocabulary)) if rank == "merges" else None
    if rank == "reference" and compared is not None:
        ranks = -compared.inputs
    worst = [i for i in at_risk(result, top, ranks=ranks, without=own) if i not in watched]
    shown = Shown(
        vocabulary, tuple(watched), tuple(worst),
        rank, _named(name, loaded, result, vocabulary, watched), 0 if own is None else _left_out(result, own), out,
        None if compared is None else expected_never(compared.inputs, result.live, int(result.data_target.sum())),
        spoken,
    )  # fmt: skip
    tell(result, shown, as_json)
    if threshold is not None and result.never_share > threshold:
        raise typer.Exit(1)


def _watched(tokenizer: Any, table: VocabTable, items: Iterable[str]) -> tuple[list[int], dict[str, Sequences]]:
    """Single tokens by id, and words of several with the ways in which they are encoded."""
    from vocabguard.data.counting import Sequences
    from vocabguard.data.ranking import word_sequences
    from vocabguard.vocabulary.table import resolve_token

    tokens, words = [], dict[str, Sequences]()
    for item in items:
        try:
            tokens.append(resolve_token(tokenizer, int(item) if item.isdigit() else item, len(table)))
        except ValueError:
            if item.isdigit() or not item.strip():
                raise
            words[item] = word_sequences(tokenizer, item)
    return tokens, words


def _check_merged(result: Coverage, tokenizer: Any, words: dict[str, Sequences]) -> None:
    from vocabguard.data.coverage import vocabulary_hash

    if result.source.vocabulary != vocabulary_hash(tokenizer):
        raise ValueError(
            f"the tokenizer {result.source.tokenizer} is not the one any more that the parts were counted with"
        )
    missing = [word for word in words if word not in [one.word for one in result.words]]
    if missing:
        raise ValueError(f"--watch {missing[0]!r}: words are counted with the data; allowed here: single tokens, and "
                         "the words that were watched then")  # fmt: skip


def _reference(names: Sequence[str], tokenizer: Any, table: VocabTable) -> Coverage | None:
    """The counts of the data to compare with, every token of it."""
    from vocabguard.data.coverage import measure_coverage
    from vocabguard.data.readers import data_files, read_examples

    if not names:
        return None
    files = data_files(names)
    examples = read_examples(files, chats=bool(tokenizer.chat_template), blocks=True)
    return measure_coverage(
        examples, tokenizer, table, files=[str(file) for file in files], workers=_workers_for(files)
    )


def _left_out(result: Coverage, own: Any) -> int:
    """Tokens at risk that are left out since the chat template writes them."""
    from vocabguard.data.coverage import at_risk

    everyone = set(at_risk(result, len(result.data_target)))
    return sum(one in everyone for one in own.tolist())


def _check_ranges(threshold: float | None, top: int, workers: int, epochs: int, max_length: int | None) -> None:
    check_threshold(threshold)
    check_most(
        ("--workers", workers, _WORKERS), ("--epochs", epochs, _EPOCHS), ("--max-length", max_length, MOST_TOKENS)
    )
    for name, value in (("--top", top), ("--workers", workers)):
        if value < 0:
            raise InputError(f"{name} is {value}; allowed: 0 or more")


def _workers_for(files: Sequence[DataFile]) -> int:
    local = [file for file in files if isinstance(file, Path)]
    size = sum(part.stat().st_size for file in local for part in ([file] if file.is_file() else file.rglob("*.arrow")))
    return min(_MOST_WORKERS, os.cpu_count() or 1) if size >= _PARALLEL_FROM else 1


def _named(name: str, tokenizer: Any, result: Coverage, table: VocabTable, watched: Sequence[int]) -> tuple[str, ...]:
    """Which of the tokens that matter are never a target."""
    from vocabguard.data.named import added_tokens, end_tokens, named_sentences, shared_padding

    ends = end_tokens(tokenizer, _generation_ends(Path(name)))
    words = {table.text(one): (one,) for one in watched}
    said = named_sentences(result.data_target, tokenizer, ends, "the data", added=added_tokens(tokenizer), words=words)
    padding = shared_padding(tokenizer, ends)
    return said if not padding or any(padding in one for one in said) else (*said, padding)


def _generation_ends(folder: Path) -> Any:
    """The EOS ids of the generation configuration beside a tokenizer, if there is one."""
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    ids = told if isinstance(told, list) else [told]
    return [one for one in ids if isinstance(one, int)]
