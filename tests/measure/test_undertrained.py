from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from vocabguard.measure.undertrained import Chunks, never_trained, row_norms, unused_distances
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS, WIDTH = 1500, 48


def chunks_of(matrix: Tensor, size: int = 97) -> Chunks:
    return lambda: ((slice(i, min(i + size, len(matrix))), matrix[i : i + size]) for i in range(0, len(matrix), size))


def mask_of(ids: Tensor | range, rows: int = ROWS) -> Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.as_tensor(list(ids), dtype=torch.long)] = True
    return mask


NEVER, UNUSED = mask_of(range(100, 125)), mask_of(range(1460, 1500))
LIVE = ~UNUSED


def trained_rows(seed: int) -> Tensor:
    """Rows of varied length around one constant, as output rows are."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.exp(0.3 * torch.randn(ROWS, 1, generator=draw))
    return 2.0 + lengths * torch.randn(ROWS, WIDTH, generator=draw)


def pushed(rows: Tensor, which: Tensor, seed: int) -> Tensor:
    """The rows, with `which` replaced by one direction and a little noise: what push alone makes of them."""
    draw = torch.Generator().manual_seed(seed)
    direction = 3 * torch.randn(WIDTH, generator=draw)
    noise = 0.3 * torch.randn(len(rows), WIDTH, generator=draw)
    return torch.where(which[:, None], direction + noise, rows)


def small(rows: Tensor, which: Tensor, seed: int) -> Tensor:
    """The rows, with `which` as an initialisation left them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.where(which[:, None], 0.02 * torch.randn(len(rows), WIDTH, generator=draw), rows)


def naive_distances(matrix: Tensor, unused: Tensor) -> Tensor:
    rows = matrix.double()
    component = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    rows = rows - torch.outer(rows @ component, component)
    found, all_unused = [], rows[unused].mean(dim=0)
    for i in range(len(rows)):
        mean = (
            torch.stack([rows[j] for j in unused.nonzero().flatten() if j != i]).mean(dim=0)
            if unused[i]
            else all_unused
        )
        found.append(1 - torch.dot(rows[i], mean) / rows[i].norm() / mean.norm())
    return torch.stack(found).float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [64, 1500])
def test_indicators_match_naive_ones(dtype: torch.dtype, tolerance: float, size: int) -> None:
    matrix = pushed(trained_rows(0), NEVER | UNUSED, 1)
    kept = matrix.to(dtype)
    distances = unused_distances(chunks_of(kept, size), UNUSED)
    torch.testing.assert_close(distances, naive_distances(matrix, UNUSED), atol=tolerance, rtol=0)
    norms = torch.tensor([math.sqrt(sum(x * x for x in row)) for row in kept.tolist()])
    torch.testing.assert_close(row_norms(chunks_of(kept, size), ROWS), norms, rtol=1e-5, atol=0)
    assert distances.dtype == norms.dtype == torch.float32


def test_indicators_of_broken_rows_are_nan() -> None:
    matrix = pushed(trained_rows(0), UNUSED, 1)
    matrix[3, 5], matrix[1470, 0], matrix[7] = math.nan, math.inf, 0.0
    distances, norms = unused_distances(chunks_of(matrix), UNUSED), row_norms(chunks_of(matrix), ROWS)
    assert distances.isnan().nonzero().flatten().tolist() == [3, 7, 1470]
    assert norms.isnan().nonzero().flatten().tolist() == [3, 1470]
    assert unused_distances(chunks_of(matrix), mask_of(range(9, 10))).isnan().all()
    assert not never_trained(None, chunks_of(matrix), True, LIVE & ~mask_of(range(7, 8)), UNUSED).any()


@pytest.mark.parametrize("seed", range(3))
def test_tied_rows_that_were_only_pushed(seed: int) -> None:
    matrix = chunks_of(pushed(trained_rows(seed), NEVER | UNUSED, seed + 10))
    for embedding, head in ((matrix, None), (None, matrix), (matrix, matrix)):
        assert torch.equal(never_trained(embedding, head, True, LIVE, UNUSED), NEVER)


@pytest.mark.parametrize("seed", range(3))
def test_untied_rows_of_small_norm(seed: int) -> None:
    embedding = chunks_of(small(trained_rows(seed), NEVER | UNUSED, seed + 10))
    head = chunks_of(pushed(trained_rows(seed + 20), NEVER | UNUSED, seed + 30))
    assert torch.equal(never_trained(embedding, None, False, LIVE, UNUSED), NEVER)
    assert torch.equal(never_trained(embedding, head, False, LIVE, UNUSED), NEVER)
    assert torch.equal(never_trained(embedding, head, False, LIVE), NEVER), "small norms stand out by themselves"


def test_indicators_that_both_have_a_say_must_agree() -> None:
    embedding = chunks_of(small(trained_rows(0), NEVER | UNUSED, 1))
    taught = NEVER & mask_of(range(110))
    head = chunks_of(pushed(trained_rows(2), (NEVER & ~taught) | UNUSED, 3))
    assert torch.equal(never_trained(embedding, head, False, LIVE, UNUSED), NEVER & ~taught)


@pytest.mark.parametrize("unused", [UNUSED, mask_of(range(1498, 1500)), None], ids=["many", "two", "none"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["trained", "fresh", "padding reset"])
def test_healthy_models_have_none(kind: str, tied: bool, unused: Tensor | None) -> None:
    head, embedding = trained_rows(0), trained_rows(1)
    if kind == "fresh":
        head, embedding = (0.02 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    elif kind == "padding reset":
        head, embedding = pushed(head, UNUSED, 2), small(embedding, UNUSED, 3)
    first, second = chunks_of(embedding), chunks_of(embedding if tied else head)
    assert not never_trained(first, second, tied, LIVE, unused).any()


def test_zero_rows_are_named_where_nothing_is_known() -> None:
    matrix = trained_rows(0)
    matrix[NEVER | UNUSED] = 0.0
    assert torch.equal(never_trained(chunks_of(matrix), None, True, LIVE, UNUSED), NEVER)


def test_refusals() -> None:
    matrix = chunks_of(trained_rows(0))
    with pytest.raises(ValueError, match="got neither"):
        never_trained(None, None, True, LIVE)
    with pytest.raises(ValueError, match=r"candidates has shape \(1500,\), known_unused \(3,\)"):
        never_trained(matrix, None, True, LIVE, mask_of(range(1), 3))
    for rows in (1400, 1600):
        with pytest.raises(ValueError, match=f"the masks have {rows} rows"):
            row_norms(matrix, rows)
        with pytest.raises(ValueError, match=f"the masks have {rows} rows"):
            unused_distances(matrix, mask_of(range(5), rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_example_base(tied: bool, dtype: torch.dtype) -> None:
    """The rows that pre-training left out are known; head and embedding were one matrix then and are two now."""
    weights = load_file(ASSETS / "model.safetensors")
    embedding, head = (
        chunks_of(weights[name].to(dtype), 512) for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    table = build_table(AutoTokenizer.from_pretrained(ASSETS), 8192)
    facts = json.loads((ASSETS / "base.json").read_text(encoding="utf-8"))
    truth = mask_of(torch.tensor(facts["never_trained"]), 8192)
    found = never_trained(embedding, None if tied else head, tied, table.live, table.padded | ~table.reachable)
    assert (found & truth).sum() >= 0.9 * truth.sum()
    assert (found & ~truth).sum() <= 5
    assert not never_trained(embedding, head, tied, table.live & ~truth, table.padded).any()
