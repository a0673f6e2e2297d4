"""How often tokens are targets, and what the gradient does to each row of the output matrix: functions of tensors.

`ExposureCounter` adds them up over a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.measure.pending import PendingStep, PendingSteps, packed, unpacked
from vocabguard.measure.shared import SharedCounts, decoded, encoded, too_large
from vocabguard.results import EXPOSURE_CLASSES, Exposure
from vocabguard.rows.sharding import Shard
from vocabguard.vocabulary.table import fit_rows

CLASS_STARTS = (1, 5, 20)
"""Data targets at which the second and later classes of `results.EXPOSURE_CLASSES` begin.

The name of the report that described the failure was a target fewer than 5 times; its remedy gave every token 20.
"""

_NORM_ELEMENTS = 2**20
_NORM_ELEMENTS_ACCELERATOR = 2**24
_PIECE_ROWS = 2**16


def targets_of(labels: Tensor, shift: bool) -> Tensor:
    """The targets of (B, T) labels that are -100 where the loss ignores the position.

    Args:
        shift: whether the model predicts ``labels[:, 1:]``, as causal language models do.

    Example:
        >>> targets_of(torch.tensor([[3, 1, -100]]), shift=True)
        tensor([[   1, -100]])
    """
    return labels[:, 1:] if shift else labels


def add_counts(counts: Tensor, ids: Tensor, *, row: int | Tensor = 0, keep: Tensor | None = None) -> None:
    """Count ids into a matrix of counters, in place and without data-dependent shapes.

    Args:
        counts: (K, V) int64, contiguous.
        ids: int of any shape; ids outside [0, V), -100 among them, are ignored.
        row: row of `counts` that gets them, or one row for each id, int64, broadcast to the shape of `ids`.
        keep: False where an id is not counted, bool, broadcast to the shape of `ids`.

    Example:
        >>> counts = torch.zeros(2, 3, dtype=torch.int64)
        >>> add_counts(counts, torch.tensor([0, 2, 2, -100]), row=torch.tensor([0, 0, 1, 1]))
        >>> counts.tolist()
        [[1, 0, 1], [0, 0, 1]]
    """
    rows = counts.shape[1]
    inside = ids.clamp(0, rows - 1).to(counts.device, torch.int64)
    counted = inside == ids.to(counts.device)
    if keep is not None:
        counted = counted & keep.to(counts.device, torch.bool)
    index = inside + (row.to(counts.device) if isinstance(row, Tensor) else row) * rows
    # Ignored ids add 0 somewhere: a boolean index would break a compiled graph and wait for the device.
    counts.view(-1).scatter_add_(0, index.reshape(-1), counted.to(torch.int64).reshape(-1))


def count_targets(labels: Tensor, shift: bool, rows: int) -> Tensor:
    """(rows,) int64 on the labels' device: how often each token is a target in one batch; see `targets_of`.

    Labels outside [0, rows), -100 among them, are ignored.

    Example:
        >>> count_targets(torch.tensor([[3, 1, 1, -100]]), shift=True, rows=4)
        tensor([0, 2, 0, 0])
    """
    counts = torch.zeros(1, rows, dtype=torch.int64, device=labels.device)
    add_counts(counts, targets_of(labels, shift))
    return counts[0]


def gradient_norms(matrix: Tensor, rows: Tensor | None = None) -> Tensor:
    """L2 norm of the rows of a gradient, read in chunks, so that no second matrix is made.

    Args:
        matrix: (V, D), any float dtype.
        rows: (n,) int64, the rows wanted; None takes all.

    Returns:
        (n,) or (V,) float32. A row with NaN or Inf gives 0, so that one bad step does not spoil a sum.

    Example:
        >>> gradient_norms(torch.tensor([[3.0, 4.0], [float("nan"), 0.0]]))
        tensor([5., 0.])
    """
    count = matrix.shape[0] if rows is None else len(rows)
    norms = torch.empty(count, dtype=torch.float32, device=matrix.device)
    # Chunks that fit a CPU's cache; on an accelerator few launches matter more.
    elements = _NORM_ELEMENTS if matrix.device.type == "cpu" else _NORM_ELEMENTS_ACCELERATOR
    chunk = max(1, elements // max(1, matrix.shape[1]))
    for begin in range(0, count, chunk):
        part = slice(begin, begin + chunk)
        read = matrix[part] if rows is None else matrix.index_select(0, rows[part])
        norms[part] = torch.linalg.vector_norm(read, dim=1, dtype=torch.promote_types(read.dtype, torch.float32))
    return norms.nan_to_num_(nan=0.0, posinf=0.0)


def exposure_classes(data_target: Tensor) -> Tensor:
    """The class of each token by its (V,) int64 data targets so far: (V,) uint8 index of `results.EXPOSURE_CLASSES`.

    Example:
        >>> exposure_classes(torch.tensor([0, 1, 4, 5, 19, 20])).tolist()
        [0, 1, 1, 2, 2, 3]
    """
    starts = torch.tensor(CLASS_STARTS, device=data_target.device)
    return torch.bucketize(data_target, starts, right=True).to(torch.uint8)


def steps_since_target(exposure: Exposure, step: int | None = None) -> Tensor:
    """(V,) int64: steps since each token last was a target, data or echo; 0 in the last step, -1 if it never was.

    Args:
        step: number of the last step; None takes `Exposure.steps`, which is right where every step was observed.

    Example:
        >>> counter = ExposureCounter(rows=3, device="cpu", tied=False)
        >>> for step, labels in enumerate([[1], [2]], start=1):
        ...     counter.observe(None, torch.tensor([labels]), shift=False)
        ...     counter.end_step(step)
        >>> steps_since_target(counter.exposure())
        tensor([-1,  1,  0])
    """
    now = exposure.steps if step is None else step
    return torch.where(exposure.last_target < 0, -1, (now - exposure.last_target).clamp(min=0))


def summarise_exposure(exposure: Exposure, classes: Tensor, live: Tensor) -> dict[str, float]:
    """Exposure as a few numbers.

    Args:
        classes: (V,) uint8, as `exposure_classes` gives them.
        live: (V,) bool, the tokens that shares are over.

    Returns:
        ``never``, ``1-4``, ``5-19``, ``20+``: share in [0, 1] of the live tokens in the class (0 if none is live); and
        ``push_share`` in [0, 1], left out before the first sample.

    Example:
        >>> exposure = ExposureCounter(rows=4, device="cpu", tied=False).exposure()
        >>> summarise_exposure(exposure, classes=torch.tensor([0, 0, 1, 3]), live=torch.ones(4, dtype=torch.bool))
        {'never': 0.5, '1-4': 0.25, '5-19': 0.0, '20+': 0.25}
    """
    of_live = torch.bincount(classes[live].long(), minlength=len(EXPOSURE_CLASSES)).tolist()
    total = max(1, sum(of_live))
    shares = {name: count / total for name, count in zip(EXPOSURE_CLASSES, of_live, strict=True)}
    if not math.isnan(exposure.push_share):
        shares["push_share"] = exposure.push_share
    return shares


_TARGET, _ECHO_TARGET, _INPUT, _ECHO_INPUT = range(4)
_COUNTED = ("data_target", "inputs", "echo_target", "echo_inputs")
"""In the order in which they are told: counts of echo are left out where there is nothing new."""
_TOLD = (_TARGET, _INPUT, _ECHO_TARGET, _ECHO_INPUT)
_ROW_STATE = ("last_target", "pull", "push", "input_only")


def _ratio(share: Tensor) -> Tensor:
    """() float32 of the two sums that push's share is of; 0 / 0 is NaN: no gradient, no share."""
    return share[0] / share[1]


