from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vocabguard.compare.summary import load_scan
from vocabguard.vocabulary.labels import label_of

Run = Callable[..., int]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def tuned(changed_assets: Any) -> Path:
    """The embedded base with 200 head rows turned."""

    def change(head: Tensor) -> None:
        head[1000:1200] += torch.randn(200, 128, generator=torch.Generator().manual_seed(0))

    return changed_assets(change)


def test_json_and_file(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    out = tmp_path / "rows.safetensors"
    assert run("scan", ASSETS, tuned, "--json", "--out", out) == 1
    told = json.loads(capsys.readouterr().out)
    assert {"cosine_mean", "cosine_min", "residual_p01", "below_0.95", "below_0.90", "groups"} <= told["head"].keys()
    assert told["embedding"]["below_0.95"] == 0
    assert 0.02 < told["head"]["below_0.95"] < 0.03
    assert len(told["worst"]) == 20
    assert all(1000 <= token["id"] < 1200 for token in told["worst"])
    assert told["findings"] is True
    told.pop("seconds")  # which the file leaves out: the same command writes the same bytes
    assert load_scan(out)[1] == told


def test_tables(tuned: Path, run: Run, capsys: Any) -> None:
    assert run("scan", ASSETS, tuned, "--threshold", "0.05", "--top", "3") == 0
    said = capsys.readouterr().out
    assert "8,014 live output rows are below cosine 0.95" in said
    named = "Never trained at the base: ␣парол, ␣geomet, "
    for word in ("Cyrillic", "input embedding", "worst live tokens", "L2 0 |", "every live row is where it was", named):
        assert word in said


@pytest.mark.parametrize("columns", [200, 80, 60, 40])
def test_cells_are_whole_in_a_narrow_terminal(
    tuned: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run("scan", ASSETS, tuned, "--json", "--top", "3")
    told = json.loads(capsys.readouterr().out)
    run("scan", ASSETS, tuned, "--top", "3")
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(" ")]
    assert max(map(len, table)) <= columns
    rows = [line.split() for line in table]
    for name, part in told["head"]["groups"].items():
        first = label_of(name).split()[0]  # of two words the second may go to the next line
        row = next(row for row in rows if row and row[0] == first)
        assert f"{part['cosine_mean']:.4f}" in row
        assert row.count("%") >= 1
    for token in told["worst"]:
        row = next(row for row in rows if row and row[0] == str(token["id"]))
        assert f"{token['cosine']:.4f}" in row
        if columns > 40:
            assert f"{token['residual']:.4f}" in row
    assert any("norm ratio" in line for line in lines) == (columns >= 80)


def test_a_tied_pair_has_one_table(run: Run, tmp_path: Path, capsys: Any) -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for name, moved in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        changed = rows.clone()
        changed[:8] += moved * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        save_file({"model.embed_tokens.weight": changed}, tmp_path / name / "model.safetensors")
    run("scan", tmp_path / "base", tmp_path / "tuned")
    said = capsys.readouterr().out
    assert "Tied in the base and the tuned" in said
    assert said.count("residual p01") == 1
    assert "\nhead = input embedding (tied)\n" in said
    worst = said[said.index("worst live tokens") :].splitlines()[2].split()
    assert worst == ["id", "token", "category", "cosine", "residual", "L2", "norm", "ratio"]


def test_no_unused_rows_to_compare_with(tuned: Path, run: Run, capsys: Any) -> None:
    files = (ASSETS / "model.safetensors", tuned / "model.safetensors")
    run("scan", *files)
    said = "Under-trained tokens not measured: no row is known to be unused, 4 are needed; only rows of tiny norm"
    assert said in " ".join(capsys.readouterr().out.split())
    run("scan", ASSETS, tuned, "--json")
    untrained = json.loads(capsys.readouterr().out)["untrained"]
    assert (untrained["known_unused"], untrained["not_measured"]) == (143, None)


def test_without_a_tokenizer(tuned: Path, run: Run, capsys: Any) -> None:
    files = (ASSETS / "model.safetensors", tuned / "model.safetensors")
    assert run("scan", *files, "--json") == 1
    assert json.loads(capsys.readouterr().out)["head"]["groups"].keys() == {"other"}
    run("scan", *files, "--json", "--tokenizer", ASSETS)
    assert "ja" in json.loads(capsys.readouterr().out)["head"]["groups"]


def test_adapter_that_touches_neither(tmp_path: Path, run: Run, capsys: Any) -> None:
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    assert run("scan", ASSETS, tmp_path) == 0
    assert "Not applicable: the adapter leaves the output rows as they are" in capsys.readouterr().out
    assert run("scan", ASSETS, tmp_path, "--json") == 0
    assert "leaves the output rows" in json.loads(capsys.readouterr().out)["head"]["not_applicable"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--coverage", "nothing"), "nothing: not found"),
        (("--coverage", "a", "--run", "b"), "one source of counts"),
        (("--run", "."), "is not a run folder"),
        (("--tokenizer", "."), "no tokenizer in this folder"),
        (("--head", "x"), "no tensor 'x' for --head"),
        (("--out", "no/where.safetensors"), "does not exist"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], said: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("scan", ASSETS, ASSETS, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err


def test_a_row_that_grew_is_not_where_it_was(changed_assets: Any, run: Run, capsys: Any) -> None:
    """Its cosine is 1, and it drowns all others."""

    def grow(head: Tensor) -> None:
        head[300] *= 12

    assert run("scan", ASSETS, changed_assets(grow), "--no-body") == 0
    said = capsys.readouterr().out
    assert "the norm of 1 live output row doubled or halved: " in said
    assert "(12 times)" in said
    assert "every live row is where it was" not in said.partition("input embedding")[0]
