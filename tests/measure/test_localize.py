"""Tokens come back with the base's rows exactly when they do in a model whose rows are really put back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhiConfig,
    PhiForCausalLM,
)

from vocabguard.measure.localize import End, HeadOrBody, head_or_body, input_rows_back, output_rows_back
from vocabguard.measure.probe import PromptContext, probe
from vocabguard.measure.retention import gone, said
from vocabguard.protect.prompts import render_context
from vocabguard.results import NotApplicable, ProbeResult
from vocabguard.rows.baselines import CopiedBaseline, copy_baseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ASK = {"seed": 0, "batch_tokens": 4096}


@pytest.fixture(scope="module")
def base() -> Any:
    """The example's base model, its head untied: it can repeat its tokens."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS).float().eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.fixture(scope="module")
def contexts() -> list[PromptContext]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    texts = {"list": ("Repeat exactly: {tokens}", 8), "one": ('Say "{tokens}" once more.', 1)}
    return [render_context(tokenizer, name, text, k) for name, (text, k) in texts.items()]


def ends(model: Any) -> tuple[End, End]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return (
        End(head, CopiedBaseline(head.weight.detach().clone())),
        End(embedding, CopiedBaseline(embedding.weight.detach().clone())),
    )


def asked(model: Any, contexts: list[PromptContext]) -> ProbeResult:
    return probe(model, torch.arange(700, 4700, 25), contexts, **ASK)


def moved(base: Any, contexts: list[PromptContext], **parts: float) -> tuple[Any, HeadOrBody, ProbeResult]:
    """A copy with noise in some parts, what `head_or_body` says of it, and its probe."""
    before = asked(base, contexts)
    base_head, base_embedding = ends(base)
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = next((size for part, size in parts.items() if part in name), 0.0)
            weight.add_(size * weight.std() * torch.randn(weight.shape, generator=generator))
    now = asked(model, contexts)
    copied = copy.deepcopy(model.state_dict())
    head, embedding = End(model.lm_head, base_head.baseline), End(model.get_input_embeddings(), base_embedding.baseline)
    found = head_or_body(model, before, now, contexts, head, embedding, **ASK)
    assert isinstance(found, HeadOrBody)
    assert all(torch.equal(value, copied[name]) for name, value in model.state_dict().items())
    assert not model.lm_head._forward_hooks
    assert not model.get_input_embeddings()._forward_hooks
    return model, found, now


@pytest.mark.parametrize(
    "parts", [{"lm_head": 1.5}, {"embed_tokens": 0.8}, {"layers": 0.6}, {"lm_head": 0.8, "layers": 0.4}]
)
def test_equal_to_rows_really_put_back(base: Any, contexts: list[PromptContext], parts: dict[str, float]) -> None:
    model, found, now = moved(base, contexts, **parts)
    assert len(found.ids) >= 10
    assert torch.isin(found.ids, now.ids[gone(now)]).all(), "few enough for all to be asked again in the same lists"
    assert torch.equal(found.ids, now.ids[said(asked(base, contexts)) & gone(now)])
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.lm_head.weight[found.ids] = base.lm_head.weight[found.ids]
        with_head = asked(again, contexts)
        again.get_input_embeddings().weight[found.ids] = base.get_input_embeddings().weight[found.ids]
        with_rows = asked(again, contexts)
    place = torch.searchsorted(now.ids, found.ids)
    assert torch.equal(found.with_head, said(with_head)[place])
    assert torch.equal(found.with_rows, said(with_rows)[place])


