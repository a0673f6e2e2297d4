"""What changes or breaks around a guard in mid-run: losses and weights are those of a bare twin."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vocabguard import RunLog, VocabGuard
from vocabguard.guard.loaders import untouched_rng
from vocabguard.measure.probe import undisturbed

STEPS = 8
CONSOLE = {"log": {"tensorboard": False}}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vocabguard"]


# -- optimizers --------------------------------------------------------------------------------------------------------


def with_optimizer(kit: Any, make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def steps(model: Any, guard: Any) -> Any:
        optimizer = make(model)
        if guard is not None:
            guard.attach(model, optimizer, total_steps=STEPS)
        return kit.loop(guard, model, optimizer, kit.batches(STEPS))

    return steps


def bare_and_guarded(kit: Any, guard: VocabGuard, make: Callable[[Any], Any], rows: int) -> Any:
    """Both in their own order; gives the guarded model."""
    models = []
    losses = []
    for watching in (None, guard):
        model = kit.llama(rows)
        models.append(model)
        losses.append(with_optimizer(kit, make)(model, watching))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1
    weights = models[1].state_dict()
    assert [name for name, value in models[0].state_dict().items() if not torch.equal(value, weights[name])] == []
    return models[1]


class EightBit(torch.optim.Optimizer):
    """Momentum kept as codes of 8 bits with a scale a block, as quantised optimizers keep theirs."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                before = torch.zeros_like(weight)
                if state:
                    before = (state["codes"].float() - 128) * state["scale"][:, None].expand(-1, 16).reshape(
                        weight.shape
                    )
                now = before * 0.9 + weight.grad
                scale = now.reshape(-1, 16).abs().amax(1).clamp(min=1e-12) / 127
                codes = (now.reshape(-1, 16) / scale[:, None]).round() + 128
                state["codes"], state["scale"] = codes.to(torch.uint8).reshape(weight.shape), scale
                weight.sub_(now, alpha=group["lr"])


def adafactor(model: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters(), lr=0.01, scale_parameter=False, relative_step=False)


def torch_adafactor(model: Any) -> Any:
    return torch.optim.Adafactor(model.parameters(), lr=0.01)


def eight_bit(model: Any) -> Any:
    return EightBit(model.parameters())


def bitsandbytes_8bit(model: Any) -> Any:
    found = pytest.importorskip("bitsandbytes")
    return found.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1)


def torchao_8bit(model: Any) -> Any:
    found = pytest.importorskip("torchao.optim")
    return found.AdamW8bit(model.parameters(), lr=0.01, block_size=16)


OPTIMIZERS = [adafactor, torch_adafactor, eight_bit, bitsandbytes_8bit, torchao_8bit]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_optimizers_of_other_kinds(kit: Any, make: Callable[[Any], Any]) -> None:
    rows = 256
    base = kit.copy_of(kit.llama(rows))["lm_head.weight"]
    guard = VocabGuard(drift={"every_n_steps": 2}, **kit.QUIET)
    model = bare_and_guarded(kit, guard, make, rows)
    assert guard.last.exposure.data_target.tolist() == kit.naive_counts(kit.batches(STEPS), rows)["data_target"]
    assert guard.last.exposure.pull.sum() > 0
    cosine = cosine_similarity(base, model.lm_head.weight.detach(), dim=1)
    torch.testing.assert_close(guard.last.head.cosine, cosine, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["freeze", "shared"])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_held_rows_under_them(kit: Any, make: Callable[[Any], Any], mode: str) -> None:
    model = kit.llama(256)
    before, data = kit.copy_of(model)["lm_head.weight"], kit.batches(STEPS)
    guard = VocabGuard(drift={"every_n_steps": 2}, hold={"enabled": True, "mode": mode}, **kit.QUIET)
    optimizer = make(model)
    guard.attach(model, optimizer, total_steps=STEPS)
    losses = kit.loop(guard, model, optimizer, data)
    assert torch.tensor(losses).isfinite().all()
    never = torch.tensor(kit.naive_counts(data, 256)["data_target"]) == 0
    moved = model.lm_head.weight.detach()[never] - before[never]
    if mode == "freeze":
        assert moved.abs().max() == 0
    else:
        torch.testing.assert_close(moved, moved.mean(0).expand_as(moved), atol=1e-5, rtol=0)


