"""What is chosen when models are compared, asked or repaired: apart from the code, so that help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")
"""Numbers that a model can be loaded in."""

Method = Literal["shift", "rows"]
METHODS: tuple[Method, ...] = ("shift", "rows")
STRENGTH = 0.6
"""Part of the mean shift that ``shift`` adds; measured by ``tests/benchmarks/repair_quality.py``."""


@dataclass(frozen=True)
class Loading:
    """Where a model goes, and in which numbers.

    Attributes:
        device: of torch, such as ``cpu`` or ``cuda:1``; None is the CPU.
        device_map: ``auto`` and its like, which spread a model over all devices; instead of `device`.
        dtype: one of `DTYPES`, or ``auto``, as it is saved.
    """

    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device and --device-map are both given; allowed: one of them")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"--dtype is {self.dtype!r}; allowed: auto, {', '.join(DTYPES)}")
        allowed = ("auto", "balanced", "balanced_low_0", "sequential")
        if self.device_map is not None and self.device_map not in allowed:
            raise ValueError(f"--device-map is {self.device_map!r}; allowed: {', '.join(allowed)}")
        if self.device is not None:
            _require_device(self.device)

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes."""
        import torch

        found: dict[str, Any] = {"dtype": "auto" if self.dtype == "auto" else getattr(torch, self.dtype)}
        return found | ({} if self.device_map is None else {"device_map": self.device_map})


@dataclass(frozen=True)
class Bars:
    """From where on a finding counts; the low end of its interval must be above.

    Attributes:
        lost: share in [0, 1] of the tokens that the base repeats; of one side, of all that are asked for and not
            repeated. None judges no share.
        rise: nats a token by which natural text may have become harder.
        rare: the same of rare tokens over frequent ones, where the training data's counts are known.
    """

    lost: float | None = 0.02
    rise: float = 0.1
    rare: float = 0.4


def _require_device(name: str) -> None:
    """Refuse what is no device, or one that is not there.

    Raises:
        ValueError: with what there is.
    """
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if torch.xpu.is_available():
        there += ["xpu", *(f"xpu:{number}" for number in range(torch.xpu.device_count()))]
    if name not in there:
        raise ValueError(f"--device is {name!r}; allowed here: {', '.join(there)}")
