"""A hand-written loop: attach, step, finish; what the guard says equals what plain loops over the run give."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerFast

from vocabguard import ConfigError, RunLog, VocabGuard
from vocabguard.results import NotApplicable, RowDrift

STEPS = 6
EAGER = {"drift": {"every_n_steps": 2}, "exposure": {"push_every_n_steps": 1}}


def cosines(before: Any, now: Any) -> Any:
    return cosine_similarity(before.double(), now.double(), dim=1)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_cosines_and_the_run_folder(kit: Any, tmp_path: Path, tied: bool) -> None:
    model, data = kit.llama(tied=tied), kit.batches(STEPS)
    optimizer, base = kit.sgd(model), kit.copy_of(model)
    guard = VocabGuard(**EAGER, **kit.QUIET)
    watch = guard.attach(model, optimizer, total_steps=STEPS, run_dir=tmp_path / "run")
    kit.loop(guard, model, optimizer, data)
    log = guard.finish()

    assert watch.head.tied == watch.embedding.tied == tied
    assert (watch.head.rows, watch.head.width, watch.live) == (kit.ROWS, 16, kit.ROWS)
    now, expected = model.state_dict(), kit.naive_counts(data)
    rows = RunLog.open(tmp_path / "run").rows()
    for name, counts in expected.items():
        assert rows[f"exposure/{name}"].tolist() == counts
    for name, key in (("head", "lm_head.weight"), ("embedding", "model.embed_tokens.weight")):
        torch.testing.assert_close(rows[f"{name}/cosine"].double(), cosines(base[key], now[key]), atol=1e-6, rtol=0)
    assert torch.equal(base["lm_head.weight"], base["model.embed_tokens.weight"]) == tied

    assert log.row_steps == (STEPS,)
    assert [check["step"] for check in log.checks()] == [0, 2, 4, 6]
    last = log.checks()[-1]["scalars"]
    cosine = cosines(base["lm_head.weight"], now["lm_head.weight"])
    assert last["vocabguard/head/cosine_mean"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert last["vocabguard/head/below_0.95"] == pytest.approx((cosine < 0.95).double().mean().item())
    assert last["vocabguard/head/below_0.95"] > 0
    never = [token for token, count in enumerate(expected["data_target"]) if count == 0]
    assert last["vocabguard/exposure/never"] == pytest.approx(len(never) / kit.ROWS)
    assert last["vocabguard/head/never/cosine_min"] == pytest.approx(cosine[never].min().item(), abs=1e-6)
    assert log.scalar("head/cosine_mean")[1][0] == pytest.approx(1.0, abs=1e-6)


def test_alerts_are_in_the_run_folder(kit: Any, tmp_path: Path) -> None:
    model = kit.llama()
    optimizer = kit.sgd(model)
    seen: list[Any] = []
    rule = {"metric": "head/cosine_min", "op": "<", "threshold": 0.9999, "actions": ["tell"]}
    guard = VocabGuard(alerts={"moved": rule}, actions={"tell": seen.append}, **EAGER, **kit.QUIET)
    guard.attach(model, optimizer, total_steps=4, run_dir=tmp_path)
    kit.loop(guard, model, optimizer, kit.batches(4))
    log = guard.finish()
    fired = [alert for alert in log.alerts() if alert.rule == "moved"]
    assert [(alert.step, alert.state) for alert in fired] == [(2, "firing")]
    assert seen == fired
    assert fired[0].value == log.checks()[1]["scalars"]["vocabguard/head/cosine_min"]
    assert "moved" in log.checks()[-1]["firing"]
    assert log.checks()[-1]["scalars"]["vocabguard/alerts/firing"] == len(guard.last.firing)


def test_tensorboard_has_the_documented_keys(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = kit.sgd(model)
    guard = VocabGuard(tokenizer=tokenizer, probe={"sample": 8}, log={"console": False}, on_error="raise", **EAGER)
    guard.attach(model, optimizer, total_steps=2, run_dir=tmp_path)
    kit.loop(guard, model, optimizer, kit.batches(2, kit.TOKENIZER_ROWS))
    log = guard.finish()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    keys = {tag.replace("-detail-", "/").replace("-detail/", "/") for tag in tags}
    assert len(keys) == len(tags)
    rows = ("cosine_mean", "cosine_min", "cosine_p01", "residual_p01", "below_0.95", "below_0.90")
    parts = ("", "ja/", "latin/", "never/", "1-4/")
    assert {
        f"vocabguard/{name}/{part}{key}" for name in ("head", "embedding") for part in parts for key in rows
    } <= keys
    assert {f"vocabguard/exposure/{name}" for name in ("never", "1-4", "5-19", "20+", "push_share")} <= keys
    assert {"vocabguard/alerts/firing", "vocabguard/overhead"} <= keys
    # The chosen ones first, and where each rule stands last.
    first = {f"vocabguard/{key}" for key in guard.config.log.keys}
    assert {tag for tag in tags if tag.startswith("vocabguard/")} == first & keys
    assert {"vocabguard/head/below_0.95", "vocabguard/alerts/firing", "vocabguard/exposure/never"} <= first & keys
    assert {tag for tag in tags if tag.startswith("vocabguard-detail-")} == {
        f"vocabguard-detail-alerts/{rule}" for rule in guard.config.alerts
    } & tags
    value = events.Scalars("vocabguard-detail/head/cosine_mean")
    assert [(event.step, event.value) for event in value] == [
        (check["step"], pytest.approx(check["scalars"]["vocabguard/head/cosine_mean"])) for check in log.checks()
    ]
    assert {"vocabguard/head/cosine", "vocabguard/embedding/cosine"} <= set(events.Tags()["histograms"])


def test_a_given_writer_is_used_and_left_open(kit: Any, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model = kit.llama()
    optimizer = kit.sgd(model)
    with SummaryWriter(str(tmp_path / "own")) as writer:
        guard = VocabGuard(log={"console": False}, on_error="raise", **EAGER)
        guard.attach(model, optimizer, total_steps=2, writer=writer, run_dir=tmp_path / "run")
        kit.loop(guard, model, optimizer, kit.batches(2))
        guard.finish()
        writer.add_scalar("mine", 1.0)
    events = EventAccumulator(str(tmp_path / "own"))
    events.Reload()
    assert {"mine", "vocabguard/head/below_0.95"} <= set(events.Tags()["scalars"])
    assert not list((tmp_path / "run").glob("events.*"))


def test_the_console_tells_preflight_and_a_verdict_each_check(kit: Any, tokenizer: Any, capsys: Any) -> None:
    data = kit.batches(4, kit.TOKENIZER_ROWS)
    examples = [{name: value[row] for name, value in batch.items()} for batch in data for row in range(3)]
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = kit.sgd(model)
    guard = VocabGuard(tokenizer=tokenizer, probe={"sample": 8}, on_error="raise", **EAGER)
    watch = guard.attach(
        model, optimizer, total_steps=4, dataloader=torch.utils.data.DataLoader(examples, batch_size=3)
    )
    start = capsys.readouterr().out
    live = guard.table.live
    targets = torch.tensor(kit.naive_counts(data, kit.TOKENIZER_ROWS)["data_target"])
    never = int((live & (targets == 0)).sum())
    assert 0 < never < watch.live
    assert f"{watch.live:,} live tokens" in start
    assert f"{never:,}" in start
    kit.loop(guard, model, optimizer, data)
    running = capsys.readouterr().out
    assert [line.split(":")[0] for line in running.splitlines() if line.startswith("vocabguard step")] == [
        "vocabguard step 2",
        "vocabguard step 4",
    ]
    assert "never a target" in running
    assert guard.finish() is None, "without a run_dir nothing is written"
    assert "worst tokens" in capsys.readouterr().out


def test_quiet_when_asked(kit: Any, capsys: Any) -> None:
    model = kit.llama()
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model)
    guard.finish()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_torch_model(kit: Any, tied: bool) -> None:
    """Named matrices, no tokenizer, labels told by `observe`."""
    model, data = kit.Plain(tied=tied), kit.batches(3)
    optimizer, base = kit.sgd(model), kit.copy_of(model)
    guard = VocabGuard(matrices=kit.PLAIN, **EAGER, **kit.QUIET)
    watch = guard.attach(model, optimizer, total_steps=3)
    assert watch.head.tied is tied
    assert "tokenizer" in watch.probe.reason
    assert watch.notes[0].startswith("No tokenizer: ")
    for step, batch in enumerate(data, start=1):
        logits = model(batch["input_ids"])[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
        guard.observe(batch["input_ids"], batch["labels"])
        optimizer.step()
        guard.step(step)
        optimizer.zero_grad()
    guard.finish()
    found = guard.last.exposure
    assert found.data_target.tolist() == kit.naive_counts(data)["data_target"]
    assert found.inputs.sum() == sum(batch["input_ids"].numel() for batch in data), "no mask was told"
    assert found.pull.sum() > 0
    torch.testing.assert_close(
        guard.last.head.cosine.double(), cosines(base["out.weight"], model.out.weight.detach()), atol=1e-6, rtol=0
    )


def test_echo_rows_are_counted_apart(kit: Any) -> None:
    model = kit.Plain()
    guard = VocabGuard(matrices=kit.PLAIN, **kit.QUIET)
    guard.attach(model)
    guard.observe(None, torch.tensor([[1, 2, 2], [1, 3, 3]]), echo_mask=torch.tensor([False, True]))
    guard.step(1)
    found = guard.check().exposure
    assert (found.data_target[2], found.echo_target[3], found.data_target[3], found.echo_target[2]) == (2, 2, 0, 0)


@pytest.mark.parametrize("matrices", [{"head": "out"}, {"embedding": "words"}])
def test_one_matrix_alone(kit: Any, matrices: dict[str, str]) -> None:
    model = kit.Plain()
    guard = VocabGuard(matrices=matrices, **kit.QUIET)
    guard.attach(model)
    guard.finish()
    watched, other = ("head", "embedding") if "head" in matrices else ("embedding", "head")
    assert isinstance(getattr(guard.last, watched), RowDrift)
    assert isinstance(getattr(guard.last, other), NotApplicable)
    assert f"matrices.{other}" in getattr(guard.watch, other).reason
    assert f"vocabguard/{watched}/cosine_mean" in guard.latest
    assert len(guard.last.worst) == 20


def test_nothing_to_watch_is_refused(kit: Any) -> None:
    with pytest.raises(ConfigError, match="matrices: nothing to watch in Plain") as refused:
        VocabGuard(**kit.QUIET).attach(kit.Plain())
    assert str(refused.value) == (
        "matrices: nothing to watch in Plain; name its modules: matrices.head=out (Linear, 64 rows), "
        "matrices.embedding=words (Embedding, 64 rows)"
    )
    with pytest.raises(ConfigError, match="has no get_output_embeddings"):
        VocabGuard(**kit.QUIET).attach(torch.nn.Linear(3, 3))


def test_what_is_proposed_works(kit: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        VocabGuard(**kit.QUIET).attach(kit.Plain())
    overrides = re.findall(r"matrices\.\w+=\S+", str(refused.value))
    guard = VocabGuard(overrides=overrides, **kit.QUIET)
    watch = guard.attach(kit.Plain())
    guard.finish()
    assert (watch.head.rows, watch.embedding.rows) == (64, 64)


def test_a_missing_head_is_proposed_where_the_inputs_are_named(kit: Any) -> None:
    guard = VocabGuard(matrices={"embedding": "words"}, **kit.QUIET)
    watch = guard.attach(kit.Plain())
    guard.finish()
    assert watch.head.reason.endswith("; it may be matrices.head=out (Linear, 64 rows)")


def test_a_module_that_does_not_exist_is_refused(kit: Any) -> None:
    with pytest.raises(ConfigError, match=r"matrices.head is 'output'.*allowed.*out"):
        VocabGuard(matrices={"head": "output"}, **kit.QUIET).attach(kit.Plain())


@pytest.mark.parametrize("also_embedding", [False, True])
def test_a_frozen_head_is_not_applicable_and_the_probe_still_runs(
    kit: Any, tokenizer: Any, tmp_path: Path, also_embedding: bool
) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(not also_embedding)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    guard = VocabGuard(tokenizer=tokenizer, probe={"sample": 8, "watch": [300]}, **EAGER, **kit.QUIET)
    watch = guard.attach(model, optimizer, total_steps=2, run_dir=tmp_path)
    data = kit.batches(2, kit.TOKENIZER_ROWS)
    kit.loop(guard, model, optimizer, data)
    log = guard.finish()
    assert "frozen" in watch.head.reason
    assert isinstance(watch.embedding, NotApplicable) == also_embedding
    assert watch.probe is None
    assert guard.last.probe is not None
    assert "vocabguard/probe/probability_mean" in guard.last.scalars
    assert "vocabguard/head/cosine_mean" not in guard.last.scalars
    assert guard.last.exposure.data_target.tolist() == kit.naive_counts(data, kit.TOKENIZER_ROWS)["data_target"]
    assert "frozen" in log.meta["watch"]["head"]["not_applicable"]
    assert math.isnan(guard.last.watched[0].cosine) == also_embedding


def test_a_wrapped_frozen_model_is_found(kit: Any) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **batch: Any) -> Any:
            return self.module(**batch)

    model = kit.llama()
    for matrix in (model.lm_head, model.model.embed_tokens):
        matrix.weight.requires_grad_(False)
    guard = VocabGuard(**kit.QUIET)
    assert guard.attach(Wrapper(model)) is not None
    assert guard.last.exposure.data_target.shape == (kit.ROWS,)


def test_a_tokenizer_larger_than_the_model_is_told(kit: Any, tokenizer: Any, caplog: Any) -> None:
    model = kit.llama()
    guard = VocabGuard(tokenizer=tokenizer, probe={"enabled": False}, **kit.QUIET)
    guard.attach(model, kit.sgd(model))
    (said,) = [record.getMessage() for record in caplog.records if "ids of the tokenizer" in record.getMessage()]
    assert "8096 ids of the tokenizer have no row (64 and above)" in said
    assert "model.resize_token_embeddings(len(tokenizer))" in said
    assert len(guard.table) == 64


def test_padded_rows_are_not_live_and_raise_no_alarm(kit: Any, tokenizer: Any) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    unasked = {"no_targets": {"enabled": False}}
    guard = VocabGuard(tokenizer=tokenizer, probe={"enabled": False}, alerts=unasked, **kit.QUIET)
    guard.attach(model)
    with torch.no_grad():
        model.lm_head.weight[8160:].neg_()
        model.lm_head.weight[8170] = torch.nan
    guard.step(1)
    found = guard.check()
    assert not guard.table.live[8160:].any()
    torch.testing.assert_close(found.head.cosine[8160:8170], -torch.ones(10))
    assert found.scalars["vocabguard/head/below_0.95"] == 0
    assert found.scalars["vocabguard/head/nonfinite_rows"] == 0
    assert found.firing == ()


@pytest.mark.parametrize("told_apart", [True, False])
def test_never_trained_rows_raise_no_alarm(kit: Any, tokenizer: Any, told_apart: bool) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    ids = tokenizer.convert_tokens_to_ids(["and", "que", "der"])
    assert len(set(ids)) == 3
    assert None not in ids
    with torch.no_grad():
        direction = torch.randn(16)
        for rows in (torch.arange(8160, 8192), torch.tensor(ids)):
            model.model.embed_tokens.weight[rows] = 1e-4 * torch.randn(len(rows), 16)
            model.lm_head.weight[rows] = direction + 1e-4 * torch.randn(len(rows), 16)
    rule = {"metric": "head/cosine_min", "op": "<", "threshold": 0.9}
    guard = VocabGuard(
        tokenizer=tokenizer,
        probe={"enabled": False},
        untrained={"enabled": told_apart},
        alerts={"low": rule, "no_targets": {"enabled": False}},
        **kit.QUIET,
    )
    watch = guard.attach(model)
    with torch.no_grad():
        model.lm_head.weight[ids] *= -1
    guard.step(1)
    found = guard.check()
    assert watch.never_trained == (3 if told_apart else 0)
    assert found.firing == (() if told_apart else ("low",))
    assert (min(report.cosine for report in found.worst) > 0.9) == told_apart


def test_that_no_row_is_known_to_be_unused_is_said(kit: Any) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("a", "b", "c", "<|end|>"))}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    told = {}
    for rows in (6, 40):
        guard = VocabGuard(tokenizer=tokenizer, probe={"enabled": False}, **kit.QUIET)
        watch = guard.attach(kit.llama(rows))
        guard.finish()
        told[rows] = [note for note in watch.notes if "Under-trained" in note]
    said = "Under-trained tokens not measured: 2 rows are known to be unused, 4 are needed; only rows of tiny norm"
    assert told == {6: [f"{said} are set apart."], 40: []}


def as_zero_3(model: Any) -> None:
    """Leave of the matrices' parameters what DeepSpeed does between forward passes, in a process by itself."""
    for module in (model.lm_head, model.model.embed_tokens):
        rows = module.weight.detach()
        module.weight = torch.nn.Parameter(torch.empty(0))
        module.weight.ds_shape, module.weight.ds_tensor = rows.shape, rows.flatten().clone()
        module.weight.ds_zero_partition_rank = 0


