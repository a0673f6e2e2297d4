"""What is read while training runs: batches on their way into the model, gradients as the optimizer used them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vocabguard import collective
from vocabguard.config import ConfigError
from vocabguard.guard.failures import Faults
from vocabguard.guard.hold import Holder
from vocabguard.guard.hooks import OwnHook
from vocabguard.measure.exposure import ExposureCounter, targets_of
from vocabguard.measure.learning_rates import RateMeter
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.protect.rows import IGNORE
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.models import core_of, parameters_of, text_config_of

Targets = Callable[[Any], tuple[Tensor | None, Tensor] | None]
"""Takes a batch, gives (inputs or None, targets), or None where there are none: targets are not shifted again."""

LABELS_KEY = "vocabguard_labels"
"""Key of a batch's labels where the trainer takes ``labels`` out of it before the model's forward pass."""


def labels_of(batch: Any, targets: Targets | None) -> tuple[Tensor | None, Tensor, bool] | None:
    """Inputs, labels and whether the extractor has aligned them already; None where a batch carries no labels.

    Args:
        batch: a mapping with ``labels`` (and ``input_ids``), or whatever `targets` takes.
    """
    if targets is not None:
        found = targets(batch)
        return None if found is None else (*found, True)
    if not isinstance(batch, Mapping):
        return None
    inputs = batch.get("input_ids")
    inputs = inputs if isinstance(inputs, Tensor) else None
    # Where a sequence is split over processes, or rows are packed, labels come shifted already.
    if isinstance(shifted := batch.get(SHIFTED_KEY), Tensor):
        return inputs, shifted, True
    labels = batch.get(LABELS_KEY, batch.get("labels"))
    return (inputs, labels, False) if isinstance(labels, Tensor) else None


SHIFTED_KEY = "shift_labels"
"""Key of labels that are shifted already: position t holds what position t predicts."""


class LabelCarrier:
    """Wraps a collate function: a batch's labels go to the model under `LABELS_KEY` too.

    Label smoothing and losses of one's own take ``labels`` out of a batch; what stays in it reaches the model's forward
    pass, where an `Observer` sees it and `drop_labels` takes it away.
    """

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, features: list[Any]) -> Any:
        """Collate one batch."""
        batch = self.inner(features)
        if isinstance(batch, MutableMapping) and isinstance(batch.get("labels"), Tensor):
            batch[LABELS_KEY] = batch["labels"]
        return batch


def drop_labels(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take the labels of a `LabelCarrier` away, as the last forward pre-hook of a model that does not know them."""
    kwargs.pop(LABELS_KEY, None)
    return args, kwargs


