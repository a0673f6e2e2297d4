"""Structured hostile input for every command and every kind of file: no traceback, no hang, no gigabyte.

    python tests/benchmarks/cli_fuzz.py [--rounds 1] [--seed 0] [--only WORD] [--out results.json]

Small healthy inputs (`fuzz/healthy.py`) are copied and damaged (`fuzz/damage.py`): trees of JSON are bent at random
places, tensors get other shapes and types, bytes are cut and changed, FIFOs and loops of links stand where files were,
options get odd values. Every case calls the command line in this process, with an alarm after 60 s, and is counted by
how it ends: ``fine`` (exit 0), ``findings`` (1), ``refused`` (2, with one line), ``usage`` (2, what the parser of
options refuses), or a fault: ``traceback``, ``last resort`` (the line for what nobody foresaw), ``many lines``,
``slow``, ``large`` (1 GiB more than before).

`cli_fuzz.json` has the counts of a run with seed 0 (five minutes on one core).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # a test that takes cases from here keeps its own
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TERM": "dumb", "COLUMNS": "120"}
sys.path.append(str(Path(__file__).parent / "fuzz"))

import damage as ways
import healthy

from vocabguard.cli.app import LAST_RESORT, main

SECONDS, BYTES = 60, 2**30
FAULTS = ("traceback", "last resort", "many lines", "slow", "large")

Bend = Callable[[Path, Random], None]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        kind: of the file that is damaged.
        file: which is damaged, below the folder of copies; None for options.
        argv: the command line; ``{}`` stands for that folder.
    """

    command: str
    kind: str
    seed: int
    argv: tuple[str, ...]
    file: str | None = None
    bend: Bend | None = None


@dataclass(frozen=True)
class Target:
    """A kind of file, the ways to damage it, the commands that read it, and how many cases each of them gets."""

    kind: str
    files: tuple[str, ...]
    bends: tuple[Bend, ...]
    lines: tuple[str, ...]
    count: int


def on_pair(tuned: str) -> tuple[str, ...]:
    """The commands that read two checkpoints."""
    return (
        f"scan {{}}/base {tuned} --json", f"scan {tuned} {{}}/base", f"explain {{}}/base {tuned} a 5 --no-ask",
        f"repair {{}}/base {tuned} --out {{}}/new --no-ask",
    )  # fmt: skip


CONFIGS = ("base/config.json", "tuned/config.json", "tuned/generation_config.json")
TOKENIZER = ("tok/tokenizer.json", "tok/tokenizer_config.json")
ON_TOKENIZER = (
    "coverage {}/tok {}/data/chats.jsonl --json", "echo {}/tok --ids {}/ids.jsonl --targets 1",
    "echo {}/tok --chats {}/chats.jsonl --targets 1 --list-tokens 20",
    "replay {}/data --tokenizer {}/tok --out {}/o.jsonl",
    "scan {}/base {}/tuned --tokenizer {}/tok --json", "report {}/run --tokenizer {}/tok --json",
)  # fmt: skip
ON_DATA = (
    "coverage {}/tok {F} --json", "coverage {}/tok {F}", "replay {F} --tokenizer {}/tok --out {}/o.jsonl --targets 2",
    "repair {}/base {}/tuned --out {}/new --method echo --data {F} --no-ask --targets 0.1",
)  # fmt: skip
RUN = tuple(f"run/{name}" for name in ("run.json", "checks.jsonl", "alerts.jsonl", "texts.json", "neighbors.jsonl"))
ON_RUN = (
    "report {}/run --out {}/page.html", "report {}/run --json", "report {}/run {}/scan.safetensors --out {}/page.html",
    "scan {}/base {}/tuned --run {}/run --json", "repair {}/base {}/tuned --run {}/run --out {}/new --no-ask",
    "show {}/run", "show {}/run --json",
)  # fmt: skip
ON_COUNTS = (
    "scan {}/base {}/tuned --coverage {F} --json", "explain {}/base {}/tuned a --coverage {F} --no-ask",
    "echo {}/tok --ids {}/ids.jsonl --needs {F} --targets 1", "report {F} --out {}/page.html",
    "replay {}/data --tokenizer {}/tok --out {}/o.jsonl --coverage {F}",
)  # fmt: skip
ON_PROBE = (
    "probe {}/tuned {F} --json", "report {F} --json", "echo {}/tok --ids {}/ids.jsonl --needs {F} --targets 1",
    "replay {}/data --tokenizer {}/tok --out {}/o.jsonl --needs {F} --targets 1", "report {F} --out {}/page.html",
    "show {F}",
)  # fmt: skip
ASK = "--sample 8 --asks 1 --text-tokens 40"
ON_MODELS = (f"probe {{}}/tuned {{}}/base {ASK} --json", f"probe {{}}/tuned {ASK}",
             "scan {}/base {}/tuned --probe --sample 8 --json")  # fmt: skip
