"""The run folder: what a guarded run leaves behind, written while it trains and read by anyone afterwards.

| file | content |
|---|---|
| ``run.json`` | schema, version, times of start and resumes, origin, evidence, settings, what is watched, group names |
| ``checks.jsonl`` | one line a check: attempt, step, seconds, probed, firing, scalars, tokens, echo, forecast |
| ``alerts.jsonl`` | one line a transition: attempt and the fields of `Transition`, its story too |
| ``rows-<step>.safetensors`` | the vectors of `row_vectors` at a step |
| ``texts.json`` | what each id says: V strings, empty where unknown; only where there is a tokenizer |
| ``confusion.jsonl`` | one line an evaluation, if asked for: shares by language, and from -> into counts |
| ``neighbors.jsonl`` | one line a token and a step, if asked for: nearest rows then and now |
| ``head_or_body.jsonl`` | one line at the end: what forgotten tokens come back with |

JSON is strict: NaN and infinities are null. Lines are only appended. An *attempt* is one start of the process on the
folder, from 0. A resume repeats steps that the attempt before had logged: the loader gives the later attempt's.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabguard.files import (
    append_line,
    each_line,
    mend,
    one_line,
    plain,
    read_lines,
    read_text,
    require_regular,
    write_file,
)
from vocabguard.installation import VERSION, missing
from vocabguard.results import CheckResult, Exposure, Forecast, RowDrift, Transition, Watch, as_transition, facts_html

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

SCHEMA = 1
"""Version of the folder's layout; a newer one is refused."""

NOTES = ("confusion", "neighbors", "head_or_body")
"""Kinds of findings beside the checks."""

# How `RunWriter` begins the line of a check.
_BEGUN = re.compile(rb'\{"attempt": ([0-9]+), "step": ([0-9]+),')
_META, _CHECKS, _ALERTS, _TEXTS = "run.json", "checks.jsonl", "alerts.jsonl", "texts.json"
_ROWS = re.compile(r"rows-(\d+)\.safetensors")


def row_vectors(result: CheckResult, group: Tensor, live: Tensor) -> dict[str, Tensor]:
    """Every row's numbers at a check, by name, for `RunWriter.rows`.

    Args:
        group: (V,) uint8, index into the group names.
        live: (V,) bool.

    Returns:
        (V,) vectors: ``group``, ``live``, ``classes``; ``head/`` and ``embedding/`` ``cosine``, ``residual``, ``l2``,
        ``norm_ratio`` (float32); ``exposure/`` ``inputs``, ``data_target``, ``echo_target``, ``last_target`` (int64),
        ``pull``, ``push``, ``input_only`` (float32); ``forecast/`` ``cosine``, ``low``, ``high``, ``chance`` (float32);
        ``recall/nats`` (float32) of the latest probe's estimate.
        If a probe ran, of its n tokens and C contexts: ``probe/ids`` (n,) int64, and (n, C) ``probe/said``,
        ``base_said`` bool, ``instead`` int64, ``probability`` float32; else left out.
    """
    vectors = {"group": group, "live": live, "classes": result.classes}
    for name, drift in (("head", result.head), ("embedding", result.embedding)):
        if isinstance(drift, RowDrift):
            vectors |= _named(name, drift, ("cosine", "residual", "l2", "norm_ratio"))
    if isinstance(result.exposure, Exposure):
        counts = ("inputs", "data_target", "echo_target", "last_target", "pull", "push", "input_only")
        vectors |= _named("exposure", result.exposure, counts)
    if isinstance(result.forecast, Forecast):
        vectors |= _named("forecast", result.forecast, ("cosine", "low", "high", "chance"))
    if result.recall is not None:
        vectors["recall/nats"] = result.recall.nats
    if result.probe is not None:
        vectors |= _named("probe", result.probe, ("ids", "instead", "probability"))
    probes = {"probe/said": result.probe, "probe/base_said": result.base_probe}
    return vectors | {name: probe.emitted for name, probe in probes.items() if probe is not None}


