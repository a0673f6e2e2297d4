"""``vocabguard probe --url``: did a model that a server has lose words?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabguard.cli import common
from vocabguard.cli.app import InputError
from vocabguard.cli.asking import Asking, telling
from vocabguard.compare.options import Bars
from vocabguard.config import ConfigError, ReferenceConfig
from vocabguard.files import one_line, read_json, write_file
from vocabguard.results import ProbeResult
from vocabguard.runlog import versions
from vocabguard.served.modes import CONCURRENCY, MODES, TIMEOUT, TRIES, Mode

if TYPE_CHECKING:
    from torch import Tensor

    from vocabguard.compare.probing import Answered
    from vocabguard.served.asking import Said
    from vocabguard.served.client import Server

KIND, SCHEMA = "vocabguard.served", 1
_CONCURRENCY, _TRIES, _SECONDS = 64, 20, 3600


@dataclass(frozen=True)
class Served:
    """A served model, and the one that it is held against.

    Attributes:
        base_url: None where there is no second server.
        base_model: the same.
        file: of an earlier run, which has the base's answers.
        key_env: name of the environment variable with the key.
        ask_by: one of `MODES`; None takes the one that `mode_of` finds.
    """

    url: str
    model: str
    base_url: str | None = None
    base_model: str | None = None
    file: Path | None = None
    key_env: str = "OPENAI_API_KEY"
    ask_by: str | None = None
    concurrency: int = CONCURRENCY
    tries: int = TRIES
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        common.check_most(
            ("--concurrency", self.concurrency, _CONCURRENCY), ("--tries", self.tries, _TRIES),
            ("--timeout", self.timeout, _SECONDS),
        )  # fmt: skip
        if self.ask_by is not None and self.ask_by not in MODES:
            raise InputError(f"--ask-by is {self.ask_by!r}; allowed: {', '.join(MODES)}")
        if self.base_model is not None and self.base_url is None and self.file is not None:
            raise InputError("--base-model and a file of an earlier run are both given; allowed: one base")
        if self.base_url is not None and self.file is not None:
            raise InputError("--base-url and a file of an earlier run are both given; allowed: one base")

    @property
    def key(self) -> str | None:
        """The key, if the environment has one."""
        return os.environ.get(self.key_env) or None

    def server(self, url: str, model: str) -> Server:
        """One of the two. The key goes to both only where they are one host.

        Raises:
            InputError: for an address that is none.
        """
        from vocabguard.served.client import Server, ServerError

        same = _host(url) == _host(self.url)
        try:
            return Server(
                url, model, self.key if same else os.environ.get(f"{self.key_env}_BASE") or None, self.timeout,
                self.tries, self.concurrency,
            )  # fmt: skip
        except ServerError as error:
            raise InputError(str(error)) from error


def _host(url: str) -> str:
    return url.split("://", 1)[-1].split("/", 1)[0].lower()


def probe_served(served: Served, asking: Asking, bars: Bars, tokenizer: str | None, top: int) -> dict[str, Any]:
    """Ask one or two served models; everything that was found, and ``kept`` for a file.

    Raises:
        InputError: for a server that cannot be asked, or a file that cannot be used.
    """
    from vocabguard.served.client import ServerError

    try:
        with telling() as tell:
            return _probe_served(served, asking, bars, tokenizer, top, tell)
    except (ServerError, ConfigError, ValueError) as error:
        raise InputError(one_line(error, 500)) from error


def _probe_served(
    served: Served, asking: Asking, bars: Bars, tokenizer: str | None, top: int, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:  # fmt: skip
    import torch

    from vocabguard.compare.verdicts import probe_verdict
    from vocabguard.served.asking import ask_words_of, mode_of

    server = served.server(served.url, served.model)
    earlier = None if served.file is None else _earlier(served.file)
    wanted: Any = served.ask_by if earlier is None else earlier["mode"]
    two = served.base_url is not None or served.base_model is not None
    base = served.server(served.base_url or served.url, served.base_model or served.model) if two else server
    mode = mode_of(base, wanted)
    if two:
        mode_of(server, mode)  # both are asked alike, or not at all
    if earlier is None:
        words, weights, pool = _words(asking, tokenizer)
        asks, seed = asking.asks, asking.seed
    else:
        words, weights, pool = earlier["words"], torch.tensor(earlier["weights"]), earlier["pool"]
        asks, seed = earlier["asks"], earlier["seed"]
    before = None if earlier is None else _said(earlier)
    if two:
        before = ask_words_of(base, words, mode=mode, asks=asks, seed=seed, tell=lambda a, b: tell("base", a, b))
    now = ask_words_of(server, words, mode=mode, asks=asks, seed=seed, tell=lambda a, b: tell("model", a, b))
    watched = set(asking.words)
    told = _summary(words, weights, pool, before, now, asks, seed, watched, top)
    told["asked"] |= {"by": mode, "model": served.model}
    told["verdict"] = probe_verdict(told, bars)
    kept = {
        "kind": KIND, "schema": SCHEMA, "model": served.model, "mode": mode, "asks": asks, "seed": seed, "pool": pool,
        "words": words, "weights": weights.tolist(), "right": now.right, "probability": now.probability,
        "instead": now.instead, "versions": versions(),
        "found": {key: told[key] for key in ("asked", "numbers", "words", "verdict")},
    }  # fmt: skip
    return told | {"kept": kept}


def _words(asking: Asking, tokenizer: str | None) -> tuple[list[str], Tensor, int]:
    """Words, how many of the pool each stands for (0: watched beside the sample), and the pool's size."""
    import torch

    from vocabguard.guard.reference import reference_texts
    from vocabguard.served.words import chosen_words, words_of_table, words_of_texts
    from vocabguard.vocabulary.table import build_table

    if tokenizer is not None:
        loaded = common.load_tokenizer(tokenizer)
        pool = words_of_table(build_table(loaded, 1 + max(loaded.get_vocab().values())))
    else:
        texts = ReferenceConfig(texts=None if asking.texts is None else str(asking.texts))
        pool = words_of_texts(reference_texts(texts))
    if not pool:
        raise InputError("no words to ask for; allowed: --tokenizer FOLDER or --texts FILE with words")
    words, weights = chosen_words(pool, len(pool) if asking.whole else asking.sample, asking.seed)
    beside = [word.strip() for word in asking.words if word.strip() not in set(words)]
    if any(len(word.split()) != 1 for word in beside):
        raise InputError("--watch holds a line of several words; allowed with --url: one word a line")
    beside = list(dict.fromkeys(beside))
    return words + beside, torch.cat([weights, torch.zeros(len(beside))]), len(pool)


