"""Ways to train that people have, each on the same few rows, with or without a guard."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from model_cases import MissingError
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from vocabguard import VocabGuard
from vocabguard.integrations.huggingface import VocabGuardCallback

HERE = Path(__file__).parent
BATCH, DOCS, HALF = 4, 24, 3


def _neighbour() -> Any:
    """The helpers of the tests of the integrations."""
    spec = importlib.util.spec_from_file_location("integration_kit", HERE.parent / "integrations" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = _neighbour()
TOKENIZER: Any = AutoTokenizer.from_pretrained(kit.ASSETS)
Doc = tuple[list[int], list[int]]


@dataclass
class Job:
    """What a run is to do.

    Attributes:
        folder: of the run.
        options: the guard's settings; None trains without a guard.
        phase: ``whole``, or ``first`` to stop at half of the steps, or ``second`` to go on from there.
    """

    folder: Path
    options: dict[str, Any] | None = None
    phase: str = "whole"

    @property
    def callback(self) -> list[Any]:
        """The Hugging Face callback, if the run is guarded."""
        return [] if self.options is None else [VocabGuardCallback(tokenizer=TOKENIZER, **self.options)]


class Tape:
    """Keeps each batch as it comes to the model in a pass that is learned from; hooked before any guard."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self._handle = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.batches.append({name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)})


@dataclass
class Trained:
    """What a run left behind."""

    model: Any
    optimizer: Any
    tape: Tape
    losses: list[float] = field(default_factory=list)
    guard: Any = None
    base: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.base = {name: value.detach().clone() for name, value in self.model.state_dict().items()}


@dataclass(frozen=True)
class TrainerCase:
    """One way to train and what is true of it.

    Attributes:
        name: of the row in the support table.
        train: does a job.
        docs: all rows in the order of training, with what they ask for; None where labels are no targets.
        rows_a_step: of `docs`.
        ordered: whether rows come one by one in that order, so that each step's targets are known beforehand.
        batches_a_step: forward passes that an optimizer step adds up.
        per_batch: whether each batch's loss is divided by its own targets, and the batches' losses averaged.
        shift: whether the model shifts its labels.
        probed: whether the model can be asked to repeat tokens.
        tied: whether the head is the input embedding.
        head: name of the head's parameter; None without a head.
        refuses: pattern of what is said instead, by column.
        resumes: whether it is run in two parts.
    """

    name: str
    train: Callable[[Job], Trained]
    docs: Callable[[], list[Doc]] | None
    rows_a_step: int = BATCH
    ordered: bool = True
    batches_a_step: int = 1
    per_batch: bool = False
    shift: bool = True
    probed: bool = True
    tied: bool = False
    head: str | None = "lm_head.weight"
    refuses: dict[str, str] = field(default_factory=dict)
    resumes: bool = True


# -- data --------------------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, list[int]]]:
    """Rows of 30 to 40 tokens over few ids, the first part of each masked."""
    rng, found = Random(0), []
    for _ in range(DOCS):
        ids = [300 + int(rng.paretovariate(0.6)) % 500 for _ in range(rng.randint(30, 40))]
        masked = rng.randint(0, 9)
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def row_docs() -> list[Doc]:
    return [(row["input_ids"], row["labels"]) for row in rows()]


def pairs() -> list[dict[str, list[int]]]:
    """For an encoder-decoder: labels are no part of the inputs."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][:9:-1]} for row in rows()]


WORDS = ("the cat", "a dog runs", "over there", "sing a song", "blue sky today", "what is it", "thank you")


def chats(answers: int = 1) -> list[list[str]]:
    """A question and some answers each, of a few English words."""
    rng = Random(1)
    return [[" ".join(rng.choices(WORDS, k=rng.randint(3, 6))) for _ in range(1 + answers)] for _ in range(DOCS)]


def turn(role: str, text: str, *, asked: bool, name_asked: bool = False) -> Doc:
    """One turn as the tokenizer's chat template has it, put together by hand."""
    name, end = (TOKENIZER.convert_tokens_to_ids(f"<|{word}|>") for word in (role, "end"))
    said = [*TOKENIZER(text)["input_ids"], end]
    return [name, *said], [name if name_asked else -100, *(said if asked else [-100] * len(said))]


def joined(*turns: Doc) -> Doc:
    return [token for ids, _ in turns for token in ids], [label for _, labels in turns for label in labels]


