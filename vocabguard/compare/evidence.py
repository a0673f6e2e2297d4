"""What a file of results, or a run, was measured on: hashes of tokenizer and weights, versions, arguments.

Two of them can then be told to be about the same weights, wherever these lay and however they were sharded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vocabguard.data.coverage import vocabulary_hash
from vocabguard.files import one_line, plain
from vocabguard.results import NotApplicable
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.fingerprint import SAMPLED, differ, fingerprint
from vocabguard.rows.tensors import ADAPTER_CONFIG, TensorStore, open_adapter_store, open_store
from vocabguard.runlog import versions
from vocabguard.vocabulary.labels import ROW_KINDS

COVERED = (
    "names, shapes and types of all tensors; every byte of the vocabulary rows; of each other tensor 2 KiB at 8 evenly "
    "spaced places (all of an adapter's); the tokenizer's pieces and ids, and its chat template"
)
"""What the hashes of a file are of."""

COVERED_OF_RUN = (
    f"{SAMPLED} evenly spaced rows of each vocabulary matrix at the base, rounded to bfloat16, and no other weight; "
    "the tokenizer's pieces and ids, and its chat template"
)
"""What the hashes of a run are of: a run must begin at once."""

_PLACES, _BYTES, _PIECE = 8, 256, 2**20


def evidence_of(
    base: Checkpoint | None, tuned: Checkpoint | None, tokenizer: Any, arguments: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What was measured on, JSON-able. Nothing in it depends on the time or on where a file is written.

    Args:
        base: None of one side.
        arguments: of the command, as they were given.
        beside: more that the numbers depend on, such as the device.
    """
    found = {
        "base": None if base is None else weights_of(base),
        "tuned": None if tuned is None else weights_of(tuned),
        "tokenizer": tokenizer_of(tokenizer),
        "versions": versions(),
        "arguments": {name: str(one) if isinstance(one, Path) else one for name, one in sorted(arguments.items())},
        "covered": COVERED,
        **(beside or {}),
    }
    told: dict[str, Any] = plain(found)
    return told


def evidence_of_run(baselines: Mapping[Any, Baseline], tokenizer: Any) -> dict[str, Any]:
    """What a run is measured on, JSON-able. Of rows that processes share, for all of them to call.

    Args:
        baselines: the rows at the base, by matrix.

    Returns:
        ``base``, whose ``rows_sample`` has the `fingerprint` of each matrix, ``tokenizer``, ``versions``, ``covered``.
    """
    sample = {name: fingerprint(rows) for name, rows in sorted(baselines.items())}
    try:
        words = tokenizer_of(tokenizer)
    except Exception as error:  # a tokenizer of somebody's own may have pieces of any type
        words = {"error": one_line(error, 80)}
    return {"base": {"rows_sample": sample}, "tokenizer": words, "versions": versions(), "covered": COVERED_OF_RUN}


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """SHA-256 of a checkpoint's weights, as far as `COVERED` says; the same for every folder and sharding.

    Returns:
        ``tensors``, how many; ``sha256`` of all; ``rows_sha256`` of the vocabulary rows alone, by matrix;
        ``rows_sample``, their `fingerprint`, which a run has, too; or ``error``.
    """
    adapter = (checkpoint.path / ADAPTER_CONFIG).is_file()
    try:
        store = open_adapter_store(checkpoint.path) if adapter else open_store(checkpoint.path)
        rows = {} if adapter else {name: _whole(store, key) for name, key in sorted(checkpoint.keys.items())}
        whole = set(store.names) if adapter else set(checkpoint.keys.values())
        sample = rows_sample(checkpoint)
        digest = hashlib.sha256()
        for name in sorted(store.names):
            shape, kind = store.form(name)
            digest.update(json.dumps([name, shape, kind]).encode())
            content = _whole(store, name).encode() if name in whole else store.sampled(name, _PLACES, _BYTES)
            digest.update(hashlib.sha256(content).digest())
    except (ValueError, OSError) as error:
        return {"path": str(checkpoint.path), "error": one_line(error)}
    return {"path": str(checkpoint.path), "tensors": len(store.names), "sha256": digest.hexdigest(),
            "rows_sha256": dict(rows), "rows_sample": sample}  # fmt: skip


