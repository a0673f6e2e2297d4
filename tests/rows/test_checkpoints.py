from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vocabguard.results import NotApplicable
from vocabguard.rows.baselines import FileBaseline
from vocabguard.rows.checkpoints import Checkpoint, open_checkpoint


def read(rows: Any, size: int = 7) -> Tensor:
    return torch.cat([part for _, part in rows.chunks(size)])


def both(found: Checkpoint) -> tuple[Tensor, Tensor]:
    return read(found.head), read(found.embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_folder_of_a_model(tmp_path: Path, kit: Any, dtype: torch.dtype, sharded: bool) -> None:
    model = kit.llama(dtype=dtype)
    kit.saved(model, tmp_path, **({"max_shard_size": "5KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    found = open_checkpoint(tmp_path)
    head, embedding = both(found)
    assert head.dtype is dtype
    assert torch.equal(head, model.lm_head.weight)
    assert torch.equal(embedding, model.model.embed_tokens.weight)
    assert not found.tied
    assert found.rows == kit.ROWS
    assert isinstance(found.head, FileBaseline)
    assert torch.allclose(found.head.norms, model.lm_head.weight.float().norm(dim=1))


def test_tied_checkpoint_serves_its_embedding_as_the_head(tmp_path: Path, kit: Any) -> None:
    model = kit.llama(tied=True)
    found = open_checkpoint(kit.saved(model, tmp_path))
    assert found.tied
    assert found.head is found.embedding
    assert torch.equal(read(found.head), model.lm_head.weight)


def test_without_a_head_where_the_config_says_untied(tmp_path: Path, kit: Any) -> None:
    kit.saved(kit.llama().model, tmp_path)
    found = open_checkpoint(tmp_path)
    assert isinstance(found.head, NotApplicable)
    assert not isinstance(found.embedding, NotApplicable)


def test_lightning_checkpoint_and_torch_files(tmp_path: Path, kit: Any) -> None:
    model = kit.llama()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [{"state": {}}]}, tmp_path / "last.ckpt")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "last.ckpt", tmp_path / "pytorch_model.bin", tmp_path):
        head, embedding = both(open_checkpoint(path))
        assert torch.equal(head, model.lm_head.weight)
        assert torch.equal(embedding, model.model.embed_tokens.weight)


def test_a_real_lightning_trainer_wrote_it(tmp_path: Path, kit: Any) -> None:
    import lightning

    class Chat(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"size": 3})
            self.model = kit.llama()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.arange(16).view(2, 8), batch_size=2)

    chat = Chat()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(chat)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
    head, _ = both(open_checkpoint(tmp_path / "one.ckpt"))
    assert torch.equal(head, chat.model.lm_head.weight)


def test_named_tensors(tmp_path: Path) -> None:
    rows = torch.randn(5, 4)
    save_file({"odd.out": rows, "odd.in": rows + 1}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="name them with --head"):
        open_checkpoint(tmp_path / "odd.safetensors")
    found = open_checkpoint(tmp_path / "odd.safetensors", keys={"head": "odd.out", "embedding": "odd.in"})
    assert torch.equal(read(found.head), rows)
    assert torch.equal(read(found.embedding), rows + 1)
    with pytest.raises(ValueError, match=r"no tensor .* for --head"):
        open_checkpoint(tmp_path / "odd.safetensors", keys={"head": "odd.no"})


