"""Neighbours and head-or-body in a run: when they are looked at, what they say, how they disable themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import called
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from vocabguard import RunLog, VocabGuard
from vocabguard.guard import evaluations as extras
from vocabguard.measure.neighbors import nearest_rows
from vocabguard.rows.baselines import CopiedBaseline
from vocabguard.views.findings import story_of

PROBE: dict[str, Any] = {"sample": 64, "contexts": {"one": {"text": "Repeat exactly: {tokens}", "k": 8}}}


def base_model(kit: Any) -> Any:
    """The example's base, its head untied."""
    model = AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def guarded(kit: Any, tokenizer: Any, model: Any, folder: Path, **options: Any) -> VocabGuard:
    settings = {"preflight": {"enabled": False}, "exposure": {"enabled": False}, "drift": {"every_n_steps": 1}}
    guard = VocabGuard(tokenizer=tokenizer, **(settings | kit.QUIET | options))
    guard.attach(model, total_steps=4, run_dir=folder)
    return guard


@pytest.mark.parametrize(("every", "steps"), [(0, [4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])], ids=str)
def test_neighbors_when_they_are_due(kit: Any, tokenizer: Any, tmp_path: Path, every: int, steps: list[int]) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    settings = {"k": 3, "rows": 2, "every_n_checks": every}
    guard = guarded(kit, tokenizer, model, tmp_path, neighbors=settings, probe={"enabled": False})
    for step in range(1, 5):
        with torch.no_grad():
            model.lm_head.weight[700 + step] *= -1
        guard.step(step)
    guard.finish()
    notes = RunLog.open(guard.run_dir).notes("neighbors")
    assert [line["step"] for line in notes] == [step for step in steps for _ in range(2)]


