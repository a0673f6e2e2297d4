"""The benchmarks are scripts: they import their neighbours as scripts do, so pytest leaves them alone."""

from pathlib import Path

collect_ignore = ["real", *(p.name for p in Path(__file__).parent.glob("*.py") if not p.name.startswith("test_"))]
