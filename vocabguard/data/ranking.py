"""Which of the tokens that are never a target matter: common ones, and none that the chat template writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocabguard.files import replacing, write_file
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.vocabulary.table import VocabTable

if TYPE_CHECKING:
    from vocabguard.data.coverage import Coverage

USUAL_NEVER = (0.85, 0.97)
"""Share of live tokens that are never a target in English chat data, as seen: the yardstick without a reference."""

KINDS = ("word", "capitalised word", "piece", "other")
"""Finer than a script: a word with the space before it, the same with a capital, what continues a word, the rest."""

WORD = regex.compile(r" \p{L}[\p{L}\p{M}'’-]*")
"""A token that is a word, with the space before it."""

_PIECE = regex.compile(r"[\p{L}\p{M}'’-]+")
_CONTENT = "0vocabguard0"


def template_ids(tokenizer: Any) -> Tensor:
    """Ids that the chat template itself writes around contents, ascending; none where there is no template.

    Of a conversation's tokens the model reads these most and never has to say most of them: in a list of
    tokens that the data reads and never has as targets they would come first, and say nothing of the data.
    """
    if not getattr(tokenizer, "chat_template", None):
        return torch.zeros(0, dtype=torch.int64)
    turns = [{"role": role, "content": _CONTENT} for role in ("system", "user", "assistant", "user", "assistant")]
    found: set[int] = set()
    for said in (turns, turns[1:]):  # some templates refuse a system's turn
        try:
            text = str(tokenizer.apply_chat_template(said, tokenize=False))
        except Exception:  # templates are programs of their own and raise what they like
            continue
        for part in text.split(_CONTENT):
            found |= set(tokenizer.encode(part, add_special_tokens=False))
    return torch.tensor(sorted(found), dtype=torch.int64)


def merge_ranks(tokenizer: Any, rows: int) -> Tensor:
    """(rows,) int64: how early the tokenizer's training made each token, the earliest first.

    A BPE tokenizer merges the commonest pairs of its corpus first, so that the order of its merges is the order of how
    common its tokens were there; a unigram one has its pieces' probabilities. Others give the order of the ids.
    """
    ranks = np.arange(rows, dtype=np.int64)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    vocabulary = tokenizer.get_vocab()
    if model.get("type") == "BPE" and model.get("merges"):
        ranks[:] = len(model["merges"]) + 1  # letters and bytes, which no merge made, come last
        for rank, merge in enumerate(model["merges"], start=1):
            piece = "".join(merge if isinstance(merge, list) else merge.split(" ", 1))
            if (index := vocabulary.get(piece, rows)) < rows:
                ranks[index] = rank
    elif model.get("type") == "Unigram":
        scores = np.full(rows, -np.inf)
        values = np.array([score for _, score in model["vocab"]])[:rows]
        scores[: len(values)] = values
        ranks[np.argsort(-scores, kind="stable")] = np.arange(rows)
    return torch.from_numpy(ranks)


def expected_never(counts: Tensor, live: Tensor, targets: int) -> float:
    """The share of live tokens that would be no target in as many tokens of a reference text.

    Each of N tokens of the reference is drawn with equal probability, so that a token of count c is left out of
    `targets` draws with probability (1 - c/N)^targets: the rarefaction of ecology (Hurlbert 1971), with replacement.

    Args:
        counts: (V,) int64 of the reference.
        live: (V,) bool.

    >>> expected_never(torch.tensor([1, 1, 0]), torch.tensor([True, True, True]), 1)
    0.6666666666666666
    """
    total = int(counts.sum())
    if not total or not bool(live.any()):
        return 1.0
    left = (1 - counts[live].double() / total) ** targets
    return float(left.mean())


def kinds_of(table: VocabTable) -> NDArray[np.uint8]:
    """(V,) uint8, index into `KINDS`, of each token's text."""
    found = np.full(len(table), KINDS.index("other"), dtype=np.uint8)
    for index, text in enumerate(table.texts):
        if WORD.fullmatch(text):
            found[index] = text[1].isupper()
        elif _PIECE.fullmatch(text):
            found[index] = KINDS.index("piece")
    return found


def kind_rows(coverage: Coverage, table: VocabTable, group: str = "latin") -> list[tuple[str, tuple[int, ...]]]:
    """Live tokens of a script by kind and exposure class: (kind, counts in the order of `EXPOSURE_CLASSES`)."""
    chosen = (coverage.live & table.mask(group)).numpy()
    pairs = kinds_of(table)[chosen].astype(np.int64) * len(EXPOSURE_CLASSES) + coverage.classes.numpy()[chosen]
    counts = np.bincount(pairs, minlength=len(KINDS) * len(EXPOSURE_CLASSES)).reshape(len(KINDS), -1)
    return [(kind, tuple(row.tolist())) for kind, row in zip(KINDS, counts, strict=True) if row.sum()]


def word_sequences(tokenizer: Any, word: str) -> tuple[tuple[int, ...], ...]:
    """How a word is encoded in a text, after a space and without one, each way once.

    Raises:
        ValueError: if it is encoded as nothing.
    """
    ways = (tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word.strip()}"))
    found = tuple(dict.fromkeys(tuple(way) for way in ways if way))
    if not found:
        raise ValueError(f"the word {word!r} has no tokens; allowed: a word that the tokenizer encodes")
    return found


COLUMNS = ("id", "text", "group", "kind", "live", "class", "data_target", "inputs")
"""Of the table that `write_tokens` writes."""


def write_tokens(path: Path, coverage: Coverage, table: VocabTable, languages: Sequence[str] | None = None) -> None:
    """Write a row for each token, `COLUMNS`, as CSV or Parquet by the name's ending.

    Args:
        languages: one more column, ``language``: of V tokens, from `vocabguard.data.token_languages`.

    Raises:
        ValueError: for another ending, or Parquet without pyarrow.
        OSError: if it cannot be written.
    """
    names: tuple[str, ...] = COLUMNS
    columns = list(_columns(coverage, table))
    if languages is not None:
        names = (*COLUMNS, "language")
        columns.append(languages)
    rows = list(zip(*columns, strict=True))
    if path.suffix == ".csv":
        with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([names, *rows])
        return
    if path.suffix != ".parquet":
        raise ValueError(f"--table is {path}; allowed: a name that ends in .csv or .parquet")
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(f"--table {path}: writing Parquet needs pyarrow; `pip install pyarrow`") from error
    content = io.BytesIO()
    parquet.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), content)
    write_file(path, content.getvalue())


def _columns(coverage: Coverage, table: VocabTable) -> Iterator[Sequence[Any]]:
    ids = range(len(coverage.data_target))
    yield ids
    # What is no whole UTF-8 has a text that no file takes.
    yield [table.text(i).encode("utf-8", "backslashreplace").decode("utf-8") for i in ids]
    yield [table.group_of(i) for i in ids]
    yield [KINDS[kind] for kind in kinds_of(table)]
    yield coverage.live.tolist()
    yield [EXPOSURE_CLASSES[one] for one in coverage.classes.tolist()]
    yield coverage.data_target.tolist()
    yield coverage.inputs.tolist()
