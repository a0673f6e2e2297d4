"""What costs nothing until it is used: imports, ``--help``, hooks; and what a missing package is answered with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vocabguard
from vocabguard.cli.app import COMMANDS

TOP = Path(__file__).parents[1]
HEAVY = (
    "torch", "transformers", "lightning", "pytorch_lightning", "tensorboard", "torchmetrics", "numpy", "pandas",
    "safetensors", "jinja2", "accelerate", "tokenizers", "datasets", "trl",
)  # fmt: skip
"""What neither ``import vocabguard`` nor the list of commands may import."""
SECONDS, MEGABYTES = 0.4, 60
COST = """
import json, resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "megabytes": peak / 1024, "modules": list(sys.modules)}),
      file=sys.stderr)
"""
CALL = """import sys; sys.argv = ['vocabguard', {0!r}]
from vocabguard.cli import main
try: main()
except SystemExit: pass
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VOCABGUARD")}
    paths = [environment.pop("first", ""), str(TOP)]
    inherited |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux shows it")
@pytest.mark.parametrize(
    ("code", "also"),
    [
        ("import vocabguard; dir(vocabguard); vocabguard.__version__", ("rich", "typer", "yaml", "omegaconf")),
        ("from vocabguard.integrations.launched import lightning_callbacks as f; assert f() == []", ("rich", "typer")),
        ("from vocabguard import ConfigError, RunLog, load_config; load_config('protect')", ("rich", "typer")),
        (CALL.format("--help"), ("yaml", "omegaconf")),
        (CALL.format("--version"), ("yaml", "omegaconf")),
        (CALL.format("run"), ()),
    ],
    ids=["import", "lightning's entry point", "settings and run folders", "--help", "--version", "run"],
)
def test_light(code: str, also: tuple[str, ...]) -> None:
    done = python(code + COST)
    told = json.loads(done.stderr.splitlines()[-1])
    assert [name for name in (*HEAVY, *also) if name in told["modules"]] == []
    assert told["seconds"] < SECONDS
    assert told["megabytes"] < MEGABYTES


def test_the_hook_costs_a_python_process_nothing() -> None:
    """``vocabguard run`` puts it into every Python below it: no module comes that is not of the standard library's."""
    modules = "import sys; print(*sorted(sys.modules))"
    hooked = python(modules, first=str(TOP / "integrations" / "hook"), VOCABGUARD="1", VOCABGUARD_REPORT="none")
    plain = python(modules)
    more = {name.split(".")[0] for name in set(hooked.stdout.split()) - set(plain.stdout.split())}
    assert more - {"sitecustomize"} <= set(sys.stdlib_module_names)
    assert "sitecustomize" in more


def test_all_names_are_there_though_none_is_imported() -> None:
    assert set(vocabguard.__all__) <= set(dir(vocabguard))
    assert all(hasattr(vocabguard, name) for name in vocabguard.__all__)
    done = python("import vocabguard; print(vocabguard.config.presets()); import vocabguard.x_y")
    assert "protect" in done.stdout
    assert "No module named 'vocabguard.x_y'" in done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vocabguard.nothing


def test_the_list_of_commands_names_their_modules() -> None:
    assert all((TOP / "vocabguard" / "cli" / f"{name}.py").is_file() for name in COMMANDS)


BLOCK = "import sys\nfor name in {0!r}: sys.modules[name] = None\n"
MODEL = """
import torch, warnings
from checkpoint_kit import llama
from vocabguard import VocabGuard
guard, model = VocabGuard(drift={"every_n_steps": 1}, probe={"enabled": False}, log={"console": False}), llama()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
guard.attach(model, optimizer, total_steps=1, run_dir=sys.argv[1] if len(sys.argv) > 1 else RUN)
ids = torch.arange(12).view(2, 6)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print(guard.step(1).step, guard.finish().folder)
"""


def test_who_uses_hugging_face_needs_no_lightning(tmp_path: Path) -> None:
    block = BLOCK.format(["lightning", "pytorch_lightning", "tensorboard", "torchmetrics"])
    use = "import vocabguard.integrations.huggingface\n" + MODEL.replace("RUN", repr(str(tmp_path / "run")))
    done = python(block + use, first=str(TOP / "tests" / "kits"))
    assert done.stdout.split() == ["1", str(tmp_path / "run")], done.stderr
    assert (
        "vocabguard's TensorBoard view needs tensorboard, which is not installed: pip install tensorboard"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("package", "code", "named"),
    [
        ("lightning", "import vocabguard.integrations.lightning", "vocabguard.integrations.lightning"),
        ("torchmetrics", "from vocabguard import TokenDrift", "vocabguard.measure.metrics"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(package: str, code: str, named: str) -> None:
    done = python(BLOCK.format([package]) + code)
    assert f"ModuleNotFoundError: {named} needs {package}, which is not installed: pip install {package}" in done.stderr
