from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.matrices import VocabMatrix, find_matrices

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS, WIDTH = 50, 8


def llama(*, tied: bool = False, kind: type[PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    return kind(
        LlamaConfig(
            vocab_size=ROWS,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16))


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(vocab_size=ROWS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=ROWS, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


class Plain(nn.Module):
    def __init__(self, head_rows: int = ROWS) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.speak = nn.Linear(WIDTH, head_rows)


class WithMethods(Plain):
    """Says where its rows are, as transformers models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def matrix_of(model: nn.Module, name: MatrixName = "head", **paths: str) -> VocabMatrix:
    found = find_matrices(model, **paths)[name]
    assert isinstance(found, VocabMatrix), found
    return found


def reason_of(model: nn.Module, name: MatrixName = "head", **paths: str) -> str:
    found = find_matrices(model, **paths)[name]
    assert isinstance(found, NotApplicable)
    return found.reason


@pytest.mark.parametrize(
    ("model", "head", "embedding", "tied", "bias"),
    [
        (llama(), "lm_head.weight", "model.embed_tokens.weight", False, False),
        (llama(tied=True), "lm_head.weight", "model.embed_tokens.weight", True, False),
        (gpt2(), "lm_head.weight", "transformer.wte.weight", True, False),
        (bert(), "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight", True, True),
        (t5(), "lm_head.weight", "shared.weight", True, False),
    ],
    ids=["llama", "llama-tied", "gpt2", "bert", "t5"],
)
def test_known_models(model: PreTrainedModel, head: str, embedding: str, tied: bool, bias: bool) -> None:
    matrices = {name: matrix_of(model, name) for name in ("head", "embedding")}
    for name, parameter in {"head": head, "embedding": embedding}.items():
        matrix = matrices[name]
        assert matrix.weight is model.get_parameter(parameter)
        assert parameter in matrix.parameter_names()
        assert (matrix.rows, matrix.width, matrix.dtype) == (ROWS, WIDTH, torch.float32)
        assert matrix.tied is tied
        assert matrix.trainable
    assert matrices["head"].has_bias is bias
    assert not matrices["embedding"].has_bias
    assert (matrices["head"].weight is matrices["embedding"].weight) is tied


def test_embedded_base_model() -> None:
    matrix = matrix_of(AutoModelForCausalLM.from_pretrained(ASSETS))
    assert (matrix.rows, matrix.width, matrix.tied) == (8192, 128, False)


@pytest.mark.parametrize("size", [1, 7, 25, ROWS, 1000])
def test_chunks_cover_the_rows_in_order(size: int) -> None:
    matrix = matrix_of(llama())
    parts, rows = zip(*matrix.chunks(size), strict=True)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(ROWS))
    assert all(len(chunk) == part.stop - part.start <= size for part, chunk in zip(parts, rows, strict=True))
    assert torch.equal(torch.cat(rows), matrix.weight)
    assert not any(chunk.requires_grad for chunk in rows)
    assert rows[0].data_ptr() == matrix.weight.data_ptr(), "a chunk is a view, no copy"


def test_rows_at_rest_are_looked_up_once_and_are_the_rows() -> None:
    model = llama()
    matrix = matrix_of(model)
    rest = matrix.at_rest()
    assert (rest.rows, rest.width) == (matrix.rows, matrix.width) == (ROWS, WIDTH)
    for size in (7, ROWS, 1000):
        pairs = zip(rest.chunks(size), matrix.chunks(size), strict=True)
        assert all(one == other and torch.equal(left, right) for (one, left), (other, right) in pairs)
    model.set_output_embeddings(nn.Linear(WIDTH, ROWS, bias=False))
    assert torch.equal(matrix.at_rest().chunks(ROWS).__next__()[1], model.get_output_embeddings().weight)


@pytest.mark.parametrize("size", [0, -3])
def test_chunk_size_is_checked(size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk size is {size}; allowed: at least 1"):
        next(matrix_of(llama()).chunks(size))


@pytest.mark.parametrize("tied", [True, False])
def test_follows_a_resized_vocabulary(tied: bool) -> None:
    model = llama(tied=tied)
    head, embedding = matrix_of(model), matrix_of(model, "embedding")
    model.resize_token_embeddings(ROWS + 14)
    assert head.rows == embedding.rows == ROWS + 14
    assert head.weight is model.get_output_embeddings().weight
    assert sum(len(rows) for _, rows in head.chunks(10)) == ROWS + 14
    assert head.tied is tied


def test_follows_a_replaced_parameter_and_module() -> None:
    model = llama()
    head = matrix_of(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16))
    assert head.dtype is torch.bfloat16
    model.lm_head = nn.Linear(WIDTH, ROWS)
    assert head.weight is model.lm_head.weight
    assert head.has_bias


def test_tied_by_memory() -> None:
    model = Plain()
    model.speak.weight = nn.Parameter(model.words.weight.data)
    assert model.speak.weight is not model.words.weight
    assert matrix_of(model, head="speak", embedding="words").tied


def test_more_rows_than_the_tokenizer() -> None:
    model = llama()
    model.resize_token_embeddings(ROWS + 1, pad_to_multiple_of=64)
    assert matrix_of(model).rows == 64


def test_no_head() -> None:
    model = llama(kind=LlamaForSequenceClassification)
    assert reason_of(model) == "LlamaForSequenceClassification has no head: get_output_embeddings() gives None"
    assert matrix_of(model, "embedding").rows == ROWS
    assert not matrix_of(model, "embedding").tied


@pytest.mark.parametrize(("name", "said"), [("head", "the probe still tells"), ("embedding", "nothing to measure")])
def test_frozen(name: MatrixName, said: str) -> None:
    model = llama()
    matrix_of(model, name).weight.requires_grad_(False)
    assert "requires_grad is False" in reason_of(model, name)
    assert said in reason_of(model, name)
    other: MatrixName = "embedding" if name == "head" else "head"
    assert matrix_of(model, other).trainable


def test_a_head_with_too_few_rows_is_no_head() -> None:
    assert reason_of(WithMethods(3)) == "the head has 3 rows for 50 tokens, so it is not a row per token"
    # A user who names it knows.
    assert matrix_of(WithMethods(3), head="speak").rows == 3


def test_a_few_more_input_rows_than_output_rows() -> None:
    model = WithMethods(ROWS - 2)
    model.config = LlamaConfig(vocab_size=ROWS - 2)
    assert matrix_of(model).rows == ROWS - 2
    assert matrix_of(model, "embedding").rows == ROWS


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.DataParallel(nn.DataParallel(model))])
def test_wrapped(wrap: type[nn.Module]) -> None:
    model = llama()
    matrix = matrix_of(wrap(model))
    assert matrix.weight is model.lm_head.weight
    assert matrix.parameter_names() == ("lm_head.weight",)


def test_compiled() -> None:
    model = llama()
    assert matrix_of(torch.compile(model, backend="eager")).weight is model.lm_head.weight


def test_plain_model_by_names() -> None:
    model = Plain()
    matrices = find_matrices(model, head="speak", embedding="words")
    assert [type(matrix) for matrix in matrices.values()] == [VocabMatrix, VocabMatrix]
    assert matrix_of(model, head="speak", embedding="words").weight is model.speak.weight
    assert matrix_of(model, "embedding", head="speak", embedding="words").weight is model.words.weight
    assert matrix_of(model, head="speak").has_bias


def test_plain_model_without_names() -> None:
    said = "Plain has no get_output_embeddings(); name the module in matrices.head; it may be matrices.head=speak "
    assert reason_of(Plain()).startswith(said)
    assert "matrices.embedding" in reason_of(Plain(), "embedding")


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize(
    ("path", "found"),
    [("nowhere", "no such module"), ("body.1", "a LayerNorm"), ("body", "a Sequential"), ("", "a Plain")],
)
def test_bad_names(name: str, path: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"matrices\.{name} is '{path}': {found}.*here words, body\.0, speak$"):
        find_matrices(Plain(), **{name: path})


def test_odd_modules() -> None:
    class Odd(Plain):
        def get_output_embeddings(self) -> Tensor:
            return self.speak.weight

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("no words")

    assert reason_of(Odd()) == "the head is a Parameter without a 2-D floating-point weight"
    assert "NotImplementedError: no words" in reason_of(Odd(), "embedding")


def test_a_module_that_went_away() -> None:
    model = WithMethods()
    matrix = matrix_of(model)
    model.speak = None
    with pytest.raises(RuntimeError, match="head is no longer in the model"):
        _ = matrix.rows


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_peft() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), lora)
    matrix = matrix_of(model)
    assert (matrix.rows, matrix.width, matrix.tied) == (ROWS, WIDTH, False)
    assert "frozen" in reason_of(model, "embedding")
    assert "frozen" in reason_of(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))
