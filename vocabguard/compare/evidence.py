"""What a file of results was measured on: hashes of tokenizer and weights, versions, arguments.

Two files can then be told to be about the same weights, wherever these lay and however they were sharded.
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
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.tensors import ADAPTER_CONFIG, TensorStore, open_adapter_store, open_store
from vocabguard.runlog import versions

COVERED = (
    "names, shapes and types of all tensors; every byte of the vocabulary rows; of each other tensor 2 KiB at 8 evenly "
    "spaced places (all of an adapter's); the tokenizer's pieces and ids, and its chat template"
)
"""What the hashes are of."""

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


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """SHA-256 of a checkpoint's weights, as far as `COVERED` says; the same for every folder and sharding.

    Returns:
        ``tensors``, how many; ``sha256`` of all; ``rows_sha256`` of the vocabulary rows alone, by matrix; or ``error``.
    """
    adapter = (checkpoint.path / ADAPTER_CONFIG).is_file()
    try:
        store = open_adapter_store(checkpoint.path) if adapter else open_store(checkpoint.path)
        rows = {} if adapter else {name: _whole(store, key) for name, key in sorted(checkpoint.keys.items())}
        whole = set(store.names) if adapter else set(checkpoint.keys.values())
        digest = hashlib.sha256()
        for name in sorted(store.names):
            shape, kind = store.form(name)
            digest.update(json.dumps([name, shape, kind]).encode())
            content = _whole(store, name).encode() if name in whole else store.sampled(name, _PLACES, _BYTES)
            digest.update(hashlib.sha256(content).digest())
    except (ValueError, OSError) as error:
        return {"path": str(checkpoint.path), "error": one_line(error)}
    return {"path": str(checkpoint.path), "tensors": len(store.names), "sha256": digest.hexdigest(),
            "rows_sha256": dict(rows)}  # fmt: skip


def tokenizer_of(tokenizer: Any) -> dict[str, Any] | None:
    """SHA-256 of a tokenizer's pieces and ids, and of its chat template; None without a tokenizer."""
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    shown = None if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return {"vocabulary": vocabulary_hash(tokenizer), "chat_template": shown}


def unequal(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> str:
    """Why two pieces of evidence are not about the same thing; empty where they are, or where one does not tell.

    Args:
        what: ``tokenizer``, ``base`` or ``tuned``.
    """
    one, other = first.get(what), second.get(what)
    key = "vocabulary" if what == "tokenizer" else "sha256"
    hashes = [side.get(key) if isinstance(side, Mapping) else None for side in (one, other)]
    if None in hashes or hashes[0] == hashes[1]:
        return ""
    return f"they were measured with another {what} ({hashes[0]:.12} and {hashes[1]:.12})"


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