table_ways = (ways.bend_bytes, ways.bend_bytes, ways.bend_path)
# Mostly what is still read as a file of its kind.
json_ways, line_ways = (*[ways.bend_json] * 9, *table_ways), (*[ways.bend_lines] * 9, *table_ways)
rows_ways = (*[ways.bend_header] * 3, *[ways.bend_tensors] * 6, *table_ways)

TARGETS = (
    Target("safetensors", ("tuned/model.safetensors",), rows_ways, on_pair("{}/tuned"), 60),
    Target("one file", ("single.safetensors",), rows_ways, on_pair("{}/single.safetensors")[:3], 30),
    Target("model config", CONFIGS, json_ways, (*on_pair("{}/tuned")[:1], "explain {}/base {}/tuned a"), 40),
    Target("index", ("sharded/model.safetensors.index.json",), json_ways, on_pair("{}/sharded"), 40),
    Target("adapter", ("lora/adapter_model.safetensors", "dora/adapter_model.safetensors",
                       "tokens/adapter_model.safetensors"), rows_ways, on_pair("{D}")[:1] + on_pair("{D}")[2:], 60),
    Target("adapter config", ("lora/adapter_config.json", "dora/adapter_config.json", "tokens/adapter_config.json"),
           json_ways, on_pair("{D}")[:1] + on_pair("{D}")[2:], 90),
    Target("ckpt", ("last.ckpt",), (*[ways.bend_torch] * 6, *table_ways), on_pair("{}/last.ckpt"), 60),
    Target("bin", ("pickled/pytorch_model.bin",), (*[ways.bend_torch] * 3, *table_ways), on_pair("{}/pickled")[:3], 30),
    Target("tokenizer", TOKENIZER, json_ways, ON_TOKENIZER, 40),
    Target("jsonl", ("data/chats.jsonl", "data/texts.jsonl", "data/completions.jsonl"),
           line_ways, ON_DATA, 60),
    Target("json", ("data/chats.json", "data/texts.json"), json_ways, ON_DATA[:3], 30),
    Target("parquet", ("data/chats.parquet", "data/texts.parquet"), table_ways, ON_DATA[:3], 30),
    Target("text", ("data/lines.txt",), table_ways, ON_DATA[:3], 12),
    Target("run folder", RUN, line_ways, ON_RUN, 100),
    Target("rows of a run", ("run/rows-4.safetensors",), rows_ways, ON_RUN, 30),
    Target("counts", ("scan.safetensors", "coverage.safetensors"), (*rows_ways, *[ways.bend_metadata] * 6),
           ON_COUNTS, 50),
    Target("probe", ("probe.safetensors",), (*rows_ways, *[ways.bend_metadata] * 6), ON_PROBE, 60),
    Target("asked model", (*CONFIGS, "tuned/tokenizer.json", "tuned/tokenizer_config.json"),
           (*[ways.bend_json] * 6, *table_ways), ON_MODELS, 60),
    Target("asked adapter", ("lora/adapter_config.json", "lora/adapter_model.safetensors"), table_ways,
           (f"probe {{}}/lora {{}}/base {ASK} --json",), 12),
    Target("words", ("data/lines.txt",), table_ways, (
        f"probe {{}}/tuned {{}}/base {ASK} --watch {{F}} --json",
        "probe {}/tuned {}/base --sample 8 --asks 1 --texts {F}",
    ), 16),
)  # fmt: skip


TEMPLATES = {
    "syntax": "{% if %}", "unclosed": "{% for m in messages %}", "undefined": "{{ nobody.at.all }}",
    "raises": "{{ raise_exception('no\nsystem role') }}", "endless": "{% for i in range(10**10) %}x{% endfor %}",
    "large": "{{ 'a' * 10**11 }}", "larger": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "nothing": "",
    "constant": "a", "a number": "{{ 1/0 }}", "private": "{{ ''.__class__.__mro__ }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "import": "{% include 'x' %}",
    "roles": "{% for m in messages %}{{ m.rolle.x }}{% endfor %}",
    "random": "{{ range(5) | random }}", "reversed": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "control": "\x00\x1b[31m{{ messages }}",
    "generation": "{% generation %}{% endgeneration %}", "twice": healthy.CHAT * 2, "power": "{{ 9**(9**9) }}",
    "wide": "{% for m in messages %}{{ m.content | center(10**9) }}{% endfor %}", "surrogate": "{{ '\\ud800' }}",
}  # fmt: skip
"""Chat templates."""

