"""The fused kernel for accelerators: its numbers by Triton's interpreter, and what happens where it fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vocabguard.measure import fused
from vocabguard.measure.kernels import sums_by_torch
from vocabguard.rows.baselines import CopiedBaseline

INTERPRETED = """
import torch
from vocabguard.measure import fused
sums = fused._compiled()
for dtype, width in ((torch.float32, 37), (torch.bfloat16, 5000), (torch.float16, 64)):
    torch.manual_seed(0)
    now, shift = torch.randn(9, width).to(dtype), torch.randn(width)
    base = (now.float() + 0.1 * torch.randn(9, width)).to(dtype)
    out = torch.full((5, 12), -1.0)
    sums(now, base, shift, out[:, 2:11])
    w, b, s = now.double(), base.double(), shift.double()
    d = w - b
    exact = torch.stack([(w * w).sum(1), (d * d).sum(1), w @ s, d @ s, (b * b).sum(1)])
    torch.testing.assert_close(out[:, 2:11].double(), exact, rtol=1e-5, atol=1e-5)
    assert (out[:, [0, 1, 11]] == -1).all()
"""


def rows_of(kind: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    base = torch.randn(50, 24, generator=made).to(kind)
    return base + 0.1 * torch.randn(50, 24, generator=made).to(kind), base, torch.randn(24, generator=made)


def by_hand(now: Tensor, before: Tensor, shift: Tensor, out: Tensor) -> None:
    """In the kernel's place."""
    w, base = now.double(), before.double()
    d, s = w - base, shift.double()
    out.copy_(torch.stack([(w * w).sum(1), (d * d).sum(1), w @ s, d @ s, (base * base).sum(1)]))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_by_the_interpreter() -> None:
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("base_too", [False, True])
@pytest.mark.parametrize("fails_at", [None, 1, 3])
def test_what_the_kernel_gives_is_taken_and_where_it_fails_operations_go_on(
    monkeypatch: pytest.MonkeyPatch, base_too: bool, fails_at: int | None
) -> None:
    calls: list[int] = []

    def kernel(*arguments: Any) -> None:
        calls.append(len(arguments[0]))
        if len(calls) == fails_at:
            raise RuntimeError("no compiler")
        by_hand(*arguments)

    monkeypatch.setattr(fused, "fused_sums", lambda _kind: kernel)
    now, base, shift = rows_of()
    found = sums_by_torch(CopiedBaseline(now), CopiedBaseline(base), shift, 16, base_too=base_too)
    exact = torch.empty(5, 50)
    by_hand(now, base, shift, exact)
    torch.testing.assert_close(found, exact[: 4 + base_too], rtol=1e-5, atol=1e-5)
    assert len(calls) == (fails_at or 4), "after a failure it is not called again"


def test_there_is_none_on_a_cpu_or_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.fused_sums("cpu") is None
    monkeypatch.setitem(sys.modules, "triton", None)
    fused.fused_sums.cache_clear()
    assert fused.fused_sums("cuda") is None
    fused.fused_sums.cache_clear()
