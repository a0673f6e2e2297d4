"""How often the language that ``coverage --languages`` tells of a token is the right one.

    pip install lingua-language-detector django
    python tests/benchmarks/token_languages.py TOKENIZER [TOKENIZER ...] [--json FILE]

The truth are Django's message catalogues: a word is of the language in whose catalogue at least 90 % of its uses are,
each catalogue counted as if it were as long as the others. Tokens that are no such word are not judged. Told for each
number of languages to choose from: the words judged, the share that is given to a language at all, and of these the
share that is right, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import gettext
import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "kits"))

import django
import torch
from documents import language_table
from transformers import AutoTokenizer

from vocabguard.data.token_languages import COMMON, UNCLEAR, token_languages
from vocabguard.measure.intervals import wilson
from vocabguard.vocabulary.table import build_table

WIDER = (*COMMON, "ca", "da", "et", "eu", "fi", "ga", "hr", "hu", "is", "lt", "lv", "nb", "sk", "sl", "sq", "sw", "cy")
SURE_SHARE = 0.9
_FILLED = re.compile(r"%\(\w+\)\w|%\w|<[^>]*>|\{\w+\}|&\w+;")


def uses(language: str) -> dict[str, float]:
    """Share of each word in a language's catalogues."""
    found: Counter[str] = Counter()
    for path in Path(django.__file__).parent.rglob(f"locale/{'de' if language == 'en' else language}/LC_MESSAGES/*.mo"):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, text in catalogue.items():
            source = key[0] if isinstance(key, tuple) else key
            if text != source:
                said = _FILLED.sub(" ", source if language == "en" else text)
                found.update(word.lower() for word in re.findall(r"[^\W\d_]{4,}", said))
    return {word: count / found.total() for word, count in found.items()}


def truth(languages: tuple[str, ...]) -> dict[str, str]:
    """The language of each word that has one."""
    shares = {language: uses(language) for language in languages}
    found = {}
    for word in set().union(*shares.values()):
        of = {language: used.get(word, 0.0) for language, used in shares.items()}
        best = max(of, key=lambda language: of[language])
        if of[best] >= SURE_SHARE * sum(of.values()):
            found[word] = best
    return found


def judged(name: str, languages: tuple[str, ...], right: dict[str, str]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    table = build_table(tokenizer, len(tokenizer))
    words = [text.strip().lower() for text in table.texts]
    began = time.process_time()
    whole = token_languages(table, languages)
    seconds = time.process_time() - began
    known = torch.tensor([word in right for word in words])
    told = token_languages(replace(table, control=table.control | ~known), languages)
    pairs = {word: code for word, code in zip(words, told, strict=True) if code}
    sure = {word: code for word, code in pairs.items() if code != UNCLEAR}
    good = sum(right[word] == code for word, code in sure.items())
    low, high = wilson(good, len(sure))
    return {
        "tokenizer": Path(name).name, "languages": len(languages), "words": sum(map(bool, whole)), "judged": len(pairs),
        "told": len(sure) / len(pairs), "right": good / len(sure), "interval": [low, high], "cpu_seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for languages in (("en", "de", "fr", "es"), COMMON, WIDER):
        right = truth(languages)
        found += [judged(name, languages, right) for name in arguments.tokenizers]
    print("\n".join(language_table(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
