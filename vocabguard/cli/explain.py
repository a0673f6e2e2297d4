"""``vocabguard explain BASE TUNED TOKEN...``: what happened to a token."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console

from vocabguard.cli import scan as scanning
from vocabguard.cli.app import InputError
from vocabguard.offline.explain import contexts_for, load_model
from vocabguard.offline.explain_story import LOST, Pair, story
from vocabguard.offline.explain_view import show_story
from vocabguard.offline.scan import Scan
from vocabguard.vocabulary import resolve_token


def explain(
    base: scanning.Base,
    tuned: scanning.Tuned,
    tokens: Annotated[list[str], typer.Argument(help="Texts of tokens, or their ids.")],
    tokenizer: scanning.Tokenizer = None,
    head: scanning.HeadKey = None,
    embedding: scanning.EmbeddingKey = None,
    coverage: scanning.Coverage = None,
    run: scanning.Run = None,
    ask: Annotated[bool, typer.Option(help="Load both models and ask them for the token.")] = True,
    as_json: scanning.AsJson = False,
) -> None:
    """Investigate single tokens: their rows, their neighbours, and whether they can still be said.

    Exit code 0: none is lost; 1: at least one is; 2: bad input.

    \f
    Raises:
        InputError: for input that cannot be used; `main` prints it and ends with 2.
        typer.Exit: with 1, for findings.
    """
    pair = scanning.open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    rows = pair.tuned.rows or pair.base.rows
    ids = [_id(pair.tokenizer, token, rows) for token in tokens]
    found = scanning.measured(pair)
    contexts, models = _askable(found, pair.tokenizer) if ask else ([], "--no-ask was given")
    try:
        both = Pair.of(found, models)
        stories = [_finite(story(both, pair.tokenizer, token, contexts)) for token in ids]
    except ValueError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(json.dumps({"tokens": stories}, ensure_ascii=False, allow_nan=False))
    else:
        for told in stories:
            show_story(Console(), told)
    if any(told["kind"] in LOST for told in stories):
        raise typer.Exit(1)


def _id(tokenizer: Any, token: str, rows: int) -> int:
    """A text is a token's text if there is one, and an id otherwise."""
    if tokenizer is not None:
        try:
            return resolve_token(tokenizer, token, rows)
        except ValueError as error:
            if not token.isdecimal():
                raise InputError(str(error)) from error
    if not token.isdecimal() or int(token) >= rows:
        raise InputError(f"token {token!r}: allowed without a tokenizer: ids from 0 to {rows - 1}")
    return int(token)


def _askable(found: Scan, tokenizer: Any) -> tuple[list[Any], Any]:
    """Contexts and both models, or no contexts and why they cannot be asked."""
    if tokenizer is None:
        return [], "there is no tokenizer to write prompts with"
    if found.match.by != "id":
        return [], "the base has another vocabulary, so both cannot be asked alike"
    try:
        return contexts_for(tokenizer), (load_model(found.base.path), load_model(found.tuned.path))
    except ValueError as error:
        return [], str(error)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
