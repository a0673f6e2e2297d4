"""Causal language models from disk: a folder, or a PEFT adapter's folder on its base; on any device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocabguard.compare.options import Loading
from vocabguard.compare.trial import require_readable
from vocabguard.files import full_path, one_line, read_json, some
from vocabguard.measure.probe import probe_applicable
from vocabguard.rows.tensors import ADAPTER_CONFIG, open_adapter_store


def load_model(
    path: Path, loading: Loading | None = None, base: Path | None = None, *, trainable: bool = False
) -> nn.Module:
    """A causal language model of a folder, ready to be asked.

    Args:
        path: a model's folder, or a PEFT adapter's.
        loading: None loads it as it is saved, on the CPU.
        base: folder of the model that an adapter sits on; None looks where the adapter's configuration says.
        trainable: whether an adapter's parameters take gradients.

    Raises:
        ValueError: if there is none, it cannot be loaded, or it cannot be asked to continue a prompt.
    """
    loading = loading or Loading()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # one for each model, where that is no terminal too
    adapter = (path / ADAPTER_CONFIG).is_file()
    model: nn.Module = _adapted(path, loading, base, trainable) if adapter else _loaded(path, loading)
    reason = probe_applicable(model)
    if reason is not None:
        raise ValueError(f"{path}: {reason.reason}")
    if loading.device is not None:
        with out_of_memory(f"on the device {loading.device}"):
            model.to(loading.device)
    return model.eval()


@contextmanager
def out_of_memory(where: str) -> Iterator[None]:
    """Turn a device's lack of memory into a ValueError that names what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"not enough memory {where}; allowed: a smaller --batch, --dtype bfloat16, --device-map auto, --device cpu"
        ) from error


def _loaded(path: Path, loading: Loading) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, so no model can be loaded from it")
    try:
        require_readable(path)
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, output_loading_info=True, **loading.options
            )
    except Exception as error:  # loading raises what it likes
        # The library's own words point to a report that is not shown.
        why = "its weights have other shapes than config.json says" if "ignore_mismatched" in str(error) else None
        raise ValueError(f"{path}: the model cannot be loaded ({why or one_line(error)})") from error
    model: nn.Module = loaded[0]
    _require_whole(path, loaded[1])
    return model


def _require_whole(path: Path, told: Mapping[str, Any]) -> None:
    """Refuse a model of which a part was made up at random, since its file has none that fits.

    Raises:
        ValueError: with the parts.
    """
    missing = sorted(map(str, told.get("missing_keys") or ()))
    if missing:
        raise ValueError(f"{path}: lacks {some(missing, 3)}; the library would make them up at random")


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers say nothing of what is refused here in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def base_of_adapter(path: Path) -> Path:
    """The folder of the model that an adapter sits on, by its configuration.

    Raises:
        ValueError: where it is not on this machine.
    """
    base = full_path(str(read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")))
    if not base.is_dir():
        raise ValueError(f"{path}: its base {str(base)!r} is not on this machine; give it as BASE")
    return base


def _adapted(path: Path, loading: Loading, base: Path | None, trainable: bool) -> nn.Module:
    """A base with an adapter on it, in which its rows and layers are as in training."""
    base = base_of_adapter(path) if base is None else base
    try:
        from peft import PeftModel, get_peft_model_state_dict  # an optional package
    except ImportError as error:
        raise ValueError(f"{path} is an adapter, which needs PEFT: pip install peft") from error
    model: Any = _loaded(base, loading)
    try:
        require_readable(path)
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing, which are looked at below
            found: Any = PeftModel.from_pretrained(model, str(path), is_trainable=trainable, local_files_only=True)
        loaded = set(get_peft_model_state_dict(found, save_embedding_layers=False))
    except Exception as error:
        raise ValueError(f"{path}: the adapter cannot be loaded ({one_line(error)})") from error
    _require_used(path, loaded)
    whole: nn.Module = found
    return whole


def _require_used(path: Path, loaded: set[str]) -> None:
    """Refuse an adapter that is not loaded as it was saved: the model asked would be another one, or the base.

    Args:
        loaded: names of the tensors that PEFT has a place for.

    Raises:
        ValueError: with tensors of the file that have none, or places that the file has no tensor for.
    """
    there = set(open_adapter_store(path).names)
    for names, why in ((there - loaded, "holds tensors that its configuration has no place for"),
                       (loaded - there, "lacks tensors that its configuration speaks of")):  # fmt: skip
        if names:
            raise ValueError(f"{path}: {why}: {some(names, 3)}")
