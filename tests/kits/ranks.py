"""Scripts run in processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_together(
    script: str, *arguments: object, count: int = 2, timeout: float = 300, killed: bool = False,
    python: str = sys.executable, paths: Sequence[Path] = (), environment: Mapping[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """Run a script in some processes, several with the environment that ``torchrun`` gives.

    Args:
        script: name of a file of `tests/processes`.
        *arguments: of the script, the same for all.
        count: of processes.
        timeout: seconds for all; what hangs is killed, and the test fails.
        killed: whether they are expected to end by SIGKILL.
        python: that runs it.
        paths: of packages, besides.
        environment: variables besides.

    Returns:
        What each process printed, errors included.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = [path for path in [*map(str, paths), os.environ.get("PYTHONPATH")] if path]
    rooms = os.pathsep.join([*(str(TESTS / room) for room in ("integrations", "guard", "processes")), *known])
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": rooms} | dict(environment or {})
    if count > 1:
        size, address = str(count), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, **address}
    ranks = [
        subprocess.Popen(
            [python, str(TESTS / "processes" / script), *map(str, arguments)],
            env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    assert all(code == -9 for code in codes) if killed else codes == [0] * count, "\n".join([*said, str(codes)])[-6000:]
    return said
