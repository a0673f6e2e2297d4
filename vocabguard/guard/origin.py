"""Where a run comes from, for the head of its report: model, data, command, versions."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from vocabguard.files import one_line
from vocabguard.runlog import versions

_SECRET = re.compile(r"(?i)(token|secret|password|passwd|api[_-]?key|access[_-]?key|credential|webhook)")
_MOST = 300  # characters of a name


def origin_of(model: Any, dataloader: Any, tokenizer: Any) -> dict[str, Any]:
    """What ``run.json`` keeps of a run's origin; what cannot be told is None.

    Returns:
        ``model``: name or path, and class; ``parameters``: their number; ``tokenizer``: name or path; ``data``: in
        words; ``command``: as it was called, without secrets; ``versions``: of packages.
    """
    return {
        "model": _told(lambda: _model_name(model)),
        "model_class": type(model).__name__,
        "parameters": _told(lambda: sum(one.numel() for one in model.parameters())),
        "tokenizer": _told(lambda: getattr(tokenizer, "name_or_path", None) or None),
        "data": _told(lambda: _data_in_words(getattr(dataloader, "dataset", None))),
        "command": command_line(sys.argv),
        "versions": versions(),
    }


def _told(read: Any) -> Any:
    """What a function reads of objects that are others'; where it fails, why."""
    try:
        found = read()
    except Exception as error:
        return f"not known ({one_line(error, 80)})"
    return found[:_MOST] if isinstance(found, str) else found


def _model_name(model: Any) -> str | None:
    # A PEFT model is named by its base.
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "base_model_name_or_path", None):
            return str(adapter.base_model_name_or_path)
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    return str(name) if name else None


def _data_in_words(dataset: Any) -> str | None:
    """Where a dataset comes from and how many rows it has, as far as it says so."""
    if dataset is None:
        return None
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "rows streamed"
    info = getattr(dataset, "info", None)
    # Of the `datasets` library: addresses that it was read from, else the builder's name.
    sources = list(getattr(info, "download_checksums", None) or ())
    name = ", ".join(map(str, sources[:3])) or getattr(info, "dataset_name", None) or type(dataset).__name__
    return f"{name} ({rows})"


def command_line(arguments: Sequence[str]) -> str:
    """A command as it was called, with values of secret options left out.

    >>> command_line(["train.py", "--hub_token", "hf_x", "--lr=1e-4", "--api-key=3"])
    'train.py --hub_token ... --lr=1e-4 --api-key=...'
    """
    shown: list[str] = []
    hide = False
    for one in arguments:
        name, sign, _ = one.partition("=")
        secret = name.startswith("-") and bool(_SECRET.search(name)) and not re.search(r"(?i)tokens|tokenizer", name)
        text = "..." if hide else f"{name}=..." if secret and sign else one
        hide = secret and not sign
        shown.append(text)
    return " ".join(one if one == "..." or one.endswith("=...") else shlex.quote(one) for one in shown)[:2000]
