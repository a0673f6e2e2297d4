"""What TensorBoard shows: scalars, the cosine histogram, the worst tokens and the alerts as text.

Tags are a fixed, small set. There is never a tag per token: thousands of tags make TensorBoard unusable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vocabguard.alerts.notify import transition_markdown
from vocabguard.results import CheckResult, Finding, RowDrift, Transition, Watch
from vocabguard.text import escape_markdown, large_groups, preflight_sentences, watch_sentences, worst_markdown
from vocabguard.views.charts import charts
from vocabguard.views.keys import ChosenKeys

if TYPE_CHECKING:
    from vocabguard.vocabulary.table import VocabTable

ALERTS_SHOWN = 100
"""Newest alert changes kept in the text of ``vocabguard/alert_log``."""


class Writer(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One number of one step."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """One Markdown text of one step."""

    def add_histogram_raw(  # noqa: D102  the signature is torch's
        self,
        tag: str,
        *,
        min: float,
        max: float,
        num: int,
        sum: float,
        sum_squares: float,
        bucket_limits: Any,
        bucket_counts: Any,
        global_step: int,
    ) -> None: ...

    def add_custom_scalars(self, layout: dict[str, dict[str, list[Any]]]) -> None:
        """Charts that hold several scalars."""

    def close(self) -> None:
        """Flush and close the event file."""


class TensorBoardView:
    """Writes what a run finds to one TensorBoard writer.

    | tag | what |
    |---|---|
    | ``vocabguard/...`` | scalars: the chosen keys of `CheckResult.scalars` |
    | ``vocabguard-detail/...`` | the other ones |
    | ``vocabguard-detail-alerts/...`` | where each rule stands |
    | ``vocabguard/head/cosine``, ``vocabguard/embedding/cosine`` | histogram over live finite rows |
    | ``vocabguard/watch`` | text: what is watched, and preflight |
    | ``vocabguard/worst``, ``vocabguard/watched`` | text: tables of the worst tokens and of the watch list |
    | ``vocabguard/alert_log`` | text: all changes of alerts so far with their stories, newest first |
    | ``vocabguard/{confusion,neighbors,head_or_body}`` | text: what was found beside the checks, if asked for |

    Args:
        writer: a ``SummaryWriter``; Lightning's ``TensorBoardLogger.experiment`` is one.
        chosen: keys that keep their names as tags; None stands for all.
        owned: whether `close` closes the writer, and whether a layout of charts is written, of which a writer has one.
    """

    def __init__(
        self, writer: Writer, *, table: VocabTable, histogram: bool = True, chosen: ChosenKeys | None = None,
        owned: bool = False,
    ) -> None:  # fmt: skip
        self._writer = writer
        self._chosen = chosen or ChosenKeys("all")
        self._table = table
        self._histogram = histogram
        self._owned = owned
        self._alerts: list[str] = []

    def watch(self, watch: Watch) -> None:
        """Write what is watched and what preflight found, as text of step 0."""
        sentences = watch_sentences(watch) + preflight_sentences(watch.preflight, self._table)
        text = "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)
        self._writer.add_text("vocabguard/watch", text, global_step=0)
        if self._owned:
            self._writer.add_custom_scalars(charts(large_groups(self._table), self._chosen))

    def check(self, result: CheckResult) -> None:
        """Write one check at its step."""
        self._scalars(result.scalars, result.step)
        if self._histogram:
            self._histograms(result)
        for tag, reports in (("vocabguard/worst", result.worst), ("vocabguard/watched", result.watched)):
            if reports:
                self._writer.add_text(tag, worst_markdown(reports), global_step=result.step)
        self._alert_log(result.step, result.transitions)

    def finding(self, found: Finding) -> None:
        """Write what was found beside the checks, at its step."""
        self._scalars(found.scalars, found.step)
        text = "\n\n".join(filter(None, (escape_markdown(found.sentence), found.table)))
        self._writer.add_text(f"vocabguard/{found.kind}", text, global_step=found.step)
        self._alert_log(found.step, found.transitions)

    def close(self) -> None:
        """Close the writer if it is ours; a trainer's writer is left alone."""
        if self._owned:
            self._writer.close()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(self._chosen.tag(key), value, global_step=step)

    def _histograms(self, result: CheckResult) -> None:
        for name, drift in (("head", result.head), ("embedding", result.embedding)):
            if not isinstance(drift, RowDrift):
                continue
            cosine = drift.cosine.numpy()
            shown = cosine[self._table.live.numpy() & np.isfinite(cosine)].clip(-1.0, 1.0)
            if shown.size:
                _add_histogram(self._writer, f"vocabguard/{name}/cosine", shown, result.step)

    def _alert_log(self, step: int, changes: Sequence[Transition]) -> None:
        """Write the whole log each time: TensorBoard keeps only a sample of a tag's texts, but always the last."""
        if not changes:
            return
        self._alerts[:0] = reversed([transition_markdown(change) for change in changes])
        del self._alerts[ALERTS_SHOWN:]
        self._writer.add_text("vocabguard/alert_log", "\n\n".join(self._alerts), global_step=step)


def open_view(
    folder: str | Path, *, table: VocabTable, histogram: bool = True, chosen: ChosenKeys | None = None
) -> TensorBoardView:
    """A view with an event file of its own in `folder`, made if it is missing.

    Use a folder beside the trainer's event file, not the same one: TensorBoard reads one live file a folder.
    """
    # Imported here: it costs a second that a run without TensorBoard need not spend.
    from torch.utils.tensorboard import SummaryWriter

    # Written by the writer's own thread, so a short interval does not hold up a step.
    writer = SummaryWriter(str(folder), flush_secs=10)  # type: ignore[no-untyped-call, unused-ignore]
    return TensorBoardView(writer, table=table, histogram=histogram, chosen=chosen, owned=True)


def _cosine_edges() -> np.ndarray[Any, np.dtype[np.float32]]:
    """(66,) float32 ascending bin edges, ten a decade of ``1 - cosine`` down to 1e-6; 0.90 and 0.95 are among them."""
    # Renard's preferred numbers: about equal on a log scale, with 1, 2 and 5 exact.
    steps = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
    drift = [step * 10.0**decade for decade in range(-6, 1) for step in steps if step * 10.0**decade <= 2.0]
    return np.array([1.0 - value for value in reversed(drift)] + [1.0], dtype=np.float32)


_EDGES = _cosine_edges()


def _add_histogram(writer: Writer, tag: str, cosine: np.ndarray[Any, np.dtype[np.float32]], step: int) -> None:
    """Write fixed bins that are densest near 1: several times cheaper than the writer's own 1,549 bins."""
    counts, _ = np.histogram(cosine, _EDGES)
    writer.add_histogram_raw(
        tag,
        min=float(cosine.min()),
        max=float(cosine.max()),
        num=cosine.size,
        sum=float(cosine.sum(dtype=np.float64)),
        # Not a dot product: BLAS threads wait for cores that training has, which costs more than all the rest.
        sum_squares=float(np.square(cosine, dtype=np.float64).sum()),
        bucket_limits=_EDGES[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