def test_another_optimizer_in_mid_run(kit: Any) -> None:
    guard = VocabGuard(drift={"every_n_steps": 1}, exposure={"push_every_n_steps": 1}, **kit.QUIET)
    losses, models = [], []
    for watching in (None, guard):
        model, data = kit.llama(), kit.batches(STEPS)
        optimizer = kit.sgd(model)
        if watching is not None:
            watching.attach(model, optimizer, total_steps=STEPS)
        found = kit.loop(watching, model, optimizer, data[:4])
        if watching is not None:
            before = watching.last.exposure
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step, batch in enumerate(data[4:], start=5):
            found += kit.loop(None, model, optimizer, [batch])
            if watching is not None:
                watching.step(step, optimizer)
        losses.append(found)
        models.append(model)
    assert losses[0] == losses[1]
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    # The step in which it was met for the first time is the last one unread.
    assert guard.last.exposure.push_samples == 7
    assert (guard.last.exposure.pull >= before.pull).all()
    assert guard.last.exposure.pull.sum() > before.pull.sum()


def test_a_forgotten_optimizer_is_told(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.llama()
    guard = VocabGuard(drift={"every_n_steps": 50}, hold={"enabled": True}, **kit.QUIET)
    guard.attach(model, kit.sgd(model))
    kit.loop(guard, model, kit.sgd(model), kit.batches(30))
    (line,) = said(caplog)
    assert "none of the last 20 steps was one of the optimizer that was attached" in line
    assert "gradients are not read, rows are not held" in line
    assert "guard.step(step, optimizer)" in line


def test_hold_ends_where_the_new_optimizer_lacks_the_matrix(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 1}, hold={"enabled": True}, **kit.QUIET | {"on_error": "warn"})
    guard.attach(model, optimizer)
    data = kit.batches(4)
    kit.loop(guard, model, optimizer, data[:2])
    others = [weight for name, weight in model.named_parameters() if "lm_head" not in name]
    optimizer = torch.optim.SGD(others, lr=0.1)
    kit.loop(None, model, optimizer, data[2:3])
    guard.step(3, optimizer)
    assert guard.failure is None
    (line,) = said(caplog)
    assert "hold is off from now on" in line


@pytest.mark.parametrize("hold", [False, True])
def test_steps_that_a_scaler_leaves_out(kit: Any, hold: bool) -> None:
    """Automatic mixed precision skips a step whose gradients are not finite."""
    guard = VocabGuard(
        drift={"every_n_steps": 1}, exposure={"push_every_n_steps": 1}, hold={"enabled": hold, "mode": "freeze"},
        **kit.QUIET,
    )  # fmt: skip
    losses, models, skipped = [], [], 0
    for watching in (None, guard):
        model = kit.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if watching is not None:
            watching.attach(model, optimizer, total_steps=STEPS)
        found = []
        for step, batch in enumerate(kit.batches(STEPS), start=1):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model.train()(**batch).loss
            scaler.scale(loss).backward()
            if step in (2, 3, 6):
                model.lm_head.weight.grad[7, 0] = torch.inf
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            if watching is not None:
                watching.step(step)
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
        models.append(model)
    assert skipped == 6
    assert guard.failure is None
    found = guard.last.exposure
    assert found.data_target.tolist() == kit.naive_counts(kit.batches(STEPS))["data_target"]
    assert found.push_samples == STEPS - 3
    assert found.pull.isfinite().all()
    now = models[1].lm_head.weight.detach()
    if hold:
        never = found.data_target == 0
        assert torch.equal(now[never], kit.llama().lm_head.weight.detach()[never]), "through skipped steps too"
    else:
        assert losses[0] == losses[1]
        assert torch.equal(now, models[0].lm_head.weight)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hold", [False, True])
