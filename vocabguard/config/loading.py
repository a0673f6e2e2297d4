"""`load_config`: presets, files, keywords and overrides merged into one checked `GuardConfig`.

Sources are merged in this order, the later one winning: the defaults in `schema`, a preset or file or mapping or
`GuardConfig`, keyword sections, dotted overrides. The only room that knows YAML.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml
from yaml import YAMLError

from vocabguard.config.schema import (
    ConfusionConfig,
    ContextConfig,
    GuardConfig,
    ProbeConfig,
    RuleConfig,
    WebhookConfig,
    default_rules,
)
from vocabguard.results import VocabGuardError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException


class ConfigError(VocabGuardError, ValueError):
    """A setting that cannot be used; the message names the key, the value and what is allowed.

    >>> load_config({"probe": {"sample": -1}})
    Traceback (most recent call last):
    vocabguard.config.loading.ConfigError: probe.sample is -1; allowed: at least 0
    """


ConfigSource = str | Path | Mapping[str, Any] | GuardConfig | None

# A file beside the presets that is none.
_QUESTIONS = "prompts.yaml"


def presets() -> tuple[str, ...]:
    """Names of the packaged presets, sorted.

    >>> presets()
    ('early', 'echo', 'hold', 'hold_echo', 'light', 'protect', 'thorough', 'watch')
    """
    names = (entry.name for entry in resources.files("vocabguard").joinpath("configs").iterdir())
    return tuple(sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml") and n != _QUESTIONS))


def load_questions(config: ConfusionConfig) -> dict[str, tuple[str, ...]]:
    """The questions that `confusion` asks: language -> at most ``per_language`` texts, in the file's order.

    Raises:
        ConfigError: for a file that is missing, is no mapping of languages to lists of texts, or lacks a language.

    Example:
        >>> load_questions(ConfusionConfig(languages=["fr"], per_language=1))
        {'fr': ("Qu'est-ce que tu as mangé ce matin ?",)}
    """
    key, path = "confusion.prompts", config.prompts
    if path is None:
        text = resources.files("vocabguard").joinpath("configs", _QUESTIONS).read_text(encoding="utf-8")
    elif not Path(path).is_file():
        raise ConfigError(f"{key} is {path!r}; allowed: a YAML file of questions by language, or null")
    try:
        found = yaml.safe_load(text if path is None else Path(path).read_text(encoding="utf-8"))
    except (YAMLError, UnicodeError) as error:
        raise ConfigError(f"{key} {path} is no YAML: {_one_line(error)}") from error
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{key} {path} holds {type(found).__name__}; allowed: lists of questions by language")
    # YAML 1.1 reads the code of Norwegian as a boolean.
    found = {"no" if language is False else str(language): texts for language, texts in found.items()}
    for language, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one.strip() for one in texts):
            raise ConfigError(f"{key}: {language} is {texts!r}; allowed: a list of questions")
    if missing := [language for language in config.languages if language not in found]:
        raise ConfigError(f"confusion.languages has {missing}; allowed: {', '.join(found)}")
    wanted = config.languages or list(found)
    return {language: tuple(found[language][: config.per_language]) for language in wanted}


def load_config(
    source: ConfigSource = None, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> GuardConfig:
    """Merge all sources into one checked configuration.

    Args:
        source: a preset's name, a path to a YAML file, a mapping, a `GuardConfig`, or None.
        overrides: dotted settings, e.g. ``"drift.every_n_steps=50"``.
        options: sections or settings by keyword, e.g. ``{"probe": {"watch": [190467]}}``.

    Raises:
        ConfigError: for an unknown preset or key, a value of the wrong type or outside its range.

    Example:
        >>> config = load_config("light", ["drift.every_n_steps=50"], {"probe": {"watch": [190467]}})
        >>> config.cadence.max_checks, config.drift.every_n_steps, config.probe.watch
        (50, 50, [190467])
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if isinstance(source, GuardConfig):
            _check_kinds(source, GuardConfig, "")
            base, rules, layers = OmegaConf.structured(source), source.alerts, []
        else:
            base, rules, layers = _defaults(), default_rules(), [_checked(_layer(source))]
        layers += [_checked(options or {}), _checked(_dotted(overrides))]
        config = OmegaConf.to_object(OmegaConf.merge(*_with_own_contexts(base, layers)))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, GuardConfig)
    _check_limits(config, "")
    _check_thresholds(config, {*rules, *(name for layer in layers for name in _with_threshold(layer))})
    _check_contexts(config.probe.contexts)
    _check_protection(config)
    _check_webhook(config.sinks.webhook)
    _check_keys(config.log.keys)
    if config.confusion.enabled:
        load_questions(config.confusion)
    return config


