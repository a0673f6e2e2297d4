"""Are the verdicts right where the damage is known? SmolLM2 135M against copies of itself that were broken on purpose.

    python tests/benchmarks/known_damage.py CACHE [--sample 256] [--asks 2] [--json tests/benchmarks/known_damage.json]

CACHE is the folder of `real_models.py`, from which this only reads; the copies are made in a temporary folder. A line
each: what `vocabguard scan` says (rows and body), what `vocabguard probe` says with its interval, what ``scan --probe``
would end with, and whether that is right. *Right*: of an untouched and of a rounded copy no finding; of 200 zeroed rows
the scan counts all 200, the probe's interval holds the true share, and the watched ones of them are lost; of a damaged
layer the scan names the block, says that behaviour was not looked at, and the probe is not fine; of a frozen head with
a tuned body (a bench run of that kind, where CACHE has one, else all layers of a real fine-tune under the base's rows)
the rows stand still, the body is named and the probe is not fine; of a real fine-tune of everything both see it.
``known_damage.json`` has the first three, with ``--sample 48 --asks 1 --text-tokens 1024``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "kits"))

import torch
from command_line import called
from real.models import base_folder, load_base
from real.replay import load_weights

ZEROED, BLOCK = 200, 12
FROZEN, TUNED = "frozen/control-0/weights-100.safetensors", "tied/control-0/weights-100.safetensors"
LIVE = 49_119


class Copies:
    """Copies of the base, each damaged in its way.

    Args:
        cache: the bench's folder.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.model, self.tokenizer = load_base(cache, "smollm2")
        self._base = {name: value.clone() for name, value in self.model.state_dict().items()}
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
        yield "200 rows zeroed", self._zero
        yield "one MLP damaged", self._mlp
        yield "head frozen, body tuned", self._frozen
        yield "everything tuned", self._tuned
        yield "bfloat16", lambda: self._rounded(lambda weight: weight.bfloat16().float())
        yield "8 bits", lambda: self._rounded(_eight_bits)

    @torch.no_grad()
    def write(self, damage: Callable[[], str | None], folder: Path) -> str | None:
        """A folder with a damaged copy, or why there is none."""
        self.model.load_state_dict(self._base)
        why = damage()
        if why is None:
            kind = torch.bfloat16 if folder.name == "bfloat16" else torch.float32
            self.model.to(kind).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.model.to(torch.float32)
        return why

    def _zero(self) -> None:
        self.model.get_output_embeddings().weight[self.zeroed] = 0

    def _mlp(self) -> None:
        weight = self.model.model.layers[BLOCK].mlp.down_proj.weight
        weight.copy_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))

    def _frozen(self) -> str | None:
        if (self._cache / FROZEN).exists():
            load_weights(self.model, self._cache / FROZEN)
            return None
        if not (self._cache / TUNED).exists():
            return f"CACHE has neither {FROZEN} nor {TUNED}"
        rows = self.model.get_input_embeddings().weight.clone()
        load_weights(self.model, self._cache / TUNED)
        self.model.get_input_embeddings().weight.copy_(rows)
        return None

    def _tuned(self) -> str | None:
        if not (self._cache / TUNED).exists():
            return f"CACHE has no {TUNED}"
        load_weights(self.model, self._cache / TUNED)
        return None

    def _rounded(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for weight in self.model.parameters():
            weight.copy_(to(weight) if weight.ndim == 2 else weight)


def _eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric, a step for each row, as most quantisers have it."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step.clamp_min(1e-12)).round() * step


KEPT = ("river", "because")
"""Watched words that no damage is aimed at."""


def judged(name: str, scan: dict[str, Any], probe: dict[str, Any]) -> dict[str, bool]:
    """What is right of what, by the truth."""
    rows, body, verdict = scan["head"], scan["body"], probe["verdict"]
    low, high = 1 - probe["numbers"]["retained_high"], 1 - probe["numbers"]["retained_low"]
    still = rows.get("below_0.95") == 0 and not rows["zeroed_rows"]["count"]
    # Nothing of a scan without a probe may read as if behaviour had been looked at.
    found = {
        "says what it did not see": any("what the model can say" in one for one in scan["verdict"]["not_measured"])
    }
    if name in ("untouched", "bfloat16", "8 bits"):
        found |= {"no finding": not verdict["findings"] and not scan["findings"], "fine": verdict["level"] == "fine"}
        found["interval holds 0"] = low <= 0
        if name != "8 bits":
            found["body"] = body["identical"] or body["rounded"]
    elif name == "200 rows zeroed":
        found |= {"all counted": rows["zeroed_rows"]["count"] >= ZEROED - 10, "interval": low <= ZEROED / LIVE <= high}
        known = [word for word in probe["words"] if word["known"]]
        found["watched words"] = verdict["level"] == "lost" and all(
            word["lost"] == (word["text"] not in KEPT) for word in known
        )
        found["body"] = body["identical"]
    else:
        found |= {"not fine": verdict["level"] in ("lost", "harder"), "body named": not body["identical"]}
        if name == "one MLP damaged":
            moved = [one["block"] for one in body["blocks"] if one["changed"]]
            found |= {"block named": moved == [str(BLOCK)], "rows still": still}
        elif name == "head frozen, body tuned":
            found["rows still"] = still
    return found


def brief(scan: dict[str, Any], probe: dict[str, Any]) -> dict[str, Any]:
    numbers, reference = probe["numbers"], probe["reference"]
    return {
        "scan": scan["verdict"]["rows"],
        "scan_findings": scan["verdict"]["findings"],
        "probe": probe["verdict"]["sentence"],
        "probe_level": probe["verdict"]["level"],
        "probe_findings": probe["verdict"]["findings"],
        "known": int(numbers["known"]),
        "lost": [
            round(value, 4) for value in (numbers["lost"], 1 - numbers["retained_high"], 1 - numbers["retained_low"])
        ],
        "nll_rise": [round(reference[f"nll_rise{end}"], 4) for end in ("", "_low", "_high")],
        "seconds": round(probe["seconds"], 1),
    }


def main_table() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--sample", type=int, default=256)
    parser.add_argument("--asks", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    base, copies = base_folder(asked.cache, "smollm2"), Copies(asked.cache)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        watch, before = Path(place) / "words.txt", Path(place) / "base.safetensors"
        watch.write_text("\n".join([*copies.words, *KEPT]) + "\n", encoding="utf-8")
        line = ("--sample", asked.sample, "--asks", asked.asks, "--text-tokens", asked.text_tokens, "--watch", watch)
        began = time.perf_counter()
        # The base is asked once: its file stands for it.
        called("probe", base, *line, "--out", before)
        found["base"] = {"seconds": round(time.perf_counter() - began, 1), "sample": asked.sample, "asks": asked.asks}
        for name, damage in copies.each():
            folder = Path(place) / name.replace(" ", "-").replace(",", "")
            why = copies.write(damage, folder)
            if why is not None:
                found[name] = {"not_made": why}
                continue
            scan = called("scan", base, folder)[1]
            code, probe = called("probe", folder, before)
            right = judged(name, scan, probe)
            found[name] = {"right": all(right.values()), "of": right, "exit": code, **brief(scan, probe)}
            print(name, json.dumps(found[name], ensure_ascii=False, indent=1), flush=True)
            if asked.json is not None:
                asked.json.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    wrong = [name for name, one in found.items() if one.get("right") is False]
    print("wrong:", wrong or "none")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main_table()
