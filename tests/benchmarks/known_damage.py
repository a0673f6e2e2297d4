"""Are the verdicts right where the damage is known? SmolLM2 135M against copies of itself that were broken on purpose.

    python tests/benchmarks/known_damage.py CACHE WORK [--only "untouched|bfloat16"] [--json known_damage.json]

CACHE is the folder of `real_models.py`, from which this only reads; in WORK the answers of the base, the adapter and
one copy at a time are kept, so that the pairs can be done one by one. Of each: what `vocabguard scan` says of rows and
body, what ``vocabguard probe`` and ``scan --probe`` say with their intervals, and whether that is right. *Right*:

- of an untouched and of a rounded copy (bfloat16, 8 bits a row, GGUF's Q8_0) there is no finding, and the interval of
  what is lost holds 0;
- of 200 zeroed rows the scan counts all 200, the interval holds the true share, and the watched ones of them are lost;
- of a row that grew (one row, twelve times as long) the scan names it, and the tokens lost are put down to other rows,
  not to the body;
- of a damaged layer the scan names the block, and the probe is not fine;
- of a head that stands still over a body that lost tokens (a LoRA adapter, 40 steps at 7e-3, at half its strength) the
  rows stand still, the body is named, the probe finds tokens lost, and no row of the base brings them back;
- of a real fine-tune of everything (the bench's ``constant``) both see it.

A scan without ``--probe`` says that behaviour was not looked at. Asked in bfloat16, 3.6 times as fast on a CPU that
computes in it; `probe` asks rounded copies in float32, since bfloat16 would round away what is looked for. `repair` is
the adapter once more, given to ``vocabguard repair --method auto``: it comes back as an adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "kits"))

import torch
from command_line import called
from corpus import load
from real.data import training_rows
from real.models import base_folder, load_base
from real.replay import load_weights
from transformers import DataCollatorForSeq2Seq, set_seed

ZEROED, BLOCK, GROWN = 200, 12, 12.0
TUNED = "constant/control-0/weights-100.safetensors"
LIVE = 49_119
ROUNDED = ("untouched", "bfloat16", "8 bits", "GGUF Q8_0")
STEPS, RATE, STRENGTH = 40, 7e-3, 0.5
KEPT = ("river", "because")
"""Watched words that no damage is aimed at."""


class Copies:
    """Copies of the base, each damaged in its way.

    Args:
        cache: the bench's folder.
        work: where the adapter is kept.
    """

    def __init__(self, cache: Path, work: Path) -> None:
        self._cache, self._work = cache, work
        self.model, self.tokenizer = load_base(cache, "smollm2")
        # Evenly over the vocabulary, past the control tokens.
        self.zeroed = torch.linspace(300, 48_900, ZEROED).long()

    @property
    def words(self) -> list[str]:
        """Some of the zeroed tokens that are words by themselves."""
        texts = (self.tokenizer.decode([token]) for token in self.zeroed.tolist())
        return [text for text in texts if text.strip().isalpha() and len(text.strip()) > 2][:12]

    def each(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """Names, and what makes the damage; it says why there is none."""
        yield "untouched", lambda: None
        yield "bfloat16", lambda: self._rounded(lambda weight: weight.bfloat16().float())
        yield "8 bits", lambda: self._rounded(_eight_bits)
        yield "GGUF Q8_0", lambda: self._rounded(_gguf)
        yield "200 rows zeroed", self._zero
        yield "one row grown", self._grow
        yield "one MLP damaged", self._mlp
        yield "head frozen, body tuned", self._frozen
        yield "everything tuned", self._tuned

    @torch.no_grad()
    def write(self, damage: Callable[[], str | None], folder: Path) -> str | None:
        """A folder with a damaged copy, or why there is none."""
        why = damage()
        if why is None:
            kind = torch.bfloat16 if folder.name == "bfloat16" else torch.float32
            self.model.to(kind).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return why

    def _zero(self) -> None:
        self.model.get_output_embeddings().weight[self.zeroed] = 0

    def _grow(self) -> None:
        self.model.get_output_embeddings().weight[self.zeroed[100]] *= GROWN

    def _mlp(self) -> None:
        weight = self.model.model.layers[BLOCK].mlp.down_proj.weight
        weight.copy_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))

    def _frozen(self) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(self.model, str(self.adapter())).merge_and_unload()

    def _tuned(self) -> str | None:
        if not (self._cache / TUNED).exists():
            return f"CACHE has no {TUNED}"
        self.model, _ = load_base(self._cache, "smollm2", untied=True)
        load_weights(self.model, self._cache / TUNED)
        return None

    def _rounded(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for weight in self.model.parameters():
            weight.copy_(to(weight) if weight.ndim == 2 else weight)

    def adapter(self) -> Path:
        """The folder of an adapter on all linear layers between the rows, trained as nobody should; made once."""
        folder = self._work / "adapter"
        if not folder.exists():
            model, _ = load_base(self._cache, "smollm2")
            train_adapter(model, self.tokenizer, base_folder(self._cache, "smollm2")).save_pretrained(folder)
        return folder


@torch.enable_grad()
def train_adapter(model: Any, tokenizer: Any, base: Path) -> Any:
    """Forty steps of four rows on English chats, at thirty times the usual rate; the base is in bfloat16 meanwhile.

    At its full strength nothing at all is repeated any more; at half of it some tokens are lost and others are not.
    """
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    adapted: Any = get_peft_model(model.bfloat16(), config, autocast_adapter_dtype=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    learned = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    rows = training_rows(tokenizer, steps=STEPS, batch=4, copies=1, longest=48, seed=0)
    collate = DataCollatorForSeq2Seq(tokenizer)
    adapted.train()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(**collate(rows[4 * step : 4 * step + 4])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"adapter: loss of the last step {float(loss.detach()):.3f}", flush=True)
    adapted.peft_config["default"].lora_alpha = int(STRENGTH * config.lora_alpha)
    return adapted.eval()


def _eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric, a step for each row, as most quantisers have it."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step.clamp_min(1e-12)).round() * step


def _gguf(weight: torch.Tensor) -> torch.Tensor:
    """There and back through the blocks of 32 in which a GGUF file keeps 8 bits."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.detach().numpy(), kind), kind).copy())


