"""Nothing of the guard ends a run: beside each guarded run a bare twin with the same losses and weights."""

from __future__ import annotations

import copy
import errno
import io
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from vocabguard import ConfigError
from vocabguard.integrations import huggingface
from vocabguard.integrations import lightning as lightning_adapter

STEPS, SAVED = 6, 3
LOG = {"log": {"console": False, "tensorboard": False}}
SMALL = {"drift": {"every_n_steps": 2}, "probe": {"enabled": False}, "preflight": {"enabled": False}, **LOG}


def guard_for(kit: Any, trainer: str, tokenizer: Any, **options: Any) -> Any:
    """A callback as users have it: faults are contained, not raised."""
    return kit.CALLBACKS[trainer](tokenizer=tokenizer, **(SMALL | options))


def assert_same(bare: Any, guarded: Any) -> None:
    assert bare.losses == guarded.losses
    assert len(set(bare.losses)) > 1
    weights = guarded.model.state_dict()
    assert [name for name, value in bare.model.state_dict().items() if not torch.equal(value, weights[name])] == []


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vocabguard"]


class MeddlerHF(TrainerCallback):
    """Does something to the model after one step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


class MeddlerLightning(lightning.Callback):
    """The same."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act, self.done = step, act, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.act(pl_module.model)


MEDDLERS = {"hf": MeddlerHF, "lightning": MeddlerLightning}


# -- other callbacks ---------------------------------------------------------------------------------------------------


def deep_copy(model: Any) -> None:
    """An EMA callback's copy, which must be one of the model alone."""
    other = copy.deepcopy(model).train()
    ids = torch.tensor([[1, 2, 3]])
    other(input_ids=ids, labels=ids).loss.backward()


def averaged(model: Any) -> None:
    torch.optim.swa_utils.AveragedModel(model).update_parameters(model)


def whole_model(model: Any) -> None:
    """``torch.save(model)`` pickles hooks too."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids = torch.tensor([[1, 2, 3]])
    torch.load(file, weights_only=False).train()(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("act", [deep_copy, averaged, whole_model], ids=lambda act: act.__name__)
@pytest.mark.parametrize("echo", [False, True])
def test_a_copy_of_the_model(kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, act: Any, echo: bool) -> None:
    rows = kit.random_rows(24)

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.RUNS[trainer_name](
            kit.tiny_model(), rows, tokenizer, tmp_path / folder, callbacks=(*callbacks, MEDDLERS[trainer_name](3, act))
        )

    options = {"echo": {"enabled": True}, "preflight": {"enabled": True}} if echo else {}
    guarded = guard_for(kit, trainer_name, tokenizer, **options, on_error="raise")
    found = run("guarded", guarded)
    if not echo:
        assert_same(run("bare"), found)
    assert guarded.guard.last.exposure.data_target.tolist() == kit.naive_counts(rows, kit.BATCH)[0]
    assert guarded.guard.last.step == STEPS


@pytest.mark.skipif(not hasattr(lightning.pytorch.callbacks, "WeightAveraging"), reason="came with Lightning 2.6")
@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_weights_beside(kit: Any, tokenizer: Any, tmp_path: Path, first: bool) -> None:
    """Lightning's own callback swaps the average in for validations, and at the end for good."""
    rows = kit.random_rows(24)

    def run(folder: str, *others: Any) -> Any:
        average = lightning.pytorch.callbacks.WeightAveraging()
        ordered = (average, *others) if first else (*others, average)
        return kit.run_lightning(
            kit.tiny_model(), rows, tokenizer, tmp_path / folder, callbacks=ordered, validate=True, val_check_interval=3
        )

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.head = pl_module.model.lm_head.weight.detach().clone()

    guarded, keep = guard_for(kit, "lightning", tokenizer, on_error="raise", forecast={"enabled": True}), Keep()
    found = run("guarded", guarded, keep)
    assert_same(run("bare"), found)
    assert not torch.equal(keep.head, found.model.lm_head.weight)
    # The check of the last step is one of the weights that were trained.
    last = guarded.guard.last
    assert last.step == STEPS
    cosine = kit.naive_cosine(found.base["lm_head.weight"], keep.head)
    torch.testing.assert_close(last.head.cosine.double(), cosine, atol=1e-6, rtol=0)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_state_that_cannot_be_written(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that has just become full."""
    save = torch.save

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if huggingface.STATE_FILE in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    bare = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path / "bare", **saving)
    guarded = guard_for(kit, "hf", tokenizer)
    found = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path / "guarded", callbacks=(guarded,), **saving)
    assert_same(bare, found)
    assert guarded.guard.failure is None
    assert guarded.guard.last.step == STEPS
    first, second = said(caplog)
    assert "No space left on device" in first
    assert "a run resumed from there starts drift and counts anew" in first
    assert "checkpoint-6" in second
    assert not [*tmp_path.rglob(f"*{huggingface.STATE_FILE}*")]


def test_checkpoints_in_a_folder_of_a_trial(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hyperparameter search saves each trial below ``run-<number>``."""
    monkeypatch.setattr(
        kit.OrderedTrainer, "_get_output_dir", lambda self, trial: str(Path(self.args.output_dir) / "run-0")
    )
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    bare = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path / "bare", **saving)
    guarded = guard_for(kit, "hf", tokenizer, on_error="raise")
    found = kit.run_hf(kit.tiny_model(), rows, tokenizer, tmp_path / "guarded", callbacks=(guarded,), **saving)
    assert_same(bare, found)
    assert said(caplog) == []
    written = sorted(str(path.relative_to(tmp_path / "guarded")) for path in tmp_path.rglob(huggingface.STATE_FILE))
    assert written == ["run-0/checkpoint-3/vocabguard.pt", "run-0/checkpoint-6/vocabguard.pt"]


