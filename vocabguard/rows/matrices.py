"""Where a model keeps its vocabulary rows, and how to read them chunk by chunk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vocabguard.results import MatrixName, NotApplicable
from vocabguard.rows.adapters import AdaptedRows, adapter_of, plain_module, plain_name
from vocabguard.rows.engines import Held, held_by_engine
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
        root: the model with its wrappers, some of which hold its parameters; None takes `model`.
        speaks: whether this process speaks for its elements of a matrix that is spread over processes, where all of
            them have agreed on that; None asks the engine.
        spans: see `Shard`.
    """

    name: MatrixName
    model: nn.Module
    path: str | None = None
    other_path: str | None = None
    root: nn.Module | None = None
    speaks: bool | None = None
    spans: tuple[tuple[int, int], ...] | None = None

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
        module = _locate(self.model, self.name, self.path, self.root)
        if isinstance(module, NotApplicable):
            raise RuntimeError(f"the {self.name} is no longer in the model: {module.reason}")
        return module

    @property
    def top(self) -> nn.Module:
        """The model with its wrappers."""
        return _top(self.model, self.root)

    @property
    def held(self) -> Held | None:
        """How an engine holds the rows that takes parameters apart; None where the parameter has them."""
        held = held_by_engine(self.top, self.module)
        if isinstance(held, NotApplicable):
            raise RuntimeError(f"the {self.name} can no longer be followed: {held.reason}")
        return held

    @property
    def weight(self) -> Tensor:
        """(rows, width) the parameter as it is now, attached to autograd; beneath an adapter, the base's.

        Where an engine holds the rows (`held`), its shape and its memory mean nothing.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rows(self) -> int:
        """V, which may exceed the tokenizer's length."""
        return self.weight.shape[0] if (held := self.held) is None else held.rows

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.weight.shape[1] if (held := self.held) is None else held.width

    @property
    def device(self) -> torch.device:
        """Where this process's rows are."""
        return self.weight.device if (held := self.held) is None else held.read().device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows as they are read."""
        return self.weight.dtype if (held := self.held) is None else held.read().dtype

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one parameter, or share its memory, and any adapters on them do."""
        other: MatrixName = "embedding" if self.name == "head" else "head"
        module = _locate(self.model, other, self.other_path, self.root)
        if isinstance(module, NotApplicable) or not self._shares(plain_module(module)):
            return False
        mine, theirs = self.adapter, adapter_of(module)
        if isinstance(mine, AdaptedRows) and isinstance(theirs, AdaptedRows):
            return mine.same(theirs)
        return mine is None and theirs is None

    def _shares(self, module: nn.Module) -> bool:
        """Whether another module's rows are in the same memory."""
        mine, theirs = self.held, held_by_engine(self.top, module)
        if isinstance(mine, Held) or theirs is not None:
            return isinstance(mine, Held) and isinstance(theirs, Held) and mine.key == theirs.key
        if not local_rows(self.weight).numel() and self.weight is not module.weight:
            # This process has none of the rows, so their memory tells nothing.
            return bool(getattr(text_config_of(self.model), "tie_word_embeddings", False))
        return _same(self.weight, module.weight)

    @property
    def untied(self) -> bool:
        """Whether the model ties head and embedding, and an adapter has taken them apart."""
        if self.tied or not getattr(text_config_of(self.model), "tie_word_embeddings", False):
            return False
        name: MatrixName = "embedding" if self.name == "head" else "head"
        other = _locate(self.model, name, self.other_path, self.root)
        ends = [self.wrapped] if isinstance(other, NotApplicable) else [self.wrapped, other]
        return any(plain_module(module) is not module for module in ends)

    @property
    def shard(self) -> Shard | None:
        """The elements that this process has; None where it has all."""
        shard = shard_of(self.weight) if (held := self.held) is None else held.shard
        if isinstance(shard, NotApplicable):
            raise RuntimeError(f"the {self.name} can no longer be followed: {shard.reason}")
        return shard if shard is None or self.speaks is None else replace(shard, owner=self.speaks, spans=self.spans)

    def own(self) -> Tensor:
        """This process's elements as they are now, detached, as `Shard.take` wants them; of a whole matrix the rows."""
        if (held := self.held) is not None:
            return held.read()
        rows, shard = local_rows(self.weight.detach()), self.shard
        return rows if shard is None or shard.columns is not None else rows.reshape(-1)

    @property
    def stepped(self) -> Tensor:
        """The parameter that the optimizer steps, as it is now."""
        held = self.held
        return self.weight if held is None or held.stepped is None else held.stepped

    def gradient(self) -> Tensor | None:
        """This process's part of the gradient: rows, or of a matrix that an engine holds the elements that are here."""
        if (held := self.held) is not None:
            return held.gradient()
        gradient = self.weight.grad
        return None if gradient is None else local_rows(gradient)

    @property
    def has_bias(self) -> bool:
        """Whether the module adds a bias, which is no part of a row."""
        return getattr(self.module, "bias", None) is not None

    @property
    def trainable(self) -> bool:
        """Whether the rows can move by gradient."""
        adapter = self.adapter
        if adapter is not None:
            return adapter.trainable
        return self.weight.requires_grad if (held := self.held) is None else held.trainable

    def parameter_names(self) -> tuple[str, ...]:
        """The parameter's dotted names in the model, without what wrappers add; more than one where it is shared."""
        if self.held is not None:
            modules = self.model.named_modules(remove_duplicate=False)
            mine = (f"{name}.weight" for name, module in modules if _has_weight(module) and self._shares(module))
            return tuple(dict.fromkeys(plain_name(name.replace("_fsdp_wrapped_module.", "")) for name in mine))
        weight = self.weight
        named = self.model.named_parameters(remove_duplicate=False)
        found = (name for name, parameter in named if _same(parameter, weight))
        return tuple(dict.fromkeys(plain_name(name) for name in found))

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows; of a matrix that is spread over processes, those of this one.

        Yields:
            The rows' slice and a detached (<= size, width) view of them, in the parameter's dtype and on its device.
            Rows that an adapter has changed are computed, in float32. Of a row that is here in part, the rest is 0.

        Raises:
            ValueError: for a size below 1.
        """
        if size < 1:
            raise ValueError(f"chunk size is {size}; allowed: at least 1")
        if (adapter := self.adapter) is not None:
            yield from adapter.chunks(size)
            return
        own, shard = self.own(), self.shard
        if shard is None:
            yield from PlainRows(own).chunks(size)
        else:
            yield from ((piece, shard.take(own, piece)) for piece in shard.pieces(size))

    def at_rest(self) -> VocabMatrix | PlainRows:
        """The same rows while no step is made: where they are a parameter, it is looked up once for all reads."""
        plain = self.adapter is None and self.held is None and self.shard is None
        return PlainRows(self.weight.detach()) if plain else self


@dataclass(frozen=True)
class PlainRows:
    """Rows in one piece of memory. `tensor`: (rows, width)."""

    tensor: Tensor

    @property
    def rows(self) -> int:
        """V."""
        return self.tensor.shape[0]

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.tensor.shape[1]

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows; see `VocabMatrix.chunks`."""
        for start in range(0, self.rows, size):
            part = slice(start, min(start + size, self.rows))
            yield part, self.tensor[part]


