from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocabguard.compare.scan import Scan, scan
from vocabguard.compare.summary import category_of, load_scan, matrix_summary, save_scan, summarise_scan
from vocabguard.data.counts import read_counts
from vocabguard.results import NotApplicable, RowDrift
from vocabguard.rows.baselines import CopiedBaseline, norms_of
from vocabguard.rows.checkpoints import open_checkpoint
from vocabguard.vocabulary.table import build_table


def scanned(base: Path, tuned: Path, **options: Any) -> Scan:
    before = open_checkpoint(base)
    return scan(before, open_checkpoint(tuned, base=before), **options)


def drift_of(found: Scan, name: str) -> RowDrift:
    drift = found.drift(name)  # type: ignore[arg-type]
    assert isinstance(drift, RowDrift)
    return drift


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [(False, False), (True, True), (True, False), (False, True)])
def test_equals_loading_both_models(
    tmp_path: Path, kit: Any, base_dtype: torch.dtype, dtype: torch.dtype, ties: tuple[bool, bool]
) -> None:
    kit.saved(kit.llama(tied=ties[0], dtype=base_dtype), tmp_path / "base")
    kit.saved(kit.nudged(kit.llama(tied=ties[1], dtype=dtype)), tmp_path / "tuned")
    found = scanned(tmp_path / "base", tmp_path / "tuned")
    base, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "tuned"))
    for name, getter in (("head", "get_output_embeddings"), ("embedding", "get_input_embeddings")):
        now, before = getattr(tuned, getter)().weight, getattr(base, getter)().weight
        drift = drift_of(found, name)
        assert (drift.cosine - kit.naive_cosine(now, before)).abs().max() < 1e-6
        shift = (now.double() - before.double()).mean(dim=0)
        assert (drift.residual - kit.naive_cosine(now.double() - shift, before)).abs().max() < 2e-6
        l2 = (now.double() - before.double()).norm(dim=1)
        assert torch.allclose(drift.l2.double(), l2, rtol=1e-4, atol=1e-6)
        assert torch.allclose(
            drift.norm_ratio.double(), now.double().norm(dim=1) / before.double().norm(dim=1), rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_near_and_far(tmp_path: Path, kit: Any, dtype: torch.dtype) -> None:
    """As wide as a large model's, moved by nothing up to several times their length."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(500, 4096, generator=generator)
    far = torch.logspace(-5, 1, 500)[:, None]
    now = base * (1 + far) + far * 0.02 * torch.randn(500, 4096, generator=generator)
    for name, rows in (("base", base), ("tuned", now)):
        save_file({"lm_head.weight": rows.to(dtype)}, tmp_path / f"{name}.safetensors")
    found = scanned(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    naive = kit.naive_cosine(now.to(dtype), base.to(dtype))
    assert (drift_of(found, "head").cosine - naive).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms(dtype: torch.dtype) -> None:
    rows = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[7], rows[8] = 0, math.nan
    found, naive = norms_of(CopiedBaseline(rows)).double(), rows.double().norm(dim=1)
    assert torch.allclose(found, naive, rtol=3e-7, atol=0, equal_nan=True)


def moved_assets(kit: Any, folder: Path) -> Path:
    """The embedded base with head rows 100 to 199 turned, and some control rows moved."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        head = tensors["lm_head.weight"]
        head[100:200] += head[100:200].norm(dim=1).mean() / 10 * torch.randn(100, 128, generator=generator)
        head[3] += 1

    return kit.assets_with(folder, change)


def test_summary_of_the_embedded_base(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    tuned = moved_assets(kit, tmp_path / "tuned")
    found = scanned(kit.ASSETS, tuned, tokenizer=tokenizer)
    told = summarise_scan(found, top=7)
    json.dumps(told, allow_nan=False)
    table = build_table(tokenizer, 8192)
    before, now = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (kit.ASSETS, tuned))
    cosine = kit.naive_cosine(now, before)
    live = table.live & found.table.trained
    assert told["tokens"]["live"] == int(live.sum()) == 8014
    assert told["untrained"]["count"] == 32
    head = told["head"]
    assert head["cosine_mean"] == pytest.approx(float(cosine[live].mean()), abs=1e-6)
    assert head["cosine_min"] == pytest.approx(float(cosine[live].min()), abs=1e-6)
    for key, limit in (("below_0.95", 0.95), ("below_0.90", 0.90)):
        assert head[key] == pytest.approx(float((cosine[live] < limit).double().mean()))
        for group, part in head["groups"].items():
            mask = live & table.mask(group)
            assert part[key] == pytest.approx(float((cosine[mask] < limit).double().mean()))
    order = torch.where(live, cosine, torch.inf).argsort()[:7].tolist()
    assert [token["id"] for token in told["worst"]] == order
    assert [token["text"] for token in told["worst"]] == [table.text(i) for i in order]
    assert told["worst"][0]["embedding_cosine"] == pytest.approx(1)
    assert told["control_moved"][0]["id"] == 3
    assert told["control_moved"][0]["category"] == "control"
    assert sum(head["l2_histogram"]["counts"]) == 8014
    assert told["embedding"]["cosine_min"] == pytest.approx(1)
    assert "classes" not in head
    assert told["residual_over"] == "live rows"


def test_counts_of_targets(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    tuned = moved_assets(kit, tmp_path / "tuned")
    counts = torch.zeros(8192, dtype=torch.int64)
    counts[150:4000], counts[4000:5000] = 30, 3
    found = scanned(kit.ASSETS, tuned, tokenizer=tokenizer, data_target=counts)
    before, now = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (kit.ASSETS, tuned))
    unexposed = found.live & (counts == 0)
    shift = (now.double() - before.double())[unexposed].mean(dim=0)
    naive = kit.naive_cosine(now.double() - shift, before)
    drift = drift_of(found, "head")
    assert (drift.residual - naive)[found.live].abs().max() < 2e-6
    classes = matrix_summary(found, "head")["classes"]
    mask = found.live & (counts == 0)
    assert classes["never"]["cosine_mean"] == pytest.approx(float(drift.cosine[mask].double().mean()), abs=1e-6)
    assert classes["5-19"] == {}
    with pytest.raises(ValueError, match=r"shape \[5\]"):
        scanned(kit.ASSETS, tuned, data_target=torch.zeros(5, dtype=torch.int64))


def test_another_order_is_matched_by_piece(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    """A tuned model whose ids are shuffled gives each piece the numbers that it has without the shuffle."""
    plain = scanned(kit.ASSETS, moved_assets(kit, tmp_path / "plain"), tokenizer=tokenizer)
    order = torch.randperm(8160, generator=torch.Generator().manual_seed(1))
    folder = moved_assets(kit, tmp_path / "shuffled")
    tensors = load_file(folder / "model.safetensors")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        rows = tensors[key].clone()
        tensors[key][order] = rows[:8160]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kit.shuffled_tokenizer(folder, order.tolist())
    own = AutoTokenizer.from_pretrained(folder)
    assert own.get_vocab() != tokenizer.get_vocab()
    found = scanned(kit.ASSETS, folder, tokenizer=own, base_tokenizer=tokenizer)
    assert (found.match.by, found.match.added, found.match.removed) == ("piece", 0, 0)
    for name in ("head", "embedding"):
        for key in ("cosine", "l2", "norm_ratio"):
            now, then = getattr(drift_of(found, name), key), getattr(drift_of(plain, name), key)
            assert torch.allclose(now[order], then[:8160], atol=1e-6, equal_nan=True)
    told, plainly = summarise_scan(found), summarise_scan(plain)
    assert told["head"]["cosine_mean"] == pytest.approx(plainly["head"]["cosine_mean"], abs=1e-7)
    assert {t["text"] for t in told["worst"]} == {t["text"] for t in plainly["worst"]}


@pytest.mark.parametrize("rows", [(96, 128), (128, 96)])
def test_vocabularies_of_different_size(tmp_path: Path, kit: Any, rows: tuple[int, int]) -> None:
    base, tuned = (kit.saved(kit.llama(rows=count), tmp_path / str(count)) for count in rows)
    found = scanned(base, tuned)
    assert len(found.table) == rows[1]
    assert int(found.live.sum()) == 96
    told = summarise_scan(found)
    assert told["matched"] == {
        "by": "id",
        "rows": 96,
        "added": max(0, rows[1] - rows[0]),
        "removed": max(0, rows[0] - rows[1]),
    }
    before, now = (load_file(path / "model.safetensors")["lm_head.weight"][:96] for path in (base, tuned))
    assert (drift_of(found, "head").cosine[:96] - kit.naive_cosine(now, before)).abs().max() < 1e-6
    assert told["head"]["nonfinite_rows"] == 0


def test_broken_rows_are_findings(tmp_path: Path, kit: Any) -> None:
    kit.saved(kit.llama(), tmp_path / "base")
    model = kit.llama()
    with torch.no_grad():
        model.lm_head.weight[3], model.lm_head.weight[4], model.lm_head.weight[5, 0] = math.nan, 0, math.inf
    told = summarise_scan(scanned(tmp_path / "base", kit.saved(model, tmp_path / "tuned")))
    assert told["head"]["nonfinite_rows"] == 2
    assert told["head"]["zero_rows"] == 1
    assert told["head"]["cosine_mean"] == pytest.approx(1)
    assert told["embedding"]["nonfinite_rows"] == 0


def test_never_trained_rows_are_told_apart(tmp_path: Path, kit: Any) -> None:
    """Without a tokenizer, a row that is next to nothing at the base is no loss."""
    model = kit.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[10:13] *= 1e-4
    base = kit.saved(model, tmp_path / "base")
    tuned = kit.saved(kit.nudged(model, 1.0), tmp_path / "tuned")
    found = scanned(base, tuned)
    assert summarise_scan(found)["untrained"]["ids"] == [10, 11, 12]
    assert int(found.live.sum()) == kit.ROWS - 3


def test_norm_outliers(tmp_path: Path, kit: Any) -> None:
    base, model = kit.saved(kit.llama(), tmp_path / "base"), kit.llama()
    with torch.no_grad():
        model.lm_head.weight *= 1.02
        model.lm_head.weight[20], model.lm_head.weight[21] = 2 * model.lm_head.weight[20], model.lm_head.weight[21] / 3
    told = summarise_scan(scanned(base, kit.saved(model, tmp_path / "tuned")))["head"]["norm_outliers"]
    assert told["count"] == 2
    assert told["ids"] == [21, 20]
    assert told["median_ratio"] == pytest.approx(1.02, abs=1e-4)
    # 2.04 and 0.34 of what they were, beside a median row at 1.02.
    assert told["twofold"]["count"] == 2
    assert told["twofold"]["ratios"] == pytest.approx([0.34, 2.04], abs=1e-3)
    with torch.no_grad():
        model.lm_head.weight[22] *= 1.5
    told = summarise_scan(scanned(base, kit.saved(model, tmp_path / "more")))["head"]["norm_outliers"]
    assert (told["count"], told["twofold"]["count"]) == (3, 2), "half as long again is out of line, and no verdict's"


def test_widths_must_agree(tmp_path: Path) -> None:
    for width in (4, 5):
        save_file({"lm_head.weight": torch.randn(9, width)}, tmp_path / f"{width}.safetensors")
    with pytest.raises(ValueError, match="4 elements in the base and 5 in the tuned"):
        scanned(tmp_path / "4.safetensors", tmp_path / "5.safetensors")


def test_only_a_head(tmp_path: Path) -> None:
    rows = torch.randn(9, 4)
    for name in ("a", "b"):
        save_file({"lm_head.weight": rows}, tmp_path / f"{name}.safetensors")
    found = scanned(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert isinstance(found.embedding, NotApplicable)
    assert summarise_scan(found)["embedding"] == {"not_applicable": "the checkpoint has no input rows"}


def test_file_of_a_scan(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    found = scanned(kit.ASSETS, moved_assets(kit, tmp_path / "tuned"), tokenizer=tokenizer)
    told = summarise_scan(found)
    save_scan(found, tmp_path / "scan.safetensors", told)
    vectors, again, texts = load_scan(tmp_path / "scan.safetensors")
    told.pop("seconds")  # the same measurement makes the same bytes
    assert again == told
    assert texts == list(found.table.texts)
    assert torch.equal(vectors["live"], found.live)
    for name in ("head", "embedding"):
        for key in ("cosine", "residual", "l2", "norm_ratio"):
            assert torch.allclose(vectors[f"{name}/{key}"], getattr(drift_of(found, name), key), equal_nan=True)
    with pytest.raises(ValueError, match="is no file of `vocabguard scan --out`"):
        load_scan(kit.ASSETS / "model.safetensors")
    with pytest.raises(ValueError, match="is no file of `vocabguard scan --out`"):
        load_scan(tmp_path / "nothing")


def test_categories(tokenizer: Any) -> None:
    table = build_table(tokenizer, 8192)
    vocabulary = tokenizer.get_vocab()
    assert category_of(table, vocabulary["<|user|>"]) == "control"
    assert category_of(table, 8191) == "padded"
    seen = {category_of(table, i) for i in range(8192)}
    assert {"byte", "latin", "ja", "code and markup"} <= seen


def test_counts_are_read_from_many_files(tmp_path: Path) -> None:
    counts = torch.tensor([0, 3, 20])
    save_file({"data_target": counts}, tmp_path / "a.safetensors")
    save_file({"exposure/data_target": counts}, tmp_path / "b.safetensors")
    (tmp_path / "c.json").write_text(json.dumps({"data_target": [0, 3, 20]}))
    (tmp_path / "d.json").write_text(json.dumps({"data_target": {"1": 3, "2": 20}}))
    for name in ("a.safetensors", "b.safetensors", "c.json", "d.json"):
        assert read_counts(tmp_path / name, 5).tolist() == [0, 3, 20, 0, 0]
    bad = {
        "e.json": "{}", "f.json": '{"data_target": {"9": 1}}', "g.json": '{"data_target": [0.5]}',
        "h.json": '{"data_target": [[1]]}', "i.json": '{"data_target": [-1]}', "j.json": '{"data_target": ["x"]}',
        "k.json": '{"data_target": [1,2,3,4,5,6]}', "l.json": "[", "m.safetensors": "junk",
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_counts(tmp_path / name, 5)
    with pytest.raises(ValueError, match="not found"):
        read_counts(tmp_path / "nothing", 5)
    with pytest.raises(ValueError, match="not a run folder"):
        read_counts(tmp_path, 5)
