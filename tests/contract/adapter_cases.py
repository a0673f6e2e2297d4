"""A tiny Llama with PEFT's adapters; its rows are those of a copy into which PEFT has merged them."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
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


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A checkpoint of a model as wide as 4-bit blocks are."""
    folder = tempfile.TemporaryDirectory()
    model_of("LlamaForCausalLM", "LlamaConfig", hidden_size=64, intermediate_size=64).save_pretrained(folder.name)
    return folder


def quantised(kind: str, *, head: bool = False, **options: Any) -> Any:
    """A Llama with a quantised base and an adapter.

    Args:
        kind: ``4bit`` or ``8bit`` of bitsandbytes, or ``int8`` of torchao.
        head: whether the head is quantised too.
        **options: of the LoRA.

    Raises:
        MissingError: without PEFT or the library.
    """
    try:
        import peft

        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config: Any = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        else:
            import bitsandbytes  # noqa: F401

            config = transformers.BitsAndBytesConfig(
                load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=[] if head else None,
            )  # fmt: skip
    except ImportError as error:
        raise MissingError(f"{error.name} is not installed") from error
    base = transformers.AutoModelForCausalLM.from_pretrained(_folder().name, quantization_config=config)
    if kind != "int8":
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return peft.get_peft_model(base, peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options)))


def over_quantised(name: str, family: str, kind: str, **options: Any) -> Case:
    """A case of LoRA on the attention of a quantised base, whose head cannot move."""
    return replace(case(name, family), build=lambda: quantised(kind, **options), rows=lambda model, end: None)


NO_GRADIENT = "pull and push are not applicable"
UNTIED = "the adapter unties them"
ADAPTERS = (
    case("lora-attention", "LoRA on attention"),
    case("lora-head", "LoRA on the head", "head", said=NO_GRADIENT, target_modules=["lm_head"]),
    case("lora-both", "LoRA on both ends", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH),
    replace(
        case("lora-untied", "LoRA on both ends of a tied base", "head", "embedding", tied=True, target_modules=BOTH),
        said=UNTIED, rows=added_rows,
    ),
    case("rslora", "rsLoRA", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH, use_rslora=True),
    case("dora", "DoRA", "head", "embedding", said=NO_GRADIENT, target_modules=BOTH, use_dora=True),
    case(
        "tokens", "trainable tokens", "embedding",
        trainable_token_indices={"embed_tokens": [300, 301, 302, 303, 304, 305, 8000]},
    ),
    Case(
        "saved", "`modules_to_save`", lambda: adapted(modules_to_save=BOTH), head=SAVED, embedding=SAVED_INPUTS,
    ),
    Case(
        "saved-untied", "`modules_to_save` over a tied base", lambda: adapted(modules_to_save=["lm_head"], tied=True),
        head=SAVED, embedding="base_model.model.model.embed_tokens.weight", moves=("head",), said=UNTIED,
    ),
    over_quantised("4bit", "LoRA on attention over 4 bits (bitsandbytes)", "4bit"),
    Case(
        "4bit-saved", "`modules_to_save` over 4 bits (bitsandbytes)",
        lambda: quantised("4bit", modules_to_save=BOTH), head=SAVED, embedding=SAVED_INPUTS,
    ),
    over_quantised("4bit-head", "LoRA on attention over 4 bits and a 4-bit head", "4bit", head=True),
    over_quantised("8bit", "LoRA on attention over 8 bits (bitsandbytes)", "8bit"),
    over_quantised("int8", "LoRA on attention over int8 (torchao)", "int8"),
)  # fmt: skip
