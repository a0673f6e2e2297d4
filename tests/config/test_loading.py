"""Sources merge in their order; what cannot be used is refused with the key, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from vocabguard import ConfigError, GuardConfig, VocabGuard, load_config, presets
from vocabguard.config import ConfusionConfig, DriftConfig, RuleConfig, load_questions
from vocabguard.measure.languages import confusion_matrix, count_answers, summarise_confusion

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "prompts")


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found = {}
    for key, value in settings.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def setting(config: GuardConfig, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_by_name_and_by_path(path: Path) -> None:
    written = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert written
    for source in (path.stem, path, str(path)):
        config = load_config(source)
        assert {key: setting(config, key) for key in written} == written
        VocabGuard(source)
    assert path.read_text(encoding="utf-8").startswith("#"), "a preset's header says what it is for"


def test_presets_are_the_files_of_configs() -> None:
    assert presets() == tuple(path.stem for path in PRESETS)


def test_defaults() -> None:
    assert load_config() == GuardConfig()
    assert load_config({}) == GuardConfig()


def test_yaml_file_mapping_and_config_say_the_same(tmp_path: Path) -> None:
    wanted = {"drift": {"every_n_steps": 7}, "probe": {"watch": ["嘉祺", 190467]}, "seed": 3}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(wanted, allow_unicode=True), encoding="utf-8")
    ready = GuardConfig(drift=DriftConfig(every_n_steps=7), seed=3)
    ready.probe.watch = ["嘉祺", 190467]
    configs = [load_config(file), load_config(wanted), load_config(ready), load_config(None, (), wanted)]
    assert all(config == ready for config in configs)
    assert configs[2] is not ready


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("", encoding="utf-8")
    assert load_config(file) == GuardConfig()


@pytest.mark.parametrize("source", [{"drift": {"every_n_steps": 2, "chunk_rows": 2}, "seed": 2},
                                    GuardConfig(drift=DriftConfig(2, 2), seed=2)])  # fmt: skip
def test_later_sources_win(source: Any) -> None:
    options = {"drift": {"every_n_steps": 3, "chunk_rows": 3}}
    config = load_config(source, ["drift.every_n_steps=4"], options)
    assert (config.drift.every_n_steps, config.drift.chunk_rows, config.seed) == (4, 3, 2)
    assert load_config(source).drift == DriftConfig(2, 2)


def test_guard_takes_preset_overrides_and_keyword_sections() -> None:
    guard = VocabGuard("light", overrides=["probe.sample=7"], probe={"sample": 8, "watch": [3]}, seed=5)
    assert (guard.config.probe.sample, guard.config.probe.watch, guard.config.seed) == (7, [3], 5)
    assert guard.config.cadence.max_checks == 50


def test_a_section_may_be_its_dataclass() -> None:
    assert load_config(None, (), {"drift": DriftConfig(every_n_steps=9)}).drift.every_n_steps == 9


def test_rules_merge_by_name() -> None:
    config = load_config({"alerts": {"head_degraded": {"threshold": 0.2, "resolve_at": 0.1}}})
    assert config.alerts["head_degraded"] == RuleConfig("head/below_0.95", ">", 0.2, resolve_at=0.1)
    assert config.alerts["head_severe"] == GuardConfig().alerts["head_severe"]
    as_list = {"alerts": [{"name": "ja", "metric": "head/ja/below_0.95", "threshold": 0.3}]}
    assert load_config(as_list).alerts == GuardConfig().alerts | {"ja": RuleConfig("head/ja/below_0.95", ">", 0.3)}


def test_a_rule_can_be_switched_off() -> None:
    guard = VocabGuard(overrides=["alerts.head_severe.enabled=false"])
    assert {rule.name for rule in guard._rules} == set(GuardConfig().alerts) - {"head_severe"}


NAN = math.nan
REFUSED: list[tuple[Any, tuple[str, ...]]] = [
    # unknown keys, with a suggestion
    ({"drift": {"every_n_step": 5}}, ("drift.every_n_step", "every_n_steps", "did you mean 'every_n_steps'")),
    ({"drfit": {"every_n_steps": 5}}, ("drfit", "did you mean 'drift'", "snapshot")),
    ({"alerts": {"head_degraded": {"treshold": 0.1}}}, ("alerts.head_degraded.treshold", "did you mean 'threshold'")),
    ({"probe": {"contexts": {"mine": {"txt": "{tokens}"}}}}, ("probe.contexts.mine.txt", "did you mean 'text'")),
    # out of range
    ({"drift": {"every_n_steps": -5}}, ("drift.every_n_steps", "-5", "at least 1")),
    ({"drift": {"every_n_steps": 0}}, ("drift.every_n_steps", "0", "at least 1")),
    ({"exposure": {"push_every_n_steps": -1}}, ("exposure.push_every_n_steps", "-1", "at least 0")),
    ({"cadence": {"budget": 1.5}}, ("cadence.budget", "1.5", "0.0 to 1.0")),
    ({"cadence": {"budget": NAN}}, ("cadence.budget", "nan", "0.0 to 1.0")),
    ({"preflight": {"max_seconds": NAN}}, ("preflight.max_seconds", "nan", "at least 0")),
    ({"log": {"top_k": 1001}}, ("log.top_k", "1001", "0 to 1000")),
    ({"probe": {"contexts": {"list": {"k": 0}}}}, ("probe.contexts.list.k", "0", "1 to 4096")),
    ({"on_error": "stop"}, ("on_error", "'stop'", "'warn', 'raise'")),
    ({"alerts": {"head_degraded": {"op": "=>"}}}, ("alerts.head_degraded.op", "'=>'", "'>='")),
    ({"alerts": {"head_degraded": {"level": "loud"}}}, ("alerts.head_degraded.level", "'loud'", "'critical'")),
    (GuardConfig(drift=DriftConfig(every_n_steps=-5)), ("drift.every_n_steps", "-5", "at least 1")),
    # wrong types
    ({"drift": {"every_n_steps": "often"}}, ("drift.every_n_steps", "is 'often' (str)", "a whole number")),
    ({"drift": {"every_n_steps": 2.5}}, ("drift.every_n_steps", "is 2.5 (float)", "a whole number")),
    ({"drift": {"every_n_steps": True}}, ("drift.every_n_steps", "is True (bool)", "a whole number")),
    ({"log": {"console": "maybe"}}, ("log.console", "maybe", "bool")),
    ({"drift": 5}, ("drift is 5", "every_n_steps", "chunk_rows")),
    ({"drift": None}, ("drift is None", "every_n_steps", "chunk_rows")),
    ({"probe": {"watch": "word"}}, ("probe.watch", "list")),
    ({"confusion": {"max_new_tokens": 0}}, ("confusion.max_new_tokens", "0", "1 to 4096")),
    ({"confusion": {"languages": "ja"}}, ("confusion.languages", "list")),
    ({"confusion": {"allow": {"ja": "latin"}}}, ("confusion.allow.ja is 'latin'", "a list")),
    ({"confusion": {"enabled": True, "languages": ["ja", "xx"]}}, ("confusion.languages has ['xx']", "ja", "ko")),
    ({"confusion": {"enabled": True, "prompts": "none.yaml"}}, ("confusion.prompts is 'none.yaml'", "YAML file")),
    ({"neighbors": {"k": 101}}, ("neighbors.k", "101", "0 to 100")),
    ({"neighbors": {"every_n_checks": -1}}, ("neighbors.every_n_checks", "-1", "at least 0")),
    # contexts
    ({"probe": {"contexts": {"mine": {"text": "Say it."}}}}, ("probe.contexts.mine.text", "Say it.", "{tokens}")),
    ({"probe": {"contexts": {"mine": {"text": "{token} -> "}}}}, ("probe.contexts.mine.text", "once more")),
    ({"probe": {"contexts": {"mine": {"turns": ["{tokens}", "a"]}}}}, ("probe.contexts.mine.turns", "odd number")),
    ({"probe": {"contexts": {"mine": {"turns": ["a"]}}}}, ("probe.contexts.mine.text", "{tokens}")),
    ({"probe": {"asks": 0}}, ("probe.asks", "0", "1 to 100")),
    # alert rules
    ({"alerts": {"mine": {"threshold": 0.1}}}, ("alerts.mine.metric", "missing")),
    ({"alerts": [{"metric": "head/below_0.95"}]}, ("alerts", "'name'", "head/below_0.95")),
    ({"alerts": ["head_degraded"]}, ("alerts", "'name'", "head_degraded")),
    # sources
    ("wach", ("wach", "watch", "thorough", "YAML file")),
    (5, ("int", "preset", "mapping")),
    (["drift"], ("list", "mapping")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "said"), REFUSED, ids=lambda case: str(case)[:60] if isinstance(case, tuple) else ""
)
def test_refused_with_key_value_and_what_is_allowed(source: Any, said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(source)
    for part in said:
        assert part in str(refusal.value)


# What came, by its key, and what is allowed there, in one line.
WRONG_KINDS: list[tuple[str, Any, str]] = [
    ("probe", [1, 2], "probe is [1, 2]; allowed: a mapping of its settings, ['enabled'"),
    ("probe", None, "probe is None; to switch it off: probe={'enabled': False}"),
    ("echo.auto", [1], "echo.auto is [1]; allowed: a mapping of its settings, ['enabled', 'tolerated', 'least', "),
    ("sinks.webhook", "http://x", "sinks.webhook is 'http://x'; allowed: a mapping of its settings, ['url'"),
    (
        "probe.contexts",
        [1],
        "probe.contexts is [1]; allowed: a mapping of names to sections of ['text', 'k', 'turns', 'chat']",
    ),
    ("probe.contexts", [], "probe.contexts is []; allowed: a mapping of names"),
    ("probe.contexts", 5, "probe.contexts is 5; allowed: a mapping of names"),
    ("probe.contexts", None, "probe.contexts is None; allowed: a mapping of names"),
    (
        "probe.contexts.mine",
        ["{tokens}"],
        "probe.contexts.mine is ['{tokens}']; allowed: a mapping of its settings, ['text', 'k', 'turns', 'chat']",
    ),
    ("probe.contexts.mine.k", [1], "probe.contexts.mine.k is [1]; allowed: a whole number"),
    ("probe.contexts.mine.k", {"a": 1}, "probe.contexts.mine.k is {'a': 1}; allowed: a whole number"),
    ("probe.budget", {"a": 1}, "probe.budget is {'a': 1}; allowed: a number"),
    ("log.console", [True], "log.console is [True]; allowed: true or false"),
    ("run_dir", ["runs"], "run_dir is ['runs']; allowed: a text"),
    ("drift.every_n_steps", {"a": 5}, "drift.every_n_steps is {'a': 5}; allowed: a whole number"),
    ("probe.watch", "word", "probe.watch is 'word'; allowed: a list"),
    ("probe.watch", {"a": 1}, "probe.watch is {'a': 1}; allowed: a list"),
    ("echo.exclude", 5, "echo.exclude is 5; allowed: a list"),
    ("echo.instructions", [{"a": "{tokens}"}], "echo.instructions[0] is {'a': '{tokens}'}; allowed: a text"),
    ("confusion.allow", ["ja"], "confusion.allow is ['ja']; allowed: a mapping of names to lists"),
    ("confusion.allow.ja", "latin", "confusion.allow.ja is 'latin'; allowed: a list"),
    ("alerts", 5, "alerts is 5; allowed: a mapping of names to sections of ['metric'"),
    ("alerts", [1], "alerts: a rule in a list needs a 'name'; got 1"),
    ("alerts.mine", 5, "alerts.mine is 5; allowed: a mapping of its settings, ['metric'"),
    ("alerts.mine", {"metric": "head/below_0.95", "actions": "log"}, "alerts.mine.actions is 'log'; allowed: a list"),
]


@pytest.mark.parametrize("way", ["mapping", "keyword", "config", "file", "override"])
@pytest.mark.parametrize(("key", "value", "said"), WRONG_KINDS, ids=lambda case: str(case)[:40])
def test_every_way_refuses_the_wrong_kind_in_one_line(
    tmp_path: Path, key: str, value: Any, said: str, way: str
) -> None:
    section: Any = value
    for name in reversed(key.split(".")):
        section = {name: section}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(section), encoding="utf-8")
    plain = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    given: dict[str, dict[str, Any]] = {
        "mapping": {"config": section},
        "keyword": section,
        "config": {"config": OmegaConf.create(section)},
        "file": {"config": file},
        "override": {"overrides": [f"{key}={plain}"]},
    }
    with pytest.raises(ConfigError) as refusal:
        VocabGuard(**given[way])
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)


def test_a_config_built_with_the_wrong_kinds_is_refused() -> None:
    wrong = GuardConfig(drift=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^drift is 5; allowed: a mapping of its settings, \['every_n_steps'"):
        load_config(wrong)
    wrong = GuardConfig()
    wrong.probe.contexts = ["{tokens}"]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^probe.contexts is \['{tokens}'\]; allowed: a mapping of names"):
        load_config(wrong)
    with pytest.raises(ConfigError, match=r"^probe is DriftConfig.*; allowed: a mapping of its settings, \['enabled'"):
        load_config(None, (), {"probe": DriftConfig()})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- drift\n- probe\n", r"config is \['drift', 'probe'\]; allowed: settings by name, \['matrices'"),
        (b"drift\n", "unknown key 'drift'|drift is None"),
        (b"5\n", "config .*own.yaml cannot be read: .*int; allowed: a YAML file"),
        (b"drift: [1\n", "config .*own.yaml is no YAML: .*line 1"),
        (b"drift: 1\ndrift: 2\n", "config .*own.yaml is no YAML: .*duplicate key drift"),
        (b"\xff\xfe\x00drift", "config .*own.yaml is no YAML"),
        (b"a: 1\n---\nb: 2\n", "config .*own.yaml is no YAML: .*single document"),
    ],
    ids=["list", "text", "number", "broken", "twice", "binary", "two"],
)
def test_files_that_hold_no_settings(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^({said})") as refusal:
        load_config(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["none.yaml", ".", "", "x" * 5000, "a\0b"], ids=lambda name: repr(name)[:12])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^config .*; allowed: a YAML file"):
        load_config(str(tmp_path / name) if name.endswith("yaml") else name)


RULES_REFUSED = [
    ({"metric": "head/below_0.95", "threshold": 1.5}, ("mine", "threshold", "1.5", "[0, 1]")),
    ({"metric": "head/cosine_min", "op": "<", "threshold": -2}, ("mine", "threshold", "-2", "[-1, 1]")),
    ({"metric": "head/below_0.95", "threshold": NAN}, ("mine", "threshold", "nan", "[0, 1]")),
    ({"metric": "head/below_0.95", "threshold": 0.1, "resolve_at": 0.2}, ("mine", "resolve_at", "0.2", "[0, 0.1]")),
    ({"metric": "head/below_0.99", "threshold": 0.1}, ("mine", "head/below_0.99", "head/below_0.95")),
    ({"metric": "head/klingon/below_0.95", "threshold": 0.1}, ("mine", "klingon", "greek")),
    ({"metric": "head/below_0.95", "threshold": 0.1, "actions": ["mail"]}, ("alerts.mine.actions", "mail", "log")),
]


@pytest.mark.parametrize(("rule", "said"), RULES_REFUSED, ids=lambda case: str(case)[:60])
def test_rules_are_refused_before_training(rule: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        VocabGuard(alerts={"mine": rule})
    for part in said:
        assert part in str(refusal.value)


def test_an_action_of_ones_own_is_known_by_name() -> None:
    rule = {"metric": "head/below_0.95", "threshold": 0.1, "actions": ["log", "mail"]}
    guard = VocabGuard(alerts={"mine": rule}, actions={"mail": print})
    assert next(known for known in guard._rules if known.name == "mine").actions == ("log", print)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("drift.every_n_step=5", ("drift.every_n_step", "did you mean 'every_n_steps'")),
        ("drift.every_n_steps", ("drift.every_n_steps", "no value", "=value")),
        ("drift.every_n_steps=-1", ("drift.every_n_steps", "-1", "at least 1")),
        ("drift=often", ("drift", "often", "every_n_steps")),
        ("drift.every_n_steps=[1", ("drift.every_n_steps=[1", "no YAML")),
        ("=5", ("=5", "no key")),
        (5, ("override 5", "'section.key=value'")),
    ],
)
def test_overrides_are_refused_too(override: str, said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(None, [override])
    for part in said:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("protct", r"config is 'protct'; did you mean 'protect'\? allowed: a YAML file"),
        ("guard.yaml", r"config is 'guard.yaml', and there is no such file in .*; allowed: a YAML file"),
        ("zzz", r"config is 'zzz'; allowed: a YAML file"),
    ],
)
def test_a_source_that_is_none(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(source)


def test_an_argument_in_the_place_of_a_section() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tokenizer'"):
        VocabGuard(tokeniser=None)  # type: ignore[call-arg]


def test_unknown_keyword_section() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'prob'.*did you mean 'probe'"):
        VocabGuard(prob={"sample": 3})


@pytest.mark.parametrize("text", ["- drift\n- probe\n", "drift: [1,\n probe: }", "drift\n"])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(file)


def test_the_given_config_stays_as_it_is() -> None:
    given = GuardConfig()
    config = load_config(given, ["drift.every_n_steps=5"])
    config.probe.watch.append(3)
    config.alerts["head_degraded"].threshold = 0.5
    assert given == GuardConfig()
    assert load_config() == GuardConfig()


# -- questions in many languages -------------------------------------------------------------------------------------


def test_packaged_questions_are_in_the_languages_they_claim() -> None:
    asked = load_questions(ConfusionConfig(per_language=99))
    assert len(asked) >= 12
    assert {4 <= len(texts) <= 8 for texts in asked.values()} == {True}
    pairs = [(language, text) for language, texts in asked.items() for text in texts]
    assert len({text for _, text in pairs}) == len(pairs)
    found = count_answers(pairs, tuple(asked), allow=dict.fromkeys(asked, ()), least_words=3)
    assert confusion_matrix(found) == {}, "no letter of another script, so that no answer repeats one"
    assert summarise_confusion(found)["line_pass"] == 1.0


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("ja: [一つ目, 二つ目, 三つ目]\nno: ['Hvordan går det?']\nko: [하나]\n", encoding="utf-8")
    assert load_questions(ConfusionConfig(prompts=str(file), per_language=2)) == {
        "ja": ("一つ目", "二つ目"), "no": ("Hvordan går det?",), "ko": ("하나",),
    }  # fmt: skip
    assert list(load_questions(ConfusionConfig(prompts=str(file), languages=["ko", "ja"]))) == ["ko", "ja"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- one\n", "holds list; allowed: lists of questions by language"),
        ("", "holds NoneType"),
        ("ja: [a", "is no YAML"),
        ("ja: one\n", "ja is 'one'; allowed: a list of questions"),
        ("ja: []\n", r"ja is \[\]"),
        ("ja: ['', a]\n", r"ja is \['', 'a'\]"),
    ],
)
def test_files_that_hold_no_questions(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^confusion.prompts.*{said}"):
        load_config({"confusion": {"enabled": True, "prompts": str(file)}})


# -- echo and hold ---------------------------------------------------------------------------------------------------

RULE = {"metric": "probe/retained", "op": "<", "threshold": 0.9}
PROTECTION_REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"echo": {"mode": "random"}}, ("echo.mode", "'random'", "'uniform'", "'least_exposed'", "'watch'")),
    ({"echo": {"dose": -0.1}}, ("echo.dose", "-0.1", "0.0 to 100.0")),
    ({"echo": {"dose": NAN}}, ("echo.dose", "nan", "0.0 to 100.0")),
    ({"echo": {"targets_per_live_token": -1}}, ("echo.targets_per_live_token", "-1", "0.0 to 1000000.0")),
    ({"echo": {"targets_per_live_token": float("inf")}}, ("echo.targets_per_live_token", "inf", "0.0 to 1000000.0")),
    (
        {"echo": {"targets_per_live_token": 2, "auto": {"enabled": True}}},
        ("echo.auto adjusts a dose", "targets_per_live_token: null"),
    ),
    (
        {"echo": {"auto": {"enabled": True}}, "probe": {"enabled": False}},
        ("echo.auto follows the probe", "probe.enabled: true"),
    ),
    ({"echo": {"list_tokens": 0}}, ("echo.list_tokens", "0", "at least 1")),
    ({"echo": {"fill": 1.1}}, ("echo.fill", "1.1", "0.0 to 1.0")),
    ({"echo": {"prefetch": -1}}, ("echo.prefetch", "-1", "at least 0")),
    ({"echo": {"boost": NAN}}, ("echo.boost", "nan", "at least 0")),
    ({"echo": {"auto": {"tolerated": -1}}}, ("echo.auto.tolerated", "-1", "at least 0")),
    ({"echo": {"auto": {"least": 0.6}}}, ("echo.auto.least is 0.6", "at most echo.auto.most")),
    ({"echo": {"auto": {"maximum": 0.6}}}, ("echo.auto.maximum", "most")),
    ({"echo": {"instructions": []}}, ("echo.instructions is []", "at least one text with '{tokens}'")),
    ({"echo": {"instructions": ["{tokens}", "Say."]}}, ("echo.instructions[1] is 'Say.'", "exactly one '{tokens}'")),
    ({"echo": {"enabled": True, "mode": "watch"}}, ("echo.mode is 'watch'", "probe.watch is []")),
    ({"echo": {"armed": True, "mode": "watch"}}, ("echo.mode is 'watch'", "probe.watch is []")),
    ({"hold": {"mode": "still"}}, ("hold.mode", "'still'", "'freeze'", "'shared'")),
    ({"hold": {"window_steps": 0}}, ("hold.window_steps", "0", "at least 1")),
    ({"hold": {"enabled": True}, "exposure": {"enabled": False}}, ("exposure.enabled is false", "hold need")),
    ({"echo": {"armed": True}, "exposure": {"enabled": False}}, ("exposure.enabled is false", "echo need")),
    (
        {"alerts": {"mine": {**RULE, "actions": ["echo", "hold"]}}, "exposure": {"enabled": False}},
        ("exposure.enabled is false", "echo and hold need"),
    ),
]


@pytest.mark.parametrize(("source", "said"), PROTECTION_REFUSED, ids=lambda case: str(case)[:70])
def test_protection_is_refused_with_key_value_and_what_is_allowed(source: Any, said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(source)
    for part in said:
        assert part in str(refusal.value)


def test_what_is_off_may_stand_beside_what_it_would_need() -> None:
    unarmed = {"echo": {"mode": "watch"}, "exposure": {"enabled": False}}
    assert load_config(unarmed).echo.mode == "watch"
    switched_off = {"alerts": {"mine": {**RULE, "actions": ["hold"], "enabled": False}}, "exposure": {"enabled": False}}
    assert not load_config(switched_off).hold.enabled


def test_nothing_is_protected_by_default() -> None:
    config = load_config()
    assert not any((config.echo.enabled, config.echo.armed, config.hold.enabled, config.hold.armed))
    assert {action for rule in config.alerts.values() for action in rule.actions} == {"log"}


def test_presets_switch_on_what_they_are_named_for() -> None:
    switched = {name: (load_config(name).echo.enabled, load_config(name).hold.enabled) for name in presets()}
    assert switched["echo"] == (True, False)
    assert switched["hold"] == (False, True)
    assert switched["protect"] == (True, True)
    assert switched["hold_echo"] == (True, True)
    assert switched["early"] == (False, False)
    at_risk = VocabGuard("early")._rules[0]
    assert (at_risk.name, at_risk.actions, at_risk.latch) == ("at_risk", ("log", "echo", "hold"), True)
    assert {switched[name] for name in ("watch", "light", "thorough")} == {(False, False)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"echo": True}, "; to switch it on: echo={'enabled': True}"),
        ({"hold": False}, "; to switch it off: hold={'enabled': False}"),
        ({"echo": {"auto": True}}, "; to switch it on: echo={'auto': {'enabled': True}}"),
        ({"alerts": {"at_risk": None}}, "; to switch it off: alerts={'at_risk': {'enabled': False}}"),
        ({"drift": True}, "allowed: a mapping of its settings, ['every_n_steps', 'chunk_rows']"),
    ],
)
def test_who_switches_a_section_is_told_how(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(options=options)
    assert str(refusal.value).endswith(said)


NO_THRESHOLD: Any = {"metric": "head/below_0.95", "level": "info"}


@pytest.mark.parametrize("way", ["options", "list", "file", "overrides"])
def test_a_rule_without_threshold_is_refused(tmp_path: Path, way: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("alerts: {mine: {metric: head/below_0.95}}", encoding="utf-8")
    given: dict[str, Any] = {
        "options": {"options": {"alerts": {"mine": NO_THRESHOLD}}},
        "list": {"options": {"alerts": [{"name": "mine", **NO_THRESHOLD}]}},
        "file": {"source": file},
        "overrides": {"overrides": ["alerts.mine.metric=head/below_0.95"]},
    }[way]
    with pytest.raises(ConfigError, match=r"^alerts\.mine\.threshold is missing; allowed: what head/below_0\.95 is"):
        load_config(**given)
    # Another source may give it; rules about a missing or unmoved value need none.
    assert load_config(**given | {"overrides": [*given.get("overrides", ()), "alerts.mine.threshold=0.5"]})
    assert load_config(**given | {"overrides": [*given.get("overrides", ()), "alerts.mine.op=absent"]})
    assert load_config(overrides=["alerts.head_degraded.level=info"]).alerts["head_degraded"].threshold == 0.01


def test_a_loaded_config_is_nobody_elses() -> None:
    mine = load_config()
    mine.probe.sample, mine.alerts["at_risk"].threshold = 7, 0.9
    del mine.alerts["head_severe"]
    assert load_config() == GuardConfig()