def judged(name: str, scan: dict[str, Any], probe: dict[str, Any]) -> dict[str, bool]:
    """What is right of what, by the truth.

    Args:
        probe: what `vocabguard probe` printed, or the ``probe`` of a scan.
    """
    rows, body, verdict = scan["head"], scan["body"], probe["verdict"]
    low, high = 1 - probe["numbers"]["retained_high"], 1 - probe["numbers"]["retained_low"]
    still = rows.get("below_0.95") == 0 and not rows["zeroed_rows"]["count"]
    where = probe.get("where")
    if name in ROUNDED:
        found = {
            "no finding": not verdict["findings"],
            "fine": verdict["level"] == "fine",
            "interval holds 0": low <= 0,
        }
        if name in ("untouched", "bfloat16"):
            found["body"] = body["identical"] or body["rounded"]
        return found
    if name == "200 rows zeroed":
        known = [word for word in probe["words"] if word["known"]]
        watched = all(word["lost"] == (word["text"] not in KEPT) for word in known)
        counted = rows["zeroed_rows"]["count"] >= ZEROED - 10
        return {"all counted": counted, "interval": low <= ZEROED / LIVE <= high, "body": body["identical"],
                "watched words": watched and verdict["level"] == "lost"}  # fmt: skip
    if name == "one row grown":
        found = {
            "lost": verdict["level"] == "lost",
            "body": body["identical"],
            "rows": rows["norm_outliers"]["count"] > 0,
        }
        return found | (
            {} if where is None else {"other rows drown them": where["other_rows"] > 0.9 * where["forgotten"]}
        )
    found = {"not fine": verdict["level"] in ("lost", "harder"), "body named": not body["identical"]}
    if name == "one MLP damaged":
        moved = [one["block"] for one in body["blocks"] if one["changed"]]
        return found | {"block named": moved == [str(BLOCK)], "rows still": still}
    if name == "head frozen, body tuned":
        found |= {"rows still": still, "tokens lost": low > 0}
        if where is not None:
            found["no row brings them back"] = where["body"] > 0.9 * where["forgotten"]
    return found


def brief(probe: dict[str, Any]) -> dict[str, Any]:
    """A probe's verdict with its intervals."""
    numbers, reference = probe["numbers"], probe["reference"]
    lost = (numbers["lost"], 1 - numbers["retained_high"], 1 - numbers["retained_low"])
    return {
        "level": probe["verdict"]["level"], "sentence": probe["verdict"]["sentence"],
        "findings": probe["verdict"]["findings"], "known": int(numbers["known"]), "asked": probe["asked"]["tokens"],
        "lost": [round(value, 4) for value in lost],
        "nll_rise": [round(reference[f"nll_rise{end}"], 4) for end in ("", "_low", "_high")],
        "where": probe.get("where"),
    }  # fmt: skip