def chat_docs(*, assistant_only: bool) -> list[Doc]:
    """What supervised fine-tuning asks for: all of a chat, or the assistant's turns with their ends."""
    every = not assistant_only
    return [
        joined(turn("user", ask, asked=every, name_asked=every), turn("assistant", say, asked=True, name_asked=every))
        for ask, say in chats()
    ]


def preference_docs() -> list[Doc]:
    """The chosen completion, and the rejected one as nothing but inputs, alternately."""
    return [
        joined(turn("user", ask, asked=False), turn("assistant", say, asked=chosen))
        for ask, good, bad in chats(2)
        for say, chosen in ((good, True), (bad, False))
    ]


# -- Hugging Face and TRL ----------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    """Ends training early, after its checkpoint is written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == HALF


class InOrder:
    """Takes the rows as they come."""

    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def huggingface(
    job: Job,
    *,
    data: Callable[[], Any],
    trainer: Any = Trainer,
    arguments: Any = TrainingArguments,
    model: Callable[[], Any] = kit.tiny_model,
    collator: Any = None,
    extra: Callable[[Any], dict[str, Any]] = lambda model: {},
    **options: Any,
) -> Trained:
    """One epoch of a ``Trainer`` or a subclass.

    Args:
        job: what to do.
        data: makes the training data.
        trainer: its class.
        arguments: the class of its arguments.
        model: makes the model.
        collator: a collate function for it, if its own does not do.
        extra: further arguments of the trainer, from the model.
        **options: further training arguments.
    """
    trained_model = model()
    optimizer = kit.RecordingAdamW(trained_model) if hasattr(trained_model, "lm_head") else None
    found = Trained(trained_model, optimizer, Tape(trained_model))
    set_seed(1)
    common: dict[str, Any] = {
        "output_dir": str(job.folder), "num_train_epochs": 1, "per_device_train_batch_size": BATCH,
        "max_grad_norm": kit.CLIP, "disable_tqdm": True, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "save_strategy": "steps", "save_steps": HALF, "bf16": False,
    }  # fmt: skip
    schedule = None if optimizer is None else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    callbacks = job.callback
    running = type("Ordered", (InOrder, trainer), {})(
        model=trained_model,
        args=arguments(**(common | options)),
        train_dataset=data(),
        processing_class=TOKENIZER,
        callbacks=[*callbacks, *([StopAt()] if job.phase == "first" else [])],
        optimizers=(optimizer, schedule),
        **({} if collator is None else {"data_collator": collator}),
        **extra(trained_model),
    )
    running.train(resume_from_checkpoint=job.phase == "second" or None)
    found.losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    found.guard = callbacks[0].guard if callbacks else None
    return found


def plain(job: Job, **options: Any) -> Trained:
    return huggingface(job, data=rows, collator=DataCollatorForSeq2Seq(TOKENIZER), **options)


def encoder_decoder(job: Job) -> Trained:
    def model() -> Any:
        return without_dropout(kit.tiny_model("t5"))

    return huggingface(
        job, data=pairs, trainer=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments, model=model,
        collator=DataCollatorForSeq2Seq(TOKENIZER),
    )  # fmt: skip


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def of_trl(job: Job, kind: str, data: list[dict[str, Any]], **options: Any) -> Trained:
    """A trainer of TRL.

    Raises:
        MissingError: without TRL.
    """
    try:
        import trl
        from datasets import Dataset
    except ImportError as error:
        raise MissingError("TRL is not installed") from error
    return huggingface(
        job,
        data=lambda: Dataset.from_list(data),
        trainer=getattr(trl, f"{kind}Trainer"),
        arguments=getattr(trl, f"{kind}Config"),
        **options,
    )


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def sft(job: Job, **options: Any) -> Trained:
    data = [{"messages": [message("user", ask), message("assistant", say)]} for ask, say in chats()]
    return of_trl(job, "SFT", data, **options)


def preferences() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [message("user", ask)],
            "chosen": [message("assistant", good)],
            "rejected": [message("assistant", bad)],
        }
        for ask, good, bad in chats(2)
    ]


def dpo(job: Job) -> Trained:
    return of_trl(job, "DPO", preferences(), extra=lambda model: {"ref_model": copy.deepcopy(model)})


