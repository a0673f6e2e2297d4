"""`VocabGuardCallback` for the Hugging Face ``Trainer`` and its subclasses.

Batches are seen in a forward pre-hook on the model, gradients in the optimizer's step post hook; the callback edits
nothing of the trainer. The keys of ``log.keys`` go to the active run of wandb, MLflow, trackio or Comet; made by
`VocabGuardCallback.add_to`, or with ``trainer=``, the callback hands them to ``trainer.log`` instead, and so to
``log_history`` and everything in ``report_to``. Evaluation metrics get the logged keys under ``eval_``, so
``metric_for_best_model="eval_vocabguard/head/below_0.95"`` with ``greater_is_better=False`` works. Name it before an
``EarlyStoppingCallback``: callbacks are called in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vocabguard.config import ConfigError, ConfigSource, Options
from vocabguard.files import one_line, replacing
from vocabguard.guard import VocabGuard
from vocabguard.guard.batches import LabelCarrier, Targets, drop_labels
from vocabguard.guard.hooks import OwnHook
from vocabguard.guard.loaders import inner_loader
from vocabguard.guard.resume import read_state
from vocabguard.guard.watched import Action
from vocabguard.integrations.trackers import ActiveRuns, insert, log_through, reporters_of
from vocabguard.integrations.trl import trainers_targets
from vocabguard.results import CheckResult
from vocabguard.views.keys import ChosenKeys

STATE_FILE = "vocabguard.pt"
STATE_KEY = "vocabguard"

_NO_COLLATE = (
    "hidden_labels: the training dataloader is a {kind} without a collate function, and labels travel through one; "
    "allowed: a torch DataLoader, or targets="
)
_NO_LOG = "trainer is of type {kind}, which has no log(); allowed: the Trainer that the callback is for"
_NOT_SAVED = "vocabguard: %s could not be written (%s): a run resumed from there starts drift and counts anew"

logger = logging.getLogger("vocabguard")


class VocabGuardCallback(TrainerCallback):
    """Guards the vocabulary of the model that a ``Trainer`` fine-tunes.

    Args:
        config: a preset's name, a YAML file, a mapping, a `GuardConfig`, or None for the defaults.
        tokenizer: taken from the trainer's ``processing_class`` where not given.
        overrides: dotted settings, e.g. ``["drift.every_n_steps=50"]``.
        targets: takes (inputs or None, targets) out of a batch, where batches have no ``labels``.
        actions: callables that alert rules may name.
        hidden_labels: the trainer takes ``labels`` out of a batch before the model sees it, as with
            ``compute_loss_func``. They are counted then by a key of our own that the collate function adds and that is
            taken away on its way into the model. Label smoothing is noticed without.
        trainer: the trainer that the callback is for: the keys of ``log.keys`` go through its ``log``. See `add_to`.
        **options: sections and settings of the configuration by keyword.

    Raises:
        ConfigError: for a setting that cannot be used, here or when training begins.

    Attributes:
        guard: the `VocabGuard` behind it.
    """

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        tokenizer: Any = None,
        overrides: Iterable[str] = (),
        targets: Targets | None = None,
        actions: Mapping[str, Action] | None = None,
        hidden_labels: bool = False,
        trainer: Any = None,
        **options: Unpack[Options],
    ) -> None:
        self.guard = VocabGuard(
            config, tokenizer=tokenizer, overrides=overrides, targets=targets, actions=actions, **options
        )
        if trainer is not None and not callable(getattr(trainer, "log", None)):
            raise ConfigError(_NO_LOG.format(kind=type(trainer).__name__))
        self._targets, self._hidden = targets, hidden_labels
        self._resumes = False
        self._undo = ExitStack()
        self._trainer = trainer
        self._chosen = ChosenKeys(self.guard.config.log.keys)
        self._runs = ActiveRuns(raises=self.guard.config.on_error == "raise")
        self._logged: CheckResult | None = None
        self._kept: CheckResult | None = None
        self._evaluated = -1

    @classmethod
    def add_to(cls, trainer: Any, config: ConfigSource = None, **arguments: Any) -> Self:
        """Add a callback to a trainer, through whose ``log`` the keys of ``log.keys`` go.

        Args:
            trainer: the trainer, before `train` is called.
            config: as for the class.
            **arguments: the class's others.
        """
        callback = cls(config, trainer=trainer, **arguments)
        trainer.add_callback(callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach: weights are still those of the base, unless the run is resumed."""
        with self.guard.contain("on_train_begin"):
            self._undo.close()
            processing = kwargs.get("processing_class")
            self.guard.attach(
                kwargs["model"],
                kwargs.get("optimizer"),
                total_steps=state.max_steps if state.max_steps > 0 else None,
                schedule=kwargs.get("lr_scheduler"),
                run_dir=Path(args.output_dir or ".") / "vocabguard",
                resumed=_saved(args, state),
                dataloader=kwargs.get("train_dataloader"),
                steps_done=state.global_step,
                inject="collate",
                batches_per_step=args.gradient_accumulation_steps,
                tokenizer=getattr(processing, "tokenizer", processing),
                targets=None if self._targets else trainers_targets(args, echo=self.guard.wants("echo")),
            )
            self._resumes = state.global_step > 0 and not args.ignore_data_skip
            if self._hidden or args.label_smoothing_factor > 0:
                self._carry_labels(kwargs["model"], kwargs.get("train_dataloader"))
            self._runs = ActiveRuns(raises=self.guard.config.on_error == "raise")
            self._evaluated = -1

    def _carry_labels(self, model: nn.Module, dataloader: Any) -> None:
        """Bring the labels to the model until training ends, also when the guard disables itself in between."""
        loader = inner_loader(dataloader)
        if self.guard.watch is None or not self.guard.counting:
            return
        if not hasattr(loader, "collate_fn"):
            if self._hidden:
                raise ConfigError(_NO_COLLATE.format(kind=type(loader).__name__))
            return
        inner = loader.collate_fn
        loader.collate_fn = LabelCarrier(inner)
        self._undo.callback(setattr, loader, "collate_fn", inner)
        self._undo.callback(model.register_forward_pre_hook(OwnHook(drop_labels), with_kwargs=True).remove)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Number the batches of the epoch; an iterable dataset collates once more what a resumed run skips."""
        with self.guard.contain("on_epoch_begin"):
            loader = kwargs.get("train_dataloader")
            skips = self._resumes and isinstance(getattr(loader, "dataset", None), IterableDataset)
            done = state.global_step % max(1, _steps_in_epoch(loader, args, state)) if skips else 0
            self.guard.start_epoch(skipped=done * args.gradient_accumulation_steps)
            self._resumes = False
            # The start's keys, only now: callbacks after this one may take no log before their own `on_train_begin`.
            self._log(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """One optimizer step is done; where a checkpoint of it will hold our state goes into the trainer's state."""
        with self.guard.contain("on_step_end"):
            self.guard.step(state.global_step, _kwargs.get("optimizer"))
            self._log(state)
            if state.global_step >= state.max_steps or control.should_training_stop:
                self._keep(state, ended=False)  # some reporters end their runs before this callback's `on_train_end`
            _shared(state)[STATE_KEY] = {"state": str(_checkpoint(args, state) / STATE_FILE)}
            self._ask(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Add the latest keys to the evaluation's metrics, which best-model selection reads afterwards.

        Questions in many languages are answered first, where `confusion` asks for them.
        """
        with self.guard.contain("on_evaluate"):
            self.guard.check(at="evaluation")
            if metrics is not None:
                metrics.update({f"eval_{key}": value for key, value in self.guard.latest.items()})
            self._log(state, evaluated=True)
            self._ask(control)

    def _log(self, state: TrainerState, *, evaluated: bool = False, ended: bool = False) -> None:
        """Hand the chosen keys of a new check to the trackers.

        Args:
            evaluated: those of the evaluation too, once a step.
            ended: the trainer's reporters have ended their runs, and would begin new ones.
        """
        last, values = self.guard.last, {}
        if last is not None and last is not self._logged:
            self._logged, values = last, self._chosen.of(last.scalars)
        if evaluated and self._evaluated != state.global_step:
            self._evaluated = state.global_step
            values |= {f"eval_{key}": value for key, value in self._chosen.of(self.guard.latest).items()}
        if not values:
            return
        reporters = set() if self._trainer is None else reporters_of(self._trainer)
        if self._trainer is not None and ended:
            insert(state.log_history, {**values, "epoch": state.epoch, "step": state.global_step})
        elif self._trainer is not None:
            self._runs.attempt("the trainer's log", log_through, self._trainer, values)
        if state.is_world_process_zero:
            self._runs.log(values, state.global_step, without=reporters)

    def _keep(self, state: TrainerState, *, ended: bool) -> None:
        """Keep the worst tokens of the last check, and at the end the report page, with the trackers."""
        last, folder = self.guard.last, self.guard.run_dir
        if last is None or not state.is_world_process_zero:
            return
        worst = () if self._kept is last else last.worst
        self._kept = last
        self._runs.keep(worst, folder / "report.html" if ended and folder is not None else None, last.step)

    def _ask(self, control: TrainerControl) -> None:
        """Pass on what alert rules ask of the trainer."""
        asked = self.guard.take_requests()
        control.should_save |= "checkpoint" in asked
        control.should_training_stop |= "stop" in asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        """Write our state into the checkpoint; one that cannot be written is no reason to stop watching."""
        with self.guard.contain("on_save"):
            saved = self.guard.state_dict()
            if saved and state.is_world_process_zero:
                path = _written(args, state) / STATE_FILE
                try:
                    with replacing(path) as new:
                        torch.save(saved, new)
                except (OSError, RuntimeError) as error:  # torch has no narrower one for a full disk
                    if self.guard.config.on_error == "raise":
                        raise
                    logger.warning(_NOT_SAVED, path, one_line(error))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Close the run; with the best model loaded back, the last step's check stands."""
        with self.guard.contain("on_train_end"):
            self._undo.close()
            self.guard.finish(check=not args.load_best_model_at_end)
            self._log(state, ended=True)
            self._keep(state, ended=True)


def _steps_in_epoch(loader: Any, args: TrainingArguments, state: TrainerState) -> int:
    """Optimizer steps of an epoch as the trainer counts them: all, where the data has no length."""
    try:
        return -(-len(loader) // args.gradient_accumulation_steps)
    except TypeError:
        return state.max_steps


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _written(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that was just written: a hyperparameter search has one for each trial."""
    own = _checkpoint(args, state)
    trials = [] if own.is_dir() else [path for path in own.parent.glob(f"*/{own.name}") if path.is_dir()]
    return max(trials, key=lambda path: path.stat().st_mtime, default=own)


def _shared(state: TrainerState) -> dict[str, Any]:
    """The part of the trainer's state that its checkpoints keep for callbacks; annotated as a list, it is a dict."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _saved(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """Our state of the checkpoint that this run resumes, if it does and the checkpoint has one."""
    if state.global_step == 0:
        return None
    entry = _shared(state).get(STATE_KEY, {})
    told = entry.get("state") if isinstance(entry, dict) else None
    for path in (Path(told if isinstance(told, str) else ""), _checkpoint(args, state) / STATE_FILE):
        if path.is_file():
            return read_state(path)
    return None
