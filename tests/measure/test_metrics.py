"""The torchmetrics faces against the functions beneath and against counting by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric

from vocabguard.measure.metrics import LanguageConfusion, TokenDrift, TokenExposure
from vocabguard.results import EXPOSURE_CLASSES

V = 17


def by_class(counts: Counter[int], live: list[int]) -> dict[str, float]:
    def name(count: int) -> str:
        return EXPOSURE_CLASSES[(count >= 1) + (count >= 5) + (count >= 20)]

    members = Counter(name(counts[v]) for v in live)
    return {label: members[label] / len(live) for label in EXPOSURE_CLASSES}


@pytest.mark.parametrize("shift", [True, False])
def test_token_exposure_equals_counting_by_hand(shift: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    live = torch.arange(V) % 5 != 0
    metric, inputs, targets = TokenExposure(V, live), Counter[int](), Counter[int]()
    for _ in range(6):
        ids = (torch.rand(3, 7, generator=generator) ** 3 * (V + 2)).long()
        labels = ids.masked_fill(torch.rand(3, 7, generator=generator) < 0.4, -100)
        metric.update(ids, labels, shift=shift)
        inputs.update(ids.flatten().tolist())
        targets.update(labels[:, int(shift) :].flatten().tolist())
    assert metric.inputs.tolist() == [inputs[v] for v in range(V)]
    assert metric.data_target.tolist() == [targets[v] for v in range(V)]
    found = {name: share.item() for name, share in metric.compute().items()}
    assert found == pytest.approx(by_class(targets, live.nonzero().flatten().tolist()))
    assert len({share for share in found.values() if share}) > 1
    metric.reset()
    assert not metric.data_target.any()


def test_token_exposure_adds_up_over_processes() -> None:
    parts = [TokenExposure(V) for _ in range(2)]
    parts[0].update(torch.tensor([[1, 2, 2]]), torch.tensor([[1, 2, 2]]))
    parts[1].update(torch.tensor([[2, 2, 2, 2]]), torch.tensor([[2, 2, 2, 2]]))
    reduce = parts[0]._reductions["data_target"]
    assert callable(reduce)
    assert reduce(torch.stack([part.data_target for part in parts])).tolist() == [0, 0, 5] + [0] * (V - 3)


@pytest.mark.parametrize("build", [TokenExposure, lambda rows, live: TokenDrift(torch.ones(rows, 2), live)])
@pytest.mark.parametrize("live", [torch.ones(16, dtype=torch.bool), torch.ones(17)])
def test_a_mask_that_does_not_fit_is_refused(build: Callable[..., Metric], live: Tensor) -> None:
    with pytest.raises(ValueError, match=r"live is \(1[67],\) torch\.\w+; expected \(17,\) torch\.bool"):
        build(V, live)


METRICS: list[Callable[..., Metric]] = [
    lambda **kwargs: TokenExposure(V, **kwargs),
    lambda **kwargs: TokenDrift(torch.ones(V, 2), **kwargs),
    lambda **kwargs: LanguageConfusion(["ja"], **kwargs),
]


@pytest.mark.parametrize("build", METRICS)
def test_torchmetrics_own_arguments_are_taken(build: Callable[..., Metric]) -> None:
    given = {"dist_sync_on_step": True, "sync_on_compute": False, "compute_on_cpu": True, "process_group": object()}
    metric = build(**given)
    assert {name: getattr(metric, name) for name in given} == given
    assert not build().dist_sync_on_step


@pytest.mark.parametrize("build", METRICS)
def test_an_unknown_argument_is_refused(build: Callable[..., Metric]) -> None:
    with pytest.raises(ValueError, match=r"Unexpected keyword arguments: `dist_sync_on_steps`"):
        build(dist_sync_on_steps=True)


@pytest.mark.parametrize("on_step", [True, False])
def test_a_step_is_of_all_processes_where_that_is_wanted(on_step: bool) -> None:
    two_alike = {"distributed_available_fn": lambda: True, "dist_sync_fn": lambda tensor, group: [tensor, tensor]}
    metric = TokenExposure(V, dist_sync_on_step=on_step, **two_alike)
    ids = torch.tensor([[0, 3, 3, 3]])
    assert metric(ids, ids)["5-19"].item() == pytest.approx(on_step / V)  # 3 targets here, 6 on both
    assert metric.compute()["5-19"].item() == pytest.approx(1 / V)


def moved(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A matrix before and after: all rows share a shift, some also turn."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(V, 6, generator=generator).to(dtype)
    turn = torch.randn(V, 6, generator=generator) * (torch.arange(V) % 3 == 0)[:, None]
    return before, (before + 0.4 + turn).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_drift_equals_cosines_in_float64(dtype: torch.dtype) -> None:
    before, after = moved(0, dtype)
    live = torch.arange(V) != 5
    metric = TokenDrift(before, live, chunk_rows=4)
    before.zero_()  # the metric keeps a copy
    metric.update(after)
    before = moved(0, dtype)[0].double()
    cosine = cosine_similarity(before, after.double())
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["cosine_mean"] == pytest.approx(cosine[live].mean().item(), abs=1e-6)
    assert found["cosine_min"] == pytest.approx(cosine[live].min().item(), abs=1e-6)
    assert found["below_0.95"] == pytest.approx((cosine[live] < 0.95).double().mean().item())
    assert found["residual_p01"] == found["cosine_p01"]
    torch.testing.assert_close(metric.cosine.double(), cosine, atol=1e-6, rtol=0)
    torch.testing.assert_close(metric.l2.double(), (after.double() - before).norm(dim=1), atol=1e-5, rtol=1e-5)


def test_token_drift_takes_off_the_unexposed_rows_shift() -> None:
    before, after = moved(1)
    unexposed = torch.arange(V) % 3 != 0
    metric = TokenDrift(before)
    metric.update(after, unexposed)
    shift = (after - before)[unexposed].double().mean(0)
    expected = cosine_similarity(before.double(), after.double() - shift)
    torch.testing.assert_close(metric.residual.double(), expected, atol=1e-6, rtol=0)
    assert metric.residual[unexposed].min() > 0.999
    assert metric.cosine[unexposed].min() < 0.99


def test_token_drift_is_that_of_the_last_update() -> None:
    before, after = moved(2)
    metric = TokenDrift(before)
    first = metric(after)
    second = metric(before)  # forward(), as a training loop would
    assert first["cosine_min"] < 0.95
    assert second["cosine_min"] == metric.compute()["cosine_min"] == pytest.approx(1.0)
    broken = after.clone()
    broken[3, 0] = torch.nan
    metric.update(broken)
    assert metric.compute()["nonfinite_rows"] == 1
    assert metric.compute()["cosine_mean"].isfinite()


def test_token_drift_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\); expected \(4, 2\)"):
        TokenDrift(torch.ones(4, 2)).update(torch.ones(3, 2))


def test_the_baseline_stays_on_the_cpu_and_survives_a_copy() -> None:
    before = moved(3)[0]
    metric = copy.deepcopy(TokenDrift(before)).to("meta")
    assert metric._baseline.tensor.device.type == "cpu"
    assert metric.cosine.device.type == "meta"
    assert torch.equal(metric._baseline.tensor, before)
