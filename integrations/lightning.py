"""`VocabGuardCallback` for Lightning's ``Trainer``.

Batches are read in ``on_train_batch_start`` by their ``labels`` or the ``targets=`` extractor, else in the language
model's own forward pass; gradients in the optimizers' step post hooks. The logged keys also go through
``pl_module.log``, so ``EarlyStopping(monitor="vocabguard/head/below_0.95")`` and ``ModelCheckpoint`` can follow them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from vocabguard.config import ConfigSource, Options
from vocabguard.guard import VocabGuard
from vocabguard.guard.batches import Targets
from vocabguard.guard.called import Call
from vocabguard.guard.watched import Action
from vocabguard.installation import missing
from vocabguard.integrations.trackers import ActiveRuns
from vocabguard.measure.learning_rates import rates_by_epoch
from vocabguard.results import CheckResult

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(missing("lightning", __name__), name=error.name) from error


class VocabGuardCallback(Callback):
    """Guards the vocabulary of the language model inside a ``LightningModule``.

    Args:
        config: a preset's name, a YAML file, a mapping, a `GuardConfig`, or None for the defaults.
        tokenizer: the model's tokenizer; taken from ``pl_module.tokenizer`` where not given and there is one.
        overrides: dotted settings, e.g. ``["drift.every_n_steps=50"]``.
        targets: takes (inputs or None, targets) out of a batch; targets are not shifted again. For modules that compute
            their loss outside the model and whose batches have no ``labels``.
        actions: callables that alert rules may name.
        call: asks a model of your own for logits: takes the model and (B, T) ids, gives (B, T, V) logits.
        **options: sections and settings of the configuration by keyword.

    Raises:
        ConfigError: for a setting that cannot be used, here or when training starts.

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
        call: Call | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.guard = VocabGuard(
            config, tokenizer=tokenizer, overrides=overrides, targets=targets, actions=actions, call=call, **options
        )
        self._global_step = 0
        self._monitored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: weights are still those of the base, unless `load_state_dict` brought a run to go on from."""
        with self.guard.contain("on_train_start"):
            named = self.guard.config.matrices
            steps = trainer.estimated_stepping_batches
            self._global_step = trainer.global_step
            self.guard.attach(
                pl_module if named.head or named.embedding else language_model(pl_module),
                trainer.optimizers,
                total_steps=int(steps) if math.isfinite(steps) else None,
                schedule=_schedule(trainer),
                run_dir=Path(trainer.log_dir or trainer.default_root_dir) / "vocabguard",
                dataloader=trainer.train_dataloader,
                writer=_tensorboard(trainer),
                hook_model=False,
                steps_done=trainer.global_step,
                inject="batch",
                batches_per_step=trainer.accumulate_grad_batches,
                tokenizer=getattr(pl_module, "tokenizer", None),
            )
            self._monitored = False
            _to_loggers(trainer, self.guard.last)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add echo rows to a batch where some are due, and count it."""
        with self.guard.contain("on_train_batch_start"):
            self.guard.observe_batch(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the guard of an optimizer step; batches of an unfinished accumulation are none."""
        with self.guard.contain("on_train_batch_end"):
            result = None
            if trainer.global_step != self._global_step:
                self._global_step = trainer.global_step
                result = self.guard.step(trainer.global_step, trainer.optimizers)
            # The start's values wait for the first batch: what `on_train_start` logs is averaged over the epoch, and
            # would cover all later values when the epoch ends.
            if result is not None or not self._monitored:
                self._monitored = True
                pl_module.log_dict(self.guard.latest, logger=False, rank_zero_only=True)
            _to_loggers(trainer, result)
            self._ask(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer questions in many languages, where `confusion` asks for them."""
        with self.guard.contain("on_validation_end"):
            if self.guard.config.confusion.enabled:
                before = self.guard.last
                result = self.guard.check(at="evaluation")
                _to_loggers(trainer, None if result is before else result)
                # Of the rules, evaluations move those about the answers.
                kinds = ("vocabguard/confusion/", "vocabguard/alerts/")
                answers = {key: value for key, value in self.guard.latest.items() if key.startswith(kinds)}
                _log_beside(trainer, answers, trainer.global_step)
                self._ask(trainer)

    def _ask(self, trainer: Trainer) -> None:
        """Do what alert rules ask of the trainer; a checkpoint lies where the trainer's own do."""
        asked = self.guard.take_requests()
        if "checkpoint" in asked:
            own = getattr(trainer.checkpoint_callback, "dirpath", None)
            folder = Path(own or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
            trainer.save_checkpoint(folder / f"vocabguard-step={trainer.global_step}.ckpt")
        if "stop" in asked:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next epoch's batches follow those that the model has seen."""
        with self.guard.contain("on_train_epoch_end"):
            self.guard.start_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run."""
        with self.guard.contain("on_train_end"):
            self.guard.finish()
            last, folder = self.guard.last, self.guard.run_dir
            if trainer.is_global_zero and last is not None:
                page = None if folder is None else folder / "report.html"
                ActiveRuns(raises=self.guard.config.on_error == "raise").keep(last.worst, page, last.step)

    def state_dict(self) -> dict[str, Any]:
        """Our part of a Lightning checkpoint."""
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint when training starts."""
        with self.guard.contain("load_state_dict"):
            self.guard.load_state_dict(state_dict)


class GuardAtSetup(Callback):
    """Adds a `VocabGuardCallback` when a fit begins, unless the trainer has one by then.

    For Lightning's entry point, which is asked for callbacks before the trainer's own are known.

    Args:
        config: as for `VocabGuardCallback`.
        overrides: the same.

    Raises:
        ConfigError: for a configuration that cannot be used.
    """

    def __init__(self, config: ConfigSource = None, *, overrides: Iterable[str] = ()) -> None:
        self._callback = VocabGuardCallback(config, overrides=overrides)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add it behind this one: the loop over the callbacks that calls this one comes to it next."""
        has = any(isinstance(one, VocabGuardCallback) for one in trainer.callbacks)  # type: ignore[attr-defined]
        if stage == "fit" and not has:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(callbacks.index(self) + 1, self._callback)


def language_model(module: nn.Module) -> nn.Module:
    """The module itself or its first descendant that knows its output embeddings, as Hugging Face models do.

    Where there is none the module comes back as it is, and `matrices` says what is missing.
    """
    return next((child for child in module.modules() if hasattr(child, "get_output_embeddings")), module)


def _schedule(trainer: Trainer) -> Any:
    """What moves the learning rates of a run, or the rates themselves; None if they are unknown."""
    configs, steps = trainer.lr_scheduler_configs, trainer.estimated_stepping_batches
    plain = trainer.lightning_module.automatic_optimization and len(configs) <= 1 and len(trainer.optimizers) > 0
    if not plain or not math.isfinite(steps):
        return None
    left = int(steps) - trainer.global_step
    if not configs:
        return [trainer.optimizers[0].param_groups[0]["lr"]] * left
    config = configs[0]
    if config.frequency != 1 or config.reduce_on_plateau:
        return None
    if config.interval == "step":
        return config.scheduler
    if not math.isfinite(trainer.num_training_batches):
        return None
    in_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    return rates_by_epoch(config.scheduler, left, in_epoch, trainer.global_step)


def _to_loggers(trainer: Trainer, result: CheckResult | None) -> None:
    """Hand a check's keys to the loggers other than TensorBoard, which has its own view."""
    if result is not None:
        _log_beside(trainer, result.scalars, result.step)


def _log_beside(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(dict(scalars), step=step)


def _tensorboard(trainer: Trainer) -> Any:
    """The ``SummaryWriter`` of the trainer's TensorBoard logger, if it has one."""
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
