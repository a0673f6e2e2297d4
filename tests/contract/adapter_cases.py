"""A tiny Llama with PEFT's adapters; its rows are those of a copy into which PEFT has merged them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from model_cases import Case, MissingError, model_of
from torch import Tensor

SAVED = "base_model.model.lm_head.modules_to_save.default.weight"
SAVED_INPUTS = "base_model.model.model.embed_tokens.modules_to_save.default.weight"
BOTH = ["lm_head", "embed_tokens"]


def adapted(*, tied: bool = False, **options: Any) -> Any:
    """A Llama with an adapter.

    Raises:
        MissingError: without PEFT.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingError("PEFT is not installed") from error
    base = model_of("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=tied)
    return peft.get_peft_model(base, peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options)))


def merged_rows(model: Any, name: str) -> Tensor:
    """Rows of a merged copy."""
    plain = copy.deepcopy(model).merge_and_unload()
    end = plain.get_output_embeddings() if name == "head" else plain.get_input_embeddings()
    rows: Tensor = end.weight
    return rows


def added_rows(model: Any, name: str) -> Tensor:
    """Rows of the forward pass; merging would put both updates of a tied base into its one matrix."""
    layer = model.get_output_embeddings() if name == "head" else model.get_input_embeddings()
    rows: Tensor = layer.base_layer.weight + layer.get_delta_weight("default")
    return rows


def case(name: str, family: str, *moves: str, said: str | None = None, tied: bool = False, **options: Any) -> Case:
    """A case whose rows have no gradients of their own."""
    return Case(
        name,
        family,
        lambda: adapted(tied=tied, **options),
        head=None,
        embedding=None,
        rows=merged_rows,
        pulled=False,
        moves=moves,
        said=said,
    )


NO_GRADIENT = "pull and push are not applicable"
UNTIED = "the adapter unties them"
ADAPTERS = (
    case("lora-attention", "LoRA on attention"),
    case("lora-head", "LoRA on the head", "head", said=NO_GRADIENT, target_modules=["lm_head"]),
    case("lora-both", "LoRA on both ends", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH),
    replace(
        case("lora-untied", "LoRA on both ends, tied base", "head", "embedding", tied=True, target_modules=BOTH),
        said=UNTIED, rows=added_rows,
    ),
    case("rslora", "rsLoRA", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH, use_rslora=True),
    case("dora", "DoRA", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH, use_dora=True),
    case(
        "tokens", "trainable tokens", "embedding",
        trainable_token_indices={"embed_tokens": [300, 301, 302, 303, 304, 305, 8000]},
    ),
    Case(
        "saved", "modules_to_save", lambda: adapted(modules_to_save=BOTH), head=SAVED, embedding=SAVED_INPUTS,
    ),
    Case(
        "saved-untied", "modules_to_save, tied base", lambda: adapted(modules_to_save=["lm_head"], tied=True),
        head=SAVED, embedding="base_model.model.model.embed_tokens.weight", moves=("head",), said=UNTIED,
    ),
)  # fmt: skip