@pytest.mark.parametrize("where", ["head", "input", "other_rows", "other input rows", "body"])
def test_head_input_and_body_are_told_apart(base: Any, contexts: list[PromptContext], where: str) -> None:
    before, (head, embedding) = asked(base, contexts), ends(base)
    model = copy.deepcopy(base)
    lost = before.ids[::3]
    torch.manual_seed(0)
    with torch.no_grad():
        if where == "head":
            model.lm_head.weight[lost] *= 0.1
        elif where == "input":
            model.get_input_embeddings().weight[lost] = model.get_input_embeddings().weight[lost.roll(1)]
        elif where == "other_rows":
            # Control tokens that nobody asks for: what is lost has rows that stand still.
            model.lm_head.weight[:60] *= 14
        elif where == "other input rows":
            model.get_input_embeddings().weight[[i for one in contexts for i in (*one.before, *one.after)]] *= -1
        else:
            for weight in model.model.layers.parameters():
                weight.add_(0.6 * weight.std(correction=0) * torch.randn_like(weight))
    ends_now = End(model.lm_head, head.baseline), End(model.get_input_embeddings(), embedding.baseline)
    found = head_or_body(model, before, asked(model, contexts), contexts, *ends_now, **ASK)
    assert isinstance(found, HeadOrBody)
    counts = found.counts
    assert counts["forgotten"] >= 20
    assert counts["forgotten"] == counts["head"] + counts["input"] + counts["other_rows"] + counts["body"]
    assert counts["other_rows" if where == "other input rows" else where] > 0.9 * counts["forgotten"]


BOTH = ["lm_head", "embed_tokens"]
# PEFT's options, and how far the head's and the embedding's parameters move: so that some of all outcomes come.
ADAPTERS: dict[str, tuple[dict[str, Any], float, float]] = {
    "lora": ({"target_modules": BOTH}, 0.08, 0.02),
    "dora": ({"target_modules": BOTH, "use_dora": True}, 0.06, 0.02),
    "head only": ({"target_modules": ["lm_head"]}, 0.2, 0.0),
    "saved": ({"modules_to_save": BOTH}, 0.06, 0.02),
    "tokens": ({"trainable_token_indices": {name: list(range(700, 4700, 50)) for name in BOTH}}, 0.2, 0.1),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*[Tt]ied")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_rows_are_put_back_as_in_a_merged_model(base: Any, contexts: list[PromptContext], kind: str) -> None:
    peft = pytest.importorskip("peft")
    options, *sizes = ADAPTERS[kind]
    before = asked(base, contexts)
    config = peft.LoraConfig(**({"r": 8, "target_modules": ["q_proj"]} | options))
    torch.manual_seed(6)  # of what PEFT draws: here some of all come
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    matrices = {name: found for name, found in find_matrices(model).items() if isinstance(found, VocabMatrix)}
    bases = {name: copy_baseline(matrix) for name, matrix in matrices.items()}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = sum(size for end, size in zip(BOTH, sizes, strict=True) if end in name)
            if weight.requires_grad and size:
                weight.add_(size * torch.randn(weight.shape, generator=generator))
    now = asked(model, contexts)
    ends_now = {name: End(matrix.wrapped, bases[name], matrix) for name, matrix in matrices.items()}
    found = head_or_body(model, before, now, contexts, ends_now["head"], ends_now.get("embedding"), **ASK)
    assert isinstance(found, HeadOrBody)
    assert len(found.ids) >= 10
    plain = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        plain.lm_head.weight[found.ids] = base.lm_head.weight[found.ids]
        with_head = asked(plain, contexts)
        plain.get_input_embeddings().weight[found.ids] = base.get_input_embeddings().weight[found.ids]
        with_rows = asked(plain, contexts)
    place = torch.searchsorted(now.ids, found.ids)
    assert torch.equal(found.with_head, said(with_head)[place])
    assert torch.equal(found.with_rows, said(with_rows)[place])
    assert found.counts["head"]
    # Only rows were moved: what its own rows do not bring back, those of others drown.
    assert found.counts["other_rows"]
    assert found.counts["body"] <= 0.1 * found.counts["forgotten"]
    assert found.counts["input"] or "embedding" not in ends_now


def test_more_forgotten_tokens_than_are_asked_for(base: Any, contexts: list[PromptContext]) -> None:
    before, (head, embedding) = asked(base, contexts), ends(base)
    model = copy.deepcopy(base)
    lost = before.ids[::2]
    with torch.no_grad():
        model.lm_head.weight[lost] = 0.0
    now = asked(model, contexts)
    ends_now = End(model.lm_head, head.baseline), End(model.get_input_embeddings(), embedding.baseline)
    found = head_or_body(model, before, now, contexts, *ends_now, most=20, **ASK)
    assert isinstance(found, HeadOrBody)
    assert 15 <= len(found.ids) <= 20
    assert torch.isin(found.ids, lost).all()
    assert found.with_head.float().mean() > 0.9
    alone = head_or_body(model, before, now, contexts, ends_now[0], None, most=20, **ASK)
    assert isinstance(alone, HeadOrBody)
    assert torch.equal(alone.with_rows, alone.with_head)
    kept = head_or_body(base, before, before, contexts, head, embedding, **ASK)
    assert isinstance(kept, HeadOrBody)
    assert kept.counts == {"forgotten": 0, "head": 0, "input": 0, "other_rows": 0, "body": 0}


def test_a_model_that_does_not_call_its_head(base: Any, contexts: list[PromptContext]) -> None:
    before, (head, embedding) = asked(base, contexts), ends(base)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight[before.ids] = 0.0
    elsewhere = End(nn.Linear(1, 1), head.baseline)
    found = head_or_body(model, before, asked(model, contexts), contexts, elsewhere, embedding, **ASK)
    assert found == NotApplicable("LlamaForCausalLM computes its logits without calling its head")


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def gemma(dtype: torch.dtype) -> Any:
    """Tied, with scaled input rows and capped logits."""
    config = Gemma3TextConfig(
        **SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0
    )
    return Gemma3ForCausalLM(config).to(dtype)


def phi(dtype: torch.dtype) -> Any:
    """A head with a bias."""
    model = PhiForCausalLM(PhiConfig(**SMALL, num_attention_heads=2, pad_token_id=0)).to(dtype)
    nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gemma, phi])