@dataclass(frozen=True)
class SomeRows:
    """Of a matrix that every process has whole, the rows that this one reads.

    Attributes:
        matrix: without an adapter, and not spread.
        shard: whole rows.
    """

    matrix: VocabMatrix
    shard: Shard

    @classmethod
    def share(cls, matrix: VocabMatrix, place: int, count: int) -> SomeRows:
        """One of `count` shares."""
        rows, width = matrix.rows, matrix.width
        firsts = [min(share * -(-rows // count), rows) * width for share in range(count + 1)]
        spans = tuple(itertools.pairwise(firsts))
        return cls(matrix, Shard(rows, width, *spans[place], spans=spans))

    @property
    def rows(self) -> int:
        """V, of the whole matrix."""
        return self.shard.rows

    @property
    def width(self) -> int:
        """Elements a row."""
        return self.shard.width

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over this share; see `VocabMatrix.chunks`."""
        rows = self.matrix.own()
        yield from ((piece, rows[piece]) for piece in self.shard.pieces(size))


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
        "head": _judge(VocabMatrix("head", bare, head, embedding, model), paths, tokens),
        "embedding": _judge(VocabMatrix("embedding", bare, embedding, head, model), paths, tokens),
    }


def _judge(matrix: VocabMatrix, paths: dict[MatrixName, str | None], tokens: int | None) -> VocabMatrix | NotApplicable:
    """The matrix, unless it is missing, no row per token, or frozen."""
    name = matrix.name
    module = _locate(matrix.model, name, matrix.path, matrix.root)
    if isinstance(module, NotApplicable):
        # A model that gives an odd module, such as a quantised one, is right about which it is.
        odd = module.reason.startswith(f"the {name} is ")
        perhaps = "" if odd else proposal(matrix.model, (name,), tokens)
        return NotApplicable(f"{module.reason}; it may be {perhaps}") if perhaps else module
    held = held_by_engine(matrix.top, plain_module(module))
    if isinstance(held, NotApplicable):
        return NotApplicable(f"the {name} cannot be followed: {held.reason}")
    expected = _vocabulary_size(matrix.model, paths, matrix.root)
    if matrix.path is None and expected is not None and matrix.rows < expected:
        return NotApplicable(f"the {name} has {matrix.rows} rows for {expected} tokens, so it is not a row per token")
    for found in (adapter_of(module), None if held is not None else shard_of(matrix.weight)):
        if isinstance(found, NotApplicable):
            return NotApplicable(f"the {name} cannot be followed: {found.reason}")
    if not matrix.trainable:
        tells = "the probe still tells what the model can say" if name == "head" else "there is nothing to measure"
        return NotApplicable(f"the {name} is frozen (requires_grad is False), so its rows cannot move; {tells}")
    return matrix


def _top(model: nn.Module, root: nn.Module | None) -> nn.Module:
    # A module's truth is its length, which a compiled one does not have.
    return model if root is None else root


def _locate(
    model: nn.Module, name: MatrixName, path: str | None, root: nn.Module | None = None
) -> nn.Module | NotApplicable:
    """The module that holds the rows, with any wrappers of PEFT's."""
    if path is not None:
        return _named(model, name, path, _top(model, root))
    getter = getattr(model, _GETTERS[name], None)
    if getter is None:
        return NotApplicable(f"{type(model).__name__} has no {_GETTERS[name]}(); name the module in matrices.{name}")
    try:
        module = getter()
    except (NotImplementedError, AttributeError) as error:
        return NotApplicable(f"{type(model).__name__}.{_GETTERS[name]}() failed ({type(error).__name__}: {error})")
    if module is None:
        return NotApplicable(f"{type(model).__name__} has no {name}: {_GETTERS[name]}() gives None")
    if not isinstance(module, nn.Module) or not _has_rows(module, _top(model, root)):
        return NotApplicable(f"the {name} is {_shown(module)}")
    return module


def _named(model: nn.Module, name: MatrixName, path: str, root: nn.Module) -> nn.Module:
    """The module a user named, or an error that lists those with rows."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        found = "no such module"
    else:
        if path and _has_rows(module, root):
            return module
        found = _shown(module)
    allowed = [known for known, candidate in model.named_modules() if known and _has_rows(candidate, root)]
    shown = ", ".join(allowed[:12]) + (f" and {len(allowed) - 12} more" if len(allowed) > 12 else "")
    raise ValueError(f"matrices.{name} is {path!r}: {found}; allowed: a module with rows, here {shown or 'none'}")


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _has_rows(module: nn.Module, root: nn.Module) -> bool:
    plain = plain_module(module)
    weight = getattr(plain, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if isinstance(held_by_engine(root, plain), Held):
        return True
    return weight.dim() == 2 and weight.is_floating_point()


def _shown(module: object) -> str:
    """A module that has no rows, in words."""
    plain = plain_module(module) if isinstance(module, nn.Module) else module
    said = f"a {type(plain).__name__} without a 2-D floating-point weight"
    weight = getattr(plain, "weight", None) if isinstance(plain, nn.Module) else None
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"{said}: it is quantised ({weight.dtype}), so its rows cannot be read"
    return said


def _vocabulary_size(model: nn.Module, paths: dict[MatrixName, str | None], root: nn.Module | None) -> int | None:
    """Fewest rows a matrix with a row per token can have.

    Some models keep a few more input rows than output rows (image tokens), so the smaller claim counts.
    """
    claims = []
    if isinstance(size := getattr(text_config_of(model), "vocab_size", None), int):
        claims.append(size)
    embedding = _locate(model, "embedding", paths["embedding"], root)
    if isinstance(embedding, nn.Module):
        plain = plain_module(embedding)
        held = held_by_engine(_top(model, root), plain)
        weight = plain.weight
        assert isinstance(weight, Tensor)
        claims.append(held.rows if isinstance(held, Held) else len(weight))
    return min(claims, default=None)


def _same(weight: Tensor, other: object) -> bool:
    """Whether two parameters are one, as objects or in memory (a shared pointer of 0 means no memory at all)."""
    if weight is other:
        return True
    if not isinstance(other, Tensor) or weight.shape != other.shape or weight.device != other.device:
        return False
    # Of a DTensor the pointer is an offset only, 0 for any two: what tells is the memory that this process has.
    mine, theirs = local_rows(weight.detach()), local_rows(other.detach())
    return mine.data_ptr() != 0 and mine.data_ptr() == theirs.data_ptr()