VALUES = (
    "", " ", "-1", "0", "1", "nan", "inf", "1e999", "a\nb", "~nobody/x", "[bold]", "99999999999999999999", "{}",
    "{}/tok", "{}/data/chats.jsonl", "{}/fifo", "{}/loop", "{}/none/x", "{}/base", "re:(", "re:(a+)+$", "\x1b[31m",
    "嘉", "--json",
)  # fmt: skip
"""Values of options."""

OPTIONS = {
    "scan {}/base {}/tuned": (
        "--tokenizer", "--head", "--embedding", "--coverage", "--run", "--threshold", "--top", "--out"
    ),
    "explain {}/base {}/tuned --no-ask": ("--tokenizer", "--head", "--embedding", "--coverage", "--run", ""),
    "repair {}/base {}/tuned --no-ask": ("--out", "--method", "--strength", "--cosine-below", "--targets-below"),
    "repair {}/base {}/tuned --out {}/new --method echo --data {}/data/chats.jsonl --targets 0.1 --no-ask": (
        "--targets", "--learning-rate", "--batch", "--max-length", "--instruction", "--data", "--tokenizer"
    ),
    "repair {}/base {}/tuned --out {}/new": ("--text", "--sample"),
    "coverage {}/tok {}/data/chats.jsonl": (
        "--kind", "--column", "--loss", "--max-length", "--chat-template", "--epochs", "--out", "--threshold",
        "--watch", "--top", "--workers", "",
    ),
    "replay {}/data --tokenizer {}/tok --out {}/o.jsonl": (
        "--coverage", "--targets", "--kind", "--column", "--max-length", "--pool", "--threshold", "--out", "--needs",
        "",
    ),
    "echo {}/tok --ids {}/ids.jsonl --targets 1": (
        "--ids", "--chats", "--targets", "--list-tokens", "--needs", "--below", "--cosine", "--exclude",
        "--instruction", "--separator", "--chat-template", "--seed",
    ),
    f"probe {{}}/tuned {{}}/base {ASK}": (
        "--sample", "--asks", "--batch", "--seed", "--watch", "--texts", "--text-tokens", "--coverage", "--run",
        "--tokenizer", "--device", "--device-map", "--dtype", "--threshold", "--threshold-loss", "--top", "--out", "",
    ),
    "probe {}/tuned": ("",),
    "scan {}/base {}/tuned --probe --sample 8": ("--watch", "--texts", "--batch", "--seed", "--dtype"),
    "show {}/run": ("--top", ""),
    "report {}/run": ("--out", "--tokenizer", "--threshold", "--threshold-forgotten", ""),
    # Without a program that is there: it would take this process's place.
    "run": ("--config", "--set"),
    "run {}/absent.py": ("",),
}  # fmt: skip
"""A command that works, and its options; an empty name is a further argument."""


def cases(seed: int, rounds: int) -> Iterator[Case]:
    """All cases; those of damaged files come `rounds` times, each time damaged otherwise."""
    number = seed * 1_000_000
    for target in TARGETS:
        if target.kind == "parquet" and not healthy.PARQUET:
            continue
        for turn in range(target.count * rounds):
            number += 1
            rng = Random(number)
            line, file = target.lines[turn % len(target.lines)], rng.choice(target.files)
            line = line.replace("{F}", "{}/" + file).replace("{D}", "{}/" + file.split("/")[0])
            argv = tuple(line.split())
            yield Case(argv[0], target.kind, number, argv, file, rng.choice(target.bends))
    for name, template in TEMPLATES.items():
        number += 1
        for line in ON_TOKENIZER[:3]:
            argv = tuple(line.split())
            yield Case(argv[0], f"template: {name}", number, argv, "tok/chat_template.jinja", _template(template))
    for line, options in OPTIONS.items():
        for option in options:
            for value in VALUES:
                number += 1
                argv = (*line.split(), *((option,) if option else ()), value)
                yield Case(argv[0], "option", number, argv)


def _template(text: str) -> Bend:
    def bend(path: Path, _rng: Random) -> None:
        path.write_text(text, encoding="utf-8")

    return bend


