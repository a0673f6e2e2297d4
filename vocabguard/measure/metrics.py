"""torchmetrics faces of the measurements, for your own training loop.

All take the keyword arguments of `torchmetrics.Metric` too (``dist_sync_on_step``, ``process_group``, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vocabguard.installation import missing
from vocabguard.measure.drift import measure_drift, summarise
from vocabguard.measure.exposure import add_counts, exposure_classes, targets_of
from vocabguard.measure.languages import (
    LANGUAGES,
    ConfusionCounts,
    confusion_matrix,
    count_answers,
    scripts_of,
    summarise_confusion,
)
from vocabguard.results import EXPOSURE_CLASSES, RowDrift
from vocabguard.rows.baselines import CopiedBaseline

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        missing((error.name or "torchmetrics").split(".")[0], __name__), name=error.name
    ) from error

_MEASURED, _FLAGS = ("cosine", "residual", "l2", "norm_ratio"), ("bad", "zero")


class TokenExposure(Metric):
    """How often tokens are targets: the share of the vocabulary in each exposure class.

    The counts are the states ``data_target`` and ``inputs``, (V,) int64; they are added up over processes.

    Args:
        rows: V.
        live: (V,) bool, the tokens that shares are over; None takes all.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: if `live` is not (rows,) bool, or for an unknown keyword argument.

    Example:
        >>> metric = TokenExposure(rows=4)
        >>> metric.update(torch.tensor([[3, 1, 1]]), torch.tensor([[3, 1, -100]]))
        >>> {name: share.item() for name, share in metric.compute().items()}
        {'never': 0.75, '1-4': 0.25, '5-19': 0.0, '20+': 0.0}
        >>> metric.inputs.tolist()
        [0, 2, 0, 1]
    """

    is_differentiable = False
    full_state_update = False

    data_target: Tensor
    inputs: Tensor
    live: Tensor

    def __init__(self, rows: int, live: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("data_target", torch.zeros(rows, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("inputs", torch.zeros(rows, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("live", _mask("live", live, rows), persistent=False)

    def update(self, inputs: Tensor, labels: Tensor, shift: bool = True) -> None:
        """Count one batch of (B, T) inputs and labels; see `measure.exposure.targets_of` for `shift`."""
        add_counts(self.inputs[None], inputs)
        add_counts(self.data_target[None], targets_of(labels, shift))

    def compute(self) -> dict[str, Tensor]:
        """``never``, ``1-4``, ``5-19``, ``20+``: () float32 shares in [0, 1] of the live tokens."""
        live = self.live.to(self.data_target.device)
        of_live = torch.bincount(exposure_classes(self.data_target)[live].long(), minlength=len(EXPOSURE_CLASSES))
        shares = of_live.float() / of_live.sum().clamp(min=1)
        return dict(zip(EXPOSURE_CLASSES, shares.unbind(), strict=True))


class TokenDrift(Metric):
    """How far the rows of a matrix have moved from where they were when the metric was made.

    The value is that of the last update, not an average over updates. The states ``cosine``, ``residual``, ``l2`` and
    ``norm_ratio``, (V,) float32, hold every row's numbers. Processes are taken to hold the same whole matrix.

    Args:
        baseline: (V, D) matrix, any float dtype; copied to the CPU and kept there.
        live: (V,) bool, the rows that the summary is over; None takes all.
        chunk_rows: rows read at a time.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: if `live` is not (V,) bool, or for an unknown keyword argument.

    Example:
        >>> weight = torch.eye(4)
        >>> metric = TokenDrift(weight)
        >>> weight[0, 1] = 1.0  # row 0 turns by 45 degrees
        >>> metric.update(weight)
        >>> summary = metric.compute()
        >>> [round(summary[key].item(), 3) for key in ("cosine_mean", "cosine_min", "below_0.95")]
        [0.927, 0.707, 0.25]
    """

    is_differentiable = False
    full_state_update = True  # forward() must not average an update with earlier ones

    live: Tensor

    def __init__(self, baseline: Tensor, live: Tensor | None = None, chunk_rows: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rows = baseline.shape[0]
        self.chunk_rows = chunk_rows
        # No buffer: it would follow the metric onto the accelerator, where a second matrix has no place.
        self._baseline = CopiedBaseline(baseline.detach().to("cpu", copy=True))
        self.register_buffer("live", _mask("live", live, rows), persistent=False)
        for name in _MEASURED:
            self.add_state(name, torch.full((rows,), torch.nan), dist_reduce_fx="mean")
        for name in _FLAGS:
            self.add_state(name, torch.zeros(rows, dtype=torch.uint8), dist_reduce_fx="max")

    def update(self, weight: Tensor, unexposed: Tensor | None = None) -> None:
        """Measure the matrix as it is now.

        Args:
            weight: (V, D), any float dtype.
            unexposed: (V,) bool, rows of tokens that were never a target, whose mean displacement the residual cosine
                takes off; None takes off nothing.

        Raises:
            ValueError: for a matrix of another shape than the baseline's, or a mask that is not (V,) bool.
        """
        expected = (self._baseline.rows, self._baseline.width)
        if weight.shape != expected:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {expected}")
        nobody = torch.zeros(expected[0], dtype=torch.bool)
        rows = CopiedBaseline(weight.detach())
        drift = measure_drift(rows, self._baseline, nobody if unexposed is None else unexposed.cpu(), self.chunk_rows)
        for name in _MEASURED:
            setattr(self, name, getattr(drift, name).to(self.device))
        for name in _FLAGS:
            setattr(self, name, getattr(drift, name).to(self.device, torch.uint8))

    def compute(self) -> dict[str, Tensor]:
        """The scalars of `measure.drift.summarise` over the live rows, () float32 each."""
        measured = {name: getattr(self, name).cpu() for name in _MEASURED}
        flags = {name: getattr(self, name).cpu().bool() for name in _FLAGS}
        scalars = summarise(RowDrift(**measured, **flags), self.live.cpu(), {})
        return {name: torch.tensor(value, device=self.device) for name, value in scalars.items()}


class LanguageConfusion(Metric):
    """Whether answers are in the language that was asked for, by the scripts of their letters.

    What counts, and where the rates depart from the published ones, is said in `vocabguard.measure.languages`. The
    states ``counts`` and ``into`` are those of `ConfusionCounts`; they are added up over processes.

    Args:
        languages: ISO 639 codes of the languages expected; None takes all that are known.
        allow: language -> scripts that belong besides its own, in the place of Latin letters alone, such as
            ``{"ja": (), "ko": ("latin", "zh")}``.
        least_words: lines of fewer words are not judged.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: for a language that is not known, or given twice, or for an unknown keyword argument.

    Example:
        >>> metric = LanguageConfusion(["ja", "ko"])
        >>> metric.update(["はい、私は元気です。", "今日は хорошо ですね。"], "ja")
        >>> metric.update(["네, 오늘은 날씨가 아주 좋아요."], "ko")
        >>> {key: value.item() for key, value in metric.compute().items() if key in ("ja", "ko", "ko/line_pass")}
        {'ja': 0.5, 'ko': 0.0, 'ko/line_pass': 1.0}
        >>> metric.matrix()
        {'ja': {'cyrillic': 1}}
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor
    into: Tensor

    def __init__(
        self,
        languages: Sequence[str] | None = None,
        allow: Mapping[str, Sequence[str]] | None = None,
        least_words: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.languages = tuple(LANGUAGES if languages is None else languages)
        if len(set(self.languages)) != len(self.languages):
            raise ValueError(f"languages are {list(self.languages)}; allowed: each once")
        for language in self.languages:
            scripts_of(language)
        self.allow = dict(allow or {})
        self.least_words = least_words
        empty = self._count([])
        self.add_state("counts", empty.counts, dist_reduce_fx="sum")
        self.add_state("into", empty.into, dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], language: str | Sequence[str]) -> None:
        """Count some answers, and the language expected of all of them, or of each.

        Raises:
            ValueError: for a language that is not among the metric's, or if there are not as many as answers.
        """
        expected = [language] * len(answers) if isinstance(language, str) else list(language)
        if len(expected) != len(answers):
            raise ValueError(f"{len(expected)} languages for {len(answers)} answers; expected one each, or one for all")
        found = self._count(list(zip(expected, answers, strict=True)))
        self.counts += found.counts.to(self.counts.device)
        self.into += found.into.to(self.into.device)

    def compute(self) -> dict[str, Tensor]:
        """The shares of `measure.languages.summarise_confusion`, () float32 each."""
        shares = summarise_confusion(ConfusionCounts(self.languages, self.counts.cpu(), self.into.cpu()))
        return {name: torch.tensor(share, device=self.device) for name, share in shares.items()}

    def matrix(self) -> dict[str, dict[str, int]]:
        """From language -> into script -> answers with letters of it, over what this process has counted."""
        return confusion_matrix(ConfusionCounts(self.languages, self.counts.cpu(), self.into.cpu()))

    def _count(self, answers: Sequence[tuple[str, str]]) -> ConfusionCounts:
        return count_answers(answers, self.languages, allow=self.allow, least_words=self.least_words)


def _mask(name: str, mask: Tensor | None, rows: int) -> Tensor:
    """A given mask, checked, or one that takes all rows."""
    if mask is None:
        return torch.ones(rows, dtype=torch.bool)
    if mask.shape != (rows,) or mask.dtype is not torch.bool:
        raise ValueError(f"{name} is {tuple(mask.shape)} {mask.dtype}; expected ({rows},) torch.bool")
    return mask
