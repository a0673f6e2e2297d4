"""What `VocabGuard.attach` puts together: matrices, vocabulary table, baselines, rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.alerts.rules import BUILT_IN, AlertRule, require_parts
from vocabguard.config import ConfigError, GuardConfig, load_questions
from vocabguard.files import one_line
from vocabguard.guard.agreement import agree_on
from vocabguard.guard.layout import Replicas
from vocabguard.measure.undertrained import never_trained
from vocabguard.measure.unused import known_unused, not_measured
from vocabguard.results import MatrixName, NotApplicable, Preflight, Transition, Watch, WatchedMatrix
from vocabguard.rows.baselines import (
    Baseline,
    CopiedBaseline,
    FileBaseline,
    copy_baseline,
    in_memory,
    reopen_baseline,
    save_baseline,
)
from vocabguard.rows.checkpoints import open_baseline
from vocabguard.rows.engines import Held, held_by_engine
from vocabguard.rows.matrices import VocabMatrix, find_matrices
from vocabguard.rows.proposals import proposal
from vocabguard.rows.sharding import OwnPart, ShardBaseline, reshard
from vocabguard.vocabulary.table import GROUPS, VocabTable, build_table, fit_rows, ids_beyond, plain_table

Action = Callable[[Transition], None]

_BEYOND = (
    "vocabguard: %d id%s of the tokenizer %s no row (%d and above) and can be no input and no target: call "
    "model.resize_token_embeddings(len(tokenizer)) before training if they are to be learned"
)

_LOST = (
    "vocabguard: the baseline of the %s is lost (%s): its drift restarts from this checkpoint (step %d), counts go on"
)

logger = logging.getLogger("vocabguard")

# Rows a message: 64 MiB at a width of 4,096 in float32, so that saving needs no second matrix.
_ROWS_SENT = 4096


@dataclass
class Watched:
    """The matrices under guard and what belongs to them.

    Attributes:
        matrices: ``head`` and ``embedding``, or why not.
        baselines: of the matrices that can move; a tied pair has one.
        tokenizer: behind the table; None where there is none.
        lost: matrices whose baseline a resumed run no longer found.
        not_compared: why rows could not be compared with unused ones; None where they were, or none were looked for.
        replicas: which processes see the same data.
        differ: what is refused since processes differ, in words.
        alike: matrices that all processes have whole and the same.
    """

    matrices: dict[MatrixName, VocabMatrix | NotApplicable]
    baselines: dict[MatrixName, Baseline]
    table: VocabTable
    rows: int
    tokenizer: Any
    lost: frozenset[str] = frozenset()
    not_compared: str | None = None
    replicas: Replicas = Replicas()
    differ: tuple[str, ...] = ()
    alike: frozenset[str] = frozenset()

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one parameter."""
        head = self.matrices["head"]
        return isinstance(head, VocabMatrix) and head.tied

    @property
    def gradient_matrix(self) -> VocabMatrix | None:
        """The matrix whose gradient pulls and pushes: the head's, unless an adapter makes its rows or an engine has it.

        Of a matrix that is split by columns no process has a whole row, so none has the norm of its gradient.
        """
        head = self.matrices["head"]
        if not isinstance(head, VocabMatrix) or head.adapter is not None or self.ungraded is not None:
            return None
        return head

    @property
    def ungraded(self) -> str | None:
        """Why the gradient of the output rows is not read, as the engine has it; None where it is."""
        head = self.matrices["head"]
        if not isinstance(head, VocabMatrix) or head.adapter is not None:
            return None
        shard = head.shard
        agreed = shard is not None and shard.spans is not None
        if (held := head.held) is not None and not (agreed and held.stepped is not None):
            return f"{held.engine} has the output rows and their gradient in parts of its own"
        if hasattr(head.weight, "_hp_mapping"):
            return "DeepSpeed steps copies of the output rows, and clears their gradient before it can be read (ZeRO)"
        split = shard is not None and shard.columns is not None
        return "the output matrix is split by columns, so no process has the gradient of a whole row" if split else None

    @property
    def edges(self) -> dict[int, bool]:
        """See `Shard.edges`, of the matrix whose gradient is read."""
        shard = None if self.gradient_matrix is None else self.gradient_matrix.shard
        return {} if shard is None else shard.edges

    @property
    def sharded(self) -> bool:
        """Whether rows are spread over processes."""
        return any(isinstance(one, VocabMatrix) and one.shard is not None for one in self.matrices.values())

    def baseline_of(self, name: MatrixName) -> Baseline:
        """The rows before; those of a pair that was tied at the start are kept once, as the head's."""
        return self.baselines[name] if name in self.baselines else self.baselines["head"]

    def mark_trained(self, trained: Tensor, not_compared: str | None = None) -> None:
        """Tell rows that were never trained at the base apart. `trained`: (V,) bool."""
        self.table, self.not_compared = self.table.with_trained(trained), not_compared

    def resize(self, rows: int) -> None:
        """Follow a matrix that was resized in mid-run.

        New rows have no baseline: they count as never trained at the base, and so raise no alarm.
        """
        trained = fit_rows(self.table.trained, rows, False)
        self.table = _table(self.tokenizer, rows).with_trained(trained)
        self.rows = rows

    def state_dict(self, run_dir: Path | None) -> dict[str, Any]:
        """``baselines``: where they can be read again, and ``trained``: (V,) bool. For all processes to call.

        A baseline that lives in memory is first written to the run folder, once. Without a run folder the rows
        themselves go along: a resumed run could not find them anywhere else.
        """
        baselines = self.baselines
        if run_dir is None:
            whole = {name: one.whole if isinstance(one, OwnPart) else one for name, one in baselines.items()}
            kept = {
                name: baseline.tensor if isinstance(baseline, CopiedBaseline) else baseline.reference()
                for name, baseline in whole.items()
            }
            return {"baselines": kept, "trained": self.table.trained}
        for name, baseline in baselines.items():
            path = run_dir / f"baseline-{name}.safetensors"
            if isinstance(baseline, ShardBaseline):
                _save_shards(baseline, path, name)
            elif isinstance(baseline, CopiedBaseline) and collective.is_main() and not baseline.reference():
                saved = save_baseline(baseline, path, name)
                if baseline.tensor.is_pinned():
                    baseline.keep_reference(saved.reference())  # checks stream it from there
                else:
                    baselines[name] = saved
        references = collective.agree({name: baseline.reference() for name, baseline in baselines.items()})
        return {"baselines": references, "trained": self.table.trained}

    def describe(self, name: MatrixName) -> WatchedMatrix | NotApplicable:
        """What a user is told of one matrix."""
        matrix = self.matrices[name]
        if isinstance(matrix, NotApplicable):
            return matrix
        dtype, kept = str(matrix.dtype).removeprefix("torch."), self.baseline_of(name).describe()
        return WatchedMatrix(name, matrix.rows, matrix.width, dtype, matrix.tied, matrix.has_bias, kept)


