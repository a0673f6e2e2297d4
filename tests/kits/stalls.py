"""An accelerator that every machine has, and what the package's code does to it: waits of the host, and transfers.

Its tensors say that they are on another device and keep their values in a tensor of the CPU. Every operation on them
passes through `Accelerator`, which notes those whose result the host must know, and every copy between the two.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import vocabguard

KIND = "lazy"
"""A kind of device that torch knows on every machine; its own tensors are never made here."""

WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount",
}  # fmt: skip
"""Operations whose result, or whose result's shape, the host must know."""


class There(Tensor):
    """A tensor on the accelerator; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(KIND, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, _inner: Tensor) -> None:
        pass

    def __repr__(self, **_options: Any) -> str:
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inner_args, inner_kwargs = tree_map_only(There, lambda one: one.inner, (args, kwargs))
    to = kwargs.get("device")
    found = func(*inner_args, **(inner_kwargs if to is None else {**inner_kwargs, "device": "cpu"}))
    if func.overloadpacket.__name__ in ("copy_", "set_"):
        return args[0]
    if not (_is_there(to) if to is not None else any(isinstance(one, There) for one in tree_leaves((args, kwargs)))):
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, There, found))


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == KIND


_PACKAGE = Path(vocabguard.__file__).parent
# Not by name: an environment may lie in a clone that is called as the package is.
_OURS = (f"{_PACKAGE}/", f"{(_PACKAGE / 'integrations').resolve()}/")


class Accelerator(TorchDispatchMode):
    """While it is entered, tensors can be made on the accelerator; records what code of the package does to it.

    Attributes:
        waits: how often the host waits, by operation and line.
        moved: bytes, by direction (``down`` to the host, ``up`` from it), and line.
        launches: operations on the accelerator.
    """

    def __init__(self, ours: Callable[[str], bool] | None = None) -> None:
        super().__init__()
        self.clear()
        self._ours = ours or (lambda file: file.startswith(_OURS))

    def clear(self) -> None:
        """Forget what was recorded."""
        self.waits: Counter[str] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(one.device.type == KIND and not isinstance(one, There) for one in given):
            # Numbers of the host made into a tensor, as `torch.tensor([...], device=...)` does: they are sent.
            assert func.overloadpacket.__name__ == "lift_fresh", func
            if (line := self._line()) is not None:
                self.moved["up", line] += given[0].numel() * given[0].element_size()
            return There(given[0].cpu())
        there = any(isinstance(one, There) for one in given)
        if not there and not _is_there(kwargs.get("device")):
            return func(*args, **kwargs)
        if (line := self._line()) is not None:
            self._note(func.overloadpacket.__name__, args, kwargs, line, there=there)
        return _run(func, args, kwargs)

    def _note(self, name: str, args: Any, kwargs: dict[str, Any], line: str, *, there: bool) -> None:
        self.launches += there
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if there and (name in WAITS or masked):
            self.waits[f"{name} at {line}"] += 1
        source, target = None, None
        if name == "copy_":
            source, target = args[1], isinstance(args[0], There)
        elif kwargs.get("device") is not None and args and isinstance(args[0], Tensor):
            source, target = args[0], _is_there(kwargs["device"])
        if source is not None and target is not isinstance(source, There) and name in ("copy_", "_to_copy"):
            # A number is sent with the operation itself.
            if target and source.ndim == 0 and name == "copy_":
                return
            self.moved["up" if target else "down", line] += source.numel() * source.element_size()

    def _line(self) -> str | None:
        """The innermost line of ours that is at work; None where there is none."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if self._ours(file):
                line = linecache.getline(file, frame.f_lineno).strip()
                return f"{file.split('/vocabguard/')[-1]}:{frame.f_lineno} {line}"
            frame = frame.f_back
        return None

    def bytes(self, way: str) -> int:
        """Bytes moved ``up`` or ``down``."""
        return sum(count for (direction, _), count in self.moved.items() if direction == way)


@contextlib.contextmanager
def accelerator(ours: Callable[[str], bool] | None = None) -> Iterator[Accelerator]:
    """The accelerator, in use; models come to it by `moved`."""
    from torch._lazy import ts_backend

    with contextlib.suppress(RuntimeError):  # it is on already
        ts_backend.init()
    with Accelerator(ours) as mode:
        yield mode


def moved(model: nn.Module) -> Any:
    """A model, brought to the accelerator by new parameters; a Hugging Face one tied again."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        there: Any = model.to(KIND)
        there.tie_weights()
        return there
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