def vocabulary_size(model: nn.Module) -> int | None:
    """Tokens that a model takes now, by its configuration, which follows a resize; None where it does not say.

    >>> vocabulary_size(nn.Linear(2, 2)) is None
    True
    """
    size = getattr(text_config_of(core_of(model)), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def keep_within(batch: MutableMapping[str, Any], echo: Tensor, rows: int) -> None:
    """Take ids that a model does not have out of echo rows.

    Args:
        batch: with ``input_ids`` and ``labels`` (B, T); other rows are left as they are.
        echo: (B,) or (B, T) bool, True at echo rows.
        rows: ids from here on are gone.

    Example:
        >>> batch = {"input_ids": torch.tensor([[7, 1], [7, 1]]), "labels": torch.tensor([[7, 1], [7, 1]])}
        >>> keep_within(batch, torch.tensor([False, True]), rows=5)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[7, 1], [0, 1]], [[7, 1], [-100, 1]])
    """
    for name, instead in (("input_ids", 0), ("labels", IGNORE), (LABELS_KEY, IGNORE)):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim == 2:
            mask = echo.to(value.device)
            gone = (value >= rows) & (mask if mask.ndim == 2 else mask[:, None])
            batch[name] = value.masked_fill(gone, instead)


def mask_of_labels(mask: Tensor, inputs: Tensor, labels: Tensor, kept: Any) -> Tensor:
    """An echo mask for labels that were trimmed to what the loss needs, as ms-swift does with ``logits_to_keep``.

    Args:
        mask: (1, T) bool, of the inputs.
        inputs: (1, T) ids.
        labels: (1, K): the last K, or -100 and the labels of the places whose logits are kept.
        kept: how many places at the end, or (T,) bool, whose logits are kept; else it is taken to be K.

    Returns:
        (1, K) bool.

    Raises:
        ValueError: if labels are not the inputs at those places, so that nobody knows which of them are echo's.

    Example:
        >>> ids, labels = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[-100, 5, 7]])
        >>> mask, kept = torch.tensor([[False, False, True, True]]), torch.tensor([True, False, True, True])
        >>> mask_of_labels(mask, ids, labels, kept)
        tensor([[False, False,  True]])
        >>> mask_of_labels(mask, ids, ids[:, 2:], kept=2)
        tensor([[True, True]])
    """
    width = labels.shape[1]
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        # The logits before a token predict it.
        asked = kept[:-1].nonzero().flatten().to(mask.device) + 1
        places = torch.cat([asked.new_zeros(1), asked])
    else:
        places = torch.arange(inputs.shape[1] - width, inputs.shape[1], device=mask.device)
    if len(places) == width and int(places[0]) >= 0:
        told = labels != IGNORE
        if torch.equal(labels[told], inputs[:, places.to(inputs.device)].to(labels.device)[told]):
            return mask[:, places]
    raise ValueError(
        f"labels of shape {tuple(labels.shape)} for inputs of shape {tuple(inputs.shape)}: echo's cannot be told apart"
    )


class BatchContext:
    """The batch in flight, in one place: observer, loss meter and echo read it, nobody else keeps a part of it.

    A batch is met on its way into the training step (`arrive`: Lightning, loops of one's own), or only in the model's
    forward pass (`take_out`, then `read`: Hugging Face). What it carries of ours is taken out there.

    Attributes:
        inputs: (B, T) int64 token ids; None where the batch has none.
        labels: (B, T) int64, -100 where there is no target, as the batch carries them.
        aligned: (B, T) int64, targets of the extractor, which are not shifted again; None without one.
        attention_mask: (B, T), 0 at padding, or None.
        echo: (B,) or (B, T) bool, True at echo rows; None where there are none.
        echo_inputs: the same in the shape of the inputs, where the labels have another; else None.
    """

    def __init__(self, targets: Targets | None = None) -> None:
        self._targets = targets
        self.inputs: Tensor | None = None
        self.labels: Tensor | None = None
        self.aligned: Tensor | None = None
        self.attention_mask: Tensor | None = None
        self.echo: Tensor | None = None
        self.echo_inputs: Tensor | None = None
        self._arrived = False
        self._rows: int | None = None

    def arrive(self, batch: Any, echo: Tensor | None) -> None:
        """A training batch, before it reaches the model. `batch`: as the trainer has it, our own keys taken out."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        self.labels, self.echo = labels if isinstance(labels, Tensor) else None, echo
        self.echo_inputs = None
        self._arrived = self.labels is not None

    def take_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: take the echo mask out of what the model is called with."""
        if ECHO_KEY in kwargs or LABELS_KEY in kwargs:
            self.echo, self.echo_inputs = kwargs.pop(ECHO_KEY, None), None
            if self.echo is not None:
                self.fit(kwargs, self.echo, module)
            self.labels, self._arrived = kwargs.get(LABELS_KEY), False
            return args, kwargs
        # Evaluation and generation in mid-run must not be taken for the batch before them.
        if module.training and not self._arrived:
            self.echo = self.echo_inputs = self.labels = None
        return None

    def follow_labels(self, batch: Mapping[str, Any]) -> None:
        """Trim the mask of a joined row, which `take_out` has found, as its labels were.

        Raises:
            ValueError: see `mask_of_labels`.
        """
        inputs, labels, echo = batch.get("input_ids"), batch.get("labels"), self.echo
        if echo is None or echo.ndim != 2 or LABELS_KEY in batch:
            return
        if isinstance(inputs, Tensor) and isinstance(labels, Tensor) and labels.shape != echo.shape == inputs.shape:
            self.echo = mask_of_labels(echo, inputs, labels, batch.get("logits_to_keep"))
            self.echo_inputs = echo

    def fit(self, batch: MutableMapping[str, Any], echo: Tensor, model: nn.Module) -> None:
        """Take ids out of echo rows that are gone since the model's matrix was cut to fewer rows."""
        rows = vocabulary_size(model)
        self._rows = self._rows or rows
        if rows is not None and self._rows is not None and rows < self._rows:
            keep_within(batch, echo, rows)

    def read(self, batch: Any) -> bool:
        """Read inputs and targets out of a batch or a forward pass's arguments; False where it carries no labels."""
        found = labels_of(batch, self._targets)
        if found is None:
            return False
        self.inputs, labels, aligned = found
        self.attention_mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if aligned:
            self.aligned = labels
            echo = self.echo
            if self._targets is None and echo is not None and echo.ndim == 2 and echo.shape == labels.shape:
                # The mask is that of the tokens; these labels are one place ahead of them.
                self.echo, self.echo_inputs = torch.nn.functional.pad(echo[:, 1:], (0, 1)), echo
        else:
            self.labels, self.aligned = labels, None
        return True


_KINDS = ("data", "echo")
_UNTOLD = (
    "vocabguard: loss/data and loss/echo leave batches with echo rows out: the model's output holds neither logits nor "
    "log_probs of every position, as fused losses do"
)

logger = logging.getLogger("vocabguard")


@torch.no_grad()
def target_losses(logits: Tensor, labels: Tensor, chosen: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of some targets.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T) int; `IGNORE` where there is no target.
        chosen: (B,) or (B, T) bool, rows or positions (of labels) whose targets count.
        shift: whether position t predicts label t + 1.

    Returns:
        The sum in nats, float32, and the number of targets, int64; both scalars on the logits' device.
    """
    wide = chosen[:, None].expand(labels.shape) if chosen.ndim == 1 else chosen
    targets, counted = targets_of(labels, shift), targets_of(wide, shift)
    keep = (targets != IGNORE) & counted.to(targets.device)
    # Few targets are chosen, so only their logits are brought to float32.
    picked = (logits[:, :-1] if shift else logits)[keep.to(logits.device)]
    total = cross_entropy(picked.float(), targets[keep].to(picked.device), reduction="sum")
    return total, keep.sum().to(picked.device)


def summed_losses(output: Any, labels: Tensor, chosen: Tensor, shift: bool) -> tuple[Tensor, Tensor] | None:
    """The same from what a model returned: its ``logits``, or the ``log_probs`` of the targets that TRL's head gives.

    Returns:
        None where the output has neither for every position.
    """
    logits, told = _field(output, "logits"), _field(output, "log_probs")
    if logits is not None and logits.shape[:2] == labels.shape:
        return target_losses(logits, labels, chosen, shift)
    targets = targets_of(labels, shift)
    if told is None or told.shape != targets.shape:
        return None
    wide = chosen[:, None].expand(labels.shape) if chosen.ndim == 1 else chosen
    keep = ((targets != IGNORE) & targets_of(wide, shift).to(targets.device)).to(told.device)
    return -told.detach().float().masked_fill(~keep, 0.0).sum(), keep.sum()


class LossMeter:
    """Adds up both losses from check to check, from the outputs of the model's training forward passes."""

    def __init__(self, shift: bool) -> None:
        self._shift = shift
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._told = False

    def add(self, output: Any, kwargs: Mapping[str, Any], labels: Tensor | None, echo: Tensor | None) -> None:
        """Take in one forward pass.

        Args:
            output: of the model; its ``loss`` is used where there is one, `summed_losses` for the echo targets.
            kwargs: the forward pass's; ``num_items_in_batch`` says what the loss was divided by.
            labels: (B, T) of the batch; without them nothing is counted.
            echo: (B,) or (B, T) bool, True at echo rows; None without any.
        """
        if labels is None:
            return
        loss = _field(output, "loss")
        targets = (targets_of(labels, self._shift) != IGNORE).sum()
        if echo is None:
            of_echo, echoed = torch.zeros((), device=labels.device), torch.zeros_like(targets)
        elif (found := summed_losses(output, labels, echo, self._shift)) is not None:
            of_echo, echoed = found
        else:
            if not self._told:
                self._told = True
                logger.warning(_UNTOLD)
            return
        if loss is not None:
            divided_by = kwargs.get("num_items_in_batch")
            whole = loss.detach().float().mean() * (targets if divided_by is None else divided_by)
        elif (found := summed_losses(output, labels, torch.ones_like(labels).bool(), self._shift)) is not None:
            whole, _ = found
        else:
            return
        self._book("echo", of_echo, echoed)
        self._book("data", whole.to(of_echo.device) - of_echo, targets.to(echoed.device) - echoed)

    def take(self) -> dict[str, float]:
        """``loss/data`` and ``loss/echo`` over all processes: means in nats a target since the last call.

        There is none without targets.
        """
        # In float64, which adds counts exactly up to 2^53.
        own = [[float(booked.get(name, 0)) for name in _KINDS] for booked in (self._sums, self._counts)]
        self._sums, self._counts = {}, {}
        sums, counts = collective.total(torch.tensor(own, dtype=torch.float64)).tolist()
        return {f"loss/{name}": sums[at] / counts[at] for at, name in enumerate(_KINDS) if counts[at] > 0}

    def _book(self, name: str, total: Tensor, count: Tensor) -> None:
        # On the device: a number on the CPU would wait for it at every batch. MPS has no float64.
        if name in self._sums:
            self._sums[name] += total.double() if total.device.type != "mps" else total
            self._counts[name] += count
        else:
            self._sums[name] = total.double() if total.device.type != "mps" else total.clone()
            self._counts[name] = count.clone()

    def hook(self, model: nn.Module, context: BatchContext, faults: Faults) -> Any:
        """Follow the training forward passes of a model, by its forward hook.

        Args:
            context: the batch in the model; its labels count where none reach the model itself.
        """

        def after(module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or faults.down:
                return
            with faults.contain("telling losses apart"):
                labels = kwargs.get("labels")
                self.add(output, kwargs, labels if isinstance(labels, Tensor) else context.labels, context.echo)

        return model.register_forward_hook(OwnHook(after), with_kwargs=True)


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


_NO_LABELS = (
    "vocabguard: a training pass got no labels, so its targets are not counted. Where a trainer takes them out of the "
    "batch before (a loss of one's own), say `hidden_labels=True` to the Hugging Face callback; else `targets=`"
)
_NOT_ITS_OWN = "no optimizer has the output matrix (DeepSpeed, for one, steps copies of its own)"
_SILENT_STEPS = 20
"""More than a gradient scaler leaves out in a row while it finds its scale."""

_SILENT = (
    "vocabguard: none of the last %d steps was one of the optimizer that was attached: gradients are not read%s. If "
    "there is another optimizer now, pass it: guard.step(step, optimizer)"
)


def inner_optimizers(optimizers: Any) -> list[torch.optim.Optimizer]:
    """The optimizers inside wrappers such as accelerate's: only their hooks fire at real steps.

    Args:
        optimizers: one, several, or None.
    """
    several = [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers or ())
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in several]


class Observer:
    """Feeds an `ExposureCounter` from forward passes or batches, and from the optimizer's step.

    Args:
        matrix: the matrix whose gradient is read; None if it gets none: pull and push are NaN then.
        push_every: optimizer steps between reads of the whole gradient; 0 never.
        holder: puts rows back after a step; None where none are held.
    """

    def __init__(
        self, counter: ExposureCounter, matrix: VocabMatrix | None, *, shift: bool, push_every: int, faults: Faults,
        context: BatchContext | None = None, holder: Holder | None = None,
    ) -> None:  # fmt: skip
        self.counter = counter
        self.context = context or BatchContext()
        self._matrix = matrix
        self._shift = shift
        self._push_every = push_every
        self._faults = faults
        self._holder = holder
        self._meter: RateMeter | None = None
        self._handles: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._of_optimizers: list[Any] = []
        self._silent = 0
        self._names: tuple[str, ...] = ()
        self._unread, self._told = True, False
        self._seen: tuple[Any, ...] = ()
        self.hooked = False
        if matrix is None:
            self._read_no_gradient()

    def hook_model(self, model: nn.Module) -> None:
        """See every training forward pass of `model` that has a gradient; batches need not be told any more."""
        # Now, since a compiled pass cannot look into a signature.
        self._names = parameters_of(model)
        self._handles.append(model.register_forward_pre_hook(OwnHook(self._before_forward), with_kwargs=True))
        self.hooked = True

    def hook_optimizers(self, optimizers: Iterable[torch.optim.Optimizer], meter: RateMeter | None = None) -> None:
        """Read the gradient after each step of the optimizer that holds the matrix.

        The step's post hook sees the same clipped, averaged gradient under every trainer.

        Args:
            meter: adds up the learning rates of the steps, for the forecast.

        Raises:
            ConfigError: if rows are to be held, and no optimizer has the matrix itself.
        """
        self._meter = meter
        self._optimizers = inner_optimizers(optimizers)
        if self._matrix is None:
            return
        weight = self._matrix.stepped
        having = [
            inner
            for inner in self._optimizers
            if any(weight is parameter for group in inner.param_groups for parameter in group["params"])
        ]
        for inner in having:
            self._of_optimizers.append(inner.register_step_pre_hook(self._before_step))
            self._of_optimizers.append(inner.register_step_post_hook(self._after_step))
        if not having:
            if self._holder is not None:
                raise ConfigError(f"hold: {_NOT_ITS_OWN}; allowed: an optimizer over the model's own parameters")
            logger.warning("vocabguard: pull and push are not applicable: %s", _NOT_ITS_OWN)
            self._read_no_gradient()

    def end_step(self, step: int, optimizers: Any = None) -> None:
        """Close an optimizer step.

        Args:
            optimizers: that do the steps, where they may be others than at the start; None where nobody knows.
        """
        self.counter.end_step(step)
        if optimizers is not None and self._of_optimizers:
            self._follow_optimizers(inner_optimizers(optimizers))
        self._silent += 1
        if self._silent == _SILENT_STEPS and self._of_optimizers:
            logger.warning(_SILENT, _SILENT_STEPS, "" if self._holder is None else ", rows are not held")

    def _follow_optimizers(self, now: list[torch.optim.Optimizer]) -> None:
        """Hook the optimizers that have taken the place of those that were hooked."""
        if len(now) == len(self._optimizers) and all(a is b for a, b in zip(now, self._optimizers, strict=True)):
            return
        for handle in self._of_optimizers:
            handle.remove()
        self._of_optimizers.clear()
        try:
            if self._meter is not None:
                self._meter.leave()
            self.hook_optimizers(now)
        except ConfigError as error:
            logger.warning("vocabguard: hold is off from now on: %s", error)
            self._holder = None

    def _read_no_gradient(self) -> None:
        """Pull and push have no meaning here: NaN, not 0."""
        for unread in (self.counter.pull, self.counter.push, self.counter.input_only):
            unread.fill_(torch.nan)

    def batch(self, batch: Any) -> bool:
        """Count a batch; False where it carries no labels."""
        context = self.context
        if not context.read(batch):
            return False
        labels = context.labels if context.aligned is None else context.aligned
        assert labels is not None
        self.observe(
            context.inputs, labels, attention_mask=context.attention_mask, echo_mask=context.echo,
            echo_inputs=context.echo_inputs, shift=self._shift and context.aligned is None,
        )  # fmt: skip
        return True

    def observe(
        self, inputs: Tensor | None, labels: Tensor, *, attention_mask: Tensor | None = None,
        echo_mask: Tensor | None = None, echo_inputs: Tensor | None = None, shift: bool | None = None,
    ) -> None:  # fmt: skip
        """Count one micro-batch."""
        if not torch.compiler.is_compiling():
            self._follow_matrix()
        self.counter.observe(
            inputs,
            labels,
            shift=self._shift if shift is None else shift,
            attention_mask=attention_mask,
            echo_mask=echo_mask,
            echo_inputs=echo_inputs,
        )

    def remove(self) -> None:
        """Take all hooks off, but the optimizer's while other processes' hold is answered there."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._holder is not None and self._holder.absent:
            return
        for handle in self._of_optimizers:
            handle.remove()
        self._of_optimizers.clear()

    def _follow_matrix(self) -> None:
        """Its rows before a step's first batch is counted, so that its targets are not forgotten; and its device."""
        if self._matrix is None:
            return
        weight, counter = self._matrix.weight, self.counter
        seen = (id(weight), len(weight), weight.device, counter.rows)
        if seen == self._seen:
            # To ask an engine for its rows takes longer than to count a batch.
            return
        self._seen = seen
        rows, device = self._matrix.rows, self._matrix.device
        if rows != counter.rows:
            counter.resize(rows)
        if device != counter.device and device.type != "meta":
            counter.to(device)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Without a gradient nothing is learned: a reference's or a sampler's pass through the same model.
        if not module.training or not torch.is_grad_enabled() or self._faults.down:
            return
        batch = self._named(args) | kwargs
        if torch.compiler.is_compiling():
            # A clock or a try block would break the graph here.
            self.batch(batch)
            return
        with self._faults.contain("counting a batch"):
            if not self.batch(batch) and not self._told:
                self._told = True
                if self.counter.batches == 0:
                    logger.warning(_NO_LABELS)

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """What a forward pass got by position, by name; a single mapping is a batch, another first one the inputs."""
        if not args:
            return {}
        first = args[0]
        if isinstance(first, Mapping):
            return dict(first)
        return {"input_ids": first, **dict(zip(self._names, args, strict=False))}

    def _before_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._unread = True
        holder = self._holder
        if holder is not None and holder.on and not self._faults.down:
            with self._faults.contain("keeping rows"):
                holder.before_step()

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        # The hooks of an optimizer whose `step` calls its parent's may fire twice in a step: the inner one reads.
        if self._matrix is None or not self._unread:
            return
        self._unread, self._silent = False, 0
        if not self._faults.down:
            self._read(optimizer)
        if self._faults.down and self._holder is not None:
            self._holder.answer()

    def _read(self, optimizer: Any) -> None:
        assert self._matrix is not None
        with self._faults.contain("reading the gradient"):
            self._follow_matrix()
            counter = self.counter
            if self._meter is not None:
                self._meter.add(optimizer)
            # By the steps that a resumed run remembers, so that it samples where an uninterrupted one does.
            sample = self._push_every > 0 and (counter.steps + 1) % self._push_every == 0
            counter.observe_gradient(self._matrix.gradient(), sample, shard=self._matrix.shard)
            if self._holder is not None:
                self._holder.after_step(optimizer)