@torch.no_grad()
def test_scaled_biased_capped_and_tied_models(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make(dtype).eval()
    ids, inputs = torch.tensor([3, 9, 40]), torch.tensor([[1, 3, 9, 9, 40, 63]])
    other_head, other_in = (torch.randn(64, 16).to(dtype) for _ in range(2))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with output_rows_back(End(head, CopiedBaseline(other_head)), ids) as called:
        assert not called
        got_head = model(input_ids=inputs).logits
        assert called
        with input_rows_back(End(embedding, CopiedBaseline(other_in)), ids):
            got_both = model(input_ids=inputs).logits
    changed = copy.deepcopy(model)
    changed.lm_head.weight = nn.Parameter(changed.lm_head.weight.detach().clone())  # untied, to change one end only
    changed.lm_head.weight[ids] = other_head[ids]
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(got_head, changed(input_ids=inputs).logits, **close)
    changed.get_input_embeddings().weight[ids] = other_in[ids]
    torch.testing.assert_close(got_both, changed(input_ids=inputs).logits, **close)
    assert not torch.allclose(got_head, model(input_ids=inputs).logits, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gemma, phi])
@torch.no_grad()
def test_all_rows_back_is_the_base_where_only_rows_changed(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make(dtype).eval()
    ids, inputs = torch.tensor([3, 9, 40]), torch.tensor([[1, 3, 9, 9, 40, 63]])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    bases = [end.weight.detach().clone() for end in (head, embedding)]
    whole = model(input_ids=inputs).logits
    head.weight[ids] *= 3
    # A row that is zero shows no scale of its own, which a model such as Gemma has.
    embedding.weight[9] = 0
    broken = model(input_ids=inputs).logits
    bases[0][50] = bases[1][50] = torch.nan
    ends = [End(one, CopiedBaseline(rows)) for one, rows in zip((head, embedding), bases, strict=True)]
    with output_rows_back(ends[0], None), input_rows_back(ends[1], None):
        found = model(input_ids=inputs).logits
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(found, whole, **close)
    assert not torch.allclose(broken, whole, **close)