def test_zero_3_is_followed_where_its_rows_lie(kit: Any) -> None:
    model = kit.llama()
    as_zero_3(model)
    guard = VocabGuard(**kit.QUIET, drift={"every_n_steps": 1}, probe={"enabled": False})
    watch = guard.attach(model, None)
    assert watch is not None
    assert (watch.head.rows, watch.head.width) == (64, 16)
    rows = model.lm_head.weight.ds_tensor
    before = rows.clone().view(64, 16)
    rows[5 * 16 : 6 * 16] = -rows[5 * 16 : 6 * 16]
    rows[16:32] += 0.1
    found = guard.step(1).head.cosine  # type: ignore[union-attr]
    naive = torch.nn.functional.cosine_similarity(before.double(), rows.view(64, 16).double(), dim=1)
    torch.testing.assert_close(found.double(), naive, rtol=0, atol=1e-6)
    assert found[5] == -1


def test_hold_under_zero_3_is_off_in_words(kit: Any) -> None:
    model, hold = kit.llama(), {"enabled": True}
    as_zero_3(model)
    with pytest.raises(ConfigError, match=r"hold: ZeRO stage 3 has the output rows .*; allowed: on_error: warn"):
        VocabGuard(**kit.QUIET, probe={"enabled": False}, hold=hold).attach(model, kit.sgd(model))
    guard = VocabGuard(**kit.QUIET | {"on_error": "warn"}, probe={"enabled": False}, hold=hold)
    watch = guard.attach(model, kit.sgd(model))
    assert watch is not None, "training goes on, and so does the guard"
    assert any(note.startswith("Hold is off: ZeRO stage 3") for note in watch.notes)