@functools.cache
def _defaults() -> Any:
    """The defaults as OmegaConf has them: made once, as it takes most of the time; a merge copies them."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(GuardConfig())


def _with_own_contexts(base: Any, layers: Sequence[Any]) -> list[Any]:
    """The sources, where contexts that one of them gives replace the pool and those of earlier ones.

    The last source, the dotted overrides, changes single settings, as everywhere. A context that has the name of one of
    the pool and neither text nor turns keeps that one's.
    """
    from omegaconf import OmegaConf

    sections = [_plain_section(layer.get("probe")) for layer in layers]
    given = [n for n, section in enumerate(sections[:-1]) if section.get("contexts")]
    if not given:
        return [base, *layers]
    pool, base = ProbeConfig().contexts, copy.deepcopy(base)
    OmegaConf.update(base, "probe.contexts", {}, merge=False)
    found = []
    for n, (layer, section) in enumerate(zip(layers[:-1], sections[:-1], strict=True)):
        kept = {key: value for key, value in section.items() if key != "contexts"}
        own = {"contexts": _filled(section["contexts"], pool)} if n == given[-1] else {}
        found.append({**layer, "probe": kept | own})
    return [base, *found, layers[-1]]


def _plain_section(section: Any) -> dict[str, Any]:
    return dict(section) if isinstance(section, Mapping) else {} if section is None else vars(section)


def _filled(contexts: Mapping[str, Any], pool: Mapping[str, ContextConfig]) -> dict[str, Any]:
    return {
        name: {**asdict(pool[name]), **given}
        if isinstance(given, Mapping) and name in pool and not {"text", "turns"} & set(given)
        else given
        for name, given in contexts.items()
    }


def _check_contexts(contexts: Mapping[str, ContextConfig]) -> None:
    """Refuse a way of asking that shows no list."""
    if not contexts:
        raise ConfigError("probe.contexts is {}; allowed: at least one context, or leave it out for the pool")
    for name, context in contexts.items():
        key, texts = f"probe.contexts.{name}", context.turns or [context.text]
        if context.turns and len(context.turns) % 2 == 0:
            raise ConfigError(
                f"{key}.turns has {len(context.turns)} turns; allowed: an odd number, the last one a user's"
            )
        if not context.turns and "{token}" in context.text:
            if context.text.count("{token}") != 2 or not context.text.startswith("{token}"):
                raise ConfigError(f"{key}.text is {context.text!r}; allowed: {{token}} at its start and once more")
        elif not any("{tokens}" in text for text in texts):
            raise ConfigError(f"{key}.text is {context.text!r}; allowed: a text with {{tokens}}")


def _with_threshold(layer: Mapping[str, Any]) -> Iterator[str]:
    """Names of the rules that a source gives a threshold."""
    for name, rule in (layer.get("alerts") or {}).items():
        if isinstance(rule, RuleConfig) or "threshold" in rule:
            yield str(name)


def _check_thresholds(config: GuardConfig, given: Collection[str]) -> None:
    """A ConfigError for a new rule that compares with a threshold and has none: 0, the default, would be a guess."""
    for name, rule in config.alerts.items():
        if name not in given and rule.op not in ("absent", "unchanged"):
            raise ConfigError(f"alerts.{name}.threshold is missing; allowed: what {rule.metric} is compared with")


def _check_protection(config: GuardConfig) -> None:
    """Refuse settings of echo and hold that contradict each other."""
    actions = {action for rule in config.alerts.values() if rule.enabled for action in rule.actions}
    settings = {"echo": (config.echo.enabled, config.echo.armed), "hold": (config.hold.enabled, config.hold.armed)}
    wanted = [kind for kind, given in settings.items() if any(given) or kind in actions]
    if wanted and not config.exposure.enabled:
        raise ConfigError(f"exposure.enabled is false, but {' and '.join(wanted)} need its counts; allowed: true")
    if config.echo.auto.least > config.echo.auto.most:
        raise ConfigError(f"echo.auto.least is {config.echo.auto.least}; allowed: at most echo.auto.most")
    auto = config.echo.auto.enabled
    if auto and config.echo.targets_per_live_token is not None:
        raise ConfigError("echo.auto adjusts a dose; allowed with it: echo.targets_per_live_token: null")
    if auto and not config.probe.enabled:
        raise ConfigError("echo.auto follows the probe; allowed with it: probe.enabled: true")
    if config.echo.mode == "watch" and "echo" in wanted and not config.probe.watch:
        raise ConfigError("echo.mode is 'watch' and probe.watch is []; allowed: a watch list of tokens")


# First parts of the logged keys.
_FAMILIES = (
    "head", "embedding", "exposure", "probe", "reference", "recall", "loss", "echo", "forecast", "hold", "confusion",
    "neighbors", "head_or_body", "alerts", "overhead",
)  # fmt: skip


def _check_keys(keys: Any) -> None:
    """Refuse what names no logged key."""
    if keys == "all":
        return
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ConfigError(f"log.keys is {keys!r}; allowed: 'all', or a list of logged keys such as 'head/below_0.95'")
    for key in keys:
        family = key.removeprefix("vocabguard/").partition("/")[0]
        if key != "all" and not fnmatch.filter(_FAMILIES, family):
            raise ConfigError(f"log.keys has {key!r}; allowed: 'all', and keys that begin with one of {_FAMILIES}")


def _check_webhook(webhook: WebhookConfig) -> None:
    """Refuse an address that nothing can be sent to. It may be a secret, so it is not shown."""
    if webhook.url_env is not None:
        if webhook.url is not None:
            raise ConfigError("sinks.webhook has a url and a url_env; allowed: one of them")
        if not os.environ.get(webhook.url_env):
            raise ConfigError(f"sinks.webhook.url_env is {webhook.url_env!r}; allowed: a variable that is set")
    url = webhook_url(webhook)
    if url is None:
        return
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"{_webhook_key(webhook)} is no address; allowed: http://... or https://...")


def webhook_url(webhook: WebhookConfig) -> str | None:
    """Where news of alerts is posted to; None where it is not.

    >>> webhook_url(WebhookConfig(url="https://chat.example.org/hook"))
    'https://chat.example.org/hook'
    """
    return webhook.url if webhook.url_env is None else os.environ.get(webhook.url_env)


def _webhook_key(webhook: WebhookConfig) -> str:
    return "sinks.webhook.url" if webhook.url_env is None else f"${webhook.url_env} (sinks.webhook.url_env)"


def _layer(source: Any) -> Any:
    """One source as something OmegaConf merges."""
    from omegaconf import OmegaConf

    if source is None:
        return {}
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        raise ConfigError(f"config is of type {kind}; allowed: a preset's name, a YAML file, a mapping, a GuardConfig")
    if str(source) in presets():
        text = resources.files("vocabguard").joinpath("configs", f"{source}.yaml").read_text(encoding="utf-8")
        return OmegaConf.create(text)
    try:
        if Path(source).is_file():
            return OmegaConf.load(source)
    except (YAMLError, UnicodeError) as error:
        raise ConfigError(f"config {source} is no YAML: {_one_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"config {source} cannot be read: {_one_line(error)}; allowed: a YAML file") from error
    raise ConfigError(_no_source(str(source)))


def _no_source(source: str) -> str:
    """What a name that is neither a preset nor a file may have been meant as."""
    allowed = f"allowed: a YAML file, or one of the presets {list(presets())}"
    if Path(source).suffix in (".yaml", ".yml"):
        return f"config is {source!r}, and there is no such file in {os.getcwd()}; {allowed}"
    close = difflib.get_close_matches(source, presets(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"config is {source!r}; {hint}{allowed}"


def _dotted(overrides: Any) -> DictConfig:
    """The overrides as one source; one without a value, which would set its key to null, is refused."""
    from omegaconf import OmegaConf

    given = [overrides] if isinstance(overrides, str) or not isinstance(overrides, Iterable) else overrides
    layer = OmegaConf.create()
    for override in given:
        key, equals, _ = override.partition("=") if isinstance(override, str) else ("", "", "")
        if not key.strip() or not equals:
            wrong = "value" if key.strip() else "key"
            raise ConfigError(f"override {override!r} has no {wrong}; allowed: 'section.key=value'")
        try:
            layer.merge_with_dotlist([override])
        except YAMLError as error:
            raise ConfigError(f"override {override!r} has a value that is no YAML: {_one_line(error)}") from error
    return layer


def _checked(layer: Any) -> Any:
    """A source whose mappings, lists and plain values stand where they belong; OmegaConf's words would name no key.

    ``alerts`` may be a list of rules that carry their names.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if not isinstance(layer, Mapping):
        raise ConfigError(f"config is {layer!r}; allowed: settings by name, {[f.name for f in fields(GuardConfig)]}")
    plain = OmegaConf.to_container(layer) if isinstance(layer, DictConfig) else dict(layer)
    assert isinstance(plain, dict)
    if isinstance(plain.get("alerts"), (list, tuple, ListConfig)):
        plain["alerts"] = _named_rules(plain["alerts"])
    _check_kinds(plain, GuardConfig, "")
    return plain


