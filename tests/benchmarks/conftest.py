"""The benchmarks are scripts: they import their neighbours as scripts do, so pytest leaves them alone."""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
