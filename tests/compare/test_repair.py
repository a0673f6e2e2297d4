from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vocabguard.cli.common import ways_of_asking
from vocabguard.compare.adapted import write_adapter
from vocabguard.compare.options import METHODS
from vocabguard.compare.repair import (
    Plan,
    check_out,
    loss_changes,
    lost_rows,
    plan_repair,
    recall_of,
    text_loss,
    write_repaired,
)
from vocabguard.compare.scan import Scan, scan
from vocabguard.measure.reference import cut_windows
from vocabguard.rows.checkpoints import open_checkpoint


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def head_of(folder: Path) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach()
    return found


@pytest.fixture
def folders(tmp_path: Path, kit: Any) -> tuple[Path, Path]:
    base = kit.saved(kit.llama(), tmp_path / "base")
    model = kit.llama()
    with torch.no_grad():
        model.lm_head.weight[20:40] += 0.05 * torch.randn(20, kit.WIDTH, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight += 0.002
    return base, kit.saved(model, tmp_path / "tuned")


def scanned(base: Path, tuned: Path, **options: Any) -> Scan:
    return scan(open_checkpoint(base), open_checkpoint(tuned), **options)


def test_rows_by_cosine_and_by_counts(folders: tuple[Path, Path]) -> None:
    lost, rule = lost_rows(scanned(*folders))
    assert rule == "live rows with cosine below 0.95"
    assert lost.sum() > 10
    assert set(lost.nonzero().flatten().tolist()) <= set(range(20, 40))
    counts = torch.full((96,), 30)
    counts[5:9], counts[9] = torch.tensor([0, 1, 5, 19]), 20
    lost, rule = lost_rows(scanned(*folders, data_target=counts))
    assert rule == "live rows with fewer than 20 data targets"
    assert lost.nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_new_rows_against_a_naive_loop(folders: tuple[Path, Path], method: Any, counted: bool) -> None:
    counts = torch.tensor([0, 2, 7, 30] * 24) if counted else None
    found = scanned(*folders, data_target=counts)
    lost, rule = lost_rows(found, cosine_below=0.999, targets_below=8)
    plan = plan_repair(found, lost, rule, method, 0.5)
    base, now = (head_of(folder).double() for folder in folders)
    assert len(plan.ids) == int(lost.sum()) > 10
    for place, token in enumerate(plan.ids.tolist()):
        naive = base[token].clone()
        if method == "shift":
            kind = None if counts is None else int(counts[token])
            members = [i for i in plan.ids.tolist() if counts is None or int(counts[i]) == kind]
            naive += 0.5 * sum((now[i] - base[i] for i in members), torch.zeros(16).double()) / len(members)
        assert torch.allclose(plan.rows[place].double(), naive, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["single", "sharded", "tied"])
def test_what_is_written(tmp_path: Path, kit: Any, dtype: torch.dtype, layout: str) -> None:
    tied = layout == "tied"
    options = {"max_shard_size": "5KB"} if layout == "sharded" else {}
    base = kit.saved(kit.llama(tied=tied, dtype=dtype), tmp_path / "base")
    tuned = kit.saved(kit.nudged(kit.llama(tied=tied, dtype=dtype), 0.1), tmp_path / "tuned", **options)
    (tuned / "notes.txt").write_text("kept")
    before = digest(base), digest(tuned)
    found = scanned(base, tuned)
    plan = plan_repair(found, *lost_rows(found), "shift")
    write_repaired(open_checkpoint(tuned), plan, tmp_path / "out")
    assert (digest(base), digest(tuned)) == before
    now, then = digest(tmp_path / "out"), digest(tuned)
    assert now.keys() == then.keys()
    assert len({name for name in now if now[name] != then[name]}) == 1
    model, old = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tuned)
    changed = model.get_output_embeddings().weight.detach()
    assert changed.dtype is dtype
    expected = old.get_output_embeddings().weight.detach().clone()
    expected[plan.ids] = plan.rows.to(dtype)
    assert torch.equal(changed, expected)
    head = {id(model.get_output_embeddings().weight)}
    for (name, one), other in zip(model.named_parameters(), old.parameters(), strict=True):
        assert id(one) in head or torch.equal(one, other), name
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(str(path), "pt") as one, safe_open(str(tuned / path.name), "pt") as other:
            assert one.metadata() == other.metadata()