def test_neighbors_of_worst_and_watched_tokens(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    before = model.lm_head.weight.detach().clone()
    watch = [3884, 1000]
    guard = guarded(
        kit, tokenizer, model, tmp_path, neighbors={"k": 5, "rows": 2}, probe=PROBE | {"watch": watch}
    )  # fmt: skip
    control = int(guard.table.control.nonzero()[0])
    with torch.no_grad():
        model.lm_head.weight[2000] = model.lm_head.weight[control] + 0.01
        model.lm_head.weight[2001] *= -1
    guard.step(1)
    log = guard.finish()
    lines = log.notes("neighbors")
    assert {line["id"] for line in lines[:2]} == {2000, 2001}
    assert [line["id"] for line in lines[2:]] == watch
    padded = guard.table.padded
    for line in lines:
        for key, rows in (("then", before), ("now", model.lm_head.weight.detach())):
            expected = nearest_rows(CopiedBaseline(rows), torch.tensor([line["id"]]), 5, padded)
            assert [one["id"] for one in line[key]] == expected.ids[0].tolist()
            assert [one["cosine"] for one in line[key]] == pytest.approx(expected.cosine[0].tolist(), abs=1e-5)
            assert not any(padded[one["id"]] for one in line[key])
    moved = next(line for line in lines if line["id"] == 2000)
    assert (moved["now"][0]["id"], moved["now"][0]["group"], moved["now"][0]["intruder"]) == (control, "control", True)
    assert lines[-1]["overlap"] > 0.5


def test_head_or_body_at_the_end(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    guard = guarded(kit, tokenizer, model, tmp_path, probe=PROBE | {"every_n_steps": 1})
    lost = guard._checker.prober.ids[:20]
    with torch.no_grad():
        model.lm_head.weight[lost] *= 0.1
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    guard.step(1)
    [note] = guard.finish().notes("head_or_body")
    assert note["step"] == 1
    assert note["forgotten"] == note["head"] + note["input"] + note["other_rows"] + note["body"] == len(note["ids"])
    assert note["head"] > 0.9 * note["forgotten"] > 15
    assert set(note["ids"]) <= set(lost.tolist())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_tokens_that_other_rows_drown_are_not_put_down_to_the_body(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    guard = guarded(kit, tokenizer, model, tmp_path, probe=PROBE | {"every_n_steps": 1})
    with torch.no_grad():
        # Rows that grew: their logits are above all others', whose own rows are the base's.
        model.lm_head.weight[-300:] *= 12
    guard.step(1)
    [note] = guard.finish().notes("head_or_body")
    assert note["forgotten"] == note["head"] + note["input"] + note["other_rows"] + note["body"] > 15
    assert note["other_rows"] > 0.9 * note["forgotten"]
    assert sum(note["with_all"]) == note["forgotten"] - note["body"]
    assert "other rows drown them" in story_of("head_or_body", [note]).sentence


def test_the_guard_and_the_probe_put_a_loss_down_to_the_same(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Rows shrunk, other rows grown, a layer damaged: one diagnosis, in a run and of its checkpoint afterwards."""
    model = base_model(kit)
    model.config.tie_word_embeddings = False
    for folder in ("base", "tuned"):
        tokenizer.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "base")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("head", "other_rows", "body"):
        model.load_state_dict(base)
        guard = guarded(kit, tokenizer, model, tmp_path / kind, probe=PROBE | {"every_n_steps": 1})
        layer = model.model.layers[0].mlp.down_proj.weight
        with torch.no_grad():
            if kind == "head":
                model.lm_head.weight[guard._checker.prober.ids[:40]] *= 0.1
            elif kind == "other_rows":
                model.lm_head.weight[-300:] *= 12
            else:
                layer.copy_(layer.std() * torch.randn(layer.shape, generator=torch.Generator().manual_seed(0)))
        guard.step(1)
        [note] = guard.finish().notes("head_or_body")
        model.save_pretrained(tmp_path / "tuned")
        # Rows that were shrunk are few of all.
        line = ("--all",) if kind == "head" else ("--sample", 64)
        _, told = called("probe", tmp_path / "tuned", tmp_path / "base", *line, "--asks", 1, "--text-tokens", 0)
        found = told["where"]
        for one in (note, found):
            assert one[kind] > 0.9 * one["forgotten"] > 5, (kind, one)


@pytest.mark.parametrize("how", ["off", "nothing lost", "frozen head", "best weights back"])
def test_no_head_or_body(kit: Any, tokenizer: Any, tmp_path: Path, how: str) -> None:
    model = base_model(kit)
    model.lm_head.requires_grad_(how != "frozen head")
    guard = guarded(
        kit, tokenizer, model, tmp_path, probe=PROBE | {"every_n_steps": 1, "head_or_body": how != "off"}
    )  # fmt: skip
    if how != "nothing lost":
        with torch.no_grad():
            model.lm_head.weight[guard._checker.prober.ids[:20]] *= 0.1
    guard.step(1)
    assert (guard.last.scalars["vocabguard/probe/retained"] < 1.0) == (how != "nothing lost")
    assert guard.finish(check=how != "best weights back").notes("head_or_body") == []


def test_neighbors_that_cannot_be_had_are_said_once(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = base_model(kit)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        module.weight.requires_grad_(False)
    guard = guarded(kit, tokenizer, model, tmp_path, neighbors={"k": 3, "every_n_checks": 1}, probe={"enabled": False})
    with caplog.at_level(logging.WARNING, "vocabguard"):
        for step in (1, 2, 3):
            guard.step(step)
        guard.finish()
    said = [record.message for record in caplog.records if "neighbors" in record.message]
    assert len(said) == 1
    assert said[0].startswith("vocabguard: no neighbors: the embedding is frozen")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*[Tt]ied")
def test_rows_that_an_adapter_makes(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base_model(kit), peft.LoraConfig(r=8, target_modules=["lm_head", "embed_tokens"]))
    near = {"k": 4, "rows": 3}
    guard = guarded(kit, tokenizer, model, tmp_path, probe=PROBE | {"every_n_steps": 1}, neighbors=near)
    before = model.lm_head.weight.detach().clone()
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.lora_B["default"].weight.normal_(std=1.0)
    guard.step(1)
    log = guard.finish()
    now = before + model.lm_head.get_delta_weight("default").detach()
    padded = guard.table.padded
    lines = log.notes("neighbors")
    assert [line["id"] for line in lines] == [report.id for report in guard.last.worst[:3]]
    for line in lines:
        for key, rows in (("then", before), ("now", now)):
            expected = nearest_rows(CopiedBaseline(rows), torch.tensor([line["id"]]), 4, padded)
            assert [one["id"] for one in line[key]] == expected.ids[0].tolist()
    [note] = log.notes("head_or_body")
    assert note["forgotten"] == note["head"] + note["input"] + note["other_rows"] + note["body"] > 10
    assert note["input"] == 0, "the input rows have not moved"


def test_a_fault_in_one_part_leaves_the_others(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("too much")

    monkeypatch.setattr(extras, "compare_neighbors", fail)
    model = base_model(kit)
    near = {"k": 3, "every_n_checks": 1}
    guard = guarded(
        kit, tokenizer, model, tmp_path, probe=PROBE | {"every_n_steps": 1}, neighbors=near, on_error="warn"
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[guard._checker.prober.ids[:20]] *= 0.1
    with caplog.at_level(logging.WARNING, "vocabguard"):
        for step in (1, 2, 3):
            guard.step(step)
        log = guard.finish()
    said = [record.message for record in caplog.records if "disabled itself" in record.message]
    assert said == ["vocabguard: neighbors disabled itself; the guard continues: MemoryError: too much"]
    assert log.notes("neighbors") == []
    assert len(log.notes("head_or_body")) == 1
    assert [check["step"] for check in log.checks()] == [0, 1, 2, 3]


def test_answers_that_copy_the_prompt_are_counted_where_echo_is_part_of_the_run(
    kit: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that answers every second question with its own tokens, and the others with something else."""
    asked: list[list[int]] = []

    def every_second(_model: Any, prompts: Any, _stops: Any, most: int) -> Any:
        for prompt in prompts:
            asked.append(list(prompt))
            yield list(prompt)[1:6] if len(asked) % 2 else [7] * most

    monkeypatch.setattr(extras, "greedy_answers", every_second)
    rows: Any = [{"input_ids": [9, 10, 11, 12], "labels": [9, 10, 11, 12]}] * 8
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    probe = {"sample": 16, "contexts": {"list": {"k": 4}}}
    found = {}
    for echo in (False, True):
        model = kit.llama(kit.TOKENIZER_ROWS)
        guard = VocabGuard(tokenizer=tokenizer, probe=probe, echo={"enabled": echo}, **kit.QUIET)
        guard.attach(model, kit.sgd(model), total_steps=2, dataloader=loader, inject="collate")
        found[echo] = guard.last.scalars.get("vocabguard/echo/copies")
        guard.finish(check=False)
    assert found == {False: None, True: 0.5}
    assert len(asked) == 16