def _save_shards(baseline: ShardBaseline, path: Path, key: str) -> None:
    """Write the rows of all processes, sent chunk by chunk, to one file, once; rank 0 does."""
    if baseline.saved:
        return
    parts = [rows for _, rows in baseline.chunks(_ROWS_SENT) if collective.is_main()]
    saved = save_baseline(CopiedBaseline(torch.cat(parts)), path, key).reference() if parts else {}
    baseline.keep_reference(collective.agree(saved))


def watch_model(
    model: nn.Module, tokenizer: Any, config: GuardConfig, resumed: Mapping[str, Any], steps_done: int = 0
) -> Watched:
    """Find the matrices, take their baselines, build the table.

    Args:
        tokenizer: its tokenizer, or None: then all tokens are one group.
        resumed: the state of an earlier run that goes on, or empty.
        steps_done: optimizer steps that the trainer has behind it.

    Raises:
        ConfigError: for a module name or a source that does not exist.
        RefusedError: where processes differ in what the guard needs; on all of them.
    """
    reshard(model)
    try:
        tokens = None if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)
        known = find_matrices(model, config.matrices.head, config.matrices.embedding, tokens)
        agreed = agree_on(model, known, lambda: vocabulary_rows(model, known, tokens))
        matrices, rows = agreed.matrices, agreed.rows
        table = _table(tokenizer, rows)
        baselines, lost = _baselines(matrices, config, resumed["baselines"] if resumed else None, steps_done)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    watched = Watched(
        matrices, baselines, table, rows, tokenizer, lost, None, agreed.replicas, agreed.differ, agreed.alike
    )
    if "trained" in resumed:
        # Rows that were added to the checkpoint since have no base: no alarm counts them.
        watched.mark_trained(fit_rows(resumed["trained"], rows, False))
    elif config.untrained.enabled:
        _tell_untrained(watched, config.drift.chunk_rows)
    return watched


