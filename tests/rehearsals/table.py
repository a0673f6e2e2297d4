"""Write the tables of `integrations/README.md` from the results: ``python tests/rehearsals/table.py``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parents[1] / "integrations" / "README.md"
ORDER = (
    "hf-script", "trl", "axolotl", "ms-swift", "ms-swift-padding-free", "llama-factory", "lightning", "litgpt",
)  # fmt: skip
NAMES = {
    "hf-script": "a script with a Hugging Face `Trainer`",
    "trl": "TRL: `trl sft`, assistant only",
    "axolotl": "axolotl, packed samples (multipack)",
    "ms-swift": "ms-swift, logits and labels trimmed",
    "ms-swift-padding-free": "ms-swift, padding-free, trimmed",
    "llama-factory": "LLaMA-Factory: `llamafactory-cli train`",
    "lightning": "a script with a Lightning `Trainer`",
    "litgpt": "litgpt's model, data and loss in Fabric",
}  # fmt: skip
ENGINES = {
    "ddp": "DDP",
    "fsdp1_orig": "FSDP1, original parameters",
    "fsdp1_flat": "FSDP1, flat parameters",
    "fsdp2": "FSDP2",
    "fsdp2_tied": "FSDP2, tied",
    "fsdp2_offload": "FSDP2, CPU offload",
    "hsdp": "HSDP (2 x 2)",
    "tp": "tensor parallel by rows",
    "tp_columns": "tensor parallel by columns",
    "tp_auto": '`tp_plan="auto"`',
    "fsdp2_tp": "FSDP2 x tensor parallel (2 x 2)",
    "context": "context parallel batches",
    "sequence": "sequence parallel batches (Ulysses)",
    "pipeline": "pipeline stages",
    "ulysses": "DeepSpeed Ulysses (`UlyssesSPAttentionHF`), no ZeRO",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
MEASURES = ("drift", "exposure", "pull and push", "probe", "echo", "hold")
TRACKERS = {
    "wandb": "wandb (offline)",
    "mlflow": "MLflow",
    "trackio": "trackio",
    "tensorboard": "TensorBoard",
    "comet_ml": "Comet (offline)",
}


def clients() -> str:
    """Client x (what is added, ends normally, counts, echo, keys in the tracker)."""
    lines = [
        "| client | versions | you add | ends normally | data targets: guard / spy (tokens that differ) "
        "| echo targets: guard / spy (tokens that differ) | keys in the client's own log |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name in ORDER:
        found = result(name)
        if found is None:
            lines.append(f"| {NAMES[name]} | not run |" + " - |" * 5)
            continue
        versions = ", ".join(f"{package} {number}" for package, number in sorted(found["versions"].items()))
        where = "the guard's own" if name == "litgpt" else "its"
        lines.append("| " + " | ".join([NAMES[name], versions, found["added"], *cells(found, where)]) + " |")
        if found["needed"]:
            notes.append(f"{NAMES[name].partition(',')[0].partition(':')[0]}: {found['needed']}.")
    return "\n".join([*lines, "", *sorted(set(notes))])


def cells(found: dict[str, Any], where: str) -> list[str]:
    """What the two runs of a client have shown. `where`: whose TensorBoard files were read."""
    plain, echo = found["plain"], found["echo"]
    ended = all(run["exit_code"] == 0 and run["steps"] == 6 and not run["disabled_itself"] for run in (plain, echo))
    works = not echo["echo_off"] and echo["counted_echo"] > 0
    steps = plain.get("steps_with_keys") or []
    log = f"{len(plain['keys_in_log_history'])} keys at {len(steps)} checks, " if steps else ""
    return [
        yes(ended),
        f"{plain['counted_data']:,} / {plain['spied']:,} ({plain['tokens_that_differ_data']})",
        f"{echo['counted_echo']:,} / {echo['spied_echo']:,} ({echo['tokens_that_differ_echo']})" if works else "off",
        f"{log}{plain['tags_in_tensorboard']} in {where} TensorBoard files",
    ]


def trackers() -> str:
    """Tracker x (keys by its active run, through the trainer, table, page)."""
    found = json.loads((HERE / "results" / "trackers.json").read_text(encoding="utf-8"))
    lines = [
        "| tracker | version | the callback alone | through `add_to` | table of worst tokens | `report.html` |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TRACKERS.items():
        one = found[name]
        if one["installed"] is None:
            lines.append(f"| {title} | not installed |" + " - |" * 4)
            continue
        ways = [one["alone"], one["through_trainer"]]
        right = ["right" if way["last_value_right"] else "WRONG" for way in ways]
        shown = [
            f"{len(way['keys'])} keys at {way['checks']} checks, last values {said}"
            for way, said in zip(ways, right, strict=True)
        ]
        kept = [yes(all(way[what] for way in ways)) for what in ("worst_tokens", "report_page")]
        lines.append("| " + " | ".join([title, one["installed"], *shown, *kept]) + " |")
    return "\n".join(lines)


def engines() -> str:
    """Engine x measure (right, or refused in so many seconds, and why)."""
    found = json.loads((HERE / "results" / "engines.json").read_text(encoding="utf-8"))["engines"]
    lines = [f"| engine | processes | {' | '.join(MEASURES)} |", "|---|---|" + "---|" * len(MEASURES)]
    reasons: dict[str, int] = {}
    for name, title in ENGINES.items():
        if name not in found:
            lines.append(f"| {title} | not run |" + " - |" * len(MEASURES))
            continue
        one = found[name]
        cells = [_cell(one["measures"][measure], reasons) for measure in MEASURES]
        lines.append(f"| {title} | {one['processes']} | {' | '.join(cells)} |")
    told = [f"<sup>{number}</sup> {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *told])


def _cell(found: dict[str, Any], reasons: dict[str, int]) -> str:
    if found["verdict"] != "refused":
        return str(found["verdict"])
    reason = found["why"].partition(" is off: ")[2] or found["why"]
    reason = (reason[0].upper() + reason[1:]).rstrip(".") + "."
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"refused ({found['seconds']:.1f} s) <sup>{number}</sup>"


def result(name: str) -> dict[str, Any] | None:
    """Of a client; None where it was not run."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def yes(so: bool) -> str:
    """A cell."""
    return "yes" if so else "no"


def written(text: str) -> str:
    """The page with the tables put in."""
    for name, table in (("clients", clients()), ("trackers", trackers()), ("engines", engines())):
        begin, end = f"<!-- {name}: by tests/rehearsals/table.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
