"""Under-trained tokens of real models: which rows serve as known unused, and what is found by them.

    python tests/benchmarks/undertrained_real.py CACHE [smollm2] [gemma3] --json tests/benchmarks/real/undertrained.json

CACHE as in `real_models`. The indicators are computed a second time, in float64 and without the package, as "Fishing
for Magikarp" (arXiv 2405.05417) gives them: the norm of the input row, and the cosine distance to the mean unused row,
both without the first principal component. The package takes that of the rows as they are, for it stands for what all
rows share; the code that came with the paper centres the rows first, so that variant is compared too. ``near`` counts
live tokens by their plain cosine to the mean of the reserved rows. On one core 10 to 30 seconds a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from real.models import SOURCES, base_folder
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from vocabguard.measure.undertrained import never_trained, row_norms, unused_distances
from vocabguard.measure.unused import known_unused
from vocabguard.vocabulary.table import VocabTable, build_table

MARKERS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
CHUNK = 4096
Floats = npt.NDArray[np.float64]


def published(rows: Floats, unused: npt.NDArray[np.bool_], *, centred: bool) -> Floats:
    """Cosine distance of each row to the mean unused row, both without the rows' first principal component."""
    about = rows - rows.mean(axis=0) if centred else rows
    component = np.linalg.eigh(about.T @ about)[1][:, -1]
    rest = rows - np.outer(rows @ component, component)
    mean = rest[unused].mean(axis=0)
    found: Floats = 1 - rest @ mean / (np.linalg.norm(rest, axis=1) * np.linalg.norm(mean))
    return found


def spearman(one: Floats, other: Floats) -> float:
    """Correlation of the ranks; the indicators have no ties."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def agreement(ours: Tensor, theirs: Floats, which: Tensor) -> dict[str, float]:
    """Of the rows in a mask: Spearman's coefficient, and the largest difference."""
    one, other = ours.double().numpy()[which.numpy()], theirs[which.numpy()]
    return {"spearman": round(spearman(one, other), 7), "largest_difference": float(np.abs(one - other).max())}


def measure(matrix: Tensor, table: VocabTable) -> dict[str, Any]:
    """What the package finds in a tied matrix, and the same by the published formulas."""
    rows = len(matrix)

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for i in range(0, rows, CHUNK):
            yield slice(i, min(i + CHUNK, rows)), matrix[i : i + CHUNK]

    began = time.process_time()
    unused = known_unused(chunks, table.idle, table.reserved, table.control)
    seconds = time.process_time() - began
    found, before = (never_trained(chunks, chunks, True, table.live, known) for known in (unused, table.idle))
    distances, norms = unused_distances(chunks, unused), row_norms(chunks, rows)
    plain = matrix.double().numpy()
    mean = plain[(unused & table.control).numpy()].mean(axis=0)
    cosines = plain @ mean / (np.linalg.norm(plain, axis=1) * np.linalg.norm(mean))
    near = table.live.numpy() & (cosines > 0.99)
    other = (unused & table.control & ~table.reserved).nonzero().flatten().tolist()
    centred = published(plain, unused.numpy(), centred=True)
    lowest = torch.from_numpy(centred).masked_fill(~table.live, np.inf).argsort()[: int(found.sum())]
    ids = {text: i for i, text in enumerate(table.texts) if text in MARKERS}
    return {
        "rows": rows,
        "live": int(table.live.sum()),
        "idle": int(table.idle.sum()),
        "control": int(table.control.sum()),
        "reserved_by_name": int(table.reserved.sum()),
        "known_unused": int(unused.sum()),
        "of_them_by_name": int((unused & table.reserved).sum()),
        "of_them_other_control": [table.text(i) for i in other],
        "markers": {
            text: {"known_unused": bool(unused[i]), "cosine": round(float(cosines[i]), 5)} for text, i in ids.items()
        },
        "found_among_as_many_lowest_centred": int(found[lowest].sum()),
        "near": int(near.sum()),
        "found": int(found.sum()),
        "found_by_idle_rows_alone": int(before.sum()),
        "near_and_found": int((near & found.numpy()).sum()),
        "examples": [table.text(i) for i in found.nonzero().flatten()[:: max(1, int(found.sum()) // 16)].tolist()][:16],
        "distance_live": agreement(distances, published(plain, unused.numpy(), centred=False), table.live),
        "distance_live_centred": agreement(distances, centred, table.live),
        "norm": agreement(norms, np.sqrt(np.square(plain).sum(axis=1)), torch.ones(rows, dtype=torch.bool)),
        "seconds_for_known_unused": round(seconds, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("models", nargs="*", default=list(SOURCES))
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in chosen.models:
        folder = base_folder(chosen.cache, name)
        with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
            matrix = file.get_tensor("model.embed_tokens.weight").float()
        results[name] = measure(matrix, build_table(AutoTokenizer.from_pretrained(folder), len(matrix)))
        print(name, json.dumps(results[name], indent=2, ensure_ascii=False))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
