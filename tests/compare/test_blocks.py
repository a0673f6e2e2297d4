"""Drift of the body by block, against plain float64 arithmetic over the whole tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vocabguard.compare.blocks import BodyDrift, body_as_json, body_drift
from vocabguard.compare.body_text import body_sentence
from vocabguard.compare.models import load_model
from vocabguard.results import NotApplicable
from vocabguard.rows.checkpoints import open_checkpoint

ROWS = ("embed_tokens", "lm_head")
# Raised inside PEFT, by a newer transformers than it was written for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def llama(seed: int = 0, layers: int = 4) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2
        )
    )


def drift(base: Path, tuned: Path) -> BodyDrift:
    before = open_checkpoint(base)
    found = body_drift(before, open_checkpoint(tuned, base=before))
    assert isinstance(found, BodyDrift)
    return found


def naive(base: dict[str, Tensor], now: dict[str, Tensor], block: str) -> tuple[float, float]:
    """Relative change and cosine of a block, from its tensors in one vector."""
    mine = (
        sorted(name for name in base if f"layers.{block}." in name)
        if block != "outside"
        else sorted(name for name in base if "layers." not in name and not any(row in name for row in ROWS))
    )
    one, other = (torch.cat([side[name].double().flatten() for name in mine]) for side in (base, now))
    return float((other - one).norm() / one.norm()), float(one @ other / one.norm() / other.norm())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a copy whose block 2 and last norm are changed."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (model.model.layers[2].mlp.up_proj.weight, model.model.norm.weight):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def test_by_block(pair: tuple[Path, Path]) -> None:
    found = drift(*pair)
    assert [one.name for one in found.blocks] == ["0", "1", "2", "3", "outside"]
    base, now = (load_file(folder / "model.safetensors") for folder in pair)
    for one in found.blocks:
        relative, cosine = naive(base, now, one.name)
        assert one.relative == pytest.approx(relative, rel=1e-5, abs=1e-12)
        assert one.cosine == pytest.approx(cosine, abs=1e-6)
    assert [one.changed for one in found.blocks] == [0, 0, 1, 0, 1]
    assert found.blocks[2].worst[0] == "model.layers.2.mlp.up_proj.weight"
    said = body_sentence(body_as_json(found))
    relative = [100 * naive(base, now, name)[0] for name in ("2", "outside")]
    assert said.startswith(f"body: block 2 changed by {relative[0]:.1f} % of its norm (cosine ")
    assert f"; weights outside the blocks changed by {relative[1]:.1f} % of their norm (model.norm.weight)" in said
    assert said.endswith("; the other 3 blocks are unchanged")


def test_a_copy_in_shards_and_in_other_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    state = model.state_dict()
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "last.ckpt")
    for other in (tmp_path / "shards", tmp_path / "last.ckpt"):
        assert drift(base, other).identical
        moved = drift(other, tuned)
        assert [one.changed for one in moved.blocks] == [0, 0, 1, 0, 1]
    assert body_sentence(body_as_json(drift(base, base))) == "body: every weight is the base's"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_told_apart(pair: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned = pair
    for name, folder in (("rounded", base), ("both", tuned)):
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / name)
    assert drift(base, tmp_path / "rounded").rounded
    assert "no more than rounding to its type" in body_sentence(body_as_json(drift(base, tmp_path / "rounded")))
    assert not drift(base, tmp_path / "both").rounded


def test_what_cannot_be_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = math.nan
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "odd.safetensors")
    found = drift(base, tmp_path / "odd.safetensors")
    assert set(found.unlike) == {f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1)}
    assert (found.only_base, found.only_tuned) == (
        ("model.layers.2.mlp.up_proj.weight",), ("model.layers.9.mlp.up_proj.weight",)
    )  # fmt: skip
    assert not found.identical
    said = body_sentence(body_as_json(found))
    for words in ("NaN or Inf in block 3", "2 tensors could not be compared", "2 tensors are on one side only"):
        assert words in said
    only = {"lm_head.weight": torch.ones(4, 4)}
    save_file(only, tmp_path / "rows.safetensors")
    rows = open_checkpoint(tmp_path / "rows.safetensors")
    assert isinstance(body_drift(rows, rows), NotApplicable)


def test_an_adapter(tmp_path: Path) -> None:
    """LoRA of some layers against the merged model, by the same naive numbers."""
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3]),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, whole = drift(tmp_path / "base", tmp_path / "adapter"), drift(tmp_path / "base", tmp_path / "merged")
    assert [one.name for one in found.blocks] == ["1", "3"]
    assert [one.name for one in whole.blocks if one.changed] == ["1", "3"]
    # Of an adapter only what it touches is measured, so that the norm it is held against is smaller.
    for one, other in zip(found.blocks, (whole.blocks[1], whole.blocks[3]), strict=True):
        assert one.step_sq == pytest.approx(other.step_sq, rel=1e-4)
        assert one.worst[1] == pytest.approx(other.worst[1], rel=1e-4)


def test_a_model_of_which_a_part_is_missing_is_refused(tmp_path: Path) -> None:
    """The library makes up what a file lacks, at random."""
    llama().save_pretrained(tmp_path / "base")
    whole = load_file(tmp_path / "base" / "model.safetensors")
    for change, said in (
        ({"model.layers.1.mlp.up_proj.weight": None}, "lacks"),
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(5, 16)}, "weights have other shapes than config.json says"),
    ):
        tensors = {name: value for name, value in (whole | change).items() if value is not None}
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / "base")


def test_an_adapter_that_is_not_used_as_a_whole_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter", base=tmp_path / "base") is not None
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first, *others = sorted(tensors)
    save_file({name: tensors[name] for name in others}, file)
    with pytest.raises(ValueError, match="lacks tensors that its configuration speaks of"):
        load_model(tmp_path / "adapter", base=tmp_path / "base")
    save_file({**tensors, first.replace("q_proj", "v_proj"): tensors[first].clone()}, file)
    with pytest.raises(ValueError, match="no place for"):
        load_model(tmp_path / "adapter", base=tmp_path / "base")