def kto(job: Job) -> Trained:
    data = [
        {"prompt": [message("user", ask)], "completion": [message("assistant", say)], "label": place % 2 == 0}
        for place, (ask, say) in enumerate(chats())
    ]
    return of_trl(job, "KTO", data, extra=lambda model: {"ref_model": copy.deepcopy(model)})


def reward(job: Job) -> Trained:
    def model() -> Any:
        config = kit.tiny_model().config
        config.num_labels = 1
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)

    return of_trl(job, "Reward", preferences(), model=model, learning_rate=1e-2)


def grpo(job: Job) -> Trained:
    def longer(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(completion))) for completion in completions]

    data = [{"prompt": [message("user", ask)]} for ask, _ in chats()]
    return of_trl(
        job, "GRPO", data, extra=lambda model: {"reward_funcs": longer}, num_generations=2, max_completion_length=8,
        max_steps=6,
    )  # fmt: skip


# -- Lightning and loops of one's own ----------------------------------------------------------------------------------


class Manual(kit.Module):  # type: ignore[name-defined, misc]
    """Steps its optimizer itself."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=kit.CLIP, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr]


def lightning(job: Job, module: Any = kit.Module, **options: Any) -> Trained:
    """Two epochs, since a plain dataloader begins anew when Lightning resumes."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    model = kit.tiny_model()
    found = Trained(model, None, Tape(model))
    guarded = [] if job.options is None else [kit.CALLBACKS["lightning"](tokenizer=TOKENIZER, **job.options)]
    keeper = ModelCheckpoint(job.folder, filename="half", every_n_train_steps=HALF, save_top_k=-1)
    run = kit.run_lightning(
        model, rows()[: HALF * BATCH], TOKENIZER, job.folder, steps=HALF if job.phase == "first" else DOCS // BATCH,
        callbacks=(*guarded, keeper), module=module, enable_checkpointing=True,
        checkpoint=str(job.folder / "half.ckpt") if job.phase == "second" else None, **options,
    )  # fmt: skip
    found.optimizer, found.losses = run.optimizer, run.losses
    found.guard = guarded[0].guard if guarded else None
    return found


