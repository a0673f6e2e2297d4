"""How each client is run: its files, its command line, and what a user adds to have the guard.

Every client trains the same tiny random model on the same chats, six steps; see `inputs`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
SETTINGS = ("drift.every_n_steps=1", "probe.enabled=false", "log.console=false", "log.report=false")
ECHO = ("echo.enabled=true", "echo.dose=0.5", "echo.list_tokens=4")


@dataclass(frozen=True)
class Client:
    """One client.

    Attributes:
        packages: whose versions are written down.
        added: what a user adds, in words.
        prepare: writes its files to the work folder and gives the command line; arguments are the Python of its
            environment, the inputs' folder, the work folder and the settings of the guard.
        launched: started through ``vocabguard run``.
        needed: what the environment needed beyond a plain install, if anything.
        own_loop: trained without a trainer that logs, so that the guard's own files are read.
    """

    packages: tuple[str, ...]
    added: str
    prepare: Callable[[Path, Path, Path, tuple[str, ...]], list[str]]
    launched: bool = False
    needed: str = ""
    own_loop: bool = False


def _hf(_python: Path, inputs: Path, work: Path, _settings: tuple[str, ...]) -> list[str]:
    return [str(HERE / "programs" / "hf_script.py"), str(inputs), str(work / "out")]


def _lightning(_python: Path, inputs: Path, work: Path, _settings: tuple[str, ...]) -> list[str]:
    return [str(HERE / "programs" / "lightning_script.py"), str(inputs), str(work / "out")]


def _litgpt(python: Path, inputs: Path, work: Path, _settings: tuple[str, ...]) -> list[str]:
    return [str(python), str(HERE / "programs" / "litgpt_script.py"), str(inputs), str(work / "out")]


def _trl(_python: Path, inputs: Path, work: Path, _settings: tuple[str, ...]) -> list[str]:
    config = {
        "model_name_or_path": str(inputs / "model"), "output_dir": str(work / "out"), "max_steps": 6,
        "datasets": [{"path": "json", "data_files": str(inputs / "chats.jsonl")}], "assistant_only_loss": True,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "report_to": "tensorboard", "seed": 1, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    (work / "sft.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["trl", "sft", "--config", str(work / "sft.yaml")]


def _axolotl(python: Path, inputs: Path, work: Path, settings: tuple[str, ...]) -> list[str]:
    section: dict[str, dict[str, object]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        room, _, name = key.partition(".")
        section.setdefault(room, {})[name] = yaml.safe_load(value)
    config = {
        "base_model": str(inputs / "model"), "tokenizer_type": "AutoTokenizer", "chat_template": "tokenizer_default",
        "datasets": [
            {"path": str(inputs / "chats.jsonl"), "type": "chat_template", "field_messages": "messages",
             "message_property_mappings": {"role": "role", "content": "content"}}
        ],
        "dataset_prepared_path": str(work / "prepared"), "output_dir": str(work / "out"), "sequence_len": 256,
        "sample_packing": True, "pad_to_sequence_len": False, "attn_implementation": "sdpa", "micro_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_steps": 6, "optimizer": "adamw_torch", "lr_scheduler": "linear",
        "learning_rate": 0.001, "bf16": False, "fp16": False, "tf32": False, "logging_steps": 1, "save_strategy": "no",
        "use_tensorboard": True, "seed": 1,
        "plugins": ["vocabguard.integrations.axolotl.VocabGuardPlugin"], "vocabguard": section,
    }  # fmt: skip
    (work / "axolotl.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(python), "-m", "axolotl.cli.train", str(work / "axolotl.yaml")]


def _swift(python: Path, inputs: Path, work: Path, _settings: tuple[str, ...], *more: str) -> list[str]:
    plugin = HERE.parents[1] / "integrations" / "plugins" / "ms_swift.py"
    options = {
        "model": inputs / "model", "model_type": "llama", "template": "chatml", "tuner_type": "full",
        "dataset": inputs / "chats.jsonl", "split_dataset_ratio": 0, "output_dir": work / "out", "max_steps": 6,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "torch_dtype": "float32",
        "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "max_length": 256,
        "report_to": "tensorboard", "dataloader_num_workers": 0, "seed": 1,
        "external_plugins": plugin, "callbacks": "vocabguard",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [*(more or (str(python), "-m", "swift.cli.sft")), *words]


def _swift_packed(python: Path, inputs: Path, work: Path, settings: tuple[str, ...]) -> list[str]:
    command = _swift(python, inputs, work, settings, str(python), str(HERE / "programs" / "swift_padding_free.py"))
    return [*command, "--attn_impl", "sdpa"]


def _llamafactory(_python: Path, inputs: Path, work: Path, _settings: tuple[str, ...]) -> list[str]:
    info = {
        "chats": {
            "file_name": str(inputs / "chats.jsonl"), "formatting": "sharegpt", "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        }
    }  # fmt: skip
    (work / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    config = {
        "model_name_or_path": str(inputs / "model"), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset_dir": str(work), "dataset": "chats", "template": "default", "cutoff_len": 256,
        "output_dir": str(work / "out"), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "tensorboard", "seed": 1,
        "overwrite_cache": True,
    }  # fmt: skip
    (work / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["llamafactory-cli", "train", str(work / "train.yaml")]


RUN = "`vocabguard run --` before the command"
CLIENTS = {
    "hf-script": Client(("transformers", "accelerate"), RUN, _hf, launched=True),
    "trl": Client(("trl", "transformers", "accelerate"), RUN, _trl, launched=True),
    "axolotl": Client(
        ("axolotl", "transformers", "trl", "accelerate"), "2 entries of its YAML file", _axolotl,
        needed="no CUDA packages (xformers, liger-kernel, bitsandbytes): sdpa attention on a CPU",
    ),
    "ms-swift": Client(("ms_swift", "transformers", "trl", "accelerate"), "2 options", _swift),
    "ms-swift-padding-free": Client(
        ("ms_swift", "transformers", "trl", "accelerate"), "2 options", _swift_packed,
        needed="its check for flash attention, which has no CPU build, is left out: sdpa",
    ),
    "llama-factory": Client(
        ("llamafactory", "transformers", "trl", "accelerate"), RUN, _llamafactory, launched=True,
        needed="an empty module in the place of torchaudio, and no torchvision: both were to be had for CUDA only",
    ),
    "lightning": Client(("lightning", "transformers"), RUN, _lightning, launched=True),
    "litgpt": Client(("litgpt", "lightning"), "4 lines in the loop", _litgpt, own_loop=True),
}  # fmt: skip
"""Client -> how it is run."""

assert sys.version_info >= (3, 11)
