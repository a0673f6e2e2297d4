from __future__ import annotations

import copy
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import checkpoint_kit
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from vocabguard.cli.common import ways_of_asking
from vocabguard.cli.explain import show_story
from vocabguard.compare import explain
from vocabguard.compare.explain import (
    LOST,
    Emission,
    Sides,
    TokenRow,
    asks_of,
    cut_of,
    emissions,
    judge,
    neighbours,
    story,
    token_row,
)
from vocabguard.compare.models import load_model
from vocabguard.compare.scan import Scan, scan
from vocabguard.measure.probe import probe
from vocabguard.results import NotApplicable
from vocabguard.rows.checkpoints import open_checkpoint

TURNED = 3497


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base whose output row of one token was turned away, and one input row scaled."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        head = tensors["lm_head.weight"]
        head[TURNED] = 0.3 * head[TURNED] + 0.2 * torch.randn(128, generator=generator)
        tensors["model.embed_tokens.weight"][20] *= 2

    folder: Path = checkpoint_kit.assets_with(tmp_path_factory.mktemp("explain") / "tuned", change)
    return folder


@pytest.fixture(scope="module")
def found(tuned: Path, tokenizer: Any) -> Scan:
    base = open_checkpoint(Path(__file__).parents[2] / "examples" / "assets")
    return scan(base, open_checkpoint(tuned), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pair(found: Scan) -> Sides:
    return Sides.of(found, (load_model(found.base.path), load_model(found.tuned.path)))


def ways(pair: Sides, tokenizer: Any) -> list[Any]:
    assert pair.base_model is not None
    return list(asks_of(pair.base_model, pair.scan, ways_of_asking(tokenizer)))


def weight(path: Path, name: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    found: Tensor = getattr(model, f"get_{'output' if name == 'head' else 'input'}_embeddings")().weight.detach()
    return found


@pytest.mark.parametrize("token", [TURNED, 20, 5000])
def test_row_in_numbers_against_naive(found: Scan, pair: Sides, kit: Any, token: int) -> None:
    facts = token_row(found, "head", pair.base["head"], token)
    assert isinstance(facts, TokenRow)
    base, now = (weight(path, "head") for path in (found.base.path, found.tuned.path))
    cosine, live = checkpoint_kit.naive_cosine(now, base), found.live
    assert facts.cosine == pytest.approx(float(cosine[token]), abs=1e-6)
    if token == TURNED:
        assert facts.cosine_rank == 0
        assert facts.l2_rank == 0
    assert facts.norm_ratio == pytest.approx(float(now[token].norm() / base[token].norm()), rel=1e-5)
    smaller = (base[live].double().norm(dim=1) < base[token].double().norm()).double().mean()
    assert facts.base_norm_quantile == pytest.approx(float(smaller), abs=2e-4)
    assert facts.live == 8014


def test_neighbours_against_naive(found: Scan, pair: Sides) -> None:
    rows = pair.base["head"]
    assert not isinstance(rows, NotApplicable)
    near = neighbours(rows, found, TURNED, 12)
    base = weight(found.base.path, "head").double()
    cosine = torch.nn.functional.cosine_similarity(base, base[TURNED][None])
    cosine[TURNED], cosine[found.table.padded] = -2, -2
    assert [one.id for one in near] == cosine.topk(12).indices.tolist()
    assert [one.cosine for one in near] == pytest.approx(cosine.topk(12).values.tolist(), abs=1e-6)
    for one in near:
        other, own = found.table.group_of(one.id), found.table.group_of(TURNED)
        assert one.intruder is (other != own and other not in ("digits_punctuation", "code"))


def test_a_control_token_is_an_intruder(found: Scan) -> None:
    rows = torch.randn(8192, 4, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[TURNED]
    from vocabguard.rows.baselines import CopiedBaseline

    first = neighbours(CopiedBaseline(rows), found, TURNED, 1)[0]
    assert (first.id, first.category, first.intruder) == (3, "control", True)


def test_emission_is_the_probe_s(found: Scan, pair: Sides, tokenizer: Any) -> None:
    contexts = ways(pair, tokenizer)
    assert pair.tuned_model is not None
    told = emissions(pair.tuned_model, found, [TURNED, 5000], contexts)
    live = found.live.nonzero().flatten()
    ids = torch.unique(torch.cat([torch.tensor([TURNED, 5000]), live[torch.linspace(0, len(live) - 1, 64).long()]]))
    naive = probe(pair.tuned_model, ids, contexts, seed=0, batch_tokens=512)
    for token in (TURNED, 5000):
        row = ids.tolist().index(token)
        assert told[token].contexts == pytest.approx(float(naive.emitted[row].float().mean()))
        assert told[token].probability == pytest.approx(float(naive.probability[row].mean()), abs=1e-5)
    assert told[TURNED].instead is not None


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_models_are_asked_and_left_as_they_were(pair: Sides, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair.tuned_model
    assert model is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    contexts = ways(pair, tokenizer)
    story(pair, tokenizer, TURNED, contexts)
    asked: list[int] = []

    def fails(asked_model: Any, *rest: Any) -> Any:
        asked.append(hooks_of(asked_model))
        if len(asked) == 3:  # with a row put back
            raise RuntimeError
        return emissions(asked_model, *rest)

    monkeypatch.setattr(explain, "emissions", fails)
    with pytest.raises(RuntimeError):
        story(pair, tokenizer, TURNED, contexts)
    assert asked == [0, 0, 1]
    assert hooks_of(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_back_are_rows_written_into_the_model(
    pair: Sides, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """What a token comes back with is what a copy of the model says into which the base's rows were written."""
    model: Any = copy.deepcopy(pair.tuned_model)
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if tied:
        head.weight = inputs.weight = torch.nn.Parameter(head.weight.detach().clone())
    scan = replace(pair.scan, tuned=replace(pair.scan.tuned, tied=tied))
    told: list[Emission] = []

    def said(asked_model: Any, *rest: Any) -> dict[int, Emission]:
        told.append(emissions(asked_model, *rest)[TURNED])
        # Lost, and not back with the output row alone: so that all there is to ask is asked.
        return {TURNED: Emission(len(told) == 1, len(told) > 1, 0.0, 0.0, None)}

    monkeypatch.setattr(explain, "emissions", said)
    contexts = ways(pair, tokenizer)
    story(replace(pair, scan=scan, tuned_model=model), tokenizer, TURNED, contexts)
    expected = []
    with torch.no_grad():
        for module, name in ((head, "head"), (inputs, "embedding"))[: 1 if tied else 2]:
            rows: Any = pair.base[name]  # type: ignore[index]
            module.weight[TURNED] = rows.chunk(slice(TURNED, TURNED + 1))[0]
            expected.append(emissions(model, scan, [TURNED], contexts)[TURNED])
    assert len(told[2:]) == len(expected)
    for one, other in zip(told[2:], expected, strict=True):
        assert (one.said, one.contexts, one.instead) == (other.said, other.contexts, other.instead)
        assert one.probability == pytest.approx(other.probability, rel=1e-4)


def test_story_of_a_token_lost_in_the_head(pair: Sides, tokenizer: Any) -> None:
    told = story(pair, tokenizer, TURNED, ways(pair, tokenizer))
    json.dumps(told)
    assert told["kind"] == "lost_in_head"
    assert told["emission"]["then"]["said"]
    assert not told["emission"]["now"]["said"]
    assert told["emission"]["head_row_back"]["said"]
    assert told["cut"]["one_id"]
    assert told["trained"]["trained"]
    assert 0 <= told["trained"]["input_norm_quantile"] <= 1
    assert 0 <= told["trained"]["distance_to_unused"] <= 2
    assert len(told["neighbours"]["then"]) == len(told["neighbours"]["now"]) == 8


def test_story_of_a_token_that_is_fine(pair: Sides, tokenizer: Any) -> None:
    told = story(pair, tokenizer, 5000, ways(pair, tokenizer))
    assert told["kind"] == "fine"
    assert told["emission"].keys() == {"then", "now"}


def test_distance_to_unused_rows_is_not_measured_without_such_rows(pair: Sides, tokenizer: Any) -> None:
    scan = replace(pair.scan, unused=torch.zeros_like(pair.scan.unused))
    alone = replace(pair, scan=scan, base_model=None, tuned_model=None, no_models="not asked here")
    told = story(alone, tokenizer, 5000, [])
    assert told["trained"]["distance_not_measured"] == "no row is known to be unused, 4 are needed"
    assert "distance_to_unused" not in told["trained"]
    said = StringIO()
    show_story(Console(file=said, width=200), told)
    assert "distance to unused rows not measured: no row is known to be unused" in said.getvalue()


def test_cut_of_a_token_that_text_does_not_give(tokenizer: Any) -> None:
    assert not cut_of(tokenizer, tokenizer.decode([5000]) * 3, 5000)["round_trip"]


def test_every_diagnosis(found: Scan) -> None:
    facts = {"cosine_rank": 0, "residual": 1.0, "l2": 0.0, "l2_rank": 0, "norm_ratio": 1.0, "base_norm": 1.0}
    rest = {"base_norm_quantile": 0.5, "live": 9}

    def of(cosine: float, token: int = 5000, **asked: bool) -> str:
        row = TokenRow(cosine=cosine, **facts, **rest)  # type: ignore[arg-type]
        emission = {key: Emission(said, not said, 0.0, 0.0, None) for key, said in asked.items()}
        return judge(found, token, {"head": row, "embedding": row}, emission)

    assert of(0.99) == "kept"
    assert of(0.5) == "drifted"
    assert of(0.99, then=True, now=True) == "fine"
    assert of(0.5, then=True, now=True) == "said_but_drifted"
    assert of(0.5, then=False, now=False) == "never_said"
    assert of(0.5, then=True, now=False, head_row_back=True) == "lost_in_head"
    assert of(0.5, then=True, now=False, head_row_back=False, both_rows_back=True) == "lost_in_rows"
    assert of(0.5, then=True, now=False, head_row_back=False, both_rows_back=False) == "lost_in_body"
    assert of(0.5, token=3) == "not_live"
    assert of(0.5, token=8191) == "not_live"
    assert of(0.5, token=int((~found.table.trained).nonzero()[0])) == "never_trained"
    assert {"lost_in_head", "drifted"} <= LOST


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path)