def test_a_tuned_vocabulary_in_another_order(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    order = torch.randperm(8160, generator=torch.Generator().manual_seed(1))

    def change(tensors: dict[str, Tensor]) -> None:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            rows = tensors[key].clone()
            tensors[key][order] = rows[:8160]
        tensors["lm_head.weight"][order[700:800]] += 0.3 * torch.randn(100, 128)

    folder = kit.assets_with(tmp_path / "tuned", change)
    kit.shuffled_tokenizer(folder, order.tolist())
    own = AutoTokenizer.from_pretrained(folder)
    found = scanned(kit.ASSETS, folder, tokenizer=own, base_tokenizer=tokenizer)
    plan = plan_repair(found, *lost_rows(found), "rows")
    base = load_file(kit.ASSETS / "model.safetensors")["lm_head.weight"]
    places = torch.empty(8160, dtype=torch.int64)
    places[order] = torch.arange(8160)
    assert len(plan.ids) > 50
    assert torch.equal(plan.rows, base[places[plan.ids]])


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = open_checkpoint(folders[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for out, words in (
        (tmp_path / "full", "not an empty folder"),
        (tmp_path / "full" / "x", "not an empty folder"),
        (folders[1], "not an empty folder"),
        (folders[1] / "inside", "lies in the tuned model's folder"),
    ):
        with pytest.raises(ValueError, match=words):
            check_out(tuned, out)
    with pytest.raises(ValueError, match="allowed for repair: a model's folder"):
        check_out(open_checkpoint(folders[1] / "model.safetensors"), tmp_path / "new")
    found = scanned(*folders)
    with pytest.raises(ValueError, match="allowed: shift, rows"):
        plan_repair(found, *lost_rows(found), "magic")  # type: ignore[arg-type]


def test_without_a_head(tmp_path: Path, kit: Any) -> None:
    bare = kit.saved(kit.llama().model, tmp_path / "bare")
    with pytest.raises(ValueError, match="there is no head to repair"):
        lost_rows(scanned(bare, bare))
    with pytest.raises(ValueError, match="has no head of its own"):
        check_out(open_checkpoint(bare), tmp_path / "out")


def test_text_loss_against_the_model_s_own(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(kit.ASSETS)
    file = tmp_path / "text.txt"
    file.write_text("Hello, how are you today? " * 60, encoding="utf-8")
    ids = torch.tensor(tokenizer(file.read_text(), add_special_tokens=False)["input_ids"])
    parts = [
        (len(part) - 1, float(model(input_ids=part[None], labels=part[None]).loss.detach())) for part in ids.split(256)
    ]
    assert len(parts) > 1
    naive = sum(count * loss for count, loss in parts) / sum(count for count, _ in parts)
    assert text_loss(model, tokenizer, file) == pytest.approx(naive, rel=1e-5)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        text_loss(model, tokenizer, file)
    file.write_text("")
    with pytest.raises(ValueError, match="needed: at least 2"):
        text_loss(model, tokenizer, file)


def test_recall_returns(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    """Rows that were only turned come back whole with the base's rows."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors["lm_head.weight"][2000:2400] += 0.1 * torch.randn(400, 128, generator=generator)

    tuned = kit.assets_with(tmp_path / "tuned", change)
    found = scanned(kit.ASSETS, tuned, tokenizer=tokenizer)
    lost, rule = lost_rows(found)
    write_repaired(open_checkpoint(tuned), plan_repair(found, lost, rule, "rows"), tmp_path / "out")
    folders = {"base": kit.ASSETS, "tuned": tuned, "repaired": tmp_path / "out"}
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    told = recall_of(models, found, ways_of_asking(tokenizer), lost, 400)
    json.dumps(told)
    assert told["tokens"] == 400
    assert told["tuned"] < 0.99  # type: ignore[operator]
    assert told["tuned_lost"] < told["tuned"]  # type: ignore[operator]
    assert told["repaired"] == 1
    assert told["returned"] == pytest.approx(1)


def test_what_a_repair_changed_is_paired(folders: tuple[Path, Path], kit: Any, tokenizer: Any) -> None:
    """Tokens that came back, and tokens that went: of a repair that makes it worse the change is below 0."""
    base, torn = AutoModelForCausalLM.from_pretrained(kit.ASSETS), AutoModelForCausalLM.from_pretrained(kit.ASSETS)
    half = AutoModelForCausalLM.from_pretrained(kit.ASSETS)
    with torch.no_grad():
        torn.lm_head.weight[1000:4000] *= -1
        half.lm_head.weight[1000:2500] *= -1
    found = scanned(kit.ASSETS, kit.ASSETS, tokenizer=tokenizer, base_tokenizer=tokenizer)
    none = torch.zeros(len(found.table), dtype=torch.bool)
    for tuned, repaired, sign in ((torn, half, 1), (half, torn, -1)):
        models = {"base": base, "tuned": tuned, "repaired": repaired}
        told = recall_of(models, found, ways_of_asking(tokenizer), none, 300)
        assert told["back" if sign > 0 else "gone"] > 20
        assert told["change"] == pytest.approx(told["repaired"] - told["tuned"])
        assert told["change"] == pytest.approx((told["back"] - told["gone"]) / told["said_at_base"])
        assert told["change_low"] < told["change"] < told["change_high"]
        assert sign * told["change_low"] > 0 < sign * told["change_high"]
        assert told["returned_low"] < told["returned"] < told["returned_high"]


def test_changes_of_a_loss_against_plain_numbers(tokenizer: Any) -> None:
    windows = cut_windows([[1, 2, 3]] * 8, window=3, max_tokens=99)
    base = torch.arange(16.0).view(8, 2)
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    nll = {"base": base, "tuned": base + 1 + noise, "repaired": base + noise}
    nll["tuned"][0, 0] = torch.nan  # said of no number: left out of its pairs
    found = loss_changes(windows, nll)
    assert found.keys() == {"tuned_from_base", "repaired_from_base", "repaired_from_tuned"}
    assert found["repaired_from_tuned"] == pytest.approx({"mean": -1, "low": -1, "high": -1}, abs=1e-5)
    told = found["tuned_from_base"]
    assert told["mean"] == pytest.approx(float(1 + noise.flatten()[1:].mean()), abs=1e-6)
    assert told["low"] < told["mean"] < told["high"]
    alone = loss_changes(cut_windows([[1, 2, 3]], window=3, max_tokens=9), {"tuned": base[:1], "repaired": base[:1]})
    assert alone == {"repaired_from_tuned": {"mean": 0.0, "low": None, "high": None}}


ADAPTERS: dict[str, dict[str, Any]] = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "frozen": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("pickled", [False, True])
def test_rows_of_an_adapter(tmp_path: Path, kit: Any, kind: str, pickled: bool) -> None:
    """Put back where it has the whole head; refused with the reason where it has none, or only an update."""
    peft = pytest.importorskip("peft")
    base = kit.saved(kit.llama(), tmp_path / "base")
    model = peft.get_peft_model(kit.llama(), peft.LoraConfig(r=2, **ADAPTERS[kind]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder, safe_serialization=not pickled)
    (folder / "notes.txt").write_text("kept")
    before, opened = digest(folder), open_checkpoint(base)
    tuned = open_checkpoint(folder, base=opened)
    if kind != "saved":
        why = "leaves the output rows" if kind == "frozen" else "into which no single row"
        with pytest.raises(ValueError, match=why):
            write_repaired(tuned, Plan(torch.tensor([1]), torch.zeros(1, 16), "x"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    found = scan(opened, tuned)
    plan = plan_repair(found, *lost_rows(found), "rows")
    assert len(plan.ids) > 10
    write_repaired(tuned, plan, tmp_path / "out")
    assert digest(folder) == before
    repaired = peft.PeftModel.from_pretrained(kit.llama(), str(tmp_path / "out"))
    rows, old = (one.get_output_embeddings().weight.detach() for one in (repaired, model))
    expected = old.clone()
    expected[plan.ids] = head_of(base)[plan.ids]
    assert torch.equal(rows, expected)
    now = digest(tmp_path / "out")
    changed = {name for name in now if now[name] != before.get(name)}
    assert changed == {"adapter_model.safetensors"}
    assert now.keys() - changed == before.keys() - {"adapter_model.safetensors", "adapter_model.bin"}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_written_with_its_own_tensors_only(tmp_path: Path, kit: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(kit.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).bfloat16()
    model.save_pretrained(tmp_path / "adapter")
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(kept))
    write_adapter(tmp_path / "adapter", {name: torch.ones(kept[name].shape)}, tmp_path / "out")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert new.keys() == kept.keys()
    assert {one.dtype for one in new.values()} == {torch.bfloat16}
    assert bool((new[name] == 1).all())
    assert all(torch.equal(new[other], kept[other]) for other in kept if other != name)
    for wrong in ({"magic": torch.ones(1)}, {name: torch.ones(1)}):
        with pytest.raises(ValueError, match="no such tensors"):
            write_adapter(tmp_path / "adapter", wrong, tmp_path / "other")


@pytest.mark.slow
def test_the_example_s_loss_returns() -> None:
    """The main example's control arm, 300 steps: most of its loss comes back for next to no validation loss."""
    script = Path(__file__).parents[1] / "benchmarks" / "repair_quality.py"
    done = subprocess.run(
        [sys.executable, str(script), "--methods", "shift,echo", "--strength", "0.6", "--counts", "known"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("shift  0.6", "echo"))]
    (shift, echo) = (
        tuple(map(float, re.search(r"([\d.]+)% of the loss returned, validation loss ([-+.\d]+)%", line).groups()))  # type: ignore[union-attr]
        for line in lines
    )
    assert echo[0] >= 90
    assert shift[0] >= 65, "73 % with two threads, 69.5 % with one: rounding makes another training"
    assert max(shift[1], echo[1]) <= 1
