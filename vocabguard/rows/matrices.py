"""Where a model keeps its vocabulary rows, and how to read them chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.adapters import AdaptedRows, adapter_of, plain_module, plain_name
from vocabguard.rows.models import text_config_of, unwrapped
from vocabguard.rows.proposals import proposal
from vocabguard.rows.sharding import Shard, local_rows, shard_of

_GETTERS: dict[MatrixName, str] = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}


@dataclass(frozen=True)
class VocabMatrix:
    """One matrix with a row per token, the model's current one at every access.

    The parameter and even its module are replaced when a model is sharded or its vocabulary resized, so neither is
    kept: each property asks the model again, and raises a RuntimeError once it no longer has rows that can be followed.
    Rows with an adapter on them are those that the forward pass uses.

    Attributes:
        model: the model that holds it, without wrappers such as DistributedDataParallel.
        path: dotted name of its module; None asks the model.
        other_path: the same for the other matrix, to tell whether they are tied.
    """

    name: MatrixName
    model: nn.Module
    path: str | None = None
    other_path: str | None = None

    @property
    def module(self) -> nn.Module:
        """The module that holds the rows now; beneath an adapter, the base's."""
        return plain_module(self.wrapped)

    @property
    def adapter(self) -> AdaptedRows | None:
        """The rows with an adapter on them; None where the rows are a parameter of their own."""
        adapter = adapter_of(self.wrapped)
        if isinstance(adapter, NotApplicable):
            raise RuntimeError(f"the {self.name} can no longer be followed: {adapter.reason}")
        return adapter

    @property
    def wrapped(self) -> nn.Module:
        """The module that the forward pass calls: with an adapter's wrappers, where there are any."""
        module = _locate(self.model, self.name, self.path)
        if isinstance(module, NotApplicable):
            raise RuntimeError(f"the {self.name} is no longer in the model: {module.reason}")
        return module

    @property
    def weight(self) -> Tensor:
        """(rows, width) the parameter as it is now, attached to autograd; beneath an adapter, the base's."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rows(self) -> int:
        """V, which may exceed the tokenizer's length."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameter."""
        return self.weight.dtype

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one parameter, or share its memory, and any adapters on them do."""
        other: MatrixName = "embedding" if self.name == "head" else "head"
        module = _locate(self.model, other, self.other_path)
        if isinstance(module, NotApplicable) or not _same(self.weight, plain_module(module).weight):
            return False
        mine, theirs = self.adapter, adapter_of(module)
        if isinstance(mine, AdaptedRows) and isinstance(theirs, AdaptedRows):
            return mine.same(theirs)
        return mine is None and theirs is None

    @property
    def untied(self) -> bool:
        """Whether the model ties head and embedding, and an adapter has taken them apart."""
        if self.tied or not getattr(text_config_of(self.model), "tie_word_embeddings", False):
            return False
        other = _locate(self.model, "embedding" if self.name == "head" else "head", self.other_path)
        ends = [self.wrapped] if isinstance(other, NotApplicable) else [self.wrapped, other]
        return any(plain_module(module) is not module for module in ends)

    @property
    def shard(self) -> Shard | None:
        """The rows that this process has; None where it has all."""
        shard = shard_of(self.weight)
        if isinstance(shard, NotApplicable):
            raise RuntimeError(f"the {self.name} can no longer be followed: {shard.reason}")
        return shard

    @property
    def has_bias(self) -> bool:
        """Whether the module adds a bias, which is no part of a row."""
        return getattr(self.module, "bias", None) is not None

    @property
    def trainable(self) -> bool:
        """Whether the rows can move by gradient."""
        adapter = self.adapter
        return self.weight.requires_grad if adapter is None else adapter.trainable

    def parameter_names(self) -> tuple[str, ...]:
        """The parameter's dotted names in the model, without what PEFT adds; more than one where it is shared."""
        weight = self.weight
        named = self.model.named_parameters(remove_duplicate=False)
        found = (name for name, parameter in named if _same(parameter, weight))
        return tuple(dict.fromkeys(plain_name(name) for name in found))

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows; of a matrix that is spread over processes, those of this one.

        Yields:
            The rows' slice and a detached (<= size, width) view of them, in the parameter's dtype and on its device.
            Rows that an adapter has changed are computed, in float32.

        Raises:
            ValueError: for a size below 1.
        """
        if size < 1:
            raise ValueError(f"chunk size is {size}; allowed: at least 1")
        if (adapter := self.adapter) is not None:
            yield from adapter.chunks(size)
            return
        rows, shard = local_rows(self.weight.detach()), self.shard
        first = 0 if shard is None else shard.part.start
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            yield slice(first + start, first + stop), rows[start:stop]


def find_matrices(
    model: nn.Module, head: str | None = None, embedding: str | None = None, tokens: int | None = None
) -> dict[MatrixName, VocabMatrix | NotApplicable]:
    """Find the rows behind a model's inputs and outputs.

    Args:
        model: a Hugging Face model or any torch module; wrappers that keep it in ``.module`` are taken off.
        head: dotted name of the module whose ``weight`` holds the output rows (``matrices.head``); None asks
            ``get_output_embeddings()``.
        embedding: the same for the input rows (``matrices.embedding``, ``get_input_embeddings()``).
        tokens: how many the tokenizer has, if known, to propose modules where none is found.

    Returns:
        For ``head`` and ``embedding`` the matrix, or why there is nothing to watch. A module named by the user may
        have any number of rows; one that the model returned must have a row for every token.

    Raises:
        ValueError: for a dotted name that is no module with a 2-D floating-point ``weight``.
    """
    bare = unwrapped(model)
    paths: dict[MatrixName, str | None] = {"head": head, "embedding": embedding}
    return {
        "head": _judge(VocabMatrix("head", bare, head, embedding), paths, tokens),
        "embedding": _judge(VocabMatrix("embedding", bare, embedding, head), paths, tokens),
    }


def _judge(matrix: VocabMatrix, paths: dict[MatrixName, str | None], tokens: int | None) -> VocabMatrix | NotApplicable:
    """The matrix, unless it is missing, no row per token, or frozen."""
    name = matrix.name
    module = _locate(matrix.model, name, matrix.path)
    if isinstance(module, NotApplicable):
        # A model that gives an odd module, such as a quantised one, is right about which it is.
        odd = module.reason.startswith(f"the {name} is ")
        perhaps = "" if odd else proposal(matrix.model, (name,), tokens)
        return NotApplicable(f"{module.reason}; it may be {perhaps}") if perhaps else module
    expected = _vocabulary_size(matrix.model, paths)
    if matrix.path is None and expected is not None and matrix.rows < expected:
        return NotApplicable(f"the {name} has {matrix.rows} rows for {expected} tokens, so it is not a row per token")
    for found in (adapter_of(module), shard_of(matrix.weight)):
        if isinstance(found, NotApplicable):
            return NotApplicable(f"the {name} cannot be followed: {found.reason}")
    if not matrix.trainable:
        tells = "the probe still tells what the model can say" if name == "head" else "there is nothing to measure"
        return NotApplicable(f"the {name} is frozen (requires_grad is False), so its rows cannot move; {tells}")
    return matrix


def _locate(model: nn.Module, name: MatrixName, path: str | None) -> nn.Module | NotApplicable:
    """The module that holds the rows, with any wrappers of PEFT's."""
    if path is not None:
        return _named(model, name, path)
    getter = getattr(model, _GETTERS[name], None)
    if getter is None:
        return NotApplicable(f"{type(model).__name__} has no {_GETTERS[name]}(); name the module in matrices.{name}")
    try:
        module = getter()
    except (NotImplementedError, AttributeError) as error:
        return NotApplicable(f"{type(model).__name__}.{_GETTERS[name]}() failed ({type(error).__name__}: {error})")
    if module is None:
        return NotApplicable(f"{type(model).__name__} has no {name}: {_GETTERS[name]}() gives None")
    if not isinstance(module, nn.Module) or not _has_rows(module):
        return NotApplicable(f"the {name} is {_shown(module)}")
    return module


