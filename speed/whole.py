"""The whole of iml-gmm on MNIST beside pythae: fit, draw, evaluate."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from imlbench import Examples, Splits
from imlbench.densities import kde_log_prob
from imlbench.testing import CheckContext
from imlbench.training import batch_size_for
from speed import data
from speed.case import Case, Claim, Finding, Measured, Note, Seconds
from speed.measure import ratio, seconds, spread

BANDWIDTH = 0.2
TIME, GAIN = "pythae / imlbench", "kde_paper, imlbench - pythae"

CLAIMS = (
    Claim(
        TIME,
        1.7,
        "the same 50 s of steps; about 25 s to collate a dictionary for every image, and 20 s of "
        "scikit-learn's mixture instead of 4 s",
        at_least=2.0,
    ),
    Claim(
        GAIN,
        14.0,
        "what the noise that iml-gmm trains with is worth; the models are the same otherwise",
        at_least=0.0,
        unit="nats",
    ),
)


def imlbench_samples(model: Any, splits: Splits, n_samples: int, seed: int) -> Tensor:
    """Fit the model and draw from it."""
    model.fit(splits.train, splits.valid, CheckContext(seed))
    with torch.no_grad():
        samples: Tensor = model.eval().sample(n_samples, torch.Generator().manual_seed(seed))
    return samples


def pythae_samples(
    start: Any, images: Tensor, n_samples: int, seed: int, n_components: int
) -> Tensor:
    """Fit pythae's auto-encoder and mixture with the same network, and draw from them."""
    from pythae.models import AE, AEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
    from pythae.trainers import BaseTrainerConfig

    network, params = copy.deepcopy(start.autoencoder), start.params

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Any:
            return ModelOutput(embedding=self.network.encode(x))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network.decode(z))

    config = AEConfig(input_dim=tuple(images.shape[1:]), latent_dim=params.latent_dim)
    model = AE(config, encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        TrainingPipeline(
            model=model,
            training_config=BaseTrainerConfig(
                output_dir=folder,
                num_epochs=params.epochs,
                per_device_train_batch_size=batch_size_for(len(images), params.batch_size),
                learning_rate=params.learning_rate,
                scheduler_cls="OneCycleLR",
                scheduler_params={"max_lr": params.learning_rate, "total_steps": params.epochs + 1},
                seed=seed,
                no_cuda=True,
            ),
        )(train_data=images)
    sampler = GaussianMixtureSampler(
        model=model, sampler_config=GaussianMixtureSamplerConfig(n_components=n_components)
    )
    sampler.fit(images)
    samples: Tensor = sampler.sample(n_samples)
    return samples


def kde_paper(samples: Tensor, test: Tensor) -> float:
    """Return what the metric of this name does."""
    density = kde_log_prob(test, samples.detach().flatten(1), [BANDWIDTH]).log_density
    return float(density.mean()) + math.log(len(samples))


def run(
    n_images: int = 55_000, epochs: int | None = None, n_samples: int = 1000, repetitions: int = 2
) -> Iterator[Finding]:
    """Run both from the same weights, with another seed for every repetition."""
    logging.disable(logging.INFO)  # pythae's loggers print to the console, its bars to stderr
    splits, space = data.load("mnist")
    train = Examples(splits.train.stored[:n_images], scale=splits.train.scale)
    splits = Splits(train, splits.valid, splits.test, splits.fingerprint)
    images, test = train[:], splits.test[:].flatten(1)
    chosen = {} if epochs is None else {"epochs": epochs}
    times: dict[str, list[float]] = {"imlbench": [], "pythae": []}
    values: dict[str, list[float]] = {"imlbench": [], "pythae": []}
    for seed in range(repetitions):
        model = data.build("iml-gmm", space, seed, **chosen)
        start = copy.deepcopy(model)
        n_components = model.params.n_components

        def ours(model: Any = model, seed: int = seed) -> None:
            samples = imlbench_samples(model, splits, n_samples, seed)
            values["imlbench"].append(kde_paper(samples, test))

        def theirs(start: Any = start, seed: int = seed, c: int = n_components) -> None:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                samples = pythae_samples(start, images, n_samples, seed, c)
            values["pythae"].append(kde_paper(samples, test))

        times["imlbench"].append(seconds(ours))
        times["pythae"].append(seconds(theirs))
    yield Measured(TIME, ratio(times["pythae"], times["imlbench"]))
    gains = [a - b for a, b in zip(values["imlbench"], values["pythae"], strict=True)]
    yield Measured(GAIN, spread(gains))
    for name in times:
        yield Seconds(name, spread(times[name]))
        found = ", ".join(f"{value:.1f}" for value in values[name])
        yield Note(f"kde_paper of {name}, one value per repetition: {found} nats.")


CASE = Case(
    "whole",
    "The whole of iml-gmm on MNIST: ratio of times; difference of kde_paper",
    "Fit, 1,000 samples, and their kernel density estimate on the 10,000 test images. iml-gmm as "
    "shipped (K = 20, noise in training). pythae: its AE around the very same network from the "
    "same weights, its TrainingPipeline with as many epochs, the same batch size, Adam, and the "
    "same one-cycle schedule, which it steps by epochs; then its GaussianMixtureSampler with as "
    "many components. Decoding images to float32 is part of imlbench's time, not of pythae's. "
    "Each repetition has another seed.",
    CLAIMS,
    run,
    needs=("pythae",),
)
