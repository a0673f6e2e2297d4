"""The chosen keys on their way to the trackers of a Hugging Face run.

Two ways: `ActiveRuns` hands them to the run that a tracker has going, without any argument; `log_through` hands them to
``Trainer.log``, which fills ``log_history`` and calls all that ``report_to`` names.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vocabguard.files import one_line
from vocabguard.results import TokenReport

logger = logging.getLogger("vocabguard")

_FAILED = "vocabguard: %s refuses the logged keys (%s: %s); it gets no more of them in this run, training continues"
# What MLflow takes in the name of a metric.
_NO_MLFLOW = re.compile(r"[^\w\-. :/]")


Table = dict[str, list[Any]]
"""A column's name -> its cells."""

WORST = "vocabguard/worst_tokens"
"""Where trackers show the table of worst tokens."""
_COLUMNS = tuple(field.name for field in fields(TokenReport))


class ActiveRuns:
    """Hands keys, and at the end the worst tokens and the report page, to active runs of trackers.

    Only to trackers that the script itself has imported; none is imported here. What a tracker raises is reported once,
    and it gets no more keys.

    Args:
        raises: hand errors on instead.
    """

    def __init__(self, *, raises: bool = False) -> None:
        self._raises = raises
        self._refused: set[str] = set()
        self._mlflow_run: str | None = None

    def log(self, values: Mapping[str, float], step: int, *, without: Collection[str] = ()) -> None:
        """Log values of one step. `without`: trackers that get them in another way."""
        ways = {"wandb": self._wandb, "mlflow": self._mlflow, "trackio": self._trackio, "comet_ml": self._comet}
        for name, way in ways.items():
            module = sys.modules.get(name)
            if module is not None and name not in without:
                self.attempt(name, way, module, dict(values), step)
            elif module is not None and name == "mlflow":
                self.attempt(name, self._find_mlflow, module)

    def keep(self, worst: Sequence[TokenReport], page: Path | None, step: int) -> None:
        """Keep the table of worst tokens, and the report page, with the active runs that have a place for such.

        Args:
            worst: worst first; none makes no table.
            page: ``report.html``; None or a file that is not there is left out.
        """
        table = {name: [getattr(one, name) for one in worst] for name in _COLUMNS} if worst else {}
        page = page if page is not None and page.is_file() else None
        ways = {"wandb": _keep_wandb, "mlflow": self._keep_mlflow, "trackio": _keep_trackio, "comet_ml": _keep_comet}
        for name, way in ways.items():
            if (module := sys.modules.get(name)) is not None and (table or page):
                self.attempt(f"{name} (table and page)", way, module, table, page, step)

    def _keep_mlflow(self, mlflow: Any, table: Table, page: Path | None, step: int) -> None:
        if self._mlflow_run is None:
            return
        if table:
            mlflow.log_table(table, f"vocabguard/worst_tokens-{step}.json", run_id=self._mlflow_run)
        if page is not None:
            mlflow.MlflowClient().log_artifact(self._mlflow_run, str(page), "vocabguard")

    def attempt(self, name: str, log: Callable[..., None], *arguments: Any) -> None:
        """Log in one way, unless that has failed before."""
        if name in self._refused:
            return
        try:
            log(*arguments)
        # Whatever a tracker, or a callback of the user's, may raise.
        except Exception as error:
            if self._raises:
                raise
            self._refused.add(name)
            logger.warning(_FAILED, name, type(error).__name__, one_line(error))

    def _wandb(self, wandb: Any, values: dict[str, float], step: int) -> None:
        if (run := getattr(wandb, "run", None)) is not None:
            # Without `step`: the trainer's own callback counts wandb's steps, and has this key as the axis.
            run.log({**values, "train/global_step": step})

    def _find_mlflow(self, mlflow: Any) -> None:
        if (run := mlflow.active_run()) is not None:
            self._mlflow_run = run.info.run_id

    def _mlflow(self, mlflow: Any, values: dict[str, float], step: int) -> None:
        self._find_mlflow(mlflow)
        if self._mlflow_run is not None:
            # By its id: the trainer's own callback ends the run before the closing check.
            named = {_NO_MLFLOW.sub("_", key): value for key, value in values.items()}
            mlflow.log_metrics(named, step=step, run_id=self._mlflow_run)

    def _trackio(self, trackio: Any, values: dict[str, float], step: int) -> None:
        if trackio.context_vars.current_run.get() is not None:
            trackio.log({**values, "train/global_step": step})

    def _comet(self, comet: Any, values: dict[str, float], step: int) -> None:
        if (experiment := _experiment(comet)) is not None:
            experiment.log_metrics(values, step=step)


