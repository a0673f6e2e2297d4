"""What users of a version rely on, as plain data, by functions that describe any version of the package.

    python tests/kits/kept.py FOLDER      writes what the installed version does, and the states of runs in mid-run

`tests/data_before` holds what this wrote with the version before the package was rearranged (0.1.0, 339c9df), run in a
folder that does not exist where the tests run: `tests/test_contract_kept.py` holds the present version to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import vocabguard
from vocabguard import VocabGuard
from vocabguard.cli import app
from vocabguard.integrations import huggingface
from vocabguard.integrations import lightning as lightning_adapter

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
QUIET: dict[str, Any] = {"log": {"console": False, "tensorboard": False}, "on_error": "raise"}

# -- plain data ----------------------------------------------------------------------------------------------------


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted paths; all else is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    if value.keys() == {"has"}:
        return {f"{path}: {name}": True for name in value["has"]}
    parts = [flat(value[name], f"{path}.{name}" if path else str(name)) for name in value]
    return {key: leaf for part in parts for key, leaf in part.items()}


def has(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that stand for themselves."""
    return {"has": sorted(names)}


def fields(value: Any, path: str = "") -> set[str]:
    """Paths of all fields of a JSON value; those of a list's items are one."""
    if isinstance(value, Mapping):
        # One name stands for all groups, and one for all classes of exposure.
        keys = {key: f"{path}/*" if path.endswith(("groups", "classes")) else f"{path}/{key}" for key in value}
        return {path} - {""} | {name for key in value for name in fields(value[key], keys[key].lstrip("/"))}
    if isinstance(value, list):
        return {path} | {name for item in value for name in fields(item, f"{path}[]")}
    return {path}


def plain(value: Any) -> Any:
    """A default as JSON has it; what has no form there by its type's name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value] or None
    return f"<{type(value).__name__}>"


# -- settings and signatures -----------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Every setting's default, and what each preset makes of it."""
    default = flat(dataclasses.asdict(vocabguard.load_config(None)))
    found: dict[str, Any] = {"default": default}
    for name in vocabguard.presets():
        preset = flat(dataclasses.asdict(vocabguard.load_config(name)))
        assert not default.keys() - preset.keys()
        found[f"preset {name}"] = {key: value for key, value in preset.items() if default.get(key, "none") != value}
    return found


def signatures() -> dict[str, Any]:
    """Parameters of all public callables: kind and default, in order."""
    found: dict[str, Any] = {"__all__": has(vocabguard.__all__)}
    public = {name: getattr(vocabguard, name) for name in vocabguard.__all__}
    public |= {"huggingface.VocabGuardCallback": huggingface.VocabGuardCallback}
    public |= {"lightning.VocabGuardCallback": lightning_adapter.VocabGuardCallback}
    for name, thing in public.items():
        found |= {name: _parameters(thing)}
        if inspect.isclass(thing):
            found |= {f"{name}.{member}": _parameters(value) for member, value in _members(thing)}
    guard = VocabGuard()
    found["VocabGuard attributes"] = {name: hasattr(guard, name) for name in ("config", "watch", "last", "latest")}
    return found


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class and those of its bases that are ours define without an underscore."""
    for owner in kind.__mro__:
        if owner.__module__.startswith("vocabguard"):
            yield from ((name, value) for name, value in vars(owner).items() if not name.startswith("_"))


def _parameters(thing: Any) -> Any:
    thing = getattr(thing, "__func__", thing)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return {base.__name__: "caught by" for base in thing.__mro__ if base.__module__ == "builtins"}
    if isinstance(thing, property) or not callable(thing):
        return "attribute"
    return {
        f"{name}": [parameter.kind.name, *([] if parameter.default is parameter.empty else [plain(parameter.default)])]
        for name, parameter in inspect.signature(thing).parameters.items()
    } or "no parameters"


# -- the command line --------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Arguments and options of every command: names, default, whether required and whether several."""
    group: Any = typer.main.get_command(app.build(tuple(app.COMMANDS)))
    return {
        name: {
            "/".join([*parameter.opts, *parameter.secondary_opts]): {
                "default": plain(parameter.default),
                "required": parameter.required,
                "several": parameter.multiple or parameter.nargs == -1,
            }
            for parameter in command.params
        }
        for name, command in group.commands.items()
    }