def test_rows_that_are_nowhere_are_refused_in_words(kit: Any) -> None:
    model = kit.llama()
    for module in (model.lm_head, model.model.embed_tokens):
        module.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ConfigError, match=r"matrices: the rows of LlamaForCausalLM cannot be counted: .* no matrix"):
        VocabGuard(**kit.QUIET).attach(model, None)


def test_what_a_check_cannot_compute_is_nan_and_not_the_value_before(kit: Any, tmp_path: Path) -> None:
    model = kit.llama()
    guard = VocabGuard(drift={"every_n_steps": 1}, **kit.QUIET)
    guard.attach(model, kit.sgd(model), total_steps=3, run_dir=tmp_path)
    keys = {key for key in guard.latest if key.startswith("vocabguard/head/") and not key.endswith("_rows")}
    assert "vocabguard/head/below_0.95" in keys
    assert not any(math.isnan(guard.latest[key]) for key in keys)
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.fill_(math.nan)
    guard.step(1)
    assert all(math.isnan(guard.latest[key]) for key in keys)
    assert guard.latest["vocabguard/head/nonfinite_rows"] == kit.ROWS
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)
    guard.step(2)
    assert guard.latest["vocabguard/head/below_0.95"] == 0.0


@pytest.mark.parametrize("call", ["step", "observe", "observe_batch"])
def test_a_loop_that_forgot_to_attach_is_told(call: str) -> None:
    guard = VocabGuard()
    given = {"step": (1,), "observe": (None, torch.zeros(1, 2).long()), "observe_batch": ({},)}[call]
    with pytest.raises(ConfigError, match=rf"^{call}\(\) before attach\(\); call guard\.attach\("):
        getattr(guard, call)(*given)


@pytest.mark.parametrize("tokenizer", ["gpt2", Path("gpt2")])
def test_a_tokenizers_name_is_no_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer is 'gpt2'; .* AutoTokenizer.from_pretrained\('gpt2'\)"):
        VocabGuard(tokenizer=tokenizer)
