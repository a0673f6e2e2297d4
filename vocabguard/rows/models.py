"""What kind of model is trained, as far as its batches, its probe and its vocabulary rows depend on it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from vocabguard.results import NotApplicable

# Decoders of encoder-decoder families and a few older ones: their loss takes labels as they are.
_ALIGNED = re.compile(
    r"(Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|CpmAnt|MBart|Marian|Mvp|PLBart|Pegasus|TrOCR|Whisper)ForCausalLM"
    r"|(Flaubert|XLM)WithLMHeadModel|XLNetLMHeadModel"
)
_LANGUAGE = re.compile(r"LM|Generation")
# They have no mask over what comes later, unless a call brings one.
_LOOK_AHEAD = re.compile(r"(Flaubert|XLM)WithLMHeadModel|XLNetLMHeadModel")


def core_of(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and its like, ``torch.compile`` and PEFT: its class tells what it is."""
    model = unwrapped(model)
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    return inner if isinstance(inner, nn.Module) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and its like, ``torch.compile`` and Fabric, adapters and all."""
    children = dict(model.named_children())
    if "_forward_module" in children:  # Fabric's, which may hold the model a second time
        return unwrapped(children["_forward_module"])
    if len(children) == 1 and children.keys() <= {"module", "_orig_mod", "_fsdp_wrapped_module"}:
        return unwrapped(*children.values())
    return model


def text_config_of(model: nn.Module) -> Any:
    """The part of a model's configuration that speaks of its vocabulary and its texts; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


_LONGEST = ("max_position_embeddings", "block_size", "max_seq_len", "context_length")
"""What configurations call it: Hugging Face's first, then those of models of one's own."""


def longest_prompt(model: nn.Module) -> int | None:
    """``max_position_embeddings`` or ``block_size`` of a model's configuration; None where it names none.

    >>> longest_prompt(nn.Linear(2, 2)) is None
    True
    """
    config = text_config_of(model)
    lengths = (getattr(config, name, None) for name in _LONGEST)
    return next((one for one in lengths if isinstance(one, int) and one > 0), None)


def logits_width(model: nn.Module) -> int:
    """Logits of a place, by the output matrix; where none is known as many as Gemma 3 has, so rather too many.

    >>> logits_width(nn.Linear(2, 2))
    262144
    """
    output_of = getattr(model, "get_output_embeddings", None)
    weight = getattr(output_of(), "weight", None) if callable(output_of) else None
    shape: tuple[int, ...] = getattr(weight, "ds_shape", ()) or tuple(getattr(weight, "shape", ()))
    return int(shape[0]) if len(shape) == 2 else 2**18


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its ids: the device of its input matrix, else of its first parameter.

    >>> input_device(nn.Linear(2, 2))
    device(type='cpu')
    """
    input_of = getattr(model, "get_input_embeddings", None)
    first = input_of() if callable(input_of) else model
    return next((p.device for p in first.parameters()), torch.device("cpu"))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder, by its configuration."""
    return bool(getattr(getattr(core_of(model), "config", None), "is_encoder_decoder", False))


def predicts_next(model: nn.Module) -> bool | None:
    """Whether the model shifts its labels, so that position t predicts label t + 1.

    Judged by its head, its configuration and its class's name; a class that says nothing by these is taken to be a
    causal language model.

    Returns:
        True for causal language models; False for encoder-decoders, masked language models and the few decoders that
        take labels as they are; None where labels are no tokens, as in classification.
    """
    core = core_of(model)
    name = type(core).__name__
    if not has_head(core) and "labels" in parameters_of(core) and not _LANGUAGE.search(name):
        return None
    if is_encoder_decoder(core):
        return False
    return not name.endswith(("ForMaskedLM", "ForPreTraining")) and _ALIGNED.fullmatch(name) is None


def no_tokens(model: nn.Module) -> NotApplicable | None:
    """Why a model's labels are not counted, where they are no tokens; None where they are."""
    if predicts_next(model) is not None:
        return None
    name = type(core_of(model)).__name__
    return NotApplicable(f"{name} has no output rows over the vocabulary: its labels are no tokens")


def looks_ahead(model: nn.Module) -> bool:
    """Whether a position sees those after it, by the class's name, so that a prompt would show its own answer."""
    return _LOOK_AHEAD.fullmatch(type(core_of(model)).__name__) is not None


def has_head(model: nn.Module) -> bool:
    """Whether a model has output rows; one that cannot be asked is taken to have them."""
    output_of = getattr(core_of(model), "get_output_embeddings", None)
    try:
        return not callable(output_of) or output_of() is not None
    except (NotImplementedError, AttributeError):
        return True


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """Names that the model's ``forward`` takes, in order, whatever its wrappers take."""
    return tuple(inspect.signature(core_of(model).forward).parameters)
