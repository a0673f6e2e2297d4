"""Tiny models of many architectures, built here from their configurations, and what the guard must find in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROWS = 8192
"""Rows of every model: 32 more than the tokenizer of the examples has tokens."""
WIDTH = 16
IMAGE, VISION_START = 8101, 8102

Batch = dict[str, Tensor]


class MissingError(Exception):
    """The installed library does not have this model."""


@dataclass(frozen=True)
class Case:
    """One architecture and what is true of it.

    Attributes:
        name: of the case.
        family: under which the support table lists it.
        build: makes the model, with random weights.
        head: name of the parameter with the output rows, or its names over the years; None without.
        embedding: name of the parameter with the input rows.
        tied: whether both are one.
        bias: whether the head adds a bias.
        shift: whether labels are shifted in the model; None where they are no tokens.
        probed: whether the model can be asked to repeat tokens.
        moves: which matrices can move, so that the guard must follow them.
        batch: changes a batch of text into one of this model.
        rows: gives the rows that the model uses now, where they are no parameter.
        pulled: whether the head's rows have gradients of their own.
        said: pattern of a note that the guard must tell.
    """

    name: str
    family: str
    build: Callable[[], Any]
    head: str | None = "lm_head.weight"
    embedding: str | None = "model.embed_tokens.weight"
    tied: bool = False
    bias: bool = False
    shift: bool | None = True
    probed: bool = True
    moves: tuple[str, ...] = ("head", "embedding")
    batch: Callable[[Batch], Batch] = lambda batch: batch
    rows: Callable[[Any, str], Tensor | None] | None = None
    pulled: bool = True
    said: str | None = None

    def rows_of(self, model: Any, name: str) -> Tensor | None:
        """A copy of the rows of ``head`` or ``embedding``, found without the guard; None where there are none."""
        if self.rows is not None:
            found = self.rows(model, name)
            return None if found is None else found.detach().clone()
        path = self.head if name == "head" else self.embedding
        return None if path is None else self.parameter(model, path).detach().clone()

    def parameter(self, model: Any, path: str) -> nn.Parameter:
        """The parameter of one of the names."""
        known = dict(model.named_parameters(remove_duplicate=False))
        return next(known[name] for name in path.split() if name in known)


SMALL: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}


def model_of(kind: str, config: str, *, text: bool = False, **settings: Any) -> Any:
    """A model with random weights, the same every time.

    Args:
        kind: its class in transformers.
        config: its configuration's.
        text: whether ``settings`` are for a configuration that has no common names.
        **settings: besides the common ones.

    Raises:
        MissingError: if the installed transformers lacks one of them.
    """
    if not hasattr(transformers, kind) or not hasattr(transformers, config):
        raise MissingError(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    settings = settings if text else SMALL | settings
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


def decoder(family: str, name: str = "", **expected: Any) -> Callable[..., Case]:
    """A case of ``<family>ForCausalLM`` with ``<family>Config``; the settings follow."""

    def case(**settings: Any) -> Case:
        def build() -> Any:
            return model_of(f"{family}ForCausalLM", f"{family}Config", **settings)

        return Case(name or family.lower(), family, build, **expected)

    return case


# -- decoders --------------------------------------------------------------------------------------------------------

NO_EXPERT_NOISE: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.0}
TWO_EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
OF_GPT: dict[str, Any] = {
    "vocab_size": ROWS, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_inner": 24,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

DECODERS = (
    decoder("Llama")(),
    decoder("Llama", "llama-tied", tied=True)(tie_word_embeddings=True),
    decoder("Mistral")(**GROUPED),
    decoder("Qwen2")(**GROUPED),
    decoder("Qwen3")(**GROUPED),
    decoder("Qwen3Moe")(**GROUPED, **TWO_EXPERTS),
    decoder("Mixtral")(num_key_value_heads=2, **NO_EXPERT_NOISE),
    decoder("Gemma2", tied=True)(**GROUPED),
    Case(
        "gemma3", "Gemma3", lambda: model_of("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED), tied=True,
    ),
    decoder("Phi", bias=True)(),
    decoder("Phi3")(),
    decoder("Olmo2")(),
    decoder("Cohere", tied=True)(),
    decoder("Granite")(),
    decoder("StableLm")(num_key_value_heads=2),
    decoder("GptOss")(**GROUPED, **NO_EXPERT_NOISE),
    decoder("DeepseekV3")(
        kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=2,
        n_group=1, topk_group=1, num_experts_per_tok=1, first_k_dense_replace=1,
    ),
    decoder("GPTNeoX", head="lm_head.weight embed_out.weight", embedding="gpt_neox.embed_in.weight")(),
    decoder("OPT", "opt-narrow", embedding="model.decoder.embed_tokens.weight", tied=True)(
        ffn_dim=24, word_embed_proj_dim=8
    ),
    decoder("Bloom", embedding="transformer.word_embeddings.weight", tied=True)(n_layer=1, n_head=2),
    decoder("Falcon", embedding="transformer.word_embeddings.weight", tied=True)(),
    decoder("Mpt", embedding="transformer.wte.weight", tied=True)(d_model=WIDTH, n_heads=2, n_layers=1, max_seq_len=64),
    decoder("Mamba", embedding="backbone.embeddings.weight", tied=True)(state_size=4, tie_word_embeddings=True),
    decoder("Mamba2", embedding="backbone.embeddings.weight")(
        state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4
    ),
    decoder("Jamba")(
        num_key_value_heads=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, num_experts=2,
        num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=0, num_hidden_layers=2,
    ),
    decoder("GPTJ", embedding="transformer.wte.weight", bias=True)(**OF_GPT, rotary_dim=4, text=True),
    decoder("GPTNeo", embedding="transformer.wte.weight", tied=True)(
        num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
    Case(
        "gpt2", "GPT2", lambda: model_of("GPT2LMHeadModel", "GPT2Config", text=True, **OF_GPT),
        embedding="transformer.wte.weight", tied=True,
    ),
    Case(
        "bart-decoder", "Bart (decoder)",
        lambda: model_of("BartForCausalLM", "BartConfig", text=True, **OF_BART),
        embedding="model.decoder.embed_tokens.weight", tied=True, shift=False,
    ),
    Case(
        "xlnet", "XLNet",
        lambda: model_of(
            "XLNetLMHeadModel", "XLNetConfig", text=True,
            vocab_size=ROWS, d_model=WIDTH, n_layer=1, n_head=2, d_inner=24,
        ),
        head="lm_loss.weight", embedding="transformer.word_embedding.weight", tied=True, bias=True, shift=False,
        probed=False,
    ),
)  # fmt: skip

# -- encoder-decoders ------------------------------------------------------------------------------------------------

OF_T5: dict[str, Any] = {
    "vocab_size": ROWS, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
OF_BART: dict[str, Any] = {
    "vocab_size": ROWS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OF_SEQ2SEQ: dict[str, Any] = {"shift": False, "probed": False}


def seq2seq(family: str, settings: dict[str, Any], name: str = "", **expected: Any) -> Case:
    """A case of ``<family>ForConditionalGeneration``."""

    def build() -> Any:
        return model_of(f"{family}ForConditionalGeneration", f"{family}Config", text=True, **settings)

    return Case(name or family.lower(), family, build, **(OF_SEQ2SEQ | expected))


def t5() -> Any:
    """T5, whose output is scaled where it is tied."""
    return model_of("T5ForConditionalGeneration", "T5Config", text=True, **OF_T5)


def untied(model: Any) -> Any:
    """The model with a head of its own, as larger checkpoints of the family have it."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.1)
    return model


