from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="session")
def changed_assets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Tensor], None]], Path]:
    """Makes copies of the embedded base whose output rows are changed in place."""

    def make(change: Callable[[Tensor], None]) -> Path:
        folder = tmp_path_factory.mktemp("pair") / "tuned"
        shutil.copytree(ASSETS, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors["lm_head.weight"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
