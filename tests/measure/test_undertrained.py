from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from vocabguard.measure.chunks import Chunks
from vocabguard.measure.undertrained import never_trained, row_norms, unused_distances
from vocabguard.measure.unused import known_unused, not_measured
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS, WIDTH = 1500, 48


def chunks_of(matrix: Tensor, size: int = 97) -> Chunks:
    return lambda: ((slice(i, min(i + size, len(matrix))), matrix[i : i + size]) for i in range(0, len(matrix), size))


def mask_of(ids: Tensor | range | list[int], rows: int = ROWS) -> Tensor:
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


NOBODY = mask_of([])
RESERVED, CONTROL = mask_of(range(1400, 1430)), mask_of(range(1400, 1450))
"""Thirty reserved tokens by name, and twenty other control tokens."""


def known(rows: Tensor, reserved: Tensor = NOBODY, control: Tensor = CONTROL, idle: Tensor = NOBODY) -> set[int]:
    found = known_unused(chunks_of(rows), idle, reserved, control)
    assert torch.equal(found, known_unused(chunks_of(rows, ROWS), idle, reserved, control))
    return set(found.nonzero().flatten().tolist())


def alike(rows: Tensor, which: Tensor, seed: int, noise: float = 0.003) -> Tensor:
    """The rows, with `which` replaced by one direction up to rounding."""
    draw = torch.Generator().manual_seed(seed)
    direction = 3 * torch.randn(WIDTH, generator=draw)
    return torch.where(which[:, None], direction + noise * torch.randn(len(rows), WIDTH, generator=draw), rows)


def turned(row: Tensor, cosine: float) -> Tensor:
    """A row of the same length at a cosine to it."""
    side = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    side -= (side @ row) / (row @ row) * row
    return row * cosine + side / side.norm() * row.norm() * math.sqrt(1 - cosine**2)


@pytest.mark.parametrize("seed", range(3))
def test_reserved_rows_that_were_trained_are_not_known_as_unused(seed: int) -> None:
    """As in Gemma 3, where a third of the reserved rows is unlike the others."""
    rows = alike(trained_rows(seed), mask_of(range(1400, 1420)), seed + 1)
    assert known(rows, RESERVED) == set(range(1400, 1420))
    rows[[100, 101, 102]] = rows[1400] + 0.003
    assert never_trained(chunks_of(rows), None, True, ~CONTROL, mask_of(range(1400, 1420)))[[100, 101, 102]].all()


@pytest.mark.parametrize("seed", range(3))
def test_control_tokens_are_known_by_their_rows(seed: int) -> None:
    """As in SmolLM2, where no name says so, and the trained chat markers are at cosines of 0.991 and 0.993."""
    rows = alike(trained_rows(seed), mask_of(range(1402, 1411)), seed + 1)
    rows[1400], rows[1401] = turned(rows[1402], 0.993), turned(rows[1402], 0.991)
    rows[1402:1406] *= 1.05
    assert known(rows) == set(range(1402, 1411))
    rows[7], rows[8] = turned(rows[1402], 0.99), turned(rows[1402], 0.8)
    unused = known_unused(chunks_of(rows), NOBODY, NOBODY, CONTROL)
    found = never_trained(chunks_of(rows), None, True, ~CONTROL, unused)
    assert found.nonzero().flatten().tolist() == [7], "hardly further from the unused rows than they from each other"


def test_chat_markers_that_share_a_reserved_name_stay_out() -> None:
    rows = alike(trained_rows(0), RESERVED, 1)
    rows[1404] = turned(rows[1405], 0.993)
    assert known(rows, RESERVED) == set(range(1400, 1430)) - {1404}


def test_trained_control_rows_are_not_known_as_unused() -> None:
    rows = trained_rows(0)
    assert known(rows) == set()
    assert known(alike(rows, mask_of(range(1400, 1403)), 1)) == set(), "three may be alike by another reason"
    assert known(rows, control=NOBODY) == set()
    assert known(rows, idle=UNUSED, control=NOBODY) == set(UNUSED.nonzero().flatten().tolist())
    assert known(alike(rows, RESERVED, 1), RESERVED, idle=mask_of(range(3))) == {0, 1, 2, *range(1400, 1430)}
    rows[1400:1450] = math.nan
    rows[1420:1430] = 0.0
    assert known(rows, RESERVED) == set()


def test_reserved_rows_as_initialised_are_known_by_name() -> None:
    """Nothing is alike there, but a row of another norm was trained."""
    rows = small(trained_rows(0), RESERVED, 1)
    rows[1403] = 1.0
    assert known(rows, RESERVED) == set(range(1400, 1430)) - {1403}


def test_too_few_unused_rows_are_said() -> None:
    assert not_measured(UNUSED) is None
    assert not_measured(NOBODY) == "no row is known to be unused, 4 are needed"
    assert not_measured(mask_of(range(1))) == "1 row is known to be unused, 4 are needed"
    assert not_measured(mask_of(range(3))) == "3 rows are known to be unused, 4 are needed"


def test_first_component_of_many_rows_is_exact() -> None:
    matrix = torch.cat([trained_rows(seed) for seed in range(4)])
    unused = mask_of(range(20), len(matrix))
    found, naive = unused_distances(chunks_of(matrix), unused), naive_distances(matrix, unused)
    torch.testing.assert_close(found, naive, atol=2e-5, rtol=0)


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
    unused = known_unused(head, table.idle, table.reserved, table.control)
    names = {table.text(i) for i in (unused & table.control).nonzero().flatten().tolist()}
    assert names == {"<|pad|>", "<|system|>", "<|tool_call|>", "<|tool_result|>", "<|fim|>"}
    for known in (unused, table.idle):
        found = never_trained(embedding, None if tied else head, tied, table.live, known)
        assert torch.equal(found, truth & table.live)
    assert (found & truth).sum() >= 0.9 * truth.sum()
    assert (found & ~truth).sum() <= 5
    assert not never_trained(embedding, head, tied, table.live & ~truth, table.padded).any()
