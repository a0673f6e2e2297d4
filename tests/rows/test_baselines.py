from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vocabguard.results import MatrixName
from vocabguard.rows.baselines import (
    CopiedBaseline,
    FileBaseline,
    copy_baseline,
    matches,
    reopen_baseline,
    save_baseline,
)
from vocabguard.rows.checkpoints import open_baseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS, WIDTH = 50, 8


def llama(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def matrix_of(model: nn.Module, name: MatrixName = "head", **paths: str) -> VocabMatrix:
    found = find_matrices(model, **paths)[name]
    assert isinstance(found, VocabMatrix)
    return found


def all_rows(baseline: CopiedBaseline | FileBaseline) -> Tensor:
    return torch.cat([rows for _, rows in baseline.chunks(7)])


def write(path: Path, **tensors: Tensor) -> Path:
    save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, str(path))
    return path


def rows_like(seed: int, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_keeps_the_rows_of_the_start(dtype: torch.dtype) -> None:
    matrix = matrix_of(llama().to(dtype))
    before = matrix.weight.detach().clone()
    baseline = copy_baseline(matrix)
    assert matches(baseline, matrix, 7)
    with torch.no_grad():
        matrix.weight[13, 2] += 1
    assert not matches(baseline, matrix, 7)
    assert (baseline.rows, baseline.width) == (ROWS, WIDTH)
    assert baseline.chunk(slice(3, 9)).dtype is dtype
    assert torch.equal(all_rows(baseline), before)
    assert baseline.reference() == {}
    assert "copy in memory" in baseline.describe()


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize("shard_size", ["50GB", "3KB"])
def test_saved_model_is_its_own_baseline(tmp_path: Path, name: MatrixName, shard_size: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() is (shard_size == "3KB")
    matrix = matrix_of(model, name)
    baseline = open_baseline(tmp_path, matrix)
    assert baseline.key in matrix.parameter_names()
    assert torch.equal(all_rows(baseline), matrix.weight)
    assert matches(baseline, matrix, 7)
    assert baseline.key in baseline.describe()
    assert str(tmp_path) in baseline.describe()


def test_embedded_base_model_by_folder_and_file() -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    head, embedding = matrix_of(model), matrix_of(model, "embedding")
    assert matches(open_baseline(ASSETS, head), head)
    assert matches(open_baseline(str(ASSETS / "model.safetensors"), embedding), embedding)
    with torch.no_grad():
        head.weight[8191, 127] += 1
    assert not matches(open_baseline(ASSETS, head), head)
    assert matches(open_baseline(ASSETS, embedding), embedding)


@pytest.mark.parametrize("name", ["head", "embedding"])
def test_tied_checkpoint_holds_one_matrix(tmp_path: Path, name: MatrixName) -> None:
    tied = llama(tied=True)
    tied.save_pretrained(tmp_path)
    matrix = matrix_of(tied, name)
    assert matches(open_baseline(tmp_path, matrix), matrix)
    # A model untied after loading started from the same rows.
    assert open_baseline(tmp_path, matrix_of(llama())).key == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("head", "lm_head.weight"),
        ("head", "language_model.lm_head.weight"),
        ("head", "embed_out.weight"),
        ("embedding", "embed_tokens.weight"),
        ("embedding", "language_model.model.embed_tokens.weight"),
        ("embedding", "transformer.wte.weight"),
        ("embedding", "shared.weight"),
    ],
)
def test_other_names(tmp_path: Path, name: MatrixName, key: str) -> None:
    path = tmp_path / "base.safetensors"
    save_file({key: rows_like(1), "model.norm.weight": torch.ones(WIDTH)}, str(path))
    baseline = open_baseline(path, matrix_of(llama(), name))
    assert baseline.key == key
    assert torch.equal(all_rows(baseline), rows_like(1))


def test_the_parameters_own_name_comes_first(tmp_path: Path) -> None:
    model = nn.Module()
    model.words, model.speak = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
    path = write(tmp_path / "base.safetensors", speak__weight=rows_like(1), lm_head__weight=rows_like(2))
    assert open_baseline(path, matrix_of(model, head="speak", embedding="words")).key == "speak.weight"


