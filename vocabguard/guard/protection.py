"""What stops the damage, as one part of the guard: echo and hold, switched by settings, rules or the user."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.alerts.rules import AlertRule
from vocabguard.config import GuardConfig
from vocabguard.guard import summary
from vocabguard.guard.batches import BatchContext, LossMeter
from vocabguard.guard.echo import EchoControl
from vocabguard.guard.failures import Faults
from vocabguard.guard.hold import Holder
from vocabguard.guard.hooks import OwnHook
from vocabguard.protect.collator import ECHO_KEY, EchoError
from vocabguard.results import CheckResult, EchoReport, Exposure, NotApplicable, ProbeResult

logger = logging.getLogger("vocabguard")


class Protection:
    """Echo and hold of one run.

    Args:
        echo: None where it is not configured.
        holder: None where it is not configured.
        context: the batch in flight, which gets its echo mask here.
    """

    def __init__(
        self, config: GuardConfig, rules: Iterable[AlertRule], echo: EchoControl | None, holder: Holder | None,
        context: BatchContext, *, shift: bool,
    ) -> None:  # fmt: skip
        self.echo, self.holder = echo, holder
        self._losses = LossMeter(shift) if echo is not None else None
        self._context = context
        self._always = {"echo": config.echo.enabled, "hold": config.hold.enabled}
        self._rules = {kind: {rule.name for rule in rules if kind in rule.actions} for kind in ("echo", "hold")}
        self._asked: dict[str, bool | None] = {"echo": None, "hold": None}
        self._model: nn.Module | None = None
        self._handles: list[Any] = []
        self._unwrap: list[Callable[[], None]] = []

    # -- switching ---------------------------------------------------------------------------------------------------

    def has(self, kind: str) -> bool:
        """Whether ``echo`` or ``hold`` can be switched on in this run."""
        return (self.echo if kind == "echo" else self.holder) is not None

    def ask(self, kind: str, on: bool | None) -> None:
        """What the user wants, whatever rules say; None leaves it to settings and rules."""
        self._asked[kind] = on

    def decide(self, firing: Collection[str]) -> None:
        """Switch echo and hold to what the user, the settings and the firing rules want."""
        if self.echo is not None:
            self.echo.switch(self._wanted("echo", firing))
        if self.holder is not None:
            self.holder.switch(self._wanted("hold", firing))

    def _wanted(self, kind: str, firing: Collection[str]) -> bool:
        asked = self._asked[kind]
        return asked if asked is not None else self._always[kind] or not self._rules[kind].isdisjoint(firing)

    def notes(self) -> tuple[str, ...]:
        """What a user is told before step 1: what is on, and what waits for which rule."""
        said = []
        if self.echo is not None:
            said.append(f"Echo, {self.echo.describe()}, {self._when('echo')}.")
        if self.holder is not None:
            said.append(f"Hold, {self.holder.describe()}, {self._when('hold')}.")
        return tuple(said)

    def _when(self, kind: str) -> str:
        if self._always[kind]:
            return "is on"
        rules = ", ".join(sorted(self._rules[kind]))
        return f"waits for {rules}" if rules else "waits to be switched on"

    # -- batches -----------------------------------------------------------------------------------------------------

    def hook_model(self, model: nn.Module, faults: Faults) -> None:
        """Take the echo mask out of batches on their way into the model, and read the losses on their way out.

        The hooks stay when the guard disables itself: batches that are made already still carry the mask.
        """
        if self._losses is None:
            return
        self._model = model

        def take_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            taken = self._context.take_out(module, args, kwargs)
            if taken is not None and not faults.down and not torch.compiler.is_compiling():
                with faults.contain("finding echo in trimmed labels"):
                    self._context.follow_labels(kwargs)
            return taken

        self._handles.append(model.register_forward_pre_hook(OwnHook(take_out), with_kwargs=True))
        self._handles.append(self._losses.hook(model, self._context, faults))

    def on_finish(self, unwrap: Callable[[], None]) -> None:
        """Call `unwrap` when the run ends."""
        self._unwrap.append(unwrap)

    def join(self, batch: Any, *, inject: bool) -> None:
        """Take the echo mask out of a batch of tensors; where it has none, append rows if they are to be injected."""
        mask = None
        if self.echo is not None and isinstance(batch, Mapping):
            if ECHO_KEY in batch:
                mask = batch.pop(ECHO_KEY)  # type: ignore[attr-defined]
            elif inject:
                try:
                    mask = self.echo.join(batch)
                except EchoError as error:
                    self.echo.source.feed.fail()
                    logger.warning("vocabguard: echo is off from now on, training goes on: %s", error)
            if mask is not None and self._model is not None and isinstance(batch, MutableMapping):
                self._context.fit(batch, mask, self._model)
        self._context.arrive(batch, mask)

    # -- steps and checks --------------------------------------------------------------------------------------------

    def start_epoch(self, skipped: int) -> None:
        """An epoch begins; see `VocabGuard.start_epoch`."""
        if self.echo is not None:
            self.echo.start_epoch(skipped)

    def end_step(self, step: int) -> None:
        """A step is done: a plan that waited may be made now."""
        if self.echo is not None:
            self.echo.catch_up(step)

    @property
    def holds(self) -> bool:
        """Whether rows are held on this process or on others."""
        return self.holder is not None and self.holder.takes_part

    def scalars(self, exposure: Exposure | NotApplicable, live: Tensor) -> dict[str, float]:
        """Logged keys: losses since the last check, echo so far, rows held in the last step. `live`: (V,) bool."""
        found: dict[str, float] = {}
        if self._losses is not None:
            found |= self._losses.take()
        if self.echo is not None and isinstance(exposure, Exposure):
            found |= summary.echo_scalars(exposure, live)
        if self.holder is not None:
            found["hold/share"] = self.holder.share(live)
        return {summary.PREFIX + key: value for key, value in found.items()}

    def report(
        self, exposure: Exposure | NotApplicable, classes: Tensor, groups: Mapping[str, Tensor]
    ) -> EchoReport | None:
        """What echo has done so far; None where it is not configured.

        Args:
            classes: (V,) uint8.
            groups: (V,) bool masks by script group.
        """
        if self.echo is None or isinstance(exposure, NotApplicable):
            return None
        parts = (groups, summary.class_masks(classes))
        by_group, by_class = (
            {name: int(exposure.echo_target[mask].sum()) for name, mask in masks.items()} for masks in parts
        )
        total = int(exposure.echo_target.sum())
        return EchoReport(self.echo.plan, self.echo.on, total, by_group, by_class, self.echo.source.feed.seconds)

    def follow(self, found: CheckResult, base: ProbeResult | None, batches: int) -> None:
        """Act on a check: switch, then adjust what is on. `base`: the probe at the base, if there is one."""
        self.decide(found.firing)
        if self.echo is not None:
            self.echo.revise(found, base, batches)

    # -- the end -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plans and switches; loads with ``weights_only=True``."""
        state: dict[str, Any] = {"asked": dict(self._asked)}
        if self.echo is not None:
            state["echo"] = self.echo.state_dict()
        if self.holder is not None:
            state["hold"] = self.holder.on
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as an earlier run would have; counts must be restored already."""
        self._asked |= state.get("asked", {})
        if self.echo is not None and "echo" in state:
            self.echo.load_state_dict(state["echo"])
        if self.holder is not None and state.get("hold"):
            self.holder.switch(True)

    def stand_down(self) -> None:
        """Stop adding rows and holding; masks that are on their way are still taken out."""
        if self.echo is not None:
            self.echo.source.feed.fail()
        if self.holder is not None:
            self.holder.leave()

    def close(self) -> None:
        """There are no more steps, or all processes know that a guard has failed."""
        if self.holder is not None:
            self.holder.close()

    def finish(self) -> None:
        """Give the dataloader and the model back as they were."""
        for undo in (*self._unwrap, *(handle.remove for handle in self._handles)):
            undo()
        self._unwrap.clear()
        self._handles.clear()
        if self.echo is not None:
            self.echo.source.feed.clear()


def needed(config: GuardConfig, rules: Iterable[AlertRule], kind: str) -> bool:
    """Whether echo or hold may be switched on in this run."""
    wanted = getattr(config, kind)
    return wanted.enabled or wanted.armed or any(kind in rule.actions for rule in rules)