def loop(job: Job, *, size: int = BATCH, accelerator: Callable[[], Any] = lambda: None) -> Trained:
    """A hand-written loop, with accelerate's help or without.

    Args:
        job: what to do.
        size: rows of a batch.
        accelerator: makes an ``Accelerator``, or None.
    """
    helper = accelerator()
    model = kit.tiny_model().train()
    optimizer = inner = kit.RecordingAdamW(model)
    found = Trained(model, inner, Tape(model))
    guard = None if job.options is None else VocabGuard(tokenizer=TOKENIZER, **job.options)
    collate: Any = DataCollatorForSeq2Seq(TOKENIZER)
    echoes = guard is not None and guard.config.echo.enabled
    loader: Any = DataLoader(
        rows(),  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=guard.collator(collate) if echoes and guard is not None else collate,
    )
    passed = model
    if helper is not None:
        passed, optimizer, loader = helper.prepare(model, optimizer, loader)
    done, saved = 0, None
    if job.phase == "second":
        saved = torch.load(job.folder / "half.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        inner.load_state_dict(saved["optimizer"])
        done = HALF
    if guard is not None:
        guard.attach(
            model, optimizer, total_steps=DOCS // BATCH, run_dir=job.folder / "run", dataloader=loader,
            steps_done=done, resumed=saved and saved["guard"], batches_per_step=BATCH // size,
        )  # fmt: skip
    for number, batch in enumerate(loader):
        if number * size < done * BATCH:
            continue
        loss = passed(**batch).loss
        found.losses.append(loss.item())
        if helper is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), kit.CLIP)
            optimizer.step()
            stepped = True
        else:
            with helper.accumulate(passed):
                helper.backward(loss)
                if helper.sync_gradients:
                    helper.clip_grad_norm_(passed.parameters(), kit.CLIP)
                optimizer.step()
                stepped = helper.sync_gradients
        if stepped and guard is not None:
            guard.step((number + 1) * size // BATCH)
        optimizer.zero_grad()
        if job.phase == "first" and (number + 1) * size == HALF * BATCH:
            state = {"model": model.state_dict(), "optimizer": inner.state_dict()}
            torch.save(state | {"guard": guard.state_dict() if guard is not None else {}}, job.folder / "half.pt")
            break
    if guard is not None:
        guard.finish()
    found.guard = guard
    return found


def accelerated(job: Job, precision: str = "no") -> Trained:
    """Two batches a step; a scale of the loss under which no step is skipped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradScalerKwargs

    def helper() -> Any:
        return Accelerator(
            cpu=True, gradient_accumulation_steps=2, mixed_precision=precision,
            kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)],
        )  # fmt: skip

    AcceleratorState._reset_state(reset_partial_state=True)
    found = loop(job, size=BATCH // 2, accelerator=helper)
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def scaled(job: Job, scale: float = 1024.0) -> Trained:
    """A loop with half precision and a scaled loss, which leaves out steps where gradients overflow."""
    model = kit.tiny_model().train()
    found = Trained(model, kit.RecordingAdamW(model), Tape(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    guard = VocabGuard(tokenizer=TOKENIZER, **(job.options or {}))
    if job.options is not None:
        guard.attach(model, found.optimizer, total_steps=DOCS // BATCH, run_dir=job.folder)
        found.guard = guard
    collate, data = DataCollatorForSeq2Seq(TOKENIZER), rows()
    for step in range(DOCS // BATCH):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**collate([dict(row) for row in data[step * BATCH : (step + 1) * BATCH]])).loss
        found.losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(found.optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), kit.CLIP)
        scaler.step(found.optimizer)
        scaler.update()
        if found.guard is not None:
            guard.step(step + 1)
        found.optimizer.zero_grad()
    guard.finish()
    return found


# -- all of them -------------------------------------------------------------------------------------------------------

OF_ROWS: dict[str, Any] = {"docs": row_docs}
TWICE: dict[str, Any] = {"docs": lambda: row_docs()[: HALF * BATCH] * 2}
CHAT = partial(chat_docs, assistant_only=False)
ONLY = partial(chat_docs, assistant_only=True)
NO_TARGETS: dict[str, Any] = {"docs": None, "resumes": False}


def refused(reason: str, *columns: str) -> dict[str, str]:
    return dict.fromkeys(columns or ("echo", "hold"), reason)


PRECISIONS = (
    TrainerCase("bf16, Trainer", partial(plain, bf16=True), **OF_ROWS),
    TrainerCase("fp16, Trainer", partial(plain, fp16=True), **OF_ROWS),
    TrainerCase("bf16, accelerate", partial(accelerated, precision="bf16"), **OF_ROWS, batches_a_step=2),
    TrainerCase("fp16, accelerate", partial(accelerated, precision="fp16"), **OF_ROWS, batches_a_step=2),
    TrainerCase("fp16, loop", scaled, **OF_ROWS),
)
TRAINERS = (
    TrainerCase("`Trainer`", plain, **OF_ROWS),
    TrainerCase(
        "`Seq2SeqTrainer`", encoder_decoder, lambda: [(pair["input_ids"], pair["labels"]) for pair in pairs()],
        shift=False, probed=False, tied=True,
    ),
    TrainerCase("TRL `SFTTrainer`", sft, CHAT),
    TrainerCase("- packing", partial(sft, packing=True, max_length=64), CHAT, ordered=False),
    TrainerCase("- padding-free", partial(sft, padding_free=True, max_length=None), CHAT),
    TrainerCase("- assistant-only loss", partial(sft, assistant_only_loss=True), ONLY),
    TrainerCase(
        "TRL `DPOTrainer`", dpo, preference_docs, rows_a_step=2 * BATCH,
        refuses=refused("pairs of a chosen and a rejected completion", "echo"),
    ),
    TrainerCase("TRL `KTOTrainer`", kto, **NO_TARGETS, refuses=refused("desirable and undesirable completions")),
    TrainerCase("TRL `GRPOTrainer`", grpo, **NO_TARGETS, refuses=refused("completions that the model itself writes")),
    TrainerCase(
        "TRL `RewardTrainer`", reward, **NO_TARGETS, probed=False, head=None,
        refuses=refused("no output rows over the vocabulary"),
    ),
    TrainerCase("Lightning automatic", lightning, **TWICE),
    TrainerCase("Lightning manual", partial(lightning, module=Manual, gradient_clip_val=None), **TWICE),
    TrainerCase("loop with accelerate", accelerated, **OF_ROWS, batches_a_step=2, per_batch=True),
    TrainerCase("your own loop", loop, **OF_ROWS),
)  # fmt: skip
