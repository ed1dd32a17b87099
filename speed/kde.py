"""Kernel density estimates: speed beside a bare matrix product, accuracy, and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor

from imlbench.densities import kde_log_prob
from speed import data
from speed.case import Agreement, Case, Claim, Finding, Measured, Note, Seconds, Spread
from speed.measure import interleaved, memory, ratio, seconds, spread

BANDWIDTH = 0.2
TOLERANCE = 1e-4  # what kde_log_prob promises

PRODUCT = "imlbench / bare product"
TREE = "KernelDensity / imlbench"
LEAF = "KernelDensity, leaf / imlbench"
TREE_ERROR = "KernelDensity, error"
LEAF_ERROR = "KernelDensity, leaf, error"
MEMORY = "working memory"

CLAIMS = (
    Claim(
        PRODUCT,
        1.45,
        "an earlier sketch: 1.35 to 1.56; three passes over the distances, and few pairs again",
        at_most=1.5,
    ),
    Claim(TREE, 80.0, "an earlier sketch; distances one by one, in float64", at_least=50.0),
    Claim(LEAF, 80.0, "in 784 dimensions the tree cuts nothing off, so a leaf costs the same"),
    Claim(
        TREE_ERROR,
        1000.0,
        "an earlier sketch; bounds of far nodes cancel in floating point",
        unit="nats",
    ),
    Claim(LEAF_ERROR, 1e-9, "one leaf is a plain sum in float64", unit="nats"),
)

MEMORY_CLAIMS = (
    Claim(
        MEMORY,
        100.0,
        "8 MiB of distances a few times over, a block of differences, and the product's buffers",
        at_most=512.0,
        unit="MiB",
    ),
)


def brute_force(x: Tensor, samples: Tensor) -> Tensor:
    """Return log-densities (N,) as a sum over all pairs, float64, without matrix products."""
    parts = []
    for part in x.double().split(1000):
        distance = torch.cdist(part, samples.double(), compute_mode="donot_use_mm_for_euclid_dist")
        parts.append((-distance.square() / (2 * BANDWIDTH**2)).logsumexp(1))
    n_samples, n_dims = samples.shape
    constant = math.log(n_samples) + n_dims * math.log(BANDWIDTH * math.sqrt(2 * math.pi))
    return torch.cat(parts) - constant


def run(
    n_points: int = 10_000,
    n_samples: int = 1000,
    repetitions: int = 15,
    library_repetitions: int = 3,
) -> Iterator[Finding]:
    """Compare on test images and training images as samples."""
    splits, _ = data.load("mnist")
    x = splits.test[:n_points].flatten(1)
    samples = splits.train[:n_samples].flatten(1)
    points = x.double().numpy()
    tree = KernelDensity(bandwidth=BANDWIDTH).fit(samples.numpy())
    leaf = KernelDensity(bandwidth=BANDWIDTH, leaf_size=n_samples + 1).fit(samples.numpy())
    quick = interleaved(
        {
            "bare product": lambda: seconds(lambda: x @ samples.T),
            "imlbench": lambda: seconds(lambda: kde_log_prob(x, samples, [BANDWIDTH])),
        },
        repetitions,
    )
    yield Measured(PRODUCT, ratio(quick["imlbench"], quick["bare product"]))
    found: dict[str, np.ndarray] = {}

    def score(name: str, density: KernelDensity) -> float:
        return seconds(lambda: found.update({name: density.score_samples(points)}))

    slow = interleaved(
        {
            "imlbench": lambda: seconds(lambda: kde_log_prob(x, samples, [BANDWIDTH])),
            "KernelDensity": lambda: score("KernelDensity", tree),
            "KernelDensity, leaf": lambda: score("KernelDensity, leaf", leaf),
        },
        library_repetitions,
        warm_up=False,
    )
    yield Measured(TREE, ratio(slow["KernelDensity"], slow["imlbench"]))
    yield Measured(LEAF, ratio(slow["KernelDensity, leaf"], slow["imlbench"]))
    for name, values in (quick | {name: slow[name] for name in found}).items():
        yield Seconds(name, spread(values))
    truth = brute_force(x, samples).numpy()
    ours = kde_log_prob(x, samples, [BANDWIDTH]).log_density[0].numpy()
    yield Agreement("imlbench and the sum", float(np.abs(ours - truth).max()), TOLERANCE)
    for claim, name in ((TREE_ERROR, "KernelDensity"), (LEAF_ERROR, "KernelDensity, leaf")):
        error = np.abs(found[name] - truth)
        yield Measured(claim, Spread.single(float(error.max())))
        n_wrong = int((error > TOLERANCE).sum())
        yield Note(
            f"{name}: {n_wrong} of {len(error)} points are off by more than {TOLERANCE:g} nats; "
            f"the mean error is {error.mean():.2g} nats."
        )


def run_memory(
    n_points: int = 10_000, n_samples: int = 10_000, n_dims: int = 12_288, n_checked: int = 20
) -> Iterator[Finding]:
    """Measure how much more memory than its inputs a large estimate needs."""
    generator = torch.Generator().manual_seed(0)
    x, samples = torch.empty(n_points, n_dims), torch.empty(n_samples, n_dims)
    for part in (*x.split(500), *samples.split(500)):
        part.uniform_(generator=generator)
    kde_log_prob(x[:100], samples[:100], [BANDWIDTH])  # loads what a first call loads
    found: list[Tensor] = []
    before = memory("VmRSS")
    time = seconds(lambda: found.extend(kde_log_prob(x, samples, [BANDWIDTH]).log_density))
    growth = (memory("VmHWM") - before) / 2**20
    yield Measured(MEMORY, Spread.single(growth))
    yield Seconds("imlbench", Spread.single(time))
    yield Note(f"The inputs have {(x.nbytes + samples.nbytes) / 2**20:.0f} MiB.")
    difference = (found[0][:n_checked] - brute_force(x[:n_checked], samples)).abs().max()
    yield Agreement(
        f"imlbench and the sum, the first {n_checked} points", float(difference), TOLERANCE
    )


ABOUT = (
    "10,000 test images of MNIST, 1,000 training images as samples, 784 dimensions, bandwidth "
    "0.2. Bare product: x @ samples.T in float32, with the same threads. KernelDensity gets its "
    "points in float64; leaf: with leaf_size above the number of samples, so that there is no "
    "tree; both compute with one thread. Errors are the largest differences to a float64 sum over "
    "all pairs."
)

CASE = Case("kde", "Kernel density estimate: ratios of times; errors", ABOUT, CLAIMS, run)

MEMORY_CASE = Case(
    "kde-memory",
    "Kernel density estimate: memory beside the inputs",
    "10,000 points, 10,000 samples, 12,288 dimensions (64x64 colour images), uniform random "
    "numbers, bandwidth 0.2. Working memory: the peak of the "
    "process, less what it has before.",
    MEMORY_CLAIMS,
    run_memory,
)