def test_ambiguous_suffixes_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", a__lm_head__weight=rows_like(1), b__lm_head__weight=rows_like(2))
    with pytest.raises(ValueError, match=r"no tensor for the head, looked for \['lm_head.weight'\]"):
        open_baseline(path, matrix_of(llama()))


@pytest.mark.parametrize(("rows", "width"), [(ROWS - 1, WIDTH), (ROWS + 14, WIDTH), (ROWS, WIDTH * 2)])
def test_another_shape_is_refused(tmp_path: Path, rows: int, width: int) -> None:
    path = write(tmp_path / "base.safetensors", lm_head__weight=rows_like(1, rows, width))
    with pytest.raises(ValueError, match=rf"snapshot\.source .*{rows} x {width}, the model's head is 50 x 8"):
        open_baseline(path, matrix_of(llama()))


def test_paths_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    matrix = matrix_of(llama())
    allowed = r"allowed: a \.safetensors file, or a folder with model\.safetensors"
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pytorch_model.bin", tmp_path / "no.safetensors"):
        with pytest.raises(ValueError, match=rf"snapshot\.source {path}.*{allowed}"):
            open_baseline(path, matrix)
    with pytest.raises(ValueError, match=r"snapshot\.source .*broken\.safetensors: cannot be read as safetensors"):
        open_baseline(tmp_path / "broken.safetensors", matrix)


def sharded_bin(state: dict[str, Tensor], folder: Path) -> Path:
    names = {key: f"pytorch_model-{place % 2}.bin" for place, key in enumerate(state)}
    for file in set(names.values()):
        torch.save({key: state[key] for key in state if names[key] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def lightning_ckpt(state: dict[str, Tensor], folder: Path) -> Path:
    inner = {f"model.{key}": value for key, value in state.items()}
    torch.save({"epoch": 1, "state_dict": inner, "optimizer_states": [{"state": {}}]}, folder / "last.ckpt")
    return folder / "last.ckpt"


def plain_file(name: str, state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / name)
    return folder / name


TORCH_FORMS = {
    "bin": partial(plain_file, "pytorch_model.bin"),
    "folder of a bin": lambda state, folder: plain_file("pytorch_model.bin", state, folder).parent,
    "sharded bin": sharded_bin,
    "pt": partial(plain_file, "base.pt"),
    "lightning": lightning_ckpt,
}


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", TORCH_FORMS)
def test_torch_files_are_baselines_too(tmp_path: Path, form: str, dtype: torch.dtype, name: MatrixName) -> None:
    model = llama().to(dtype)
    matrix = matrix_of(model, name)
    path = TORCH_FORMS[form](model.state_dict(), tmp_path)
    baseline = open_baseline(path, matrix)
    assert isinstance(baseline, CopiedBaseline)
    assert baseline.chunk(slice(0, 1)).dtype is dtype
    assert torch.equal(all_rows(baseline), matrix.weight)
    assert str(tmp_path) in baseline.describe()
    # So a guard writes them into its run folder before it is resumed, as it does with a copy.
    assert baseline.reference() == {}
    own = tmp_path / "own"
    own.mkdir()
    assert torch.equal(all_rows(save_baseline(baseline, own / "own.safetensors", name)), matrix.weight)


def adapter_of_base(folder: Path, **options: Any) -> Any:
    """A PEFT model with moved adapters, saved in ``folder / "adapter"``, its base in ``folder / "base"``."""
    peft = pytest.importorskip("peft")
    llama().save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("name", ["head", "embedding"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    ],
    ids=["lora", "dora", "modules to save", "trainable tokens"],
)
def test_rows_of_an_adapter_are_those_of_the_live_model(
    tmp_path: Path, options: dict[str, Any], name: MatrixName
) -> None:
    model = adapter_of_base(tmp_path, **options)
    # What an adapter leaves alone is frozen, and so the live model has no matrix to follow: its rows are the base's.
    getter = model.get_output_embeddings if name == "head" else model.get_input_embeddings
    live = find_matrices(model)[name]
    expected = torch.cat([rows for _, rows in live.chunks(2**14)]) if isinstance(live, VocabMatrix) else getter().weight
    baseline = open_baseline(tmp_path / "adapter", matrix_of(llama(), name))
    assert torch.equal(all_rows(baseline), expected)


def test_an_adapter_whose_base_is_elsewhere_is_refused(tmp_path: Path) -> None:
    adapter_of_base(tmp_path, target_modules=["lm_head"])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=rf"snapshot\.source {tmp_path}/adapter: its base .*base' is not on this .*allowed"
    ):
        open_baseline(tmp_path / "adapter", matrix_of(llama()))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "base.pt"])