class StopHF(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SAVED:
            control.should_training_stop = True


class StopLightning(lightning.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == SAVED:
            trainer.should_stop = True


def first_half(kit: Any, trainer: str, tokenizer: Any, folder: Path, callbacks: tuple[Any, ...], **options: Any) -> Any:
    rows = kit.random_rows(24)
    if trainer == "hf":
        return kit.run_hf(
            kit.tiny_model(), rows, tokenizer, folder, callbacks=(*callbacks, StopHF()), save_strategy="steps",
            save_steps=SAVED,
        )  # fmt: skip
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    return kit.run_lightning(
        kit.tiny_model(), rows[: SAVED * kit.BATCH], tokenizer, folder, steps=SAVED, enable_checkpointing=True,
        callbacks=(*callbacks, saves),
    )  # fmt: skip


def second_half(kit: Any, trainer: str, tokenizer: Any, folder: Path, callbacks: tuple[Any, ...]) -> Any:
    rows = kit.random_rows(24)
    if trainer == "hf":
        return kit.run_hf(kit.tiny_model(), rows, tokenizer, folder, callbacks=callbacks, resume=True)
    return kit.run_lightning(
        kit.tiny_model(), rows[SAVED * kit.BATCH :], tokenizer, folder, callbacks=callbacks,
        checkpoint=str(folder / f"step={SAVED}.ckpt"),
    )  # fmt: skip


needs_no_saver = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")


def state_of(folder: Path, trainer: str) -> Path:
    return folder / (f"checkpoint-{SAVED}/vocabguard.pt" if trainer == "hf" else f"step={SAVED}.ckpt")


def changed(folder: Path, trainer: str, change: Any) -> None:
    """Change the guard's state inside a checkpoint."""
    path = state_of(folder, trainer)
    whole = torch.load(path, weights_only=False)
    state = whole if trainer == "hf" else whole["callbacks"]["VocabGuardCallback"]
    change(state)
    torch.save(whole, path)


def without(*names: str) -> Any:
    def change(state: dict[str, Any]) -> None:
        for name in names:
            state.pop(name)

    return change


DAMAGES = {
    "empty": lambda state: state.clear(),
    "no counts": without("exposure"),
    "no cadence": without("cadence"),
    "no step": without("step"),
    "words for counts": lambda state: state.update(exposure={"data_target": "many"}),
    "a list for baselines": lambda state: state.update(baselines=[1, 2]),
    "short counts": lambda state: state["exposure"].update(last_target=torch.zeros(3)),
    "no alerts": lambda state: state.update(alerts=None),
    "words for a step": lambda state: state.update(step="three"),
}


@needs_no_saver
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, callbacks in {"bare": (), "guarded": (guard_for(kit, trainer_name, tokenizer),)}.items():
        first_half(kit, trainer_name, tokenizer, tmp_path / name, callbacks)
    changed(tmp_path / "guarded", trainer_name, DAMAGES[damage])
    bare = second_half(kit, trainer_name, tokenizer, tmp_path / "bare", ())
    guarded = guard_for(kit, trainer_name, tokenizer)
    found = second_half(kit, trainer_name, tokenizer, tmp_path / "guarded", (guarded,))
    assert_same(bare, found)
    assert guarded.guard.failure is None, guarded.guard.failure
    assert guarded.guard.last.step == STEPS
    (line,) = said(caplog)
    assert f"drift and counts restart from this checkpoint (step {SAVED})" in line
    assert guarded.guard.last.exposure.steps == STEPS - SAVED
    kit.assert_counts(
        guarded.guard.last.exposure,
        kit.naive_counts(kit.random_rows(24)[SAVED * kit.BATCH :], kit.BATCH, first_step=SAVED + 1),
    )


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + b"\x00" * 60])
def test_a_damaged_state_file(
    kit: Any, tokenizer: Any, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first_half(kit, "hf", tokenizer, tmp_path, (guard_for(kit, "hf", tokenizer),))
    state_of(tmp_path, "hf").write_bytes(content)
    guarded = guard_for(kit, "hf", tokenizer)
    second_half(kit, "hf", tokenizer, tmp_path, (guarded,))
    assert guarded.guard.last.step == STEPS
    (line,) = said(caplog)
    assert "vocabguard.pt cannot be read" in line
    assert f"drift and counts restart from this checkpoint (step {SAVED})" in line


def cut_short(folder: Path) -> None:
    path = folder / "baseline-head.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_rows(folder: Path) -> None:
    shutil.copy(folder / "baseline-embedding.safetensors", folder / "baseline-head.safetensors")


LOSSES = {
    "folder gone": shutil.rmtree,
    "baseline gone": lambda folder: (folder / "baseline-head.safetensors").unlink(),
    "baseline cut short": cut_short,
    "another baseline": other_rows,
}


@needs_no_saver
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_baseline(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, callbacks in {"bare": (), "guarded": (guard_for(kit, trainer_name, tokenizer),)}.items():
        half = first_half(kit, trainer_name, tokenizer, tmp_path / name, callbacks)
    start = half.model.lm_head.weight.detach().clone()
    LOSSES[loss](callbacks[0].guard.run_dir)
    bare = second_half(kit, trainer_name, tokenizer, tmp_path / "bare", ())
    guarded = guard_for(kit, trainer_name, tokenizer)
    found = second_half(kit, trainer_name, tokenizer, tmp_path / "guarded", (guarded,))
    assert_same(bare, found)
    assert guarded.guard.failure is None, guarded.guard.failure
    (line,) = said(caplog)
    assert f"the baseline of the {'head and the embedding' if loss == 'folder gone' else 'head'} is lost" in line
    assert f"its drift restarts from this checkpoint (step {SAVED}), counts go on" in line
    kit.assert_counts(guarded.guard.last.exposure, kit.naive_counts(kit.random_rows(24), kit.BATCH))
    cosine = kit.naive_cosine(start, found.model.lm_head.weight.detach())
    torch.testing.assert_close(guarded.guard.last.head.cosine.double(), cosine, atol=1e-6, rtol=0)


@needs_no_saver
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "groups": 3}'])
def test_a_damaged_run_folder(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = guard_for(kit, trainer_name, tokenizer)
    first_half(kit, trainer_name, tokenizer, tmp_path, (before,))
    (before.guard.run_dir / "run.json").write_text(content, encoding="utf-8")
    guarded = guard_for(kit, trainer_name, tokenizer)
    second_half(kit, trainer_name, tokenizer, tmp_path, (guarded,))
    assert guarded.guard.failure is None, guarded.guard.failure
    assert guarded.guard.run_dir == before.guard.run_dir.with_name("vocabguard-2")
    (line,) = said(caplog)
    assert "run.json" in line
    assert str(guarded.guard.run_dir) in line
    kit.assert_counts(guarded.guard.last.exposure, kit.naive_counts(kit.random_rows(24), kit.BATCH))


# -- the vocabulary ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_rows(
    kit: Any, tmp_path: Path, trainer_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    tokenizer.add_special_tokens({"pad_token": "<newpad>"})
    tokenizer.add_tokens(["foobarium"])
    rows = [dict(row) for row in kit.random_rows(1) * 24]  # of one length: nothing is padded

    def run(folder: str, *callbacks: Any) -> Any:
        model = kit.tiny_model(rows=8160)
        return kit.RUNS[trainer_name](model, rows, tokenizer, tmp_path / folder, callbacks=callbacks)

    guarded = guard_for(kit, trainer_name, tokenizer, probe={"sample": 8}, preflight={"enabled": True})
    found = run("guarded", guarded)
    assert_same(run("bare"), found)
    assert guarded.guard.failure is None
    assert guarded.guard.last.probe is not None
    assert len(guarded.guard.table) == 8160
    (line,) = said(caplog)
    assert "2 ids of the tokenizer have no row (8160 and above)" in line
    assert "model.resize_token_embeddings(len(tokenizer))" in line


@pytest.mark.parametrize("rows", [8200, 8180])
def test_resuming_after_a_resize(
    kit: Any, tokenizer: Any, tmp_path: Path, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens are added to a checkpoint, whose optimizer is dropped."""
    options = {
        "probe": {"sample": 8, "every_n_steps": 2}, "echo": {"enabled": True}, "preflight": {"enabled": True},
        "hold": {"enabled": True}, "forecast": {"enabled": True},
    }  # fmt: skip
    half = first_half(kit, "hf", tokenizer, tmp_path, (guard_for(kit, "hf", tokenizer, **options),))
    base, data = half.base["lm_head.weight"], kit.random_rows(24)
    folder = tmp_path / f"checkpoint-{SAVED}"
    half.model.resize_token_embeddings(rows, mean_resizing=False)
    half.model.save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    guarded = guard_for(kit, "hf", tokenizer, **options)
    model = kit.tiny_model()
    model.resize_token_embeddings(rows, mean_resizing=False)
    found = kit.run_hf(model, data, tokenizer, tmp_path, callbacks=(guarded,), resume=True)
    assert guarded.guard.failure is None
    assert said(caplog) == []
    last, kept = guarded.guard.last, min(rows, kit.ROWS)
    assert last.step == STEPS
    cosine = kit.naive_cosine(base[:kept], found.model.lm_head.weight.detach()[:kept])
    torch.testing.assert_close(last.head.cosine[:kept].double(), cosine, atol=1e-6, rtol=0)
    assert last.head.cosine[kept:].isnan().all()
    assert last.exposure.data_target[:kept].tolist() == kit.naive_counts(data, kit.BATCH)[0][:kept]
    assert not guarded.guard.table.live[kit.ROWS :].any()


# -- settings of trainers ----------------------------------------------------------------------------------------------


class Endless(IterableDataset):  # type: ignore[type-arg]
    """Without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        while True:
            yield from self.rows


def test_data_without_a_length_and_rates_by_epoch(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    class ByEpoch(kit.Module):  # type: ignore[name-defined, misc]
        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            found["lr_scheduler"]["interval"] = "epoch"
            return found

    rows = kit.random_rows(24)

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.run_lightning(
            kit.tiny_model(), Endless(rows), tokenizer, tmp_path / folder, callbacks=callbacks, module=ByEpoch
        )

    guarded = guard_for(kit, "lightning", tokenizer, on_error="raise")
    assert_same(run("bare"), run("guarded", guarded))
    assert guarded.guard.last.step == STEPS


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize("echo", [False, True])
def test_four_persistent_workers(kit: Any, tokenizer: Any, tmp_path: Path, echo: bool) -> None:
    rows = kit.random_rows(16)
    options = {"echo": {"enabled": True}, "preflight": {"enabled": True}} if echo else {}
    guarded = guard_for(kit, "hf", tokenizer, on_error="raise", **options)

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.run_hf(
            kit.tiny_model(), rows, tokenizer, tmp_path / folder, callbacks=callbacks, steps=8,
            dataloader_num_workers=4, dataloader_persistent_workers=True,
        )  # fmt: skip

    found = run("guarded", guarded)
    assert guarded.guard.last.exposure.data_target.tolist() == kit.naive_counts(rows + rows, kit.BATCH)[0]
    if echo:
        assert guarded.guard.last.exposure.echo_target.sum() > 0
    else:
        assert_same(run("bare"), found)


def test_two_guards_are_refused_before_step_1(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Lightning itself refuses a second callback of a kind that has no key of its own."""
    two = [guard_for(kit, "hf", tokenizer) for _ in range(2)]
    model = kit.tiny_model()
    with pytest.raises(ConfigError, match=r"another guard watches this model already; allowed: one"):
        kit.run_hf(model, kit.random_rows(24), tokenizer, tmp_path, callbacks=tuple(two))
    two[0].guard.finish(check=False)
    assert not model._forward_pre_hooks


def test_a_run_after_one_that_was_interrupted(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook: the first guard never heard of an end, and the same model goes on."""

    def interrupt(_model: Any) -> None:
        raise RuntimeError("stopped by hand")

    model, rows = kit.tiny_model(), kit.random_rows(24)
    first, second = (guard_for(kit, trainer_name, tokenizer) for _ in range(2))
    with pytest.raises(RuntimeError, match="stopped by hand"):
        kit.RUNS[trainer_name](
            model, rows, tokenizer, tmp_path, callbacks=(first, MEDDLERS[trainer_name](2, interrupt))
        )
    kit.RUNS[trainer_name](model, rows, tokenizer, tmp_path, callbacks=(second,))
    kit.assert_counts(second.guard.last.exposure, kit.naive_counts(rows, kit.BATCH))
    assert first.guard.last.step == 2
    assert not model._forward_pre_hooks
    (line,) = said(caplog)
    assert "the guard of an earlier run still watched this model" in line


# -- faults in the callbacks' own bodies -------------------------------------------------------------------------------


def broken(*_args: Any, **_kwargs: Any) -> Any:
    raise OSError("broken on purpose")


BODIES = [
    ("hf", "_saved", "on_train_begin"), ("hf", "_shared", "on_step_end"), ("hf", "_written", "on_save"),
    ("lightning", "_schedule", "on_train_start"), ("lightning", "_tensorboard", "on_train_start"),
    ("lightning", "_to_loggers", "on_train_start"),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "function", "body"), BODIES)
def test_a_fault_in_a_body_of_a_callback(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer: str, function: str, body: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rows = kit.random_rows(24)
    saving = {"save_strategy": "steps", "save_steps": SAVED} if trainer == "hf" else {}

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.RUNS[trainer](kit.tiny_model(), rows, tokenizer, tmp_path / folder, callbacks=callbacks, **saving)

    bare = run("bare")
    module = {"hf": huggingface, "lightning": lightning_adapter}[trainer]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, broken)
        guarded = guard_for(kit, trainer, tokenizer)
        found = run("guarded", guarded)
    assert_same(bare, found)
    assert guarded.guard.failure == f"{body} failed with OSError: broken on purpose"
    assert len(said(caplog)) == 1
    assert not found.model._forward_pre_hooks
    # The next run of the same callback is guarded again.
    run("again", guarded)
    assert guarded.guard.failure is None
    assert guarded.guard.last.step == STEPS


def test_a_checkpoint_that_a_rule_asks_for_and_the_disk_refuses(
    kit: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, rule = kit.random_rows(24), {"metric": "head/cosine_min", "op": "<", "threshold": 0.99999}

    def run(folder: str, *callbacks: Any) -> Any:
        return kit.run_lightning(kit.tiny_model(), rows, tokenizer, tmp_path / folder, callbacks=callbacks)

    bare = run("bare")
    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", broken)
    guarded = guard_for(kit, "lightning", tokenizer, alerts={"moved": rule | {"actions": ["checkpoint"]}})
    assert_same(bare, run("guarded", guarded))
    assert "broken on purpose" in guarded.guard.failure