class ExposureCounter:
    """Counts targets and inputs of every micro-batch and adds up row gradients of every optimizer step.

    The calls of a step are: `observe` once per micro-batch, `observe_gradient` once, `end_step` once. Counts are those
    of this process. On an accelerator none of these calls makes the host wait for it or moves anything to the host.

    Args:
        tied: whether one matrix serves as input and as output, so that a row's gradient also comes from the input.
        deferred: whether an averaged gradient holds the pull of other processes' targets too, which `settle` asks them
            for; see `vocabguard.measure.pending`.
        speaks: whether this process's counts are told: of those that see the very same batches, one's are.
        edges: rows of whose gradient several processes have a part, and whether this one speaks for them.

    Example:
        >>> counter = ExposureCounter(rows=3, device="cpu", tied=False)
        >>> counter.observe(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), shift=True)  # only 1 is a target
        >>> counter.observe_gradient(torch.tensor([[0.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), sample_push=True)
        >>> counter.end_step(1)
        >>> found = counter.exposure()
        >>> found.data_target, found.pull, found.push
        (tensor([0, 1, 0]), tensor([0., 5., 0.]), tensor([2., 0., 0.]))
    """

    def __init__(
        self, rows: int, device: torch.device | str, tied: bool, deferred: bool = False, speaks: bool = True,
        edges: Mapping[int, bool] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self._speaks, self._edges = rows, speaks, dict(edges or {})
        self.tied = tied
        self.deferred = deferred
        self.steps = 0
        self._pending = PendingSteps(rows)
        self._shared = SharedCounts(len(_COUNTED), rows)
        # Whether some last targets are in no mask that the other processes get.
        self._missed = torch.zeros((), dtype=torch.bool, device=device)
        # Of a matrix that is spread over processes: gradients of all its rows, and whether some process has news.
        self._gathered: Tensor | None = None
        self._sampled = False
        self.push_samples = 0
        self._counts = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._before = torch.zeros_like(self._counts)
        self.last_target = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.last_data_target = self.last_target.clone()
        self.pull = torch.zeros(rows, dtype=torch.float32, device=device)
        self.push = torch.zeros_like(self.pull)
        self.input_only = torch.zeros_like(self.pull)
        # Counted on the host, but by compiled graphs: a number of the host in them would have them compiled anew.
        self._batches, self._compiled = 0, False
        self._compiled_batches = torch.zeros((), dtype=torch.int64, device=device)
        # Gradient norms of the rows that were no targets, and of all, in the last step in which push was sampled.
        self._share = torch.full((2,), torch.nan, dtype=torch.float32, device=device)

    def observe(
        self, inputs: Tensor | None, labels: Tensor, *, shift: bool, attention_mask: Tensor | None = None,
        echo_mask: Tensor | None = None, echo_inputs: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count one micro-batch. Safe inside `torch.compile`: no graph break and no recompile from call to call.

        Args:
            inputs: (B, T) int ids, or None where the model got embeddings.
            labels: (B, T) int; -100 and ids outside [0, V) are ignored.
            shift: see `targets_of`.
            attention_mask: (B, T), 0 where an input is padding; a mask of another shape is not used.
            echo_mask: (B,) or, in the shape of the labels and inputs, (B, T) bool: True on rows or positions that echo
                injection added. Their targets are counted apart and their inputs not at all.
            echo_inputs: the same in the shape of the inputs, where the labels have another; None takes `echo_mask`.
        """
        echo = self._columns(echo_mask)
        wide = echo is not None and echo.shape[1] > 1
        of_targets = targets_of(echo, shift) if echo is not None and wide else echo
        targets = targets_of(labels, shift)
        add_counts(self._counts, targets, row=_TARGET if of_targets is None else of_targets.long() * _ECHO_TARGET)
        if inputs is not None:
            real = attention_mask != 0 if attention_mask is not None and attention_mask.shape == inputs.shape else None
            echo = echo if echo_inputs is None else self._columns(echo_inputs)
            add_counts(self._counts, inputs, row=_INPUT if echo is None else _INPUT + echo.long(), keep=real)
        if torch.compiler.is_compiling():
            self._compiled = True
            self._compiled_batches += 1
        else:
            self._batches += 1

    def _columns(self, mask: Tensor | None) -> Tensor | None:
        """A mask on the counters' device, (B, 1) where it is of rows."""
        mask = None if mask is None else mask.to(self._counts.device, torch.bool)
        return mask[:, None] if mask is not None and mask.ndim == 1 else mask

    @property
    def batches(self) -> int:
        """Micro-batches observed so far."""
        return self._batches + (int(self._compiled_batches) if self._compiled else 0)

    @property
    def data_targets(self) -> int:
        """Data targets counted so far, of all tokens; 0 where another process tells of them."""
        return int(self._counts[_TARGET].sum()) if self._speaks else 0

    def targets_now(self) -> Tensor:
        """(V,) bool on the counters' device: the token was a target, data or echo, since the last `end_step`."""
        return (self._counts[:_INPUT] != self._before[:_INPUT]).any(dim=0)

    def data_targets_now(self) -> Tensor:
        """(V,) bool on the counters' device: the token was a target of the data since the last `end_step`."""
        return self._counts[_TARGET] != self._before[_TARGET]

    def inputs_now(self) -> Tensor:
        """(V,) bool on the counters' device: the token was an input, data or echo, since the last `end_step`."""
        return (self._counts[_INPUT:] != self._before[_INPUT:]).any(dim=0)

    @torch.no_grad()
    def observe_gradient(self, head_grad: Tensor | None, sample_push: bool, *, shard: Shard | None = None) -> None:
        """Add the row norms of this step's gradient: clipped and averaged, as the optimizer used it.

        Rows whose gradient is not finite add nothing.

        Args:
            head_grad: (V, D) gradient of the output matrix, any float dtype; dense, or sparse in its first dimension.
                None where the step had none.
            sample_push: take the push of the other rows too, not only the pull of this step's targets.
            shard: where the gradient is one process's part of a sharded one: which. It has rows, or, in one dimension,
                elements; then a row may be here in part.

        Raises:
            ValueError: if the gradient has another number of rows.
        """
        if head_grad is None:
            if self.deferred:
                # Every process has as many steps to tell of.
                self._add_later(torch.zeros_like(self.pull), sample_push, empty=True)
            return
        expected = "(n, D) or (n,)" if shard is not None else f"({self.rows}, D)"
        if shard is None and (head_grad.ndim != 2 or head_grad.shape[0] != self.rows):
            raise ValueError(f"the gradient has shape {tuple(head_grad.shape)}; expected {expected}")
        gradient, on_host = head_grad.detach(), self.pull.device.type == head_grad.device.type == "cpu"
        if on_host and not (self.deferred or sample_push or gradient.is_sparse):
            # Few rows are targets. Elsewhere to count them would make the host wait, which costs more than to read all.
            rows = self.targets_now().nonzero().squeeze(1)
            self.pull.index_add_(0, rows, gradient_norms(gradient, rows))
            return
        norms = torch.zeros_like(self.pull)
        if shard is None:
            norms += self._all_norms(gradient).to(norms.device)
        elif gradient.ndim == 1:
            for piece in shard.pieces(_PIECE_ROWS):
                norms[piece] = gradient_norms(shard.take(gradient, piece)).to(norms.device)
        else:
            first = shard.part.start
            norms[first : first + len(gradient)] = self._all_norms(gradient).to(norms.device)
        if self.deferred:
            self._add_later(norms, sample_push)
        else:
            inputs = self.inputs_now() if self.tied and sample_push else None
            self._add(PendingStep(norms, self.targets_now(), inputs, sample_push))

    def end_step(self, step: int) -> None:
        """Close an optimizer step; the first one has number 1. Settles, where no more steps may wait."""
        targets = self.targets_now()
        self.last_target.masked_fill_(targets, step)
        self.last_data_target.masked_fill_(self.data_targets_now(), step)
        self.steps += 1
        if self.deferred:
            masked = self._pending.number(step)
            self._missed |= (targets if masked is None else targets & ~masked).any()
        self._clear_step()
        if self._pending.full:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Add the steps that wait for other processes' targets. For all processes to call, where there are any.

        Each step is added by itself and in order, so that it makes no difference when.
        """
        if self._pending:
            piece = collective.Piece(0, 0, int(self._pending.sampled))
            self._sampled |= piece.words[2] > 0
            masks = piece.any_bits(self._pending.masks())
            self._add_steps(masks, piece.total(self._pending.squares([*self._edges])) if self._edges else None)

    def _add_steps(self, masks: Tensor, squares: Tensor | None) -> None:
        """Add them, given everyone's masks and the squared norms of rows of which several processes have a part."""
        if squares is not None:
            self._pending.keep_norms(self._edges, squares.sqrt())
        for step in self._pending.take(masks):
            self._add(step)
            if step.number is not None:
                told = torch.where(step.targets, step.number, -1)
                self.last_target.copy_(self.last_target.maximum(told))

    @torch.no_grad()
    def _exchange(self) -> None:
        """Tell the others what is new, and hear of theirs, in one piece of talk.

        By then the masks of the steps have told when tokens last were targets, and averaged gradients are the same on
        all processes: neither is sent.
        """
        if collective.world_size() == 1:
            self.settle()
            return
        counts = self._told
        news = self._shared.news(counts)
        own = packed(too_large(news, collective.world_size())[None])
        waiting = self._pending.masks().cpu() if self._pending else own[:0]
        parts = self._pending.squares([*self._edges]) if self._pending and self._edges else None
        piece = collective.Piece(int(news[2:].any()), int(self._missed), int(self._pending.sampled))
        masks = piece.any_bits(torch.cat([waiting, own]))
        large, kinds = unpacked(masks[-1:], self.rows)[0], 4 if piece.words[0] else 2
        everyones = piece.total(encoded(news[:kinds], large))
        last = piece.largest(self.last_target.to("cpu", torch.int32)) if piece.words[1] else None
        squares = None if parts is None else piece.total(parts)
        self._shared.add(decoded(everyones, large, kinds), counts)
        self._sampled |= piece.words[2] > 0
        if self._pending:
            self._add_steps(masks[:-1].to(self.device), squares)
        if last is not None:
            self.last_target.copy_(self.last_target.maximum(last.to(self.last_target)))
            self._missed.zero_()

    def exposure(self) -> Exposure:
        """The counts so far of all processes, as CPU copies. For all processes to call.

        Of a gradient that is spread over processes, `with_gradients` has all rows.
        """
        self._exchange()
        return Exposure(
            **dict(zip(_COUNTED[:3], self._everyones(), strict=False)),
            **{name: getattr(self, name).to("cpu", copy=True) for name in _ROW_STATE},
            push_samples=self.push_samples,
            push_share=float(_ratio(self._share)),
            steps=self.steps,
        )

    def with_gradients(self, exposure: Exposure, shard: Shard) -> collective.Talk[Exposure]:
        """The `exposure` that was just made, with the gradients of all processes' rows: a work of all of them.

        Args:
            shard: the rows whose gradient this process sees.
        """
        share = yield collective.Telling(self._share.cpu().nan_to_num().double())
        own = torch.stack([exposure.pull, exposure.push, exposure.input_only])
        # From sample to sample push stays as it was.
        kinds = 1 if self._gathered is not None and not self._sampled else 3 if self.tied else 2
        known = own.new_zeros(own.shape) if self._gathered is None else self._gathered
        found = yield from shard.adding_up(own[:kinds])
        self._gathered, self._sampled = torch.cat([found, known[kinds:]]), False
        pull, push, input_only = self._gathered.clone().unbind()
        return replace(exposure, pull=pull, push=push, input_only=input_only, push_share=float(_ratio(share)))

    def resize(self, rows: int) -> None:
        """Follow a resized matrix: new rows start at nothing, cut rows are forgotten. Flags of the step are cleared."""
        for name in ("_counts", "_before", "last_data_target", *_ROW_STATE):
            setattr(self, name, fit_rows(getattr(self, name), rows, -1 if name.startswith("last") else 0))
        self._pending.resize(rows)
        self._shared.resize(rows)
        self._gathered = None
        self.rows = rows
        self._clear_step()

    def to(self, device: torch.device) -> None:
        """Follow a matrix that was moved: from then on steps move nothing between devices."""
        for name in ("_counts", "_before", "last_data_target", *_ROW_STATE, "_compiled_batches", "_share", "_missed"):
            setattr(self, name, getattr(self, name).to(device))
        self._pending.to(device)
        self._shared.to(device)

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self.pull.device

    def state_dict(self, *, spread: bool = False) -> dict[str, Tensor | int]:
        """CPU copies of V-sized tensors, one scalar tensor and ints; loads with ``weights_only=True``.

        The numbers are those of all processes, which must call it together. Take it between optimizer steps: what was
        observed since the last `end_step` is in the counts, the step's flags are not kept.

        Args:
            spread: whether the matrix whose gradient is read is spread over processes.
        """
        self._exchange()
        names, piece = (*_ROW_STATE, "last_data_target"), collective.Piece()
        # The order of floats that are not negative is that of their bits, and a NaN is above them.
        vectors = [getattr(self, name) for name in names]
        words = [one.view(torch.int32) if one.is_floating_point() else one.to(torch.int32) for one in vectors]
        found = zip(names, vectors, piece.largest(torch.stack(words)), strict=True)
        state: dict[str, Tensor | int] = {
            name: (word.view(one.dtype) if one.is_floating_point() else word.to(one.dtype)).to("cpu", copy=True)
            for name, one, word in found
        }
        # A copy of each row, because safetensors refuses tensors that share memory.
        state |= {name: row.clone() for name, row in zip(_COUNTED, self._everyones(), strict=True)}
        share = piece.total(self._share.nan_to_num()) if spread else self._share
        state["push_share"] = _ratio(share).to("cpu", copy=True)
        return state | {"push_samples": self.push_samples, "steps": self.steps, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue from what `state_dict` gave, of as many rows; rank 0 takes all counts: they are in the sum once."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if len(tensors["data_target"]) != self.rows:
            raise ValueError(f"the saved exposure has {len(tensors['data_target'])} rows; expected {self.rows}")
        # In place: a compiled graph may hold these very tensors.
        for row, name in zip(_TOLD, _COUNTED, strict=True):
            self._counts[row].copy_(tensors[name] if collective.is_main() else torch.zeros_like(tensors[name]))
        elsewhere = [row for row, mine in self._edges.items() if not mine]
        for name in _ROW_STATE:
            getattr(self, name).copy_(tensors[name])
            if name != "last_target":
                getattr(self, name)[elsewhere] = 0.0  # of parts of a row the sum is taken
        # States of earlier versions have no echo, so any target was one of the data.
        self.last_data_target.copy_(tensors.get("last_data_target", tensors["last_target"]))
        # Of the two sums the state has the ratio.
        self._share.copy_(torch.stack([tensors["push_share"], torch.ones(())]))
        # Telling anew, once, in full.
        self._pending, self._shared = PendingSteps(self.rows), SharedCounts(len(_COUNTED), self.rows)
        self._gathered = None
        self._missed.zero_()
        self.push_samples, self.steps = int(state["push_samples"]), int(state["steps"])
        self._batches = int(state.get("batches", self.steps))
        self._compiled_batches.zero_()
        self._clear_step()

    @property
    def _told(self) -> Tensor:
        """(4, V) int64: what this process adds to the counts of all, in the order of `_COUNTED`."""
        return self._counts[_TOLD, :] if self._speaks else torch.zeros_like(self._counts)

    def _everyones(self) -> Iterator[Tensor]:
        """The counts of all processes, as far as they are told: new (V,) int64 on the CPU, ordered as `_COUNTED`."""
        counts = self._told.cpu() if collective.world_size() == 1 else self._shared.totals.clone()
        return iter(counts.unbind())

    def _clear_step(self) -> None:
        self._before.copy_(self._counts)

    def _all_norms(self, gradient: Tensor) -> Tensor:
        if not gradient.is_sparse:
            return gradient_norms(gradient)
        gradient = gradient.coalesce()
        norms = torch.zeros(self.rows, dtype=torch.float32, device=gradient.device)
        return norms.index_copy_(0, gradient.indices()[0], gradient_norms(gradient.values()))

    def _add_later(self, norms: Tensor, sample_push: bool, *, empty: bool = False) -> None:
        inputs = self.inputs_now() if self.tied and sample_push else None
        self._pending.put(PendingStep(norms, self.targets_now(), inputs, sample_push and not empty))

    def _add(self, step: PendingStep) -> None:
        """Add a step whose targets are known."""
        self.pull += step.norms.masked_fill(~step.targets, 0.0)
        if not step.sampled:
            return
        untargeted = step.norms.masked_fill(step.targets, 0.0)
        self._share = torch.stack([untargeted.sum(), step.norms.sum()])
        self.push_samples += 1
        if step.inputs is None:
            self.push += untargeted
            return
        self.push += untargeted.masked_fill(step.inputs, 0.0)
        self.input_only += untargeted.masked_fill(~step.inputs, 0.0)