def _named(model: nn.Module, name: MatrixName, path: str) -> nn.Module:
    """The module a user named, or an error that lists those with rows."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        found = "no such module"
    else:
        if path and _has_rows(module):
            return module
        found = _shown(module)
    allowed = [known for known, candidate in model.named_modules() if known and _has_rows(candidate)]
    shown = ", ".join(allowed[:12]) + (f" and {len(allowed) - 12} more" if len(allowed) > 12 else "")
    raise ValueError(f"matrices.{name} is {path!r}: {found}; allowed: a module with rows, here {shown or 'none'}")


def _has_rows(module: nn.Module) -> bool:
    weight = getattr(plain_module(module), "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def _shown(module: object) -> str:
    """A module that has no rows, in words."""
    plain = plain_module(module) if isinstance(module, nn.Module) else module
    said = f"a {type(plain).__name__} without a 2-D floating-point weight"
    weight = getattr(plain, "weight", None) if isinstance(plain, nn.Module) else None
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"{said}: it is quantised ({weight.dtype}), so its rows cannot be read"
    return said


def _vocabulary_size(model: nn.Module, paths: dict[MatrixName, str | None]) -> int | None:
    """Fewest rows a matrix with a row per token can have.

    Some models keep a few more input rows than output rows (image tokens), so the smaller claim counts.
    """
    claims = []
    if isinstance(size := getattr(text_config_of(model), "vocab_size", None), int):
        claims.append(size)
    embedding = _locate(model, "embedding", paths["embedding"])
    if isinstance(embedding, nn.Module):
        weight = plain_module(embedding).weight
        assert isinstance(weight, Tensor)
        claims.append(len(weight))
    return min(claims, default=None)


def _same(weight: Tensor, other: object) -> bool:
    """Whether two parameters are one, as objects or in memory (a shared pointer of 0 means no memory at all)."""
    if weight is other:
        return True
    if not isinstance(other, Tensor) or weight.shape != other.shape or weight.device != other.device:
        return False
    return weight.data_ptr() != 0 and weight.data_ptr() == other.data_ptr()