SEQ2SEQ = (
    seq2seq("T5", OF_T5, embedding="shared.weight", tied=True),
    Case("t5-untied", "T5 (untied)", lambda: untied(t5()), embedding="shared.weight", **OF_SEQ2SEQ),
    seq2seq("MT5", OF_T5, embedding="shared.weight", tied=True),
    seq2seq("Bart", OF_BART, embedding="model.shared.weight", tied=True),
    seq2seq("MBart", OF_BART, embedding="model.shared.weight", tied=True),
    seq2seq("Pegasus", OF_BART, embedding="model.shared.weight", tied=True),
)

# -- masked language models ------------------------------------------------------------------------------------------


def masked(family: str, head: str, embedding: str, *, bias: bool = True, tied: bool = True, **settings: Any) -> Case:
    """A case of ``<family>ForMaskedLM``."""

    def build() -> Any:
        return model_of(f"{family}ForMaskedLM", f"{family}Config", **settings)

    return Case(family.lower(), family, build, head, embedding, tied, bias, shift=False, probed=False)


MASKED = (
    masked("Bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    masked("Roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    masked("ModernBert", "decoder.weight", "model.embeddings.tok_embeddings.weight", cls_token_id=1, sep_token_id=2),
    masked(
        "DistilBert", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight",
        dim=WIDTH, n_heads=2, n_layers=1, hidden_dim=24,
    ),
    masked("Electra", "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight", embedding_size=8),
    masked("Albert", "predictions.decoder.weight", "albert.embeddings.word_embeddings.weight", embedding_size=8),
    masked("DebertaV2", "cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"),
)  # fmt: skip

# -- pictures and text -----------------------------------------------------------------------------------------------

OF_TEXT = SMALL | {"num_key_value_heads": 2}


def with_picture(batch: Batch) -> Batch:
    """Four places of every row become those of one picture of 8 x 8."""
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][:, 1:5], changed["labels"][:, 1:5] = IMAGE, -100
    count = len(changed["input_ids"])
    return changed | {"pixel_values": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def with_grid(batch: Batch) -> Batch:
    """The same for a model that takes pictures as patches and a grid: 4 x 4 patches, merged to 2 x 2 places."""
    changed = with_picture(batch)
    changed["input_ids"][:, 0] = VISION_START
    changed["labels"][:, 0] = -100
    count = len(changed["input_ids"])
    generator = torch.Generator().manual_seed(0)
    changed["pixel_values"] = torch.randn(16 * count, 3 * 2 * 2 * 2, generator=generator)
    grids = torch.tensor([[1, 4, 4]]).expand(count, 3)
    return changed | {"image_grid_thw": grids, "mm_token_type_ids": (changed["input_ids"] == IMAGE).long()}


def llava() -> Any:
    """LLaVA around a tiny Llama."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**OF_TEXT)
    options = {"image_token_index": IMAGE, "vision_feature_layer": -1, "image_seq_length": 4}
    return model_of(
        "LlavaForConditionalGeneration", "LlavaConfig", text=True, vision_config=vision, text_config=text, **options
    )


def qwen2_vl() -> Any:
    """Qwen2-VL, whose vocabulary is known to its text configuration only."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    return model_of(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text=True,
        vision_config=vision | {"temporal_patch_size": 2, "spatial_merge_size": 2},
        text_config=OF_TEXT | {"rope_parameters": rope, "rope_scaling": rope},
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        video_token_id=8103,
        vision_end_token_id=8104,
    )


