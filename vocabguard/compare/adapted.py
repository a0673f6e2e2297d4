"""Adapters that are repaired as adapters: whether rows can be put back into one, and how its file is written anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vocabguard.files import copy_files, replacing, some
from vocabguard.results import NotApplicable
from vocabguard.rows.baselines import CopiedBaseline, FileBaseline
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.tensors import ADAPTER_CONFIG, ADAPTER_FILES, COMMON_NAMES, open_adapter_store, tensors_named


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter's."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_head(tuned: Checkpoint) -> str | NotApplicable:
    """The tensor of an adapter's file that is its output rows as a whole, or why rows cannot be put back into it."""
    if isinstance(tuned.head, NotApplicable):
        return NotApplicable("the adapter leaves the output rows as they are: what it lost, it lost in the body")
    if isinstance(tuned.head, FileBaseline):
        return tuned.head.key
    saved = tensors_named(COMMON_NAMES["head"], open_adapter_store(tuned.path).names)
    if isinstance(tuned.head, CopiedBaseline) and saved:
        return saved[0]
    return NotApplicable("the adapter makes its output rows by an update, into which no single row can be put")


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Copy an adapter's folder with some of its tensors replaced; names, dtypes and all other files stay as they are.

    Raises:
        ValueError: for a tensor that the adapter does not have, or of another shape, or an adapter that is damaged.
    """
    store = open_adapter_store(folder)
    strange = [name for name, new in tensors.items() if name not in store.names or store.form(name)[0] != new.shape]
    if strange:
        raise ValueError(f"{folder}: has no such tensors to replace: {some(strange, 3)}")
    kept = {name: store.tensor(name) for name in store.names}
    changed = {name: new.detach().to("cpu", kept[name].dtype).contiguous() for name, new in tensors.items()}
    safe, header = folder / ADAPTER_FILES[0], {"format": "pt"}
    if safe.is_file():
        with safe_open(str(safe), framework="pt", device="cpu") as opened:
            header = opened.metadata()
    copy_files(folder, out, but={folder / name for name in ADAPTER_FILES})
    with replacing(out / safe.name) as new:
        save_file(kept | changed, str(new), metadata=header)