def _summary(
    words: Sequence[str], weights: Tensor, pool: int, before: Said | None, now: Said, asks: int, seed: int,
    watched: set[str], top: int,
) -> dict[str, Any]:  # fmt: skip
    """What the offline probe says of tokens, of words."""
    import torch

    from vocabguard.compare.probing import ProbePlan, summarise_answers
    from vocabguard.measure.probe import PromptContext
    from vocabguard.served.words import word_table

    own = set(words)
    others = [text for side in (before, now) if side for texts in side.instead for text in texts if text not in own]
    names = [*words, *dict.fromkeys([*others, ""])]
    ids = {name: place for place, name in enumerate(names)}
    table = word_table(names)
    contexts = tuple(PromptContext(f"{now.mode} {ask + 1}", (), (), 1) for ask in range(asks))
    plan = ProbePlan(contexts, torch.arange(len(words)), weights.float(), torch.zeros(len(words)).bool(), seed)
    live = torch.arange(len(names)) < len(words)
    sides = [None if side is None else _answered(side, words, ids, asks) for side in (before, now)]
    assert sides[1] is not None
    told = summarise_answers(plan, sides[0], sides[1], table, live, top=top)
    if now.probability is None:  # of free answers there is none
        for key in ("nats", "nats_low", "nats_high", "probability_mean"):
            told["numbers"].pop(key, None)
    drawn = int((weights > 0).sum())
    told["asked"] |= {"unit": "words", "tokens": drawn, "live": pool, "whole": drawn == pool}
    told["words"] = _watched(words, watched, before, now, asks)
    return told


def _answered(side: Said, words: Sequence[str], ids: Mapping[str, int], asks: int) -> Answered:
    import torch

    from vocabguard.compare.probing import Answered

    right = torch.tensor(side.right, dtype=torch.bool).view(len(words), asks)
    chance = right.float()
    if side.probability is not None:
        chance = torch.tensor(side.probability)[:, None].expand(-1, asks)
    own = torch.arange(len(words))[:, None].expand(-1, asks)
    other = torch.tensor([[ids[(texts or [""])[0]]] * asks for texts in side.instead]).view(len(words), asks)
    result = ProbeResult(
        tuple(f"{side.mode} {ask + 1}" for ask in range(asks)), torch.arange(len(words)), right, chance,
        (~right).long(), torch.where(right, own, other),
    )  # fmt: skip
    return Answered(result, torch.zeros(0, asks, dtype=torch.bool), None)


def _watched(
    words: Sequence[str], watched: set[str], before: Said | None, now: Said, asks: int
) -> list[dict[str, Any]]:
    """Verdicts of the watched words, each by its own asks: three quarters right are known, one quarter lost."""
    told = []
    for place, word in enumerate(words):
        if word in watched:
            first = sum((before or now).right[place])
            known = 4 * first >= 3 * asks
            told.append({
                "text": word, "ids": [], "asks": asks, "asks_right": sum(now.right[place]),
                "asks_right_at_base": None if before is None else first, "known": known,
                "lost": None if before is None else known and 4 * sum(now.right[place]) <= asks,
            })  # fmt: skip
    return told


def _earlier(file: Path) -> dict[str, Any]:
    """A file of an earlier run.

    Raises:
        ValueError: if it is none.
    """
    told = read_json(file)
    if told.get("kind") != KIND or told.get("schema") != SCHEMA:
        raise ValueError(f"{file}: is no file of `vocabguard probe --url ... --out` that this version reads")
    try:
        count, asks = len(told["words"]), int(told["asks"])
        numbers = [*told["weights"], *(told["probability"] or [])]
        fits = (
            {len(told[name]) for name in ("words", "weights", "right", "instead")} == {count} and count > 0
            and all(isinstance(word, str) for word in told["words"])
            and all(isinstance(one, list) and len(one) == asks for one in told["right"])
            and all(isinstance(one, (int, float)) for one in numbers)
            and (told["probability"] is None or len(told["probability"]) == count)
            and told["mode"] in MODES and isinstance(told["seed"], int) and isinstance(told["pool"], int)
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({type(error).__name__}: {one_line(error)})") from error
    if not fits:
        raise ValueError(f"{file}: is damaged, its parts do not fit each other")
    return told


def _said(told: Mapping[str, Any]) -> Said:
    from vocabguard.served.asking import Said

    mode: Mode = told["mode"]
    right = [[bool(one) for one in row] for row in told["right"]]
    return Said(mode, right, told["probability"], [list(map(str, texts)) for texts in told["instead"]])


def save_served(kept: Mapping[str, Any], out: Path) -> None:
    """Write the answers, for a later run to be held against; neither the key nor the address is in it.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        write_file(out, json.dumps(kept, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from error