def _experiment(comet: Any) -> Any:
    """Comet's experiment that is going; None where there is none."""
    return (getattr(comet, "get_running_experiment", None) or comet.get_global_experiment)()


def _keep_wandb(wandb: Any, table: Table, page: Path | None, step: int) -> None:
    if (run := getattr(wandb, "run", None)) is None:
        return
    if table:
        rows = wandb.Table(columns=list(table), data=[list(row) for row in zip(*table.values(), strict=True)])
        run.log({WORST: rows, "train/global_step": step})
    if page is not None:
        artifact = wandb.Artifact(f"vocabguard-report-{run.id}", type="report")
        artifact.add_file(str(page))
        run.log_artifact(artifact)


def _keep_trackio(trackio: Any, table: Table, page: Path | None, step: int) -> None:
    if trackio.context_vars.current_run.get() is None:
        return
    if table:
        import pandas  # trackio has it

        trackio.log({WORST: trackio.Table(dataframe=pandas.DataFrame(table)), "train/global_step": step})
    if page is not None and hasattr(trackio, "log_artifact"):  # not in older ones
        trackio.log_artifact(page, name="vocabguard-report", type="report")


def _keep_comet(comet: Any, table: Table, page: Path | None, step: int) -> None:
    if (experiment := _experiment(comet)) is None:
        return
    if table:
        rows = [list(row) for row in zip(*table.values(), strict=True)]
        experiment.log_table(f"worst_tokens-{step}.csv", tabular_data=rows, headers=list(table))
    if page is not None:
        experiment.log_asset(str(page), file_name="vocabguard-report.html", step=step)


_REPORTERS = {
    "WandbCallback": "wandb",
    "MLflowCallback": "mlflow",
    "TrackioCallback": "trackio",
    "CometCallback": "comet_ml",
}


def reporters_of(trainer: Any) -> set[str]:
    """The trackers, by their modules, that get what goes through ``trainer.log``."""
    kinds = (kind for callback in trainer.callback_handler.callbacks for kind in type(callback).__mro__)
    return {_REPORTERS[kind.__name__] for kind in kinds if kind.__name__ in _REPORTERS}


def log_through(trainer: Any, values: Mapping[str, float]) -> None:
    """Log by ``trainer.log``, so that nothing else of the trainer's log is disturbed.

    The entry goes before the last one of ``log_history``: who reads ``log_history[-1]["loss"]`` finds it as before.
    """
    from transformers import Trainer  # not at the top: Lightning's users need not wait for it

    wanted = trainer.control.should_log
    history = trainer.state.log_history
    length = len(history)
    # TRL's trainers add the metrics gathered so far to whatever is logged, and forget them: they belong to the loss.
    gathers = any(kind.__module__.partition(".")[0] == "trl" and "log" in vars(kind) for kind in type(trainer).__mro__)
    try:
        Trainer.log(trainer, dict(values)) if gathers else trainer.log(dict(values))
    finally:
        # `on_log` takes the wish to log as fulfilled; the loss of this step is still to come.
        control = trainer.control
        control.should_log = wanted
        if len(history) == length + 1:
            insert(history, history.pop())


def insert(history: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Put an entry of ours before the trainer's last one, after ours that stand there.

    >>> history = [{"loss": 2.0, "step": 5}]
    >>> insert(history, {"vocabguard/exposure/never": 0.9, "step": 6})
    >>> history[-1]
    {'loss': 2.0, 'step': 5}
    """
    last_is_ours = not history or any("vocabguard/" in key for key in history[-1])
    history.insert(len(history) - (not last_is_ours), entry)