def _named_rules(rules: Iterable[Any]) -> dict[Any, Any]:
    named = {}
    for rule in rules:
        if not isinstance(rule, Mapping) or "name" not in rule:
            raise ConfigError(f"alerts: a rule in a list needs a 'name'; got {rule}")
        named[rule["name"]] = {key: value for key, value in rule.items() if key != "name"}
    return named


def _check_kinds(section: Any, kind: Any, prefix: str) -> None:
    """Refuse what is no mapping, no list or no plain value where one belongs, through all known keys of a section."""
    values = section if isinstance(section, Mapping) else vars(section)
    for name, wanted in get_type_hints(kind).items():
        if name in values:
            _check_kind(values[name], wanted, prefix + name)


def _check_kind(value: Any, wanted: Any, key: str) -> None:
    from omegaconf import ListConfig

    owner, inner = get_origin(wanted), get_args(wanted)
    if owner is UnionType:
        if value is not None:
            _check_kind(value, inner[0], key)
    elif is_dataclass(wanted):
        if not isinstance(value, (Mapping, wanted)):  # type: ignore[arg-type]
            allowed = [f.name for f in fields(wanted)]
            hint = _switch_hint(key, value, allowed)
            raise ConfigError(f"{key} is {value!r}; {hint or f'allowed: a mapping of its settings, {allowed}'}")
        _check_kinds(value, wanted, f"{key}.")
    elif owner is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; allowed: a mapping of names to {_named(inner[1])}")
        for name, item in value.items():
            _check_kind(item, inner[1], f"{key}.{name}")
    elif owner is list:
        if not isinstance(value, (list, tuple, ListConfig)):
            raise ConfigError(f"{key} is {value!r}; allowed: a list")
        for place, item in enumerate(value):
            _check_kind(item, inner[0], f"{key}[{place}]")
    elif isinstance(value, Mapping) or (wanted is not Any and isinstance(value, (list, tuple, ListConfig))):
        raise ConfigError(f"{key} is {value!r}; allowed: {_named(wanted)}")


