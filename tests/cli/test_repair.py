from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Run = Callable[..., int]
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def tuned(changed_assets: Any) -> Path:
    def change(head: Tensor) -> None:
        head[2000:2300] += 0.5 * torch.randn(300, 128, generator=torch.Generator().manual_seed(0))

    return changed_assets(change)


def test_json_and_words(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How are you? I am fine, thank you.", encoding="utf-8")
    options = ("--sample", 300, "--text", text)
    assert run("repair", ASSETS, tuned, "--out", tmp_path / "one", *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "shift"
    assert 250 <= told["rows"] <= 300
    assert told["recall"]["repaired"] > told["recall"]["tuned"]
    assert told["loss"].keys() == {"base", "tuned", "repaired"}
    assert told["recall"]["change_low"] > 0
    assert told["recall"]["returned_low"] <= told["recall"]["returned"] <= told["recall"]["returned_high"]
    assert told["loss_change"]["repaired_from_tuned"]["low"] is None, "one window has no interval"
    changes, loss = told["reference"]["loss_change"], told["reference"]["loss"]
    for pair in ("tuned_from_base", "repaired_from_base", "repaired_from_tuned"):
        later, earlier = pair.split("_from_")
        assert changes[pair]["mean"] == pytest.approx(loss[later] - loss[earlier], abs=1e-4)
        assert changes[pair]["low"] < changes[pair]["mean"] < changes[pair]["high"]
    assert changes["tuned_from_base"]["low"] > 0 > changes["repaired_from_tuned"]["high"]
    assert run("repair", ASSETS, tuned, "--out", tmp_path / "two", *options, "--method", "rows") == 0
    said = capsys.readouterr().out
    assert "output rows replaced (live rows with cosine below 0.95; method rows)" in said
    assert "100 % of the loss returned" in said
    assert "loss of natural text (" in said
    assert "loss on the text: tuned" in said


def test_the_method_is_chosen_by_what_was_lost(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    """Rows that turned are put back; of a damaged layer no row brings anything back, so data to train on is needed."""
    auto = ("--method", "auto", "--sample", "256", "--json")
    assert run("repair", ASSETS, tuned, "--out", tmp_path / "rows", *auto) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == told["choice"]["method"] == "shift"
    where = told["choice"]["where"]
    # The turned rows are so long that they drown the others.
    assert 2 * (where["head"] + where["other_rows"]) >= where["forgotten"] > 0
    assert told["recall"]["tuned_low"] <= told["recall"]["tuned"] < told["recall"]["tuned_high"]
    assert told["recall"]["repaired_low"] > told["recall"]["tuned_high"]
    shutil.copytree(ASSETS, tmp_path / "body")
    tensors = load_file(tmp_path / "body" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith("layers.0.mlp.down_proj.weight"):
            tensors[name] = 2 * tensors[name].std() * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tmp_path / "body" / "model.safetensors", metadata={"format": "pt"})
    assert run("repair", ASSETS, tmp_path / "body", "--out", tmp_path / "echoed", *auto) == 2
    said = capsys.readouterr().err
    assert "lost in the body" in said
    assert "--method auto needs --data FILE here" in said
    assert not (tmp_path / "echoed").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["auto", "echo"])
def test_an_adapter_under_a_frozen_head_is_repaired_as_an_adapter(
    method: str, tmp_path: Path, run: Run, capsys: Any
) -> None:
    """Its rows stand still and nothing can be put back: it is trained on, and neither base nor configuration change."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(ASSETS),
        peft.LoraConfig(r=8, target_modules=["down_proj", "o_proj"], base_model_name_or_path=str(ASSETS)),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.7 * torch.randn(weight.shape, generator=generator))
    adapter, out, data = tmp_path / "adapter", tmp_path / "out", tmp_path / "chats.jsonl"
    model.save_pretrained(adapter)
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine, thank you."}]
    data.write_text((json.dumps({"messages": chat}) + "\n") * 40, encoding="utf-8")
    before = {path.name: path.read_bytes() for folder in (adapter, ASSETS) for path in folder.iterdir()}
    options = ("--sample", 256, "--text-tokens", 512)
    for rows in ("shift", "rows"):
        assert run("repair", ASSETS, adapter, "--out", out, "--method", rows) == 2
        said = capsys.readouterr().err
        assert "leaves the output rows as they are" in said
        assert "allowed: --method echo or auto" in said
    if method == "auto":
        assert run("repair", ASSETS, adapter, "--out", out, "--method", "auto", *options) == 2
        assert "needs --data FILE here" in capsys.readouterr().err
    assert not out.exists()
    line = ("--method", method, "--data", data, "--targets", 4, "--learning-rate", 1e-3, *options, "--json")
    assert run("repair", ASSETS, adapter, "--out", out, *line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == told["choice"]["method"] == "echo"
    assert "trained on as an adapter" in told["choice"]["because"]
    assert told["chosen_by"] == "tokens that the probe found lost"
    low, share, high = (told["choice"]["rows_bring_back"][place] for place in (1, 0, 2))
    assert low <= share < 0.5
    assert share < high
    assert {path.name: path.read_bytes() for folder in (adapter, ASSETS) for path in folder.iterdir()} == before
    assert {path.name for path in out.iterdir()} == {path.name for path in adapter.iterdir()}
    assert (out / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out))
    assert {name: (part.shape, part.dtype) for name, part in one.items()} == {
        name: (part.shape, part.dtype) for name, part in other.items()
    }
    assert any(not torch.equal(one[name], other[name]) for name in one)
    recall = told["recall"]
    assert recall["tuned"] < 0.9
    assert recall["change_low"] > 0
    # What was written is what was measured.
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ASSETS), str(out))
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_without_asking(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    assert run("repair", ASSETS, tuned, "--out", tmp_path / "out", "--no-ask", "--cosine-below", "-1") == 0
    assert "Not measured" in capsys.readouterr().out
    one, other = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_echo_trains_all_but_the_input_rows(tuned: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    """Lost tokens are echoed as often as asked, come back, and neither the inputs nor the input rows change."""
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine, thank you."}]
    data, out = tmp_path / "chats.jsonl", tmp_path / "out"
    data.write_text((json.dumps({"messages": chat}) + "\n") * 40, encoding="utf-8")
    before = {path.name: path.read_bytes() for path in tuned.iterdir()}
    options = ("--method", "echo", "--data", data, "--sample", 300, "--json")
    assert run("repair", ASSETS, tuned, "--out", out, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert {path.name: path.read_bytes() for path in tuned.iterdir()} == before
    echo, recall = told["echo"], told["recall"]
    assert abs(echo["echo_targets"] - 2 * told["rows"]) <= 16  # whole lists
    assert echo["steps"] >= 30
    assert echo["input_embedding"] == "unchanged"
    assert recall["repaired"] > recall["tuned"]
    one, other = (load_file(folder / "model.safetensors") for folder in (tuned, out))
    assert one.keys() == other.keys()
    assert torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert not torch.equal(one["model.norm.weight"], other["model.norm.weight"])
    assert {path.name for path in out.iterdir()} == before.keys()


@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        (True, torch.bfloat16),
        pytest.param(True, torch.float32, marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_echo_of_tied_and_bfloat16_models(
    tmp_path: Path, run: Run, capsys: Any, tied: bool, dtype: torch.dtype
) -> None:
    """What comes out is tied and of the dtype that went in, and its rows are near the base's again."""
    for name in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(ASSETS)
        if tied:
            model.model.embed_tokens.weight = model.lm_head.weight
            model.config.tie_word_embeddings = True
        with torch.no_grad():
            if name == "tuned":
                generator = torch.Generator().manual_seed(0)
                model.lm_head.weight[2000:2300] += 0.5 * torch.randn(300, 128, generator=generator)
        model.to(dtype).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(ASSETS).save_pretrained(tmp_path / name)
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine, thank you."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40, encoding="utf-8")
    out = tmp_path / "out"
    options = ("--method", "echo", "--data", tmp_path / "chats.jsonl", "--no-ask", "--json")
    assert run("repair", tmp_path / "base", tmp_path / "tuned", "--out", out, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert 250 <= told["rows"] <= 300
    assert told["echo"]["input_embedding"].startswith("shared" if tied else "unchanged")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "tuned", out))
    assert one.keys() == other.keys()
    assert ("lm_head.weight" in one) != tied
    assert {tensor.dtype for tensor in other.values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"]) != tied
    run("scan", tmp_path / "base", out, "--json", "--top", 0)
    after = json.loads(capsys.readouterr().out)["head"]["cosine_min"]
    run("scan", tmp_path / "base", tmp_path / "tuned", "--json", "--top", 0)
    before = json.loads(capsys.readouterr().out)["head"]["cosine_min"]
    assert before < 0.5
    assert after > 0.8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "full"), "not an empty folder"),
        (("--out", "new", "--method", "magic"), "allowed: shift, rows, echo"),
        (("--out", "new", "--method", "echo"), "needs --data FILE"),
        (("--out", "new", "--data", "none.jsonl"), "only echo takes it"),
        (("--out", "new", "--method", "echo", "--data", "none.jsonl"), "none.jsonl: not found"),
        (("--out", "new", "--text", "none.txt"), "none.txt: not found"),
        (("--out", "new", "--coverage", "none.json"), "none.json: not found"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], said: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert run("repair", ASSETS, ASSETS, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err
    assert not (tmp_path / "new").exists()