def describe(
    watched: Watched, flight: Preflight | NotApplicable, prober: object, run_dir: Path | None,
    notes: tuple[str, ...] = (),
) -> Watch:  # fmt: skip
    """What a user is told before step 1. `prober`: what probes, or the `NotApplicable` that says why nothing does."""
    blind: tuple[str, ...] = ()
    if watched.tokenizer is None:
        blind = ("No tokenizer: no token texts, no groups, no probe. Pass VocabGuardCallback(tokenizer=tokenizer).",)
    if watched.tokenizer is not None and watched.not_compared is not None:
        blind = (f"Under-trained tokens not measured: {watched.not_compared}; only rows of tiny norm are set apart.",)
    blind += tuple(f"Not followed: {one}." for one in watched.differ)
    if (why := watched.ungraded) is not None:
        blind += (f"Pull and push are not applicable: {why}.",)
    return Watch(
        head=watched.describe("head"), embedding=watched.describe("embedding"),
        probe=prober if isinstance(prober, NotApplicable) else None, preflight=flight,
        live=int(watched.table.live.sum()), never_trained=int((~watched.table.trained).sum()),
        run_dir=None if run_dir is None else str(run_dir), notes=(*blind, *_adapter_notes(watched), *notes),
    )  # fmt: skip


def _adapter_notes(watched: Watched) -> tuple[str, ...]:
    """What adapters make of the matrices, as far as a user should know."""
    found = [matrix for matrix in watched.matrices.values() if isinstance(matrix, VocabMatrix)]
    said = [
        f"{adapter.kind} makes the {matrix.name} rows: base and adapter are added up, chunk by chunk"
        + (", and such rows have no gradient of their own: pull and push are not applicable." if head else ".")
        for matrix in found
        if (adapter := matrix.adapter) is not None
        for head in [matrix.name == "head"]
    ]
    if any(matrix.untied for matrix in found):
        said.append("The base ties head and input embedding, and the adapter unties them: each is followed by itself.")
    return tuple(said)


def _table(tokenizer: Any, rows: int) -> VocabTable:
    if tokenizer is None:
        return plain_table(rows)
    if (beyond := ids_beyond(tokenizer, rows)) and collective.is_main():
        logger.warning(_BEYOND, beyond, "s" if beyond > 1 else "", "have" if beyond > 1 else "has", rows)
    return build_table(tokenizer, rows)


def vocabulary_rows(
    model: nn.Module, matrices: Mapping[MatrixName, VocabMatrix | NotApplicable], tokens: int | None = None
) -> int:
    """V: of the matrices, or of the model's input embedding where none of them can move.

    Args:
        tokens: how many the tokenizer has, if known.

    Raises:
        ValueError: if the model has neither.
    """
    found = [matrix.rows for matrix in matrices.values() if isinstance(matrix, VocabMatrix)]
    if found:
        return max(found)
    # DistributedDataParallel keeps the model inside.
    inputs = getattr(getattr(model, "module", model), "get_input_embeddings", lambda: None)()
    if inputs is None:
        name = type(model).__name__
        if perhaps := proposal(model, ("head", "embedding"), tokens):
            raise ValueError(f"matrices: nothing to watch in {name}; name its modules: {perhaps}")
        reasons = {name: matrix.reason for name, matrix in matrices.items() if isinstance(matrix, NotApplicable)}
        raise ValueError(f"matrices: nothing to watch in {name}: {reasons}")
    held = held_by_engine(model, inputs)
    if isinstance(held, Held):
        return held.rows
    weight = getattr(inputs, "weight", None)
    if isinstance(held, NotApplicable) or not isinstance(weight, Tensor) or weight.dim() != 2:
        reason = f"its input embedding, a {type(inputs).__name__}, has no matrix" if held is None else held.reason
        raise ValueError(f"matrices: the rows of {type(model).__name__} cannot be counted: {reason}")
    return int(weight.shape[0])


