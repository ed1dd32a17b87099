"""Training: a step as shipped, beside the usual loader and the usual optimiser."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from imlbench import Examples
from imlbench.training import OneCycleAdam, batch_size_for
from speed import data
from speed.case import Agreement, Case, Claim, Finding, Measured, Seconds
from speed.measure import interleaved, ratio, seconds, spread

BOTH, LOADER, OPTIMISER = "DataLoader, default Adam", "DataLoader", "default Adam"
SHIPPED = "imlbench"

CLAIMS = (
    Claim(BOTH, 1.3, "5 ms to collate 500 images, 2 ms for Adam without fusion, of about 25 ms"),
    Claim(LOADER, 1.2, "5 ms to collate 500 images, one by one, of about 25 ms"),
    Claim(OPTIMISER, 1.1, "2 ms for Adam without fusion, of about 25 ms"),
)


class DefaultAdam:
    """The same schedule with torch's Adam as it comes.

    Arguments:
        parameters: What to optimise.
        learning_rate: The peak.
        n_steps: How many steps there will be.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, n_steps: int
    ) -> None:
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, max_lr=learning_rate, total_steps=n_steps
        )

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of ``loss``."""
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()


def resident(train: Examples, batch_size: int) -> Iterator[Tensor]:
    """Yield batches as imlbench's training does."""
    return train.batches(batch_size, torch.Generator().manual_seed(0))


def loader(train: Examples, batch_size: int) -> Iterator[Tensor]:
    """Yield the same batches from a DataLoader over images in float32."""
    dataset = TensorDataset(train[:])
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    return (x for (x,) in DataLoader(dataset, batch_size=batch_size, sampler=sampler))


def epoch(model: Any, batches: Iterator[Tensor], optimizer: Any) -> float:
    """Train for an epoch; return the mean loss."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for x in batches:
        loss = model.autoencoder.loss(x, generator)
        optimizer.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def run(n_images: int = 25_000, repetitions: int = 3) -> Iterator[Finding]:
    """Train one epoch from the same start in four ways."""
    splits, space = data.load("mnist")
    train = Examples(splits.train.stored[:n_images], scale=splits.train.scale)
    start = data.build("iml-gmm", space, seed=0)
    batch_size = batch_size_for(len(train), start.params.batch_size)
    n_steps = len(train) // batch_size
    assert n_steps * batch_size == len(train)  # no incomplete batch, which imlbench leaves out
    losses: dict[str, float] = {}

    def timer(name: str, source: Any, optimizer_class: Any) -> float:
        model = copy.deepcopy(start)
        batches = source(train, batch_size)
        optimizer = optimizer_class(
            model.autoencoder.parameters(), model.params.learning_rate, n_steps
        )
        return seconds(lambda: losses.update({name: epoch(model, batches, optimizer)})) / n_steps

    times = interleaved(
        {
            SHIPPED: lambda: timer(SHIPPED, resident, OneCycleAdam),
            BOTH: lambda: timer(BOTH, loader, DefaultAdam),
            LOADER: lambda: timer(LOADER, loader, OneCycleAdam),
            OPTIMISER: lambda: timer(OPTIMISER, resident, DefaultAdam),
        },
        repetitions,
    )
    for name, values in times.items():
        yield Seconds(f"{name}, one step", spread(values))
    for name in (BOTH, LOADER, OPTIMISER):
        yield Measured(name, ratio(times[name], times[SHIPPED]))
        difference = abs(losses[name] / losses[SHIPPED] - 1)
        yield Agreement(f"mean loss of the epoch, {name}", difference, 1e-2, unit="relative")


CASE = Case(
    "training",
    "Time of a training step, in units of imlbench's",
    "The auto-encoder of iml-gmm as shipped on MNIST, K = 20: an epoch over 25,000 images from the "
    "same weights, in the same batches and with the same noise. DataLoader: torch's, over images "
    "in float32, with its default settings. Default Adam: torch's, not fused.",
    CLAIMS,
    run,
)