def rows_sample(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `fingerprint` of each vocabulary matrix that a checkpoint has; of a tied one it is the head's."""
    named = {name: checkpoint.matrix(name) for name in ("head", *(() if checkpoint.tied else ("embedding",)))}
    return {name: fingerprint(rows) for name, rows in named.items() if not isinstance(rows, NotApplicable)}


def tokenizer_of(tokenizer: Any) -> dict[str, Any] | None:
    """SHA-256 of a tokenizer's pieces and ids, and of its chat template; None without a tokenizer."""
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    shown = None if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return {"vocabulary": vocabulary_hash(tokenizer), "chat_template": shown}


def unequal(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> str:
    """In what two pieces of evidence are not about the same thing; empty where they are, or where one does not tell.

    Args:
        what: ``tokenizer``, ``base`` or ``tuned``.

    Returns:
        ``another base (HASH and HASH)``, to be put into a sentence.
    """
    one, other = (side if isinstance(side, Mapping) else {} for side in (first.get(what), second.get(what)))
    key = "vocabulary" if what == "tokenizer" else "sha256"
    hashes = [one.get(key), other.get(key)]
    if None not in hashes:
        return "" if hashes[0] == hashes[1] else f"another {what} ({hashes[0]!s:.12} and {hashes[1]!s:.12})"
    pairs = _sampled_alike(one, other)
    odd = [name for name, (left, right) in pairs.items() if differ(left, right)]
    if not odd:
        return ""
    left, right = (str(side.get("sha256"))[:12] for side in pairs[odd[0]])
    return f"another {what} ({ROW_KINDS.get(odd[0], odd[0])} rows {left} and {right})"


def identity_of(told: Mapping[str, Any], what: str) -> str | None:
    """The hash of the tokenizer, or of output rows at the base; None where it is not known.

    Args:
        what: ``tokenizer`` or ``base``.
    """
    side = told.get(what)
    side = side if isinstance(side, Mapping) else {}
    found = side.get("vocabulary") if what == "tokenizer" else _samples(side).get("head", {}).get("sha256")
    return found if isinstance(found, str) else None


def _sampled_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fingerprints that both have, by matrix."""
    mine, theirs = (_samples(side) for side in (one, other))
    return {name: (mine[name], theirs[name]) for name in mine if name in theirs}


def _samples(side: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = side.get("rows_sample")
    return {} if not isinstance(found, Mapping) else {n: one for n, one in found.items() if isinstance(one, Mapping)}


def evidence_sentences(told: Mapping[str, Any]) -> tuple[str, ...]:
    """The evidence of a file, for a page; none where an earlier version wrote the file."""
    if not told:
        return ()
    said = []
    for side in ("base", "tuned"):
        one = told.get(side)
        if isinstance(one, Mapping) and one.get("sha256"):
            said.append(f"Weights of the {side}: SHA-256 {one['sha256']} ({one['tensors']:,} tensors).")
        elif isinstance(one, Mapping) and one.get("error"):
            said.append(f"Weights of the {side}: no hash, {one['error']}.")
        elif isinstance(one, Mapping):
            said += [
                f"{ROW_KINDS.get(name, name).capitalize()} rows of the {side}: SHA-256 {sample.get('sha256')}, of "
                f"{sample.get('sampled')} of {sample.get('rows')} rows."
                for name, sample in _samples(one).items()
            ]
    words = told.get("tokenizer")
    if isinstance(words, Mapping) and words.get("vocabulary"):
        said.append(f"Tokenizer: SHA-256 {words['vocabulary']}.")
    said += [f"The hashes cover {told['covered']}."] if said and told.get("covered") else []
    made = [f"{name} {number}" for name, number in (told.get("versions") or {}).items() if number]
    said += [f"Measured with {', '.join(made)}."] if made else []
    given = {name: one for name, one in (told.get("arguments") or {}).items() if one not in (None, False, [])}
    said += [f"Arguments: {', '.join(f'{name}={one}' for name, one in given.items())}."] if given else []
    return tuple(map(str, said))


def _whole(store: TensorStore, name: str) -> str:
    """SHA-256 of all bytes of a tensor."""
    digest = hashlib.sha256()
    for piece in store.pieces(name, _PIECE):
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