def timed(*arguments: object) -> tuple[int, dict[str, Any], dict[str, float]]:
    """A command's exit code, its JSON, and what it cost."""
    began, worked = time.perf_counter(), time.process_time()
    code, told = called(*arguments)
    cost = {"cpu_s": time.process_time() - worked, "wall_s": time.perf_counter() - began,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # fmt: skip
    return code, told, {key: round(value, 1) for key, value in cost.items()}


def pair(name: str, folder: Path, base: Path, work: Path, line: tuple[object, ...]) -> dict[str, Any]:
    """One pair: both commands, and what is right of it."""
    dtype = "float32" if name in ROUNDED else "bfloat16"
    before = work / f"base-{dtype}.safetensors"
    found: dict[str, Any] = {"dtype": dtype}
    if not before.exists():
        # The base is asked once in each: its file stands for it.
        code, _, found["base_cost"] = timed("probe", base, *line, "--dtype", dtype, "--out", before)
        assert code == 0
    code, probe, cost = timed("probe", folder, before, "--dtype", dtype)
    kept = [part for at in (line.index("--sample"), line.index("--watch")) for part in line[at : at + 2]]
    _, scan, scan_cost = timed("scan", base, folder, "--probe", *kept, "--dtype", "bfloat16")
    rows = scan["verdict"]["rows"]
    right = {"probe": judged(name, scan, probe), "scan --probe": judged(name, scan, scan["probe"])}
    if name in ROUNDED:
        right["scan"] = {"no finding": not scan["findings"]}
    if name == "one row grown":
        right["scan"] = {"names the row": "the norm of 1 live output row doubled or halved" in rows}
    if name == "one MLP damaged":
        # Nothing of a scan without a probe may read as if behaviour had been looked at.
        unseen = timed("scan", base, folder)[1]["verdict"]["not_measured"]
        right["scan"] = {"says what it did not see": any("what the model can say" in one for one in unseen)}
    return {
        "right": all(all(one.values()) for one in right.values()), "of": right, "exit": code, "scan": rows,
        "scan_findings": scan["verdict"]["findings"], "probe": brief(probe), "scan_probe": brief(scan["probe"]),
        "cost": {"probe": cost, "scan_probe": scan_cost}, **found,
    }  # fmt: skip


def repaired(copies: Copies, base: Path, work: Path) -> dict[str, Any]:
    """The adapter that lost tokens, repaired as an adapter with the chats that it was trained on."""
    data, out = work / "chats.jsonl", work / "repaired"
    chats = [[{"role": "user", "content": one.user}, {"role": "assistant", "content": one.assistant}]
             for one in load("train").english()[:400]]  # fmt: skip
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    line = (
        "--method",
        "auto",
        "--data",
        data,
        "--sample",
        192,
        "--max-length",
        48,
        "--batch",
        3,
        "--learning-rate",
        1e-3,
        "--text-tokens",
        2048,
        "--dtype",
        "bfloat16",
    )
    code, told, cost = timed("repair", base, copies.adapter(), "--out", out, *line)
    named = sorted(path.name for path in out.iterdir())
    told.pop("out", None)
    right = {
        "an adapter": "adapter_model.safetensors" in named and "model.safetensors" not in named,
        "recall back for sure": told["recall"]["change_low"] > 0,
    }
    return {"right": all(right.values()), "of": right, "exit": code, "files": named, **told, "cost": cost}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main_table() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sample", type=int, default=128)
    parser.add_argument("--asks", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--only", default="", help="names of pairs between bars, and `repair`")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    only = [name.strip() for name in asked.only.split("|") if name.strip()]
    base, copies = base_folder(asked.cache, "smollm2"), Copies(asked.cache, asked.work)
    found = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json and asked.json.exists() else {}
    watch = asked.work / "words.txt"
    watch.write_text("\n".join([*copies.words, *KEPT]) + "\n", encoding="utf-8")
    line = ("--sample", asked.sample, "--asks", asked.asks, "--text-tokens", asked.text_tokens, "--watch", watch)
    names = [name for name, _ in copies.each() if not only or name in only]
    for name in names:
        folder = asked.work / name.replace(" ", "-").replace(",", "")
        fresh = Copies(asked.cache, asked.work)
        damage = dict(fresh.each())[name]
        why = fresh.write(damage, folder)
        found[name] = {"not_made": why} if why is not None else pair(name, folder, base, asked.work, line)
        shutil.rmtree(folder, ignore_errors=True)
        _kept(name, found, asked.json)
    if not only or "repair" in only:
        found["repair"] = repaired(copies, base, asked.work)
        _kept("repair", found, asked.json)
    wrong = [name for name, one in found.items() if one.get("right") is False]
    print("wrong:", wrong or "none")
    sys.exit(bool(wrong))


def _kept(name: str, found: dict[str, Any], file: Path | None) -> None:
    print(name, json.dumps(_finite(found[name]), ensure_ascii=False, indent=1), flush=True)
    if file is not None:
        file.write_text(json.dumps(_finite(found), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_table()
