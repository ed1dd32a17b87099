"""Manifold likelihoods: batched Gram matrices beside Jacobians by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from speed import data
from speed.case import Agreement, Case, Claim, Finding, Measured, Seconds
from speed.measure import interleaved, ratio, seconds, spread

REVERSE, FORWARD = "jacrev, image by image", "jacfwd, vectorised"

CLAIMS = (
    Claim(
        REVERSE,
        60.0,
        "784 rows by reverse mode where 20 columns suffice: 39 times the work, and overheads",
    ),
    Claim(FORWARD, 2.0, "the same products, but none shared by images, and passes for tangents"),
)


def run(n_images: int = 100, repetitions: int = 5) -> Iterator[Finding]:
    """Compare on embeddings of test images."""
    model, splits = data.autoencoder("mnist", 20)
    network = model.autoencoder
    h = network.encode(splits.test[:n_images])

    def decode(latent: Tensor) -> Any:
        return network.decode(latent[None]).flatten()

    def log_volume(jacobian: Tensor) -> Any:
        return torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet / 2

    reverse, forward = torch.func.jacrev(decode), torch.func.jacfwd(decode)
    ways: dict[str, Callable[[], Tensor]] = {
        "imlbench": lambda: network.log_volume_manifold(h),
        REVERSE: lambda: torch.stack([log_volume(reverse(latent)) for latent in h]),
        FORWARD: lambda: log_volume(torch.func.vmap(forward)(h)),
    }
    results = {name: way() for name, way in ways.items()}
    timers = {name: lambda way=way: seconds(way) for name, way in ways.items()}
    times = interleaved(timers, repetitions)
    for name, values in times.items():
        yield Seconds(f"{name}, {n_images} images", spread(values))
    for name in (REVERSE, FORWARD):
        yield Measured(name, ratio(times[name], times["imlbench"]))
        difference = (results[name] - results["imlbench"]).abs().max()
        yield Agreement(f"log volume, {name}", float(difference), 1e-3)


CASE = Case(
    "likelihood",
    "Time of manifold log-volumes, in units of imlbench's",
    "The same test images of MNIST, the same trained decoder (K = 20, float32). jacrev: the "
    "Jacobian of each image by torch.func.jacrev, then slogdet of its Gram matrix. jacfwd: all "
    "Jacobians at once, by forward mode under torch.func.vmap.",
    CLAIMS,
    run,
)
