"""What the guard's messages and waits cost on many hosts: traced counts, stated constants, arithmetic.

``python tests/benchmarks/many_hosts.py --json tests/benchmarks/many_hosts.json`` traces and computes anew, in a minute;
``--table JSON`` shows a file as the table of `tests/README.md`.

**Traced.** Two real processes note each message of a step and of a check (`tests/processes/messages.py`); one process
notes waits of the host and bytes to and from an accelerator that stands in for a real one (`tests/kits/stalls.py`).
Sizes there are small, and follow from V: masks have a byte or a bit a row, vectors 4 or 8 bytes, a flag 4 bytes a rank.

**Not measured.** No run on 64 or 512 ranks stands behind the milliseconds: they are the counts times `CONSTANTS`, for a
network where nobody is late. A blocking message also waits for the slowest rank of the step, which is not in here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]

CONSTANTS = {
    "gloo_hop_s": 50e-6,  # over TCP: of a ring, which has 2 (N - 1) hops, or of a tree, which has log2 N
    "gloo_bytes_s": 1.25e9,  # 10 Gbit/s
    "nccl_start_s": 20e-6,
    "nccl_hop_s": 5e-6,  # of a tree, which has 2 log2 N
    "nccl_bytes_s": 25e9,
    "wait_s": 50e-6,  # a host wait: the device runs dry and is fed anew
    "bus_bytes_s": 8e9,  # pageable memory
    "memory_bytes_s": 3e12,  # of the accelerator
}
"""Stated, not measured: seconds and bytes a second."""

SIZE = {"rows": 131_072, "width": 4096, "element": 2, "every": 100}
"""Rows, elements a row and their bytes of the model; steps between checks."""

RANKS = (64, 512)

FLAG = 5
"""Elements of a flag of health, as two processes send it: one for each, and a few numbers."""

BEFORE: dict[str, dict[str, Any]] = {
    "watching": {"own": [("flag", 1), ("mask", 1)], "waits": 2, "bus": 2, "read": 0},
    "hold": {"own": [("flag", 3), ("mask", 2)], "waits": 7, "bus": 4, "read": 10},
}
"""A step of 0.1.0, by reading its code: messages of the guard's own group (a flag of health before each mask), waits of
the host, masks over the bus, and how often the matrix was read or written (with its rows kept on the device)."""

# Row norms of a gradient are one pass; to keep the rows, to put them back, to move them and the same of two moments.
READS = {"watching": 1, "hold": 1 + 2 + 3 + 2 + 2 * 3}


def traced() -> dict[str, Any]:
    """Counts of this version: two processes' messages, and waits and bytes on the stand-in."""
    for room in ("", "kits", "guard"):
        sys.path.insert(0, str(TESTS / room))
    import conftest as guard_kit
    import torch
    from ranks import run_together
    from stalls import KIND, accelerator, moved

    from vocabguard import VocabGuard, collective

    assert FLAG == 2 + collective.WORDS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_together("messages.py", folder, timeout=900)
        sent = torch.load(Path(folder) / "rank-0.pt", weights_only=True)
    for name in ("watching", "hold"):
        messages = sent[name]["sent"]
        found[name] = {"step": messages[1], "check": messages[11]}
    for name, options in {"watching": {}, "hold": {"hold": {"enabled": True}}}.items():
        with accelerator() as device:
            model = guard_kit.llama()
            model.config.use_cache = False
            moved(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            guard = VocabGuard(drift={"every_n_steps": 9}, **options, **guard_kit.QUIET)
            guard.attach(model, optimizer, total_steps=9)
            for step, batch in enumerate(guard_kit.batches(3), start=1):
                device.clear()
                model.train()(**{key: value.to(KIND) for key, value in batch.items()}).loss.backward()
                optimizer.step()
                guard.step(step)
            waits = sum(device.waits.values())
            found[name] |= {"waits": waits, "bytes": device.bytes("up") + device.bytes("down")}
    return found


def seconds_of(message: tuple[str, int, str], ranks: int, rows_traced: int) -> float:
    """Of one traced message, in a world of so many ranks: its size follows V, but a flag's, which follows the ranks."""
    group, elements, dtype = message
    width = {"torch.uint8": 1, "torch.int32": 4, "torch.float32": 4, "torch.int64": 8, "torch.float64": 8}.get(dtype, 1)
    if dtype == "object":  # the logged keys, pickled, from the first rank to the others
        return math.ceil(math.log2(ranks)) * (CONSTANTS["gloo_hop_s"] + 8192.0 / CONSTANTS["gloo_bytes_s"])
    if elements == FLAG and dtype == "torch.int64":
        size = 8.0 * (ranks + FLAG - 2)
    elif group == "own" and dtype == "torch.uint8":  # a mask a step, and one of the tokens that are sent in full
        size = (SIZE["every"] + 1) * SIZE["rows"] / 8
    else:
        size = width * elements / rows_traced * SIZE["rows"]
    return _all_reduce(size, ranks, own=group == "own")


def values_of(messages: list[Any], rows: int) -> float:
    """Values of 4 bytes a row that a check sends, but for the masks of its steps: one bit a row and step."""
    return sum(elements for _, elements, dtype in messages if dtype in ("torch.int32", "torch.float32")) / rows


def _all_reduce(size: float, ranks: int, *, own: bool) -> float:
    c = CONSTANTS
    if own:
        return 2 * (ranks - 1) * c["gloo_hop_s"] + 2 * size / c["gloo_bytes_s"]
    return c["nccl_start_s"] + 2 * math.ceil(math.log2(ranks)) * c["nccl_hop_s"] + 2 * size / c["nccl_bytes_s"]


def model(found: dict[str, Any], rows_traced: int = 131) -> list[dict[str, Any]]:
    """Milliseconds of a step and of a check, before and now, for each kind of run and number of ranks."""
    c, matrix = CONSTANTS, SIZE["rows"] * SIZE["width"] * SIZE["element"]
    lines = []
    for kind in ("watching", "hold"):
        for ranks in RANKS:
            old, now = BEFORE[kind], found[kind]
            sizes = {"flag": 4.0 * ranks, "mask": float(SIZE["rows"])}
            before = sum(count * _all_reduce(sizes[name], ranks, own=True) for name, count in old["own"])
            before += old["waits"] * c["wait_s"] + old["bus"] * SIZE["rows"] / c["bus_bytes_s"]
            before += old["read"] * matrix / c["memory_bytes_s"]
            messages = [seconds_of(tuple(one), ranks, rows_traced) for one in now["step"]]
            waits = now["waits"] * c["wait_s"] + now["bytes"] / c["bus_bytes_s"]
            reads = READS[kind] * matrix / c["memory_bytes_s"]
            check = sum(seconds_of(tuple(one), ranks, rows_traced) for one in now["check"])
            lines.append(
                {
                    "kind": kind, "ranks": ranks, "before_messages": sum(count for _, count in old["own"]),
                    "before_waits": old["waits"], "before_ms": before * 1e3, "messages": len(now["step"]),
                    "waits": now["waits"], "sent_ms": sum(messages) * 1e3, "memory_ms": reads * 1e3,
                    "now_ms": (sum(messages) + waits + reads) * 1e3, "check_messages": len(now["check"]),
                    "check_values": values_of(now["check"], rows_traced), "check_ms": check * 1e3,
                    "check_a_step_ms": check * 1e3 / SIZE["every"],
                }
            )  # fmt: skip
    return lines


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    head = (
        "| | ranks | a step of 0.1.0: messages, waits | ms | now | ms | of it memory | a check: messages "
        "| values a row | ms |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {one['kind']} | {one['ranks']} | {one['before_messages']}, {one['before_waits']} | "
        f"{one['before_ms']:.1f} | {one['messages']}, {one['waits']} | {one['now_ms']:.2f} | "
        f"{one['memory_ms']:.2f} | {one['check_messages']} | {one['check_values']:.1f} | "
        f"{one['check_ms']:.0f} |"
        for one in report["lines"]
    ]
    return "\n".join([head, *rows])


def main(argv: list[str] | None = None) -> None:
    """Trace and compute, or show what was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write counts, constants and milliseconds there")
    parser.add_argument("--table", type=Path, metavar="JSON", help="show a file and trace nothing")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    found = traced()
    report = {"constants": CONSTANTS, "size": SIZE, "before": BEFORE, "traced": found, "lines": model(found)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