def _switch_hint(key: str, value: Any, allowed: Collection[str]) -> str:
    """How to switch a section on or off, for who tried it with true, false or null."""
    if "enabled" not in allowed or not (value is None or isinstance(value, bool)):
        return ""
    section, *inner = key.split(".")
    told = f"{{'enabled': {bool(value)}}}"
    for name in reversed(inner):
        told = f"{{{name!r}: {told}}}"
    return f"to switch it {'on' if value else 'off'}: {section}={told}"


def _named(kind: Any) -> str:
    """A type in a user's words."""
    if is_dataclass(kind):
        return f"sections of {[f.name for f in fields(kind)]}"
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Any: "a text or a list",
    }.get(kind, "lists")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_WRONG_TYPE = re.compile(r"Value (?P<value>.*) of type '(?P<type>.*)' could not be converted to (?P<wanted>\w+)")
_TYPES = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
_ARGUMENTS = ("tokenizer", "overrides", "targets", "actions")
"""What a callback takes beside the sections of the configuration."""


def _explain(error: OmegaConfBaseException) -> str:
    """Key, value and what is allowed, from OmegaConf's error."""
    from omegaconf.errors import ConfigKeyError

    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "config"
    first_line = str(getattr(error, "msg", None) or error).splitlines()[0]
    if isinstance(error, ConfigKeyError) or "not in" in first_line:
        owner = getattr(error, "object_type", None)
        allowed = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        named = [*allowed, *_ARGUMENTS] if owner is GuardConfig else allowed
        close = difflib.get_close_matches(str(key).rpartition(".")[2], named, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}allowed: {allowed}"
    wrong = _WRONG_TYPE.fullmatch(first_line)
    if wrong:
        value, wanted = wrong["value"], _TYPES.get(wrong["wanted"], wrong["wanted"])
        # Everything is quoted there.
        value = value if wrong["type"] == "str" else value.strip("'")
        return f"{key} is {value} ({wrong['type']}); allowed: {wanted}"
    return f"{key}: {first_line}"