def call(*arguments: object) -> tuple[int, str]:
    """The command line in this process: exit code and standard output."""
    before, out = sys.argv, io.StringIO()
    sys.argv = ["vocabguard", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            app.main()
    except SystemExit as left:
        return int(left.code or 0), out.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line ends with SystemExit")


BAD: tuple[str, ...] = (
    "nothing", "scan", "scan A", "scan A none", "scan A A --threshold 2", "scan A A --no-such", "scan A A --top x",
    "scan A A --out no/such.safetensors", "scan A A --coverage c.json --run r", "scan A A --head none.weight",
    "scan A A --tokenizer .", "coverage A", "coverage A none.jsonl", "coverage . chats.jsonl",
    "coverage A chats.jsonl --kind magic", "coverage A chats.jsonl --loss magic", "coverage A chats.jsonl --epochs 0",
    "coverage A chats.jsonl --threshold 2", "echo A", "echo A --ids e.jsonl --targets 0", "echo A --ids no/such.jsonl",
    "echo A --ids e.jsonl --below 5", "echo A --ids e.jsonl --exclude re:(", "echo A --ids e.jsonl --instruction x",
    "replay lines.txt --out r.txt", "replay lines.txt --tokenizer A", "replay lines.txt --tokenizer A --out r.csv",
    "replay lines.txt --tokenizer A --out r.txt --pool 0", "replay none.txt --tokenizer A --out r.txt", "explain A A",
    "explain A A 99999", "explain A none 5", "repair A A", "repair A A --out full", "repair A A --out new --method x",
    "repair A A --out new --method echo", "repair A A --out new --data chats.jsonl",
    "repair A A --out new --strength 2", "report none", "report full", "report scan.safetensors --threshold 2",
    "report scan.safetensors --threshold-forgotten 0",
)  # fmt: skip
"""Calls that are refused; A is the embedded base."""

GOOD: tuple[str, ...] = (
    "coverage A chats.jsonl --json --top 3 --watch 3497 --out coverage.safetensors",
    "scan A B --json --top 3 --out scan.safetensors",
    "scan A B --json --top 3 --coverage coverage.safetensors",
    "scan A A --json",
    "coverage A lines.txt --json --threshold 0.5",
    "echo A --ids echo.jsonl --chats echo-chats.jsonl --targets 1 --json",
    "replay lines.txt --tokenizer A --out replay.jsonl --targets 1 --json",
    "replay lines.txt --tokenizer A --out replay.txt --targets 1 --threshold 0.5 --json",
    "explain A B 3497 5000 --coverage coverage.safetensors --json",
    "explain A B 5000 --no-ask --json",
    "repair A B --out repaired --sample 16 --text lines.txt --json",
    "repair A B --out unasked --no-ask --json",
    "report scan.safetensors --json",
    "report run --json",
    "report run --json --threshold 0",
    "report run run --json",
    "report run --out page.html",
    "show run --json",
    "probe A B --sample 32 --text-tokens 300 --json",
)
"""Calls that work, in this order: some read what those before wrote. B is the base with three output rows moved."""


def command_line(folder: Path, run: Path) -> dict[str, Any]:
    """Exit codes and the fields of what ``--json`` prints.

    Args:
        folder: an empty one to work in.
        run: a run folder that is finished.
    """
    _inputs(folder, run)
    known = {"A": str(ASSETS), "B": "tuned"}
    found: dict[str, Any] = {"code": {}, "json": {}}
    with _inside(folder):
        for line in (*BAD, *GOOD):
            code, said = call(*(known.get(word, word) for word in line.split()))
            found["code"][line] = code
            assert (code == app.BAD_INPUT) == (line in BAD), line
            if code != app.BAD_INPUT and "--json" in line:
                found["json"][line] = has(fields(json.loads(said)))
    return found


def _inputs(folder: Path, run: Path) -> None:
    chat = [{"role": "user", "content": "Say the data"}, {"role": "assistant", "content": "the data and the rest"}]
    # A column that is not read gives a note, whatever else is installed.
    row = {"messages": chat, "system": "Say little"}
    (folder / "chats.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    (folder / "lines.txt").write_text("the data\nthe file\nand the data\n" * 2, encoding="utf-8")
    (folder / "c.json").write_text('{"data_target": {"3497": 2}}', encoding="utf-8")
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    shutil.copytree(run, folder / "run")
    shutil.copytree(ASSETS, folder / "tuned")
    tensors = load_file(folder / "tuned" / "model.safetensors")
    moved = torch.Generator().manual_seed(0)
    tensors["lm_head.weight"][3497:3500] = torch.randn(3, 128, generator=moved) / 4
    save_file(tensors, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# -- a run with everything on ------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = QUIET | {
    "drift": {"every_n_steps": 2},
    "probe": {"every_n_steps": 2, "sample": 96, "watch": [3497]},
    "exposure": {"push_every_n_steps": 2},
    "echo": {"enabled": True, "dose": 0.5, "list_tokens": 4},
    "hold": {"enabled": True},
    "neighbors": {"k": 2, "rows": 3, "every_n_checks": 1},
    "confusion": {"enabled": True, "per_language": 1, "max_new_tokens": 2},
    "alerts": {"moved": {"metric": "head/cosine_mean", "op": "<", "threshold": 0.9999999}},
    "log": {"console": False, "tensorboard": False, "rows_every_n_checks": 2, "top_k": 3},
}


def llama(rows: int, width: int) -> Any:
    """A random causal language model without dropout."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip


def guarded_run(folder: Path) -> dict[str, Any]:
    """Keys and files of a short run with everything on, which it leaves in the folder."""
    tokenizer, model = AutoTokenizer.from_pretrained(ASSETS), llama(8192, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    guard = VocabGuard(tokenizer=tokenizer, **EVERYTHING)
    chooser = Random(0)
    examples = [[300 + int(chooser.paretovariate(0.6)) % 500 for _ in range(32)] for _ in range(18)]
    loader = _loader(guard, tokenizer, examples)
    guard.attach(model, optimizer, total_steps=6, schedule=schedule, run_dir=folder, dataloader=loader)
    for step, batch in enumerate(loader, start=1):
        _step(guard, model, optimizer, batch, step)
        schedule.step()
        if step == 4:
            guard.check(at="evaluation")
    log: Any = guard.finish()
    assert {alert.rule for alert in log.alerts()} >= {"moved"}
    rows = log.rows()
    return {
        "keys": has(guard.latest),
        "files": has(path.name for path in folder.iterdir()),
        "fields": {
            **{path.name: _lines(path) for path in sorted(folder.glob("*.jsonl"))},
            "run.json": has(path for path in fields(log.meta) if not path.startswith("config/")),
        },
        "rows": {name: [str(tensor.dtype), tensor.ndim] for name, tensor in sorted(rows.items())},
    }


def _loader(guard: VocabGuard, tokenizer: Any, examples: list[list[int]]) -> Any:
    data: Any = [{"input_ids": ids, "labels": list(ids)} for ids in examples]
    return DataLoader(data, batch_size=3, collate_fn=guard.collator(DataCollatorForSeq2Seq(tokenizer)))


def _step(guard: VocabGuard, model: nn.Module, optimizer: Any, batch: Any, step: int) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    guard.step(step)
    optimizer.zero_grad()


def _lines(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    # The scalars of a check are the logged keys.
    found = set().union(*(fields(json.loads(line)) for line in lines))
    return has(field for field in found if not field.startswith("scalars/"))


# -- runs in mid-run ---------------------------------------------------------------------------------------------------

STEPS, HALF = 10, 5
ROWS, WIDTH = 304, 4
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": HALF}
GUARDED: dict[str, Any] = QUIET | {
    "drift": {"every_n_steps": 2},
    "exposure": {"push_every_n_steps": 3},
    "probe": {"every_n_steps": 4, "sample": 24, "contexts": {"list": {"text": "Repeat: {tokens}", "k": 4}}},
    "echo": {"enabled": True, "dose": 0.5, "list_tokens": 4, "instructions": ["Repeat: {tokens}"]},
    "hold": {"enabled": True},
    "alerts": {"moved": {"metric": "head/cosine_min", "op": "<", "threshold": 0.999, "for_checks": 3}},
    "log": {"console": False, "tensorboard": False, "top_k": 3},
}


def small_tokenizer() -> Any:
    """Bytes, Cyrillic letters and four tokens that control: 304 rows with the unused ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *alphabet]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = [tuple(level.pre_tokenize_str(letter)[0][0]) for letter in "абвгдежзийклмнопрстуфхцчшщыьэюя"]
    vocabulary = {word: place for place, word in enumerate([*words, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer, inner.decoder = level, decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.chat_template = (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def small_examples(count: int) -> list[list[int]]:
    """Few tokens often, most never."""
    chooser = Random(0)
    return [[20 + int(chooser.paretovariate(0.6)) % 60 for _ in range(chooser.randint(24, 32))] for _ in range(count)]


class Loop:
    """A run by hand, whole or from a state on."""

    def __init__(self) -> None:
        self.tokenizer, self.model = small_tokenizer(), llama(ROWS, WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=2.0)
        self.guard = VocabGuard(tokenizer=self.tokenizer, **GUARDED)
        self.examples = small_examples(3 * STEPS)

    def begin(self, folder: Path, state: Any = None) -> None:
        loader = _loader(self.guard, self.tokenizer, self.examples)
        schedule = [2.0] * STEPS
        self.guard.attach(
            self.model, self.optimizer, total_steps=STEPS, schedule=schedule, run_dir=folder, resumed=state,
            dataloader=loader,
        )  # fmt: skip

    def steps(self, first: int, last: int) -> None:
        loader = _loader(self.guard, self.tokenizer, self.examples[3 * first - 3 : 3 * last])
        for step, batch in enumerate(loader, start=first):
            _step(self.guard, self.model, self.optimizer, batch, step)


class Ordered(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]


class Keep(TrainerCallback):
    """Keeps what is there when the checkpoint is written, as a killed process leaves it."""

    def __init__(self, output: Path, kept: Path) -> None:
        self.output, self.kept = output, kept

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == HALF:
            shutil.copytree(self.output, self.kept)


def train(folder: Path, *others: TrainerCallback, resume: Path | None = None, **options: Any) -> VocabGuard:
    """A run of the Hugging Face trainer over two epochs, guarded; its guard."""
    tokenizer, model = small_tokenizer(), llama(ROWS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    callback = huggingface.VocabGuardCallback(tokenizer=tokenizer, **GUARDED)
    # Versions of the trainer differ in whether a first label, which nothing predicts, counts in the mean loss.
    data = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in small_examples(18)]
    trainer = Ordered(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=3, disable_tqdm=True, use_cpu=True,
            report_to="none", max_grad_norm=1.0, **{"save_strategy": "no", **options},
        ),
        train_dataset=data,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)),
        callbacks=[callback, *others],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return callback.guard


def ended(guard: VocabGuard) -> dict[str, torch.Tensor]:
    """What a run ended with: exact counts, and cosines by matrix."""
    last: Any = guard.last
    counts = ("data_target", "echo_target", "inputs", "last_target")
    return {name: getattr(last.exposure, name).clone() for name in counts} | {
        f"cosine/{name}": getattr(last, name).cosine.clone() for name in ("head", "embedding")
    }


def alerts(folder: Path) -> list[list[Any]]:
    """Of a run: what fired when."""
    return [[alert.rule, alert.state, alert.step] for alert in vocabguard.RunLog.open(folder).alerts()]


def write_runs(work: Path, out: Path) -> None:
    """A state of each kind in mid-run, and what the run ended with when left alone."""
    loop = Loop()
    loop.begin(work / "loop")
    loop.steps(1, HALF)
    state = loop.guard.state_dict()
    torch.save({"guard": state, "model": loop.model.state_dict()}, work / "loop" / "saved.pt")
    shutil.copytree(work / "loop", out / "loop")
    loop.guard.finish()
    whole = Loop()
    whole.begin(work / "whole-loop")
    whole.steps(1, STEPS)
    whole.guard.finish()
    save_file(ended(whole.guard), out / "loop" / "ended.safetensors")
    train(work / "hf", Keep(work / "hf", out / "hf"), **SAVING)
    save_file(ended(train(work / "whole-hf")), out / "hf" / "ended.safetensors")
    for name in (
        "training_args.bin",
        "rng_state.pth",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        (out / "hf" / f"checkpoint-{HALF}" / name).unlink(missing_ok=True)
    fired = {"loop": alerts(work / "whole-loop"), "hf": alerts(work / "whole-hf" / "vocabguard")}
    (out / "alerts.json").write_text(json.dumps(fired) + "\n", encoding="utf-8")


def facts(work: Path) -> dict[str, Callable[[], Any]]:
    """How to describe each part, working in the folder."""
    run = functools.cache(lambda: guarded_run(work / "run"))

    @functools.cache
    def on_the_command_line() -> dict[str, Any]:
        run()
        (work / "cli").mkdir()
        return command_line(work / "cli", work / "run")

    return {
        "settings": settings,
        "signatures": signatures,
        "commands": commands,
        "run": run,
        "command_line": on_the_command_line,
    }


def main(out: Path) -> None:
    """Write it all: a readable file for each part, and the runs as one archive."""
    shutil.rmtree(out, ignore_errors=True)
    work, runs = out / "work", out / "runs"
    work.mkdir(parents=True)
    for name, describe in facts(work).items():
        text = json.dumps(describe(), indent=1, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    runs.mkdir()
    write_runs(work, runs)
    shutil.make_archive(str(runs), "zip", runs)
    shutil.rmtree(runs)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