def test_a_damaged_torch_file_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(llama().state_dict(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"snapshot\.source {tmp_path / name}: torch\.load.* fails .*; allowed: a "):
        open_baseline(tmp_path / name, matrix_of(llama()))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"snapshot\.source .*model-00001"):
        open_baseline(tmp_path, matrix_of(llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_reopen(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = matrix_of(llama().to(dtype))
    saved = save_baseline(copy_baseline(matrix), tmp_path / "baseline.safetensors", "head")
    reference = json.loads(json.dumps(saved.reference()))
    assert all(isinstance(value, str) for value in reference.values())
    again = reopen_baseline(reference)
    assert (again.path, again.key, again.rows, again.width) == (saved.path, "head", ROWS, WIDTH)
    assert again.chunk(slice(0, 1)).dtype is dtype
    assert torch.equal(all_rows(again), matrix.weight)


def test_a_file_baseline_can_be_saved_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", lm_head__weight=rows_like(1))
    saved = save_baseline(open_baseline(path, matrix_of(llama())), tmp_path / "own.safetensors", "head")
    path.unlink()
    assert torch.equal(all_rows(saved), rows_like(1))


def test_another_file_in_its_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "baseline.safetensors"
    reference = save_baseline(CopiedBaseline(rows_like(1)), path, "head").reference()
    for rows, said in ((rows_like(2), "digest"), (rows_like(1)[:40], "shape is 40 x 8, was 50 x 8")):
        save_baseline(CopiedBaseline(rows), path, "head")
        with pytest.raises(ValueError, match=rf"baseline\.safetensors.*not the one the run started with: {said}"):
            reopen_baseline(reference)
    save_baseline(CopiedBaseline(rows_like(1)), path, "other")
    with pytest.raises(ValueError, match=r"no tensor 'head'; it holds \['other'\]"):
        reopen_baseline(reference)


@pytest.mark.parametrize("reference", [{}, {"kind": "copy"}, {"kind": "file", "path": "x"}])
def test_bad_references_are_refused(reference: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"baseline reference is .*; allowed: kind 'file'"):
        reopen_baseline(reference)


def test_a_tensor_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", lm_head__weight=torch.ones(ROWS))
    with pytest.raises(ValueError, match=r"has shape \(50,\); allowed: \(rows, width\)"):
        open_baseline(path, matrix_of(llama()))


def test_matches_rounds_as_loading_does(tmp_path: Path) -> None:
    model = llama()
    baseline = copy_baseline(matrix_of(model))
    matrix = matrix_of(model.to(torch.bfloat16))
    assert not torch.equal(baseline.tensor, matrix.weight.float())
    assert matches(baseline, matrix)
    model.resize_token_embeddings(ROWS + 1)
    assert not matches(baseline, matrix)


def test_rows_of_a_file_are_mapped_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", lm_head__weight=rows_like(1))
    baseline = open_baseline(path, matrix_of(llama()))
    assert baseline.chunk(slice(3, 9)).data_ptr() == baseline.chunk(slice(3, 5)).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = rows_like(1, rows=3000).to(dtype)
    rows[17, 2], rows[2999, 0] = float("nan"), float("inf")
    for baseline in (CopiedBaseline(rows), save_baseline(CopiedBaseline(rows), tmp_path / "b.safetensors", "head")):
        expected = [sum(x * x for x in row) ** 0.5 for row in rows.double().tolist()]
        torch.testing.assert_close(
            baseline.norms.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0, equal_nan=True
        )
        assert baseline.norms is baseline.norms
        assert baseline.norms.dtype is torch.float32


@pytest.mark.parametrize("size", [0, -1])
def test_chunk_size_is_checked(size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk size is {size}; allowed: at least 1"):
        next(CopiedBaseline(rows_like(1)).chunks(size))