def test_several_candidates_are_not_guessed(tmp_path: Path) -> None:
    rows = torch.randn(5, 4)
    save_file({"a.lm_head.weight": rows, "b.lm_head.weight": rows.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="several tensors may be the head"):
        open_checkpoint(tmp_path / "two.safetensors")


def test_rows_are_read_in_any_chunks_and_the_file_stays(tmp_path: Path) -> None:
    rows = torch.randn(1000, 64)
    save_file({"pad": torch.zeros(3), "lm_head.weight": rows}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    mapped = FileBaseline(tmp_path / "m.safetensors", "lm_head.weight")
    for size in (1, 13, 1000, 5000):
        assert torch.equal(read(mapped, size), rows)
    assert torch.equal(mapped.chunk(slice(990, 2000)), rows[990:])
    assert mapped.chunk(slice(1000, 1010)).shape == (0, 64)
    mapped.chunk(slice(0, 3)).zero_()  # a private mapping: nothing reaches the file
    del mapped
    assert (tmp_path / "m.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="chunk size is 0"):
        read(FileBaseline(tmp_path / "m.safetensors", "lm_head.weight"), 0)


def test_memory_is_let_go_of(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")

    def resident() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssFile"))

    save_file({"lm_head.weight": torch.ones(40_000, 1024)}, tmp_path / "m.safetensors")  # 160 MiB
    mapped = FileBaseline(tmp_path / "m.safetensors", "lm_head.weight")
    before, most = resident(), 0
    for _, part in mapped.chunks(512):
        part.sum()
        most = max(most, resident())
    assert most - before < 40 * 1024


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head", "embed_tokens"]},
    "rank stabilised": {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True, "lora_alpha": 16},
    "alpha pattern": {"target_modules": ["lm_head", "embed_tokens"], "alpha_pattern": {"lm_head": 32}},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 70]},
}


def adapted(kit: Any, folder: Path, options: dict[str, Any], *, tied: bool = False) -> tuple[Any, Checkpoint]:
    """A PEFT model with random adapters, and its base's and its own folder."""
    peft = pytest.importorskip("peft")
    base = open_checkpoint(kit.saved(kit.llama(tied=tied), folder / "base"))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kit.llama(tied=tied), peft.LoraConfig(r=4, **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter) + (0.5 if "magnitude" in name else 0))
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload()
    return merged, open_checkpoint(folder / "adapter", base=base)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_equal_peft_merged(tmp_path: Path, kit: Any, name: str) -> None:
    merged, found = adapted(kit, tmp_path, ADAPTERS[name])
    for rows, module in (
        (found.head, merged.get_output_embeddings()),
        (found.embedding, merged.get_input_embeddings()),
    ):
        if isinstance(rows, NotApplicable):
            original = load_file(tmp_path / "base" / "model.safetensors")
            key = "lm_head.weight" if rows is found.head else "model.embed_tokens.weight"
            assert torch.equal(module.weight, original[key])
        else:
            assert torch.allclose(read(rows), module.weight, atol=1e-6)
            assert torch.allclose(rows.norms, module.weight.norm(dim=1), atol=1e-5)
    assert not (isinstance(found.head, NotApplicable) and isinstance(found.embedding, NotApplicable))


def test_lora_on_the_head_of_a_tied_base(tmp_path: Path, kit: Any) -> None:
    merged, found = adapted(kit, tmp_path, {"target_modules": ["lm_head"]}, tied=True)
    assert not isinstance(found.head, NotApplicable)
    assert isinstance(found.embedding, NotApplicable)
    assert torch.allclose(read(found.head), merged.lm_head.weight, atol=1e-6)


def test_adapter_that_touches_neither(tmp_path: Path, kit: Any) -> None:
    _, found = adapted(kit, tmp_path, {"target_modules": ["q_proj"]})
    assert isinstance(found.head, NotApplicable)
    assert isinstance(found.embedding, NotApplicable)
    assert "leaves the output rows as they are" in found.head.reason
    assert found.rows == 0


def test_adapter_without_its_base_is_refused(tmp_path: Path, kit: Any) -> None:
    adapted(kit, tmp_path, ADAPTERS["lora"])
    with pytest.raises(ValueError, match="is an adapter, not a model"):
        open_checkpoint(tmp_path / "adapter")


def test_adapter_of_another_base_is_refused(tmp_path: Path, kit: Any) -> None:
    adapted(kit, tmp_path, {"target_modules": ["lm_head"]})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "base_layer" not in key}
    save_file(tensors, file)
    other = open_checkpoint(kit.saved(kit.llama(rows=64), tmp_path / "other"))
    with pytest.raises(ValueError, match="do not make the base's 64 x 16 rows"):
        open_checkpoint(tmp_path / "adapter", base=other)


def test_index_must_stay_in_its_folder(tmp_path: Path, kit: Any) -> None:
    kit.saved(kit.llama(), tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lies in another folder"):
        open_checkpoint(tmp_path)
