"""Time and memory of a scan, against reading both files by the fastest kernel and against loading both models.

    pip install simsimd
    python tests/benchmarks/scan_speed.py rows [--rows 200064] [--width 4096] [--threads 1] [--numpy]
    python tests/benchmarks/scan_speed.py models [--rows 262144] [--width 640]

``rows``: two bf16 files of one head each, in a temporary folder (3.3 GB, deleted afterwards). "kernel" maps both files
anew and takes one cosine a row by SimSIMD, block by block, letting go of what it has read as a scan does; "read" reads
both files once through a 1 MiB buffer. All are in the page cache by then. Scans, kernels and reads take turns; CPU
seconds are compared, and the ratio is that of each round. "row pass" is the part of a scan that reads every row; the
rest is a sample of the rows, before it, and the summary. The first round, which loads the compiled loop, is told apart;
``--numpy`` does without that loop. Memory is the peak resident size (``VmHWM``) of a fresh process that scans, less
that of one that has only imported torch. ``models``: a pair of small Gemma 3 models with random weights (vocabulary and
width of the 270M one, few layers), scanned, and compared by ``from_pretrained`` and a naive cosine in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PEAK = "[line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]"
TORCH = f"import torch; print({PEAK})"
SCAN = f"""
import sys, time, json, torch
torch.set_num_threads(int(sys.argv[3]))
if "--numpy" in sys.argv:
    sys.modules["numba"] = None
from vocabguard.measure import compiled, drift
from vocabguard.rows.checkpoints import open_checkpoint
from vocabguard.compare.scan import scan
from vocabguard.compare.summary import summarise_scan
passes, reads, kernels, seconds, row_sums = [], [], [], [], drift.row_sums
clock = time.process_time
def timed(*args, **options):
    began = clock()
    found = row_sums(*args, **options)
    passes.append(clock() - began)
    return found
drift.row_sums = timed
def read_once(paths):
    buffer, began = bytearray(2**20), clock()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return clock() - began
def by_kernel(paths):
    import mmap
    import numpy as np, simsimd
    began, maps, sides = clock(), [], []
    for path in paths:
        with open(path, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(maps[-1][:8], "little")
        width = json.loads(maps[-1][8:start])["lm_head.weight"]["shape"][1]
        sides.append(np.frombuffer(maps[-1], np.uint16, offset=start).reshape(-1, width))
    size, page = max(1, 2**20 // width), mmap.PAGESIZE
    for row in range(0, len(sides[0]), size):
        simsimd.cosine(sides[0][row : row + size], sides[1][row : row + size], "bf16")
        first = (start + row * width * 2) // page * page
        for one in maps:
            one.madvise(mmap.MADV_DONTNEED, first, min(size * width * 2, len(one) - first))
    return clock() - began
rows = sys.argv[1].endswith(".safetensors")
for _ in range(int(sys.argv[4])):
    reads.append(read_once(sys.argv[1:3]) if rows else 0)
    kernels.append(by_kernel(sys.argv[1:3]) if rows else 0)
    began = clock()
    base = open_checkpoint(sys.argv[1]); tuned = open_checkpoint(sys.argv[2], base=base)
    told = summarise_scan(scan(base, tuned))
    seconds.append(clock() - began)
by_numba = compiled.sums_loop("bfloat16") is not None
print(json.dumps([seconds, {PEAK}, told["head"]["cosine_mean"], reads, kernels, passes, by_numba]))
"""
NAIVE = f"""
import sys, time, json, torch
from transformers import AutoModelForCausalLM
began = time.process_time()
base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in sys.argv[1:3])
for of in ("get_output_embeddings", "get_input_embeddings"):
    a, b = (getattr(model, of)().weight.detach().double() for model in (base, tuned))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
print(json.dumps([[time.process_time() - began], {PEAK}, float(cosine.mean())]))
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(label: str, code: str, *arguments: object) -> list[list[float]]:
    """Seconds of every round, and what else the code measured."""
    seconds, peak, mean, *others = json.loads(run(code, *arguments))
    above = (int(peak) - int(run(TORCH))) / 1024
    print(f"{label}: median {statistics.median(seconds):.3f} s, min {min(seconds):.3f} s, first {seconds[0]:.3f} s, "
          f"{above:.0f} MiB above torch, mean cosine {mean:.6f}")  # fmt: skip
    return [seconds, *others]


def ratio(name: str, seconds: list[float], other: str, others: list[float]) -> str:
    each = [mine / one for mine, one in zip(seconds[1:], others[1:], strict=True)]
    return f"{name} x {other}: median {statistics.median(each):.2f}, least {min(each):.2f}"


def rows(folder: Path, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = [folder / "base.safetensors", folder / "tuned.safetensors"]
    base = torch.empty(arguments.rows, arguments.width, dtype=torch.bfloat16).normal_(generator=generator)
    save_file({"lm_head.weight": base}, paths[0])
    for part in base.split(4096):
        part.add_(0.1 * torch.randn(part.shape, generator=generator).bfloat16())
    save_file({"lm_head.weight": base}, paths[1])
    del base
    flags = ["--numpy"] * arguments.numpy
    seconds, reads, kernels, passes, compiled = measure(
        "scan", SCAN, *paths, arguments.threads, arguments.rounds, *flags
    )
    print(f"read both once: median {statistics.median(reads[1:]):.3f} s, min {min(reads[1:]):.3f} s; "
          f"sums by {'the compiled loop' if compiled else 'numpy'}")  # fmt: skip
    print(f"both by the kernel: median {statistics.median(kernels[1:]):.3f} s, min {min(kernels[1:]):.3f} s")
    for other, others in (("kernel", kernels), ("read", reads)):
        print(ratio("scan", seconds, other, others))
        print(ratio("row pass", passes, other, others))


def models(folder: Path, arguments: argparse.Namespace) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=arguments.rows, hidden_size=arguments.width, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, dtype="bfloat16",
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += 0.1 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    pair = folder / "base", folder / "tuned"
    found = measure("scan", SCAN, *pair, arguments.threads, 3)[0]
    naive = measure("from_pretrained and float64", NAIVE, *pair)[0]
    print(f"naive over scan: {min(naive) / min(found):.1f} times the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "models"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--numpy", action="store_true")
    arguments = parser.parse_args()
    sizes = (200_064, 4096) if arguments.what == "rows" else (262_144, 640)
    arguments.rows, arguments.width = arguments.rows or sizes[0], arguments.width or sizes[1]
    with tempfile.TemporaryDirectory() as folder:
        (rows if arguments.what == "rows" else models)(Path(folder), arguments)


if __name__ == "__main__":
    main()
