"""What a scan or a probe found in one sentence, how it counts, and what it did not look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vocabguard.compare.body_text import body_sentence
from vocabguard.compare.options import Bars
from vocabguard.compare.probing import loss_low, words_of
from vocabguard.measure.retention import ENOUGH
from vocabguard.text import listed, number, percent, visible
from vocabguard.vocabulary.labels import label_of

_GROUPS_NAMED = 3


def probe_verdict(told: Mapping[str, Any], bars: Bars) -> dict[str, Any]:
    """The verdict of what `vocabguard.compare.probing.summarise_answers` gave.

    Returns:
        ``level``: ``lost``, ``harder`` (only natural text is harder to predict), ``unsaid`` (of one side: less is
        repeated than was asked for), ``fine`` or ``unknown``; ``sentence``; ``findings``, each over its bar for sure;
        ``not_measured``.
    """
    two = "outright" in told
    findings = {**(_losses(told, bars) if two else _silence(told, bars)), **_harder(told, bars)}
    level = next(iter(findings), "fine")
    known = told["numbers"].get("known", told["numbers"]["asked"])
    open_ = (
        two and not findings and bars.lost is not None and known and 1 - told["numbers"]["retained_high"] > bars.lost
    )
    if level == "fine" and (known < ENOUGH or open_):
        level = "unknown"
    parts = _said_parts(told, sure=bool(findings)) if two else _one_sided_parts(told)
    parts += ["that is not enough evidence of more than noise: more asks (--asks) would tell"] if open_ else []
    parts += [_reference_part(told["reference"])] if "nll" in told["reference"] else []
    words = told["asked"].get("unit") == "words"
    name = _as_words if words else str
    return {
        "level": level if two or level != "fine" else "unknown",
        "sentence": name(" ".join(f"{part[:1].upper()}{part[1:]}." for part in parts)),
        "findings": [name(one) for found in findings.values() for one in found],
        "not_measured": _unseen_words(told, two=two) if words else _unseen(told, two=two),
    }


def _as_words(said: str) -> str:
    """A sentence about tokens as one about words, which is what a served model is asked for."""
    return said.replace("live tokens", "words").replace("token", "word")


def _unseen_words(told: Mapping[str, Any], *, two: bool) -> list[str]:
    """What asking a server does not see."""
    asked, said = told["asked"], []
    if not asked["whole"]:
        said.append(f"{asked['live'] - asked['tokens']:,} words were not sampled")
    said += [] if two else ["what was lost, which takes a base: --base-url, or a file of an earlier run"]
    return [*said, "single tokens: a word may be said by others", "natural text, rows and body"]


def _losses(told: Mapping[str, Any], bars: Bars) -> dict[str, list[str]]:
    said, low = [], loss_low(told)
    if bars.lost is not None and low > bars.lost:
        said.append(f"at least {percent(low)} of the tokens that the base repeats are lost; allowed: "
                    f"{percent(bars.lost)}")  # fmt: skip
    missing = words_of(told, "lost")
    if missing:
        named = listed([visible(word, 24) for word in missing], len(missing))
        said.append(
            f"{len(missing)} of {len(words_of(told, 'known'))} watched words that the base says are lost: {named}"
        )
    return {"lost": said} if said else {}


def _silence(told: Mapping[str, Any], bars: Bars) -> dict[str, list[str]]:
    high = told["numbers"]["repeated_high"]
    if bars.lost is None or high is None or 1 - high <= bars.lost:
        return {}
    return {"unsaid": [f"at least {percent(1 - high)} of live tokens are not repeated; allowed: {percent(bars.lost)}"]}


def _harder(told: Mapping[str, Any], bars: Bars) -> dict[str, list[str]]:
    found, said = told["reference"], []
    rise, rare = found.get("nll_rise_low"), found.get("rare_rise_low")
    if rise is not None and rise > bars.rise:
        said.append(f"natural text is harder to predict by at least {number(rise, 2)} nats a token; allowed: "
                    f"{bars.rise:g}")  # fmt: skip
    if rare is not None and rare > bars.rare:
        said.append(f"rare tokens became harder to predict than frequent ones by at least {number(rare, 2)} nats; "
                    f"allowed: {bars.rare:g}")  # fmt: skip
    return {"harder": said} if said else {}


def _said_parts(told: Mapping[str, Any], *, sure: bool) -> list[str]:
    """What was lost and how much of it is sure; too few tokens are no evidence, unless their interval is."""
    asked, numbers, outright = told["asked"], told["numbers"], told["outright"]
    known = int(numbers["known"])
    those = _those(asked)
    if known < ENOUGH and not (sure and known):
        return [f"Not enough evidence: the base repeats only {known} of {those}"]
    missing = told["lost_count"]
    if not missing:
        unseen = "" if asked["whole"] else f"; up to {percent(1 - numbers['retained_low'])} could be lost unseen"
        return [f"No loss found: all {known:,} of {those} that the base repeats are still repeated{unseen}"]
    low, high = 1 - numbers["retained_high"], 1 - numbers["retained_low"]
    lead = (
        f"Lost: {percent(numbers['lost'])} ({percent(low)} to {percent(high)}) of the live tokens that the base "
        f"repeats, by {missing:,} of {known:,} in a probe of {those}"
    )
    parts = [lead + _hit(told)]
    if outright["count"]:
        chance = outright["by_chance"]
        by = "" if chance is None else f" (by chance alone: {outright['known'] * chance:.1f})"
        parts.append(f"{outright['count']:,} of the {missing:,} were repeated in every ask and now are in none{by}")
    if numbers.get("noise"):
        parts.append(f"noise: asked again in other lists, the base itself loses {percent(numbers['noise'])}")
    if "skill" in numbers:
        parts.append(f"of frequent targets, {percent(1 - numbers['skill'])} are lost")
    if numbers.get("gained"):
        count = told["gained_count"]
        parts.append("1 token is repeated only now" if count == 1 else f"{count:,} tokens are repeated only now")
    return parts


def _one_sided_parts(told: Mapping[str, Any]) -> list[str]:
    numbers = told["numbers"]
    if not numbers["asked"]:
        return ["Nothing was probed: no live token"]
    share = f"{percent(numbers['repeated_low'])} to {percent(numbers['repeated_high'])}"
    lead = "Without a base model a loss cannot be measured. The model repeats "
    return [f"{lead}{percent(numbers['repeated'])} ({share}) of live tokens, by {_those(told['asked'])}{_silent(told)}"]


def _those(asked: Mapping[str, Any]) -> str:
    if asked["whole"]:
        return f"all {asked['live']:,} live tokens"
    return f"{asked['tokens']:,} sampled of {asked['live']:,} live tokens"


def _hit(told: Mapping[str, Any]) -> str:
    """Groups that lost more than all together, for sure, worst first."""
    overall = 1 - told["numbers"]["retained"]
    worse = [(1 - part["retained"], name) for name, part in told["groups"].items()
             if part["known"] and 1 - part["high"] > overall]  # fmt: skip
    named = [f"{label_of(name)} {percent(share)}" for share, name in sorted(worse, reverse=True)[:_GROUPS_NAMED]]
    return f", hit hardest {', '.join(named)}" if named else ""


def _silent(told: Mapping[str, Any]) -> str:
    overall = told["numbers"]["repeated"]
    fewer = [(part["repeated"], name) for name, part in told["groups"].items()
             if part["asked"] and part["high"] < overall]  # fmt: skip
    named = [f"{label_of(name)} {percent(share)}" for share, name in sorted(fewer)[:_GROUPS_NAMED]]
    return f"; fewest {', '.join(named)}" if named else ""


def _reference_part(found: Mapping[str, Any]) -> str:
    targets = f"{int(found['targets']):,} tokens"
    if found.get("nll_rise") is None:
        return f"loss of natural text ({targets}): {number(found['nll'], 2)} nats a token"
    low, high = found["nll_rise_low"], found["nll_rise_high"]
    change = f"{found['nll_rise']:+.2f} nats a token ({low:+.2f} to {high:+.2f})"
    rare = ""
    if found.get("rare_rise") is not None:
        rare = (f", rare tokens over frequent ones {found['rare_rise']:+.2f} "
                f"({found['rare_rise_low']:+.2f} to {found['rare_rise_high']:+.2f})")  # fmt: skip
    return f"loss of natural text ({targets}): {change}{rare}"


def _unseen(told: Mapping[str, Any], *, two: bool) -> list[str]:
    """What a probe did not look at."""
    asked, said = told["asked"], []
    if not asked["whole"]:
        said.append(f"{asked['live'] - asked['tokens']:,} live tokens were not sampled (--all asks for every one)")
    if not two:
        said.append("what was lost, which takes a BASE")
    if "nll_rise" not in told["reference"] and two:
        said.append("natural text: too few tokens, or none was read")
    if two and "rare_rise" not in told["reference"]:
        said.append("rare tokens against frequent ones, which takes --coverage or --run")
    if two and "skill" not in told["numbers"]:
        said.append("how much of a loss is only the skill of repeating, which takes --coverage or --run")
    if two and len(asked.get("asks", ())) == 1:
        said.append("what the base itself loses when it is asked again, which takes --asks 2 or more")
    return [*said, "answers that the model writes freely"]


def rows_sentence(rows: str, body: Mapping[str, Any] | None) -> str:
    """A scan's sentence: the rows' verdict, and what became of the body.

    Args:
        rows: the verdict over rows.
        body: what `vocabguard.compare.blocks.body_as_json` gave; None where it was not looked at.
    """
    return rows if body is None else f"{rows.removesuffix('.')}; {body_sentence(body)}."


def unseen_by_scan(body: Mapping[str, Any] | None, probe: Mapping[str, Any] | None) -> list[str]:
    """What a scan did not look at, a phrase each."""
    said = []
    if body is None:
        said.append("the body: --no-body was given")
    elif "not_applicable" in body:
        said.append(f"the body: {body['not_applicable']}")
    if probe is None:
        said.append("what the model can say: --probe asks it")
    return said