def _baselines(
    matrices: Mapping[MatrixName, VocabMatrix | NotApplicable],
    config: GuardConfig,
    saved: Mapping[str, Mapping[str, str] | Tensor] | None,
    steps_done: int,
) -> tuple[dict[MatrixName, Baseline], frozenset[str]]:
    """The rows before by matrix, and the names of those whose saved rows are lost."""
    baselines: dict[MatrixName, Baseline] = {}
    lost: dict[str, str] = {}
    for name, matrix in matrices.items():
        if isinstance(matrix, NotApplicable) or (matrix.tied and name == "embedding" and "head" in baselines):
            continue
        found = None if saved is None else _kept(name, matrix, saved.get(name), lost)
        if found is None and config.snapshot.source is not None:
            found = open_baseline(config.snapshot.source, matrix)
        if found is not None:
            baselines[name] = found if (shard := matrix.shard) is None else OwnPart(found, shard)
        else:
            baselines[name] = copy_baseline(matrix)
    if lost and config.snapshot.source is None:
        logger.warning(_LOST, " and the ".join(lost), next(iter(lost.values())), steps_done)
    return baselines, frozenset(lost)


def _kept(
    name: str, matrix: VocabMatrix, saved: Mapping[str, str] | Tensor | None, lost: dict[str, str]
) -> CopiedBaseline | FileBaseline | None:
    """The rows that a run has begun with; None where they are lost on any process, and why in `lost`."""
    found, why = None, ""
    try:
        if saved is None:
            raise ValueError("the saved state names none")
        found = CopiedBaseline(saved) if isinstance(saved, Tensor) else in_memory(reopen_baseline(saved), matrix)
        if found.width != matrix.width:
            why = f"{found.describe()} has rows of {found.width} elements, the model's have {matrix.width}"
    except (ValueError, OSError, TypeError, AttributeError) as error:
        why = one_line(error)
    if not bool(collective.any_of(torch.tensor([bool(why)]))):
        return found
    lost[name] = why or "lost on another process"
    return None


def _tell_untrained(watched: Watched, chunk_rows: int) -> None:
    """Mark rows that were never trained at the base, by their baselines; note where they could not be compared.

    The table's own candidates are the rows that a text can reach; see `known_unused` for what they are compared with.
    """
    table = watched.table
    head, embedding = (
        partial(watched.baselines[name].chunks, chunk_rows) if name in watched.baselines else None
        for name in ("head", "embedding")
    )
    output = head or embedding
    if output is None:
        return
    unused = known_unused(output, table.idle, table.reserved, table.control)
    found = never_trained(embedding, head, watched.tied, table.live, unused)
    watched.mark_trained(~found, not_measured(unused))


def build_rules(config: GuardConfig, actions: Mapping[str, Action]) -> list[AlertRule]:
    """The enabled rules, with action names replaced by the callables they stand for.

    Raises:
        ConfigError: for a rule that is refused, or an action that has no callable.
    """
    rules = []
    for name, rule in config.alerts.items():
        if not rule.enabled:
            continue
        unknown = [action for action in rule.actions if action not in (*BUILT_IN, *actions)]
        if unknown:
            allowed = [*BUILT_IN, *actions]
            raise ConfigError(f"alerts.{name}.actions has {unknown}; allowed: {allowed} (more by `actions=`)")
        try:
            given = {spec.name: getattr(rule, spec.name) for spec in fields(rule) if spec.name != "enabled"}
            given["actions"] = tuple(cast(Any, actions.get(action, action)) for action in rule.actions)
            rules.append(AlertRule(name, **given))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    try:
        require_parts(rules, GROUPS, load_questions(config.confusion) if config.confusion.enabled else ())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return rules