def _check_limits(section: Any, prefix: str) -> None:
    """Refuse values outside the limits that the fields carry, through all sections."""
    for spec in fields(section):
        value, key = getattr(section, spec.name), prefix + spec.name
        if is_dataclass(value):
            _check_limits(value, f"{key}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    _check_limits(item, f"{key}.{name}.")
        elif isinstance(value, list):
            if not value and "holds" in spec.metadata:
                raise ConfigError(f"{key} is []; allowed: at least one text with {spec.metadata['holds']!r}")
            for place, item in enumerate(value):
                _check_limit(item, spec.metadata, f"{key}[{place}]")
        elif value is not None:
            _check_limit(value, spec.metadata, key)


def _check_limit(value: Any, limits: Mapping[str, Any], key: str) -> None:
    if not _within(value, limits):
        raise ConfigError(f"{key} is {value!r}; allowed: {_allowed(limits)}")


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    if "choices" in limits:
        return value in limits["choices"]
    if "holds" in limits:
        return bool(value.count(limits["holds"]) == 1)
    # Written so that NaN, which compares false, is refused.
    return ("at_least" not in limits or value >= limits["at_least"]) and (
        "at_most" not in limits or value <= limits["at_most"]
    )


def _allowed(limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return f"one of {list(limits['choices'])}"
    if "holds" in limits:
        return f"a text with exactly one {limits['holds']!r}"
    if "at_most" in limits:
        return f"{limits['at_least']} to {limits['at_most']}"
    return f"at least {limits['at_least']}"
