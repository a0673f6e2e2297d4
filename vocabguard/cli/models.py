"""Where a model or a tokenizer that a command names lies: a path, a trainer's output folder, a name on the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vocabguard.cli.app import InputError
from vocabguard.files import one_line
from vocabguard.report.commands import latest_checkpoint

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "config.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
_OLD_WEIGHTS = ("*.bin", "*.bin.index.json")
_HELD = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.index.json", "adapter_config.json")


def model_path(name: str) -> str:
    """The path of a model's files.

    Args:
        name: a folder or file; the output folder of a trainer, whose newest checkpoint is taken; or a name on the
            Hugging Face hub, ``organisation/model``, which is downloaded into its cache.

    Raises:
        InputError: for a name that is on neither.
    """
    if _on_hub(name):
        return _downloaded(name, (*_WEIGHTS, *_TOKENIZER), _OLD_WEIGHTS)
    folder = Path(name)
    try:
        holds = not folder.is_dir() or any(found for pattern in _HELD for found in folder.glob(pattern))
    except (OSError, ValueError):
        return name
    if holds:
        return name
    found = latest_checkpoint(folder)
    if found is None or found == folder:
        return name
    print(f"vocabguard: {name}: the newest checkpoint in it is {found}", file=sys.stderr)
    return str(found)


def tokenizer_path(name: str) -> str:
    """The folder of a tokenizer: as it is, or of a name on the hub.

    Raises:
        InputError: for a name that is on neither.
    """
    return _downloaded(name, _TOKENIZER) if _on_hub(name) else name


def _on_hub(name: str) -> bool:
    """Whether a name can only be one on the hub: a path of that form would begin with a folder that is there."""
    if not _HUB_NAME.fullmatch(name):
        return False
    path = Path(name)
    return not path.exists() and not path.parent.exists()


def _downloaded(name: str, patterns: tuple[str, ...], otherwise: tuple[str, ...] = ()) -> str:
    """Files of the hub's cache, downloaded if they are not in it; `otherwise` where there is no safetensors file."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=list(patterns))
        if otherwise and not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=[*patterns, *otherwise])
    except Exception as error:  # of the hub's client, of many types
        raise InputError(
            f"{name}: there is no such path, and the Hugging Face hub has no such model or cannot be reached "
            f"({one_line(error)})"
        ) from error
    return str(folder)