def test_another_dtype_in_mid_run(kit: Any, tmp_path: Path, dtype: torch.dtype, hold: bool) -> None:
    losses, models = [], []
    guard = VocabGuard(drift={"every_n_steps": 1}, hold={"enabled": hold}, **kit.QUIET)
    for watching in (None, guard):
        model, data = kit.llama(), kit.batches(STEPS)
        optimizer = kit.sgd(model, lr=0.05)
        if watching is not None:
            watching.attach(model, optimizer, total_steps=STEPS, run_dir=tmp_path / "run")
        found = kit.loop(watching, model, optimizer, data[:4])
        model.to(dtype)
        losses.append(found + kit.loop(watching, model, optimizer, data[4:], first=5))
        models.append(model)
    if not hold:
        assert losses[0] == losses[1]
        assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert guard.failure is None
    base = kit.copy_of(kit.llama())["lm_head.weight"]
    cosine = cosine_similarity(base.double(), models[1].lm_head.weight.detach().double(), dim=1)
    torch.testing.assert_close(guard.last.head.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert guard.state_dict()["step"] == STEPS


def lazy_device() -> str:
    """torch's lazy tensors: a device that is not the CPU and that every machine has; no module of torch serves it."""
    from torch._lazy import ts_backend

    with contextlib.suppress(RuntimeError):  # it is on already
        ts_backend.init()
    return "lazy"


@pytest.fixture(params=["cuda", "lazy"])
def other_device(request: pytest.FixtureRequest) -> str:
    """A device that is not the CPU."""
    if request.param == "lazy":
        return lazy_device()
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    return "cuda"


@pytest.mark.parametrize("hold", [False, True])
def test_another_device_in_mid_run(kit: Any, tmp_path: Path, hold: bool, other_device: str) -> None:
    model, data = kit.llama(), kit.batches(STEPS)
    guard = VocabGuard(drift={"every_n_steps": 1}, hold={"enabled": hold}, **kit.QUIET)
    optimizer = kit.sgd(model, lr=0.05)
    guard.attach(model, optimizer, total_steps=STEPS, run_dir=tmp_path / "run")
    base = kit.copy_of(model)["lm_head.weight"]
    kit.loop(guard, model, optimizer, data[:4])
    model.to(other_device)
    moved = [{name: value.to(other_device) for name, value in batch.items()} for batch in data[4:]]
    try:
        kit.llama().to(other_device)(**moved[0])
    except RuntimeError as error:
        pytest.skip(f"this transformers does not run there: {error}")
    kit.loop(guard, model, optimizer, moved, first=5)
    assert guard.failure is None
    cosine = cosine_similarity(base.double(), model.lm_head.weight.detach().cpu().double(), dim=1)
    torch.testing.assert_close(guard.last.head.cosine.double(), cosine, atol=1e-5, rtol=0)


def test_a_model_is_asked_on_a_kind_of_device_that_torch_has_no_module_for(kit: Any) -> None:
    model = kit.llama().to(lazy_device())
    with undisturbed(model):
        assert not model.training
    assert model.training


@pytest.mark.parametrize("used", [False, True])
def test_generators_of_accelerators_that_are_not_in_use_are_let_alone(
    monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    asked: list[list[int]] = []

    @contextlib.contextmanager
    def fork_rng(devices: list[int]) -> Iterator[None]:
        asked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with untouched_rng():
        pass
    assert asked == [[3] if used else []]


# -- standard output ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ascii_output() -> Iterator[Any]:
    found = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with contextlib.redirect_stdout(found):
        yield found
    found.flush()
    found.buffer.getvalue().decode("ascii")


@contextlib.contextmanager
def latin_output() -> Iterator[Any]:
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")) as found:
        yield found


@contextlib.contextmanager
def closed_output() -> Iterator[Any]:
    found = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    found.close()
    with contextlib.redirect_stdout(found):
        yield found


@contextlib.contextmanager
def no_output() -> Iterator[Any]:
    """As of a process without a console."""
    with contextlib.redirect_stdout(None):
        yield None


@contextlib.contextmanager
def broken_pipe() -> Iterator[Any]:
    """As behind ``| head``. rich would leave the process, and point descriptor 1 to nowhere."""
    reading, writing = os.pipe()
    os.close(reading)
    found = os.fdopen(writing, "w", encoding="utf-8", buffering=1)
    try:
        with contextlib.redirect_stdout(found):
            yield found
    finally:
        with contextlib.suppress(OSError):
            found.close()


class Full(io.TextIOBase):
    """A log file on a full disk."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@contextlib.contextmanager
def full_disk() -> Iterator[Any]:
    with contextlib.redirect_stdout(Full()) as found:
        yield found


OUTPUTS = [ascii_output, latin_output, closed_output, no_output, broken_pipe, full_disk]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.__name__)
def test_standard_output(
    kit: Any, tokenizer: Any, tmp_path: Path, output: Any, caplog: pytest.LogCaptureFixture
) -> None:
    losses, models = [], []
    options = {
        "probe": {"sample": 16, "watch": ["の", " the"], "every_n_steps": 2}, "drift": {"every_n_steps": 2},
        "alerts": {"moved": {"metric": "head/cosine_min", "op": "<", "threshold": 0.9999}}, **CONSOLE,
    }  # fmt: skip
    for watching in (False, True):
        model, data = kit.llama(kit.TOKENIZER_ROWS), kit.batches(4, kit.TOKENIZER_ROWS)
        optimizer = kit.sgd(model)
        with output():
            guard = VocabGuard(tokenizer=tokenizer, **options) if watching else None
            if guard is not None:
                guard.attach(model, optimizer, total_steps=4, run_dir=tmp_path / "run")
            losses.append(kit.loop(guard, model, optimizer, data))
            if guard is not None:
                log = guard.finish()
        models.append(model)
    assert losses[0] == losses[1]
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert guard is not None
    assert guard.failure is None, guard.failure
    assert guard.last.step == 4
    assert [check["step"] for check in log.checks()] == [0, 2, 4]
    lost = [line for line in said(caplog) if "console" in line]
    assert len(lost) == (output in (closed_output, broken_pipe, full_disk))
    assert all("the console view is off from now on" in line for line in lost)


# -- signals -----------------------------------------------------------------------------------------------------------


class PreemptedError(Exception):
    """What a job's own handler raises."""


@pytest.mark.parametrize("kind", [PreemptedError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["check", "counting", "saving"])
def test_a_signal_in_mid_check(
    kit: Any, tmp_path: Path, kind: type[BaseException], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler's exception is the training's; what is on disk is whole, and the run goes on from it."""
    from vocabguard.guard import checks
    from vocabguard.rows import baselines

    def leave(_number: int, _frame: Any) -> None:
        raise kind("the job is about to be preempted")

    model, data = kit.llama(), kit.batches(STEPS)
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 2}, log={"console": False, "tensorboard": False})
    guard.attach(model, optimizer, total_steps=STEPS, run_dir=tmp_path / "run")
    kit.loop(guard, model, optimizer, data[:3])
    if place != "saving":
        state = guard.state_dict()
    owner, name = {
        "check": (checks, "measuring"),
        "counting": (guard._observer.counter, "observe"),
        "saving": (baselines, "save_file"),
    }[place]
    real = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, struck)
            with pytest.raises(kind):
                guard.state_dict() if place == "saving" else kit.loop(guard, model, optimizer, data[3:4], first=4)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert guard.failure is None
    if place == "saving":
        state = guard.state_dict()
    log = RunLog.open(tmp_path / "run")
    assert [check["step"] for check in log.checks()] == [0, 2]
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]
    other = VocabGuard(drift={"every_n_steps": 2}, log={"console": False, "tensorboard": False}, on_error="raise")
    other.attach(model, kit.sgd(model), total_steps=STEPS, resumed=state, steps_done=3)
    assert other.steps == 3
    assert other.check().exposure.data_target.tolist() == kit.naive_counts(data[:3])["data_target"]