def gemma3_pictures() -> Any:
    """Gemma 3 with pictures, its text part tied."""
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    return model_of(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text=True,
        vision_config=vision,
        text_config=SMALL | GROUPED,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )


def with_types(batch: Batch) -> Batch:
    """A picture, and which places it takes."""
    changed = with_picture(batch)
    return changed | {"token_type_ids": (changed["input_ids"] == IMAGE).long()}


IN_LANGUAGE_MODEL = "model.language_model.embed_tokens.weight"
PICTURES = (
    Case("llava", "LLaVA", llava, embedding=IN_LANGUAGE_MODEL, batch=with_picture),
    Case("qwen2-vl", "Qwen2-VL", qwen2_vl, embedding=IN_LANGUAGE_MODEL, batch=with_grid),
    Case(
        "gemma3-pictures", "Gemma3 (pictures)", gemma3_pictures,
        embedding=IN_LANGUAGE_MODEL, tied=True, batch=with_types,
    ),
)  # fmt: skip

# -- no head ---------------------------------------------------------------------------------------------------------


def with_classes(batch: Batch) -> Batch:
    """One class for every row."""
    return batch | {"labels": torch.arange(len(batch["labels"])) % 2}


def with_tags(batch: Batch) -> Batch:
    """One class for every token."""
    return batch | {"labels": batch["labels"].clamp(max=1)}


def without_labels(batch: Batch) -> Batch:
    """What a model without a loss takes."""
    return {name: value for name, value in batch.items() if name != "labels"}


OF_CLASSES: dict[str, Any] = {
    "head": None, "shift": None, "probed": False, "pulled": False, "moves": ("embedding",),
}  # fmt: skip
HEADLESS = (
    Case(
        "llama-classes", "classification",
        lambda: model_of("LlamaForSequenceClassification", "LlamaConfig", num_labels=2),
        batch=with_classes, **OF_CLASSES,
    ),
    Case(
        "bert-tags", "token classification",
        lambda: model_of("BertForTokenClassification", "BertConfig", num_labels=2),
        embedding="bert.embeddings.word_embeddings.weight", batch=with_tags, **OF_CLASSES,
    ),
    Case(
        "t5-classes", "classification (T5)",
        lambda: model_of("T5ForSequenceClassification", "T5Config", text=True, num_labels=2, **OF_T5),
        embedding="transformer.shared.weight",
        batch=lambda batch: with_classes(batch | {"input_ids": ended(batch["input_ids"])}), **OF_CLASSES,
    ),
    Case(
        "llama-backbone", "bare backbone", lambda: model_of("LlamaModel", "LlamaConfig"),
        embedding="embed_tokens.weight", batch=without_labels, **OF_CLASSES,
    ),
)  # fmt: skip


def ended(ids: Tensor) -> Tensor:
    """Every row with the end token that an encoder-decoder reads the class at."""
    ids = ids.clone()
    ids[:, -1] = 1
    return ids


MODELS = (*DECODERS, *SEQ2SEQ, *MASKED, *PICTURES, *HEADLESS)


def frozen(model: nn.Module) -> nn.Module:
    """The model without dropout, so that two passes agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
