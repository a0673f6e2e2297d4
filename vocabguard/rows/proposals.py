"""Which modules of a model that only torch knows look like its vocabulary matrices."""

from __future__ import annotations

from torch import Tensor, nn

from vocabguard.results import MatrixName
from vocabguard.rows.adapters import plain_module
from vocabguard.rows.models import unwrapped

_KINDS: dict[MatrixName, str] = {"head": "linear", "embedding": "embedding"}
_SHOWN = 3


def proposed(model: nn.Module, tokens: int | None = None) -> dict[MatrixName, dict[str, nn.Module]]:
    """Linear modules that may be the head and Embedding modules that may be the input rows, by their dotted names.

    Args:
        tokens: how many the tokenizer has, if known; a matrix may have more rows. Where there are both, a head has as
            many rows as an embedding: tables of positions and inner layers have no such partner.

    Example:
        >>> body = nn.ModuleDict({"words": nn.Embedding(50, 8), "places": nn.Embedding(16, 8), "out": nn.Linear(8, 50)})
        >>> {name: list(found) for name, found in proposed(body).items()}
        {'head': ['out'], 'embedding': ['words']}
    """
    named = dict(unwrapped(model).named_modules())
    found: dict[MatrixName, dict[str, nn.Module]] = {
        name: {path: one for path, one in named.items() if path and _rows(one) and kind in _kind(one).lower()}
        for name, kind in _KINDS.items()
    }
    heads, inputs = ({_rows(one) for one in found[name].values()} for name in ("head", "embedding"))
    if tokens:
        heads, inputs = ({size for size in sizes if size >= tokens} for sizes in (heads, inputs))
    # An inner layer may be wider than the vocabulary; it has no embedding of as many rows.
    both = heads & inputs
    fitting: dict[MatrixName, int | None] = {
        "head": (min if tokens else max)(both or (heads if tokens and not inputs else ()), default=None),
        "embedding": (min if tokens else max)(both or inputs, default=None),
    }
    return {
        name: {path: one for path, one in modules.items() if _rows(one) == fitting[name]}
        for name, modules in found.items()
    }


def proposal(model: nn.Module, names: tuple[MatrixName, ...], tokens: int | None = None) -> str:
    """What a user may set, in words; empty where no module looks like it.

    Example:
        >>> body = nn.ModuleDict({"words": nn.Embedding(50, 8), "out": nn.Linear(8, 50)})
        >>> proposal(body, ("head",))
        'matrices.head=out (Linear, 50 rows)'
    """
    found = proposed(model, tokens)
    said = []
    for name in names:
        shown = [f"{path} ({_kind(one)}, {_rows(one):,} rows)" for path, one in found[name].items()]
        if shown:
            said.append(f"matrices.{name}=" + " or ".join(shown[-_SHOWN:]))
    return ", ".join(said)


def _kind(module: nn.Module) -> str:
    return type(plain_module(module)).__name__


def _rows(module: nn.Module) -> int:
    weight = getattr(plain_module(module), "weight", None)
    matrix = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    return len(weight) if isinstance(weight, Tensor) and matrix else 0
