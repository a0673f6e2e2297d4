"""Fitting the networks of `vocabguard.measure.forecast_networks` on recorded fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import torch
from early_replay import PRIORS, Recorded
from torch import nn

from vocabguard.measure.forecast import Floats
from vocabguard.measure.forecast_networks import KINDS, LEVELS, QuantileNets, nets_of

Name = Literal["running-adam", "running-sgd", "starting"]

MEMBERS = 4
HIDDEN = 32
PAIRS = {"running-adam": 36, "running-sgd": 60, "starting": 16}
ROWS = 1200
EPOCHS = 10
BATCH = 4096
_MEDIAN = LEVELS.index(0.5)


class Member(nn.Module):
    """One network, in torch: what `forecast_networks.QuantileNets` computes in numpy."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, len(LEVELS))]
        )
        self.past = nn.Linear(inputs, 1, bias=False)
        nn.init.zeros_(self.past.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, Q) quantiles."""
        past = self.past(x)
        for layer in self.layers[:2]:
            x = nn.functional.silu(layer(x))
        out = self.layers[2](x)
        steps = nn.functional.softplus(out - 2)
        below = steps[:, :_MEDIAN].flip(1).cumsum(1).flip(1)
        above = steps[:, _MEDIAN + 1 :].cumsum(1)
        middle = out[:, _MEDIAN : _MEDIAN + 1]
        return torch.cat([middle - below, middle, middle + above], 1) + past


def examples(run: Recorded, name: Name, seed: int) -> tuple[Floats, Floats]:
    """Numbers and growths of some rows, at random moments up to random later ones.

    Any check may stand for the end: a run that is cut short there went the same way.
    """
    rng = np.random.default_rng(seed)
    live, inputs, growths = np.flatnonzero(run.live), [], []
    for _ in range(PAIRS[name]):
        check = 0 if name == "starting" else run.at(rng.uniform(0.04, 0.7))
        end = run.last if rng.random() < 0.5 else int(rng.integers(check + 2, run.last + 1))
        prior = PRIORS[rng.integers(2)] if name == "starting" else PRIORS[rng.choice(3, p=(0.5, 0.3, 0.2))]
        x, y = run.pair(check, end, prior, int(rng.integers(2**31)))
        chosen = rng.choice(live, min(ROWS, len(live)), replace=False)
        inputs.append(x[chosen])
        growths.append(y[chosen])
    return np.concatenate(inputs), np.concatenate(growths)


def fit(runs: Sequence[Recorded], name: Name, seed: int = 0, members: int = MEMBERS) -> dict[str, Any]:
    """Fit some networks, each on all runs but its share of them.

    Returns:
        The tensors of `forecast_networks.nets_of`, not widened.
    """
    runs = concerned(runs, name)
    data = [examples(run, name, seed + index) for index, run in enumerate(runs)]
    inputs = np.concatenate([x for x, _ in data])
    mean, scale = inputs.mean(0), np.maximum(inputs.std(0), 0.05)
    order = np.random.default_rng(seed).permutation(len(runs))
    trained = []
    for member in range(members):
        left_out = set(order[member::members]) if members > 1 else set()
        chosen = [data[index] for index in range(len(runs)) if index not in left_out]
        x = np.clip((np.concatenate([x for x, _ in chosen]) - mean) / scale, -4, 4)
        trained.append(train(x, np.concatenate([y for _, y in chosen]), seed + member))
    tensors = {f"{name}/mean": mean, f"{name}/scale": scale, f"{name}/widen": np.ones(2)}
    for layer in range(3):
        parts = [net.layers[layer] for net in trained]
        tensors[f"{name}/weight{layer}"] = np.stack([part.weight.detach().numpy().T for part in parts])
        tensors[f"{name}/bias{layer}"] = np.stack([part.bias.detach().numpy()[None] for part in parts])
    tensors[f"{name}/weight3"] = np.stack([net.past.weight.detach().numpy().T for net in trained])
    return {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()}


def concerned(runs: Sequence[Recorded], name: Name) -> list[Recorded]:
    """The runs that networks of a name are for: gradient descent has its own, and none before its first step."""
    return [run for run in runs if (run.setup.optimizer == "sgd") == (name == "running-sgd")]


def train(inputs: Floats, growths: Floats, seed: int, epochs: int = EPOCHS, batch: int = BATCH) -> Member:
    """One network, by the pinball loss.

    Args:
        inputs: (n, F), standardised.
        growths: (n,).
        seed: of the weights and the order.
        epochs: passes over the rows.
        batch: rows a step.
    """
    torch.manual_seed(seed)
    net, levels = Member(inputs.shape[1]), torch.tensor(LEVELS)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(growths).float()[:, None]
    batches = max(1, len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=batches * epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(x))[: batches * batch].view(batches, -1):
            missed = y[part] - net(x[part])
            loss = torch.maximum(levels * missed, (levels - 1) * missed).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return net


def left_out(runs: Sequence[Recorded], name: Name) -> list[tuple[Recorded, QuantileNets]]:
    """Each run with networks that were fitted on the runs of other data."""
    runs, found = concerned(runs, name), []
    for data in sorted({run.setup.data for run in runs}):
        nets = nets_of(fit([run for run in runs if run.setup.data != data], name, members=2), name)
        found += [(run, nets) for run in runs if run.setup.data == data]
    return found


def widening(pairs: Sequence[tuple[Recorded, QuantileNets]], name: Name) -> Floats:
    """How much wider intervals must be to hold 90 % of the rows in nine of ten runs whose data was left out.

    The factor of each side is that with which 95 % of a run's rows lie within. The few that go quite another way would
    make the intervals of all others useless.
    """
    factors = []
    for run, nets in pairs:
        moved = run.live & (run.end < 0.98)
        for share in (0.0,) if name == "starting" else (0.1, 0.2, 0.4):
            if moved.any():
                x, y = run.pair(run.at(share), run.last, "complete", 0)
                levels = nets.quantiles(x)[moved]
                off, middle = y[moved] - levels[:, _MEDIAN], levels[:, _MEDIAN]
                sides = -off / (middle - levels[:, 0]), off / (levels[:, -1] - middle)
                factors.append([np.quantile(side, 0.95) for side in sides])
    return np.quantile(factors, 0.9, axis=0).astype(np.float32)


def fit_all(runs: Sequence[Recorded], path: Path) -> None:
    """Fit and widen both kinds on the runs, and write them."""
    tensors: dict[str, Any] = {}
    for name in KINDS:
        widen = widening(left_out(runs, name), name)
        print(f"{name}: intervals widened by {widen.round(2).tolist()}")
        tensors |= {**fit(runs, name), f"{name}/widen": widen}
    path.write_bytes(safetensors.numpy.save(tensors))
