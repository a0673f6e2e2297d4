"""Rows with adapters on them, against copies in which PEFT has merged the adapters itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.adapters import adapter_of, plain_module, plain_name
from vocabguard.rows.baselines import copy_baseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices

peft = pytest.importorskip("peft")
# PEFT asks newer models by a name that they are about to drop.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (".*is_gradient_checkpointing", ".*[Tt]ied", "Already following adapters were merged")
]

ROWS, WIDTH = 53, 8
ENDS: dict[MatrixName, str] = {"head": "lm_head", "embedding": "embed_tokens"}


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(model: Any, seed: int = 1, **options: Any) -> Any:
    """The model with LoRA on both ends, all adapter weights moved at random, lengths of DoRA too."""
    defaults: dict[str, Any] = {"target_modules": ["q_proj", *ENDS.values()], "r": 3, "lora_alpha": 5}
    return moved(peft.get_peft_model(model, peft.LoraConfig(**(defaults | options))), seed)


def moved(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def matrix_of(model: nn.Module, name: MatrixName) -> VocabMatrix:
    found = find_matrices(model)[name]
    assert isinstance(found, VocabMatrix), found
    return found


def rows_of(matrix: VocabMatrix, size: int = 7) -> Tensor:
    parts, rows = zip(*matrix.chunks(size), strict=True)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(matrix.rows))
    assert all(len(chunk) <= size for chunk in rows)
    return torch.cat(rows)


def merged(model: Any, name: MatrixName, adapters: list[str] | None = None) -> Tensor:
    """The rows of a copy in which PEFT has merged everything."""
    plain = copy.deepcopy(model).merge_and_unload(adapter_names=adapters)
    getter = plain.get_output_embeddings if name == "head" else plain.get_input_embeddings
    return getter().weight.detach()


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alpha pattern": {"alpha_pattern": {"lm_head": 11}, "rank_pattern": {"embed_tokens": 2}},
    "pissa": {"init_lora_weights": "pissa"},
    "from zero": {"init_lora_weights": True, "lora_dropout": 0.5},
}


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_peft_merges(kind: str, name: MatrixName) -> None:
    model = adapted(llama(), **KINDS[kind])
    matrix = matrix_of(model, name)
    assert matrix.adapter is not None
    assert matrix.adapter.kind == ("DoRA" if kind == "dora" else "LoRA")
    assert (matrix.rows, matrix.width, matrix.trainable, matrix.tied) == (ROWS, WIDTH, True, False)
    rows = rows_of(matrix)
    torch.testing.assert_close(rows, merged(model, name), atol=3e-7, rtol=1e-6)
    assert (rows - matrix.weight).abs().max() > 0.1, "the adapter does change the rows"
    assert not rows.requires_grad
    for size in (1, 1000):
        torch.testing.assert_close(rows_of(matrix, size), rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rows_are_what_the_forward_pass_uses(kind: str, name: MatrixName) -> None:
    model = adapted(llama(), **KINDS[kind]).eval()
    layer = model.get_output_embeddings() if name == "head" else model.get_input_embeddings()
    rows = rows_of(matrix_of(model, name))
    hidden = torch.randn(4, WIDTH)
    expected = layer(hidden) if name == "head" else layer(torch.arange(ROWS))
    torch.testing.assert_close(hidden @ rows.T if name == "head" else rows, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["head", "embedding"])
def test_several_adapters(name: MatrixName) -> None:
    model = adapted(llama())
    model.add_adapter("second", peft.LoraConfig(target_modules=[*ENDS.values()], r=2, lora_alpha=7))
    model.set_adapter("second")
    moved(model, seed=2)
    matrix = matrix_of(model, name)
    torch.testing.assert_close(rows_of(matrix), merged(model, name, ["second"]), atol=3e-7, rtol=1e-6)
    model.base_model.set_adapter(["default", "second"])
    both = rows_of(matrix)
    torch.testing.assert_close(both, merged(model, name, ["default", "second"]), atol=6e-7, rtol=1e-6)
    model.base_model.merge_adapter(["default"])
    # Once something is merged, the forward pass adds nothing more.
    torch.testing.assert_close(rows_of(matrix), matrix.weight.detach())
    model.base_model.merge_adapter(["second"])
    torch.testing.assert_close(rows_of(matrix), both, atol=1e-6, rtol=0)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(rows_of(matrix), both, atol=1e-6, rtol=0)


def test_two_kinds_at_once_as_the_forward_pass_adds_them() -> None:
    model = adapted(llama(), use_dora=True)
    model.add_adapter("second", peft.LoraConfig(target_modules=[*ENDS.values()], r=2, lora_alpha=7))
    model.add_adapter("third", peft.LoraConfig(target_modules=[*ENDS.values()], r=2, use_dora=True))
    for name in ("second", "third"):
        model.set_adapter(name)
        moved(model, seed=3)
    model.base_model.set_adapter(["default", "second", "third"])
    model.eval()
    hidden = torch.randn(4, WIDTH)
    expected = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(hidden @ rows_of(matrix_of(model, "head")).T, expected, atol=1e-5, rtol=1e-5)
    expected = model.get_input_embeddings()(torch.arange(ROWS))
    torch.testing.assert_close(rows_of(matrix_of(model, "embedding")), expected, atol=1e-5, rtol=1e-5)


def test_disabled_and_inactive_adapters_add_nothing() -> None:
    model = adapted(llama())
    matrix = matrix_of(model, "head")
    base = matrix.weight.detach().clone()
    with model.disable_adapter():
        assert torch.equal(rows_of(matrix), base)
    assert not torch.equal(rows_of(matrix), base)
    model.add_adapter("attention", peft.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("attention")
    assert torch.equal(rows_of(matrix), base)
    assert isinstance(find_matrices(model)["head"], NotApplicable)


def test_an_adapter_that_has_changed_nothing_costs_nothing() -> None:
    model = llama().to(torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(ENDS.values())))
    for name in ENDS:
        matrix = matrix_of(model, name)
        _, rows = next(matrix.chunks(9))
        assert rows.dtype is torch.bfloat16
        assert rows.data_ptr() == matrix.weight.data_ptr(), "a view, no copy"
        assert torch.equal(copy_baseline(matrix).tensor, matrix.weight)
    moved(model)
    assert {rows.dtype for _, rows in matrix_of(model, "head").chunks(9)} == {torch.float32}


@pytest.mark.parametrize("name", ["head", "embedding"])
def test_a_baseline_is_of_the_rows_with_the_adapter(name: MatrixName) -> None:
    model = adapted(llama())
    matrix = matrix_of(model, name)
    expected, baseline = merged(model, name), copy_baseline(matrix)
    moved(model)
    torch.testing.assert_close(baseline.tensor, expected, atol=3e-7, rtol=1e-6)


def test_saved_modules_are_their_own_rows() -> None:
    model = adapted(llama(), target_modules=["q_proj"], modules_to_save=list(ENDS.values()))
    for name in ENDS:
        matrix = matrix_of(model, name)
        assert matrix.adapter is None
        assert matrix.weight.requires_grad
        assert torch.equal(rows_of(matrix), merged(model, name))
    head = matrix_of(model, "head")
    assert head.module is model.get_output_embeddings().modules_to_save["default"]
    assert head.parameter_names() == ("lm_head.weight",)
    with model.disable_adapter():
        assert torch.equal(rows_of(head), model.get_output_embeddings().original_module.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens(tied: bool) -> None:
    ids = [3, 17, 18, 52]
    asked = ids if tied else {"embed_tokens": ids, "lm_head": [5, 3]}
    model = adapted(llama(tied=tied), target_modules=["q_proj"], trainable_token_indices=asked)
    for name in ENDS:
        matrix = matrix_of(model, name)
        assert matrix.adapter is not None
        assert matrix.adapter.kind == "trainable tokens"
        assert (matrix.trainable, matrix.tied) == (True, tied)
        rows = rows_of(matrix)
        assert torch.equal(rows, merged(model, name))
        changed = (rows != matrix.weight).any(dim=1).nonzero().flatten().tolist()
        assert changed == (ids if tied or name == "embedding" else [3, 5])
        assert matrix.weight.is_leaf, "no copy of the matrix is made to look at it"
    with model.disable_adapter():
        matrix = matrix_of(llama(), "head")
        assert torch.equal(rows_of(matrix), matrix.weight)


def test_trainable_tokens_as_a_method_of_its_own() -> None:
    config = peft.TrainableTokensConfig(token_indices=[1, 30], target_modules=["embed_tokens"])
    model = moved(peft.get_peft_model(llama(), config))
    matrix = matrix_of(model, "embedding")
    rows = rows_of(matrix)
    assert torch.equal(rows, merged(model, "embedding"))
    assert (rows != matrix.weight).any(dim=1).nonzero().flatten().tolist() == [1, 30]


@pytest.mark.parametrize(
    ("options", "head", "embedding"),
    [
        ({"target_modules": ["lm_head"]}, True, False),
        ({"target_modules": ["embed_tokens"]}, False, True),
        ({"target_modules": ["lm_head", "embed_tokens"]}, True, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True, False),
    ],
)
def test_a_tied_base_comes_apart(options: dict[str, Any], head: bool, embedding: bool) -> None:
    found = find_matrices(adapted(llama(tied=True), **options))
    for name, expected in {"head": head, "embedding": embedding}.items():
        matrix = found[name]  # type: ignore[index]
        assert isinstance(matrix, VocabMatrix) is expected
        if isinstance(matrix, VocabMatrix):
            assert not matrix.tied
            assert matrix.untied
    assert not matrix_of(llama(tied=True), "head").untied


@pytest.mark.skipif(not hasattr(peft.LoraConfig(), "ensure_weight_tying"), reason="an older PEFT unties")
def test_a_tied_base_that_stays_tied() -> None:
    model = adapted(llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    head, embedding = matrix_of(model, "head"), matrix_of(model, "embedding")
    assert head.tied
    assert embedding.tied
    assert not head.untied
    torch.testing.assert_close(rows_of(head), rows_of(embedding))
    layer = model.get_output_embeddings()
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(rows_of(head), expected.detach(), atol=3e-7, rtol=1e-6)


def test_adapters_on_attention_leave_both_ends_frozen() -> None:
    found = find_matrices(adapted(llama(), target_modules=["q_proj"]))
    for matrix in found.values():
        assert isinstance(matrix, NotApplicable)
        assert "frozen (requires_grad is False), so its rows cannot move" in matrix.reason
    assert "the probe still tells what the model can say" in found["head"].reason


@pytest.mark.parametrize("kind", ["LoHaConfig", "OFTConfig"])
def test_other_adapters_are_named(kind: str) -> None:
    options = {"oft_block_size": 4, "r": 0} if kind == "OFTConfig" else {"r": 2}
    model = peft.get_peft_model(llama(), getattr(peft, kind)(target_modules=["lm_head"], **options))
    found = find_matrices(model)["head"]
    assert isinstance(found, NotApplicable)
    assert found.reason == (
        f"the head cannot be followed: it is adapted by {kind.removesuffix('Config').lower()} (Linear), whose rows are "
        "not read"
    )


def test_other_kinds_of_lora_are_named() -> None:
    model = adapted(llama())
    model.get_output_embeddings().lora_variant["default"] = nn.Identity()
    found = find_matrices(model)["head"]
    assert isinstance(found, NotApplicable)
    assert "a kind of LoRA (Identity), whose rows are not read" in found.reason


def test_adapters_that_do_not_fit_a_resized_base() -> None:
    model = adapted(llama())
    model.get_output_embeddings().base_layer.weight = nn.Parameter(torch.zeros(ROWS + 1, WIDTH))
    found = adapter_of(model.get_output_embeddings())
    assert isinstance(found, NotApplicable)
    assert found.reason == f"its adapter 'default' makes {ROWS} x 8 rows for a base of {ROWS + 1} x 8"


def test_an_adapter_spread_over_processes() -> None:
    model = adapted(llama())
    # Stands for a DTensor, which alone has this method.
    model.get_output_embeddings().base_layer.weight.to_local = lambda: None
    found = adapter_of(model.get_output_embeddings())
    assert isinstance(found, NotApplicable)
    assert found.reason == "its adapter is spread over processes, and such rows are not read"


def test_a_head_that_becomes_unreadable_is_an_error() -> None:
    model = adapted(llama())
    matrix = matrix_of(model, "head")
    model.get_output_embeddings().lora_variant["default"] = nn.Identity()
    with pytest.raises(RuntimeError, match="the head can no longer be followed: it is adapted by a kind of LoRA"):
        rows_of(matrix)


def test_a_quantised_base() -> None:
    """Stands for bitsandbytes: packed integers that only a kernel can read."""

    class Linear4bit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(ROWS * WIDTH // 2, 1, dtype=torch.uint8), requires_grad=False)

    model = llama()
    model.lm_head = Linear4bit()
    found = find_matrices(model)["head"]
    assert isinstance(found, NotApplicable)
    assert found.reason == (
        "the head is a Linear4bit without a 2-D floating-point weight: it is quantised (torch.uint8), so its rows "
        "cannot be read"
    )


def test_plain_modules_and_names() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16))
    assert adapter_of(model.lm_head) is None
    assert plain_module(model.lm_head) is model.lm_head
    model = adapted(llama())
    assert plain_module(model.get_output_embeddings()) is model.get_output_embeddings().base_layer
    assert matrix_of(model, "head").parameter_names() == ("lm_head.weight",)
    assert matrix_of(model, "embedding").parameter_names() == ("model.embed_tokens.weight",)
    assert plain_name("base_model.model.model.embed_tokens.token_adapter.base_layer.weight") == (
        "model.embed_tokens.weight"
    )
    assert plain_name("transformer.wte.weight") == "transformer.wte.weight"