class RunWriter:
    """Writes a run folder, made if missing; a run that is already there is gone on with.

    Only the main process should hold one. Before `start` it raises a RuntimeError.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._attempt: int | None = None

    def start(
        self, config: Mapping[str, Any], watch: Watch, groups: Sequence[str], origin: Mapping[str, Any] | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write ``run.json``, or take up the run that the folder holds.

        Args:
            watch: what is watched. Its vectors are not written, only their shapes.
            groups: names of the script groups, in the order of the ``group`` vector.
            origin: model, data, command and versions; None leaves them out.
            evidence: hashes of the tokenizer and the base's rows; None leaves them out.

        Raises:
            ValueError: if the folder holds a run of another schema, or of other groups.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        meta: dict[str, Any] = {"schema": SCHEMA, "vocabguard": VERSION, "created": now, "resumed": []}
        if (self.folder / _META).exists():
            old = _read_meta(self.folder)
            if old["groups"] != list(groups):
                raise ValueError(f"{self.folder} holds a run with groups {old['groups']}; this one has {list(groups)}")
            meta |= {"created": old["created"], "resumed": [*old["resumed"], now]}
        for path in self.folder.glob("*.jsonl"):
            mend(path)
        meta |= {"config": plain(config), "watch": plain(watch), "groups": list(groups)}
        meta |= {} if origin is None else {"origin": plain(origin)}
        meta |= {} if evidence is None else {"evidence": plain(evidence)}
        write_file(self.folder / _META, json.dumps(meta, indent=2, allow_nan=False) + "\n")
        self._attempt = len(meta["resumed"])

    def texts(self, texts: Sequence[str]) -> None:
        """Write what each id says, V strings; nothing where all are empty. To be called after `start`."""
        self._started()
        if any(texts):
            write_file(self.folder / _TEXTS, json.dumps(list(texts)))

    def check(self, result: CheckResult) -> None:
        """Append a check and its transitions."""
        attempt = self._started()
        line = {
            "attempt": attempt,
            "step": result.step,
            "seconds": result.seconds,
            "probed": result.probe is not None,
            "firing": result.firing,
            "scalars": result.scalars,
            "worst": result.worst,
            "watched": result.watched,
            "forecast": {"total": forecast.total} if isinstance(forecast := result.forecast, Forecast) else forecast,
        }
        line |= {} if result.echo is None else {"echo": result.echo}
        # Alerts first: a check that can be read has all its alerts.
        self.alerts(result.transitions)
        append_line(self.folder / _CHECKS, line)

    def alerts(self, transitions: Sequence[Transition]) -> None:
        """Append transitions."""
        attempt = self._started()
        for transition in transitions:
            append_line(self.folder / _ALERTS, {"attempt": attempt, **plain(transition)})

    def note(self, kind: str, step: int, content: Mapping[str, Any]) -> None:
        """Append a finding that is no check; ``kind`` is one of `NOTES`, the file's name without ``.jsonl``."""
        append_line(self.folder / f"{kind}.jsonl", {"attempt": self._started(), "step": step, **content})

    def rows(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write every row's numbers.

        Args:
            step: the optimizer step; a file of the same step is replaced.
            tensors: by name, e.g. from `row_vectors`.

        """
        attempt = self._started()
        path = self.folder / f"rows-{step}.safetensors"
        import safetensors.torch

        # Clones, since safetensors refuses tensors that share memory.
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_file(path, safetensors.torch.save(whole, metadata={"attempt": str(attempt), "step": str(step)}))
        return path

    def _started(self) -> int:
        if self._attempt is None:
            raise RuntimeError(f"run folder {self.folder}: call start() before check() and rows()")
        return self._attempt


@dataclass(frozen=True)
class RunLog:
    """Reads a run folder, also one that is still being written. Get one with `RunLog.open`.

    Attributes:
        meta: ``run.json``: ``schema``, ``vocabguard``, ``created``, ``resumed``, ``config``, ``watch``, ``groups``.

    Example:
        >>> import tempfile
        >>> from torch import Tensor
        >>> from vocabguard.results import NotApplicable
        >>> off = NotApplicable("not in this example")
        >>> check = CheckResult(7, off, off, off, Tensor(), None, {"vocabguard/head/below_0.95": 0.25})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = RunWriter(Path(folder))
        ...     writer.start({}, Watch(off, off, off, off, live=4, never_trained=0, run_dir=folder), ["latin"])
        ...     writer.check(check)
        ...     RunLog.open(folder).scalar("head/below_0.95")
        ([7], [0.25])
    """

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> RunLog:
        """Open a run folder.

        Raises:
            FileNotFoundError: if there is no ``run.json``.
            ValueError: if it is no JSON, or of a schema newer than this version reads.
        """
        folder = Path(folder)
        if not (folder / _META).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder; expected {_META} in it (and {_CHECKS}, {_ALERTS})")
        return cls(folder, _read_meta(folder))

    def checks(self) -> list[dict[str, Any]]:
        """All checks in order: ``attempt, step, seconds, probed, firing, scalars, worst, watched``; None for a NaN.

        Some have ``echo``, and ``forecast``: the run's ``total`` of steps, or why it is ``not_applicable``.
        """
        return list(self.each_check())

    def each_check(self) -> Iterator[dict[str, Any]]:
        """What `checks` gives, one at a time: those of a long run are larger than they look."""
        first = self._first_steps()
        return (line for line in each_line(self.folder / _CHECKS) if _stands(line, first))

    def _first_steps(self) -> dict[int, int]:
        """The first step that each attempt checked."""
        path = self.folder / _CHECKS
        if not path.exists():
            return {}
        found = path.stat()
        return _first_steps(path, (found.st_size, found.st_mtime_ns))

    def alerts(self) -> list[Transition]:
        """All transitions, in order."""
        first = self._first_steps()
        return [as_transition(line) for line in read_lines(self.folder / _ALERTS) if _stands(line, first)]

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """All findings of a kind, in order: ``attempt``, ``step`` and what was found; none where none was asked for.

        Raises:
            ValueError: for another kind.
        """
        if kind not in NOTES:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(NOTES)}")
        first = self._first_steps()
        return [line for line in read_lines(self.folder / f"{kind}.jsonl") if _stands(line, first)]

    def texts(self) -> list[str]:
        """What each id says, V strings; empty if the folder does not tell.

        Raises:
            ValueError: if the file is no list of strings.
        """
        path = self.folder / _TEXTS
        if not path.is_file():
            return []
        try:
            found = json.loads(read_text(path))
        except RecursionError as error:
            raise ValueError(f"{path} is no JSON ({one_line(error)})") from error
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{path} holds no list of texts")
        return found

    @property
    def row_steps(self) -> tuple[int, ...]:
        """Steps of which there are rows, ascending."""
        first = self._first_steps()
        lines = []
        for path in self.folder.iterdir():
            if match := _ROWS.fullmatch(path.name):
                from safetensors import safe_open

                with safe_open(require_regular(path), framework="pt") as file:
                    lines.append({"step": int(match[1]), "attempt": int((file.metadata() or {}).get("attempt", 0))})
        return tuple(sorted(line["step"] for line in lines if _stands(line, first)))

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Every row's numbers at a step: see `row_vectors`.

        Args:
            step: one of `row_steps`; None takes the latest.

        Raises:
            ValueError: if there are no rows of that step, or none at all.
        """
        steps = self.row_steps
        if not steps or (step is not None and step not in steps):
            raise ValueError(f"{self.folder} has no rows of step {step}; there are rows of steps {list(steps)}")
        import safetensors.torch

        return safetensors.torch.load_file(self.folder / f"rows-{steps[-1] if step is None else step}.safetensors")

    def to_pandas(self) -> pandas.DataFrame:
        """Checks as a table: a row a check, indexed by ``step``, and a column a logged key without ``vocabguard/``.

        Beside the keys: ``attempt``, ``seconds``, ``probed`` and ``firing``. pandas is imported here.

        Returns:
            NaN where a check did not log a key.

        Raises:
            ModuleNotFoundError: without pandas.
            ValueError: if a file of the folder is torn.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(missing("pandas", "RunLog.to_pandas"), name=error.name) from error

        rows = []
        for check in self.checks():
            beside = {"step": check["step"], "attempt": check["attempt"], "seconds": check["seconds"],
                      "probed": check["probed"], "firing": ", ".join(check["firing"])}  # fmt: skip
            scalars = {name.removeprefix("vocabguard/"): math.nan if value is None else value
                       for name, value in check["scalars"].items()}  # fmt: skip
            rows.append(beside | scalars)
        columns = ["step", "attempt", "seconds", "probed", "firing"]
        frame = pandas.DataFrame(rows, columns=None if rows else columns)
        return frame.set_index("step")

    def _repr_html_(self) -> str:
        """What a notebook shows: the last check, and where the page is."""
        checks = self.checks()
        page = self.folder / "report.html"
        last = checks[-1] if checks else None
        facts = {
            "folder": str(self.folder),
            "checks": f"{len(checks):,}",
            "last step": "-" if last is None else f"{last['step']:,}",
            "firing": "-" if last is None else ", ".join(last["firing"]) or "none",
            "page": str(page) if page.is_file() else f"none yet: vocabguard report {self.folder}",
        }
        return facts_html("RunLog", facts, {} if last is None else last["scalars"])

    def scalar(self, key: str) -> tuple[list[int], list[float]]:
        """One scalar over the run.

        Args:
            key: a logged key, with or without ``vocabguard/``.

        Returns:
            The steps of the checks that logged it, and its values; NaN where it had none.

        Raises:
            KeyError: if no check logged it, with the closest key that was.
        """
        short, checks = key.removeprefix("vocabguard/"), self.checks()
        for name in (f"vocabguard/{short}", short):
            found = [(check["step"], check["scalars"][name]) for check in checks if name in check["scalars"]]
            if found:
                return [step for step, _ in found], [math.nan if value is None else value for _, value in found]
        logged = sorted({name.removeprefix("vocabguard/") for check in checks for name in check["scalars"]})
        close = difflib.get_close_matches(short, logged, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"logged are {logged}"
        raise KeyError(f"no check in {self.folder} logged {key!r}; {hint}")


def _named(prefix: str, source: object, names: Sequence[str]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": getattr(source, name) for name in names}


def why_unusable(folder: Path, groups: Sequence[str]) -> str | None:
    """Why a run cannot go on in a folder; None where it can, as in one that holds no run.

    Args:
        groups: names of the script groups.
    """
    if not (folder / _META).exists():
        return None
    try:
        meta = _read_meta(folder)
    except (OSError, ValueError) as error:
        return one_line(error)
    if isinstance(meta.get("created"), str) and isinstance(meta.get("resumed"), list) and "groups" in meta:
        return None if meta["groups"] == list(groups) else f"{folder / _META} has other groups of tokens"
    return f"{folder / _META} is not a vocabguard run: it names no start, no resumes or no groups"


def evidence_in(folder: str | Path) -> dict[str, Any] | None:
    """What a run was measured on: hashes of the tokenizer and of the base's rows; None where its folder has none.

    Such as a folder of an earlier version, one that cannot be read, or one that holds no run.
    """
    try:
        found = _read_meta(Path(folder)).get("evidence")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def versions() -> dict[str, str | None]:
    """Of this package and of those whose numbers a measurement depends on, and of Python."""
    found: dict[str, str | None] = {"vocabguard": VERSION, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(read_text(folder / _META))
        schema = meta["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / _META} is not a vocabguard run: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{folder} has schema {schema}; this version of vocabguard reads schema {SCHEMA}")
    return meta


@functools.lru_cache(maxsize=8)
def _first_steps(path: Path, _written: tuple[int, int]) -> dict[int, int]:
    """The first step that each attempt checked, of a file as it was written last: a page asks for it many times."""
    first: dict[int, int] = {}
    for attempt, step in _begun(path):
        first[attempt] = min(step, first.get(attempt, step))
    return first


def _begun(path: Path) -> Iterator[tuple[int, int]]:
    """Attempt and step of each whole line, without reading all that a check says."""
    if not path.exists():
        return
    with require_regular(path).open("rb") as file:
        for line in file:
            match = _BEGUN.match(line)
            if match is None or not line.endswith(b"}\n"):
                break
            yield int(match[1]), int(match[2])
        else:
            return
    # A last line that is being written, or another program's order.
    yield from ((line["attempt"], line["step"]) for line in each_line(path))


def _stands(line: Mapping[str, Any], first: Mapping[int, int]) -> bool:
    """Whether no later attempt has gone back to before this line."""
    return all(line["step"] < step for attempt, step in first.items() if attempt > line["attempt"])
