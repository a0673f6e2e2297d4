"""Whether Ray Data counts what `vocabguard coverage` counts: ``python tests/rehearsals/ray_data.py [--json FILE]``

The recipe of `examples/coverage_on_many_machines.py`, on this machine, with two processes of a real Ray, over a file
each of conversations, texts, and prompts with completions; beside it `datasets`, and the command. All counts of all
tokens are compared. Needs ``pip install "ray[data]" datasets``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer

from vocabguard.data.coverage import load_coverage
from vocabguard.data.mapped import CountBatch

TOP = Path(__file__).parents[2]
ASSETS = TOP / "examples" / "assets"
ROWS = 1200


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe", TOP / "examples" / "coverage_on_many_machines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder: Path) -> Iterator[Path]:
    """A file of each form, of the words of the embedded corpus' scripts."""
    words = ("the data", "данные", "データ", "naïve", "x = 1;", "👍🏽")
    rows: dict[str, list[dict[str, Any]]] = {"conversations": [], "texts": [], "completions": []}
    for n in range(ROWS):
        asked, said = f"Say {n} {words[n % 6]}", f"{words[n % 5]} {n} there"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows["conversations"].append({"messages": turns * (1 + n % 3)})
        rows["texts"].append({"text": f"{asked} {said}"})
        rows["completions"].append({"prompt": asked, "completion": f" {said}"})
    for name, of_kind in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in of_kind), encoding="utf-8")
        yield path


def main() -> None:
    """Count in three ways, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="Write the result.")
    given = parser.parse_args()
    import ray

    tokenizer, engines = AutoTokenizer.from_pretrained(ASSETS), recipe()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in files(Path(scratch)):
            out = path.with_suffix(".safetensors")
            own = "import sys; from vocabguard.cli.app import main; sys.exit(main())"
            command = [sys.executable, "-c", own, "coverage", str(ASSETS), str(path), "--out", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(TOP)})
            known = load_coverage(out)
            size = len(known.inputs)
            row: dict[str, Any] = {"rows": known.tally.rows, "targets": int(known.data_target.sum()),
                                   "inputs": int(known.inputs.sum())}  # fmt: skip
            for name, engine in (("ray", engines.by_ray), ("datasets", engines.by_datasets)):
                targets, inputs = engine(str(path), CountBatch(tokenizer), size, 2)
                same = torch.equal(targets, known.data_target) and torch.equal(inputs, known.inputs)
                row[name] = "equal" if same else f"{int(targets.sum())} targets, {int(inputs.sum())} inputs"
            found[path.stem] = row
            print(path.stem, json.dumps(row), flush=True)
    ray.shutdown()
    result = {"versions": {name: version(name) for name in ("ray", "datasets", "transformers")}, "files": found}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any(row[name] != "equal" for row in found.values() for name in ("ray", "datasets")):
        sys.exit(1)


if __name__ == "__main__":
    main()