def run(argv: list[str]) -> tuple[int | None, str, str, str]:
    """Exit code (None for a traceback), standard output, standard error, the traceback."""
    out, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["vocabguard", *argv]
    code: int | None = 0
    told = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:  # what nobody caught is what is looked for
        code, told = None, traceback.format_exc()
    finally:
        sys.argv = before
    return code, out.getvalue(), errors.getvalue(), told


class TooLongError(BaseException):
    """Raised by the alarm; nothing of ours catches it."""


def _alarm(_number: int, _frame: Any) -> None:
    raise TooLongError


def memory() -> tuple[int, int]:
    """Bytes now, and the most since `forget_peak`; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024
    return 0, 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """How a case ends, and what there is to say of it."""
    if case.file is not None and case.bend is not None:
        case.bend(folder / case.file, Random(case.seed))
    argv = [part.replace("{}", str(folder)) for part in case.argv]
    forget_peak()
    before, began = memory()[0], time.monotonic()
    signal.alarm(SECONDS)
    try:
        code, _, errors, told = run(argv)
    finally:
        signal.alarm(0)
    seconds, grown = time.monotonic() - began, memory()[1] - before
    if "TooLongError" in told or seconds > SECONDS:
        return "slow", told
    if grown > BYTES or "MemoryError" in told + errors:
        return "large", f"{grown:,} bytes: {told}{errors}"
    if code is None or LAST_RESORT in errors:
        return "traceback" if code is None else "last resort", told or errors
    return _by_code(code, errors), f"exit {code}: {errors}"


def _by_code(code: int, errors: str) -> str:
    lines = errors.strip().splitlines()
    if code == 2 and lines and lines[0].startswith("Usage:"):
        return "usage"
    if code == 2:
        # Libraries may say something of their own before.
        ours = [place for place, line in enumerate(lines) if line.startswith("vocabguard: ")]
        return "refused" if ours == [len(lines) - 1] and "Traceback" not in errors else "many lines"
    return {0: "fine", 1: "findings"}.get(code, "traceback")


def limit_memory() -> None:
    """Let what asks for too much get a MemoryError, instead of the machine's other programs."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, -1))


def prepared(folder: Path) -> Path:
    """Healthy inputs, and what the commands themselves write of them."""
    healthy.make(folder)
    for argv in (
        ["scan", f"{folder}/base", f"{folder}/tuned", "--out", f"{folder}/scan.safetensors", "--json"],
        ["coverage", f"{folder}/tok", f"{folder}/data/chats.jsonl", "--out", f"{folder}/coverage.safetensors"],
        ["probe", f"{folder}/tuned", f"{folder}/base", *ASK.split(), "--out", f"{folder}/probe.safetensors", "--json"],
    ):
        code, _, errors, told = run(argv)
        assert code in (0, 1), errors + told
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def copied(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    os.mkfifo(target / "fifo")


def main_fuzz() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose command and kind hold this")
    parser.add_argument("--every", type=int, default=1, help="each n-th case only")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    limit_memory()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest, began, faults = 0.0, time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        source = prepared(Path(place) / "healthy")
        chosen = [case for case in cases(asked.seed, asked.rounds) if asked.only in f"{case.command} {case.kind}"]
        for case in chosen[:: asked.every]:
            folder = Path(place) / "work"
            copied(source, folder)
            before = Path.cwd()
            os.chdir(folder)
            started = time.monotonic()
            how, told = outcome(case, folder)
            slowest = max(slowest, time.monotonic() - started)
            os.chdir(before)
            counts[case.command][how] += 1
            kinds[case.kind.split(":")[0]][how] += 1
            if how in FAULTS:
                faults += 1
                print(f"-- {how}: {case.kind} {case.seed} {case.file} {' '.join(map(repr, case.argv))}\n{told[-1500:]}")
            shutil.rmtree(folder)
    found = {
        "cases": sum(sum(one.values()) for one in counts.values()),
        "faults": {name: sum(one[name] for one in counts.values()) for name in FAULTS},
        "by_command": {name: dict(sorted(one.items())) for name, one in sorted(counts.items())},
        "by_kind": {name: dict(sorted(one.items())) for name, one in sorted(kinds.items())},
        "slowest_seconds": round(slowest, 1),
        "seed": asked.seed,
    }
    print(json.dumps(found, indent=1), f"\n{time.monotonic() - began:.0f} s")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main_fuzz()
