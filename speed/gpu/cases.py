"""What is timed on a device: training, mixtures, hidden Markov models, densities.

Each is compared with the same code on the processors of the same machine, and with bare matrix
products of the same precision on the same device.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imlbench import Examples, Space, Splits
from imlbench.densities import GaussianHMM, GaussianMixture, kde_log_prob
from imlbench.testing import CheckContext
from speed import data, hmm, mixture
from speed.case import Agreement, Case, Claim, Failed, Finding, Measured, Note, Seconds
from speed.gpu.work import Products, seconds_at_peak, synchronised
from speed.measure import interleaved, per_iteration, ratio, spread

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Arguments:
        images: A dataset of images.
        n_colour: Colour images, made of noise.
        side: Height and width of them, in pixels.
        width: Channels of the networks for them.
        latent_dim: Dimensions of what the mixture is fitted to.
        n_components: Its components.
        n_recordings: Recordings of what the hidden Markov model is fitted to.
        n_states: Its states.
        n_test: Test images of the two densities; the second gets a tenth.
        more: Iterations that are timed.
        repetitions: How often.
    """

    images: str = "mnist"
    n_colour: int = 16_000
    side: int = 64
    width: int = 128
    latent_dim: int = 140
    n_components: int = 30
    n_recordings: int = 1000
    n_states: int = 300
    n_test: int = 10_000
    more: int = 5
    repetitions: int = 5


FULL = Size()
QUICK = Size("digits", 50, 32, 2, 5, 3, 20, 4, 200, more=2, repetitions=1)

Prepare = Callable[[torch.device, int], Callable[[], Tensor]]
"""Takes a device and a number of iterations; returns a function that makes them, and its result."""


def on_device(name: str, prepare: Prepare, device: torch.device, size: Size) -> Iterator[Finding]:
    """Time iterations on a device, count their products, and tell their memory."""
    few, many = prepare(device, 1), prepare(device, 1 + size.more)
    with Products() as of_few:
        few()
    _reset_peak_memory(device)
    with Products() as of_many:
        many()
    operations = {k: (n - of_few.operations[k]) / size.more for k, n in of_many.operations.items()}
    timer = per_iteration(lambda n: synchronised(prepare(device, n), device), more=size.more)
    times = [timer() for _ in range(size.repetitions)]
    yield Seconds(f"{name}, {device}", spread(times))
    percent = 100 * seconds_at_peak(operations, device)
    yield _ratio(f"{name}: share of peak", [percent] * len(times), times)
    amounts = ", ".join(f"{n / 1e9:.3g} in {k}" for k, n in operations.items())
    memory = _peak_memory(device)
    yield Note(f"{name}: 1e9 operations in products: {amounts}.{memory}")


def beside_cpu(
    name: str, prepare: Prepare, device: torch.device, size: Size, tolerance: float | None = None
) -> Iterator[Finding]:
    """Time iterations on a device and on the CPU, in turn, and compare their results.

    Arguments:
        name: What is timed.
        prepare: Prepares it.
        device: Where.
        size: How often.
        tolerance: How far apart results may be; by default they are not compared, as where random
            numbers of two devices differ.
    """
    yield from on_device(name, prepare, device, size)
    timers = {
        where.type: per_iteration(
            lambda n, where=where: synchronised(prepare(where, n), where),  # type: ignore[misc]
            more=size.more,
        )
        for where in (CPU, device)
    }
    times = interleaved(timers, 1 + size.repetitions // 3, warm_up=False)
    yield Seconds(f"{name}, cpu", spread(times["cpu"]))
    yield _ratio(f"{name}: CPU / device", times["cpu"], times[device.type])
    if tolerance is not None:
        results = [prepare(where, 3)().cpu() for where in (CPU, device)]
        difference = (results[0] - results[1]).abs().max()
        yield Agreement(f"{name}, device and CPU", float(difference), tolerance)


def _ratio(claim: str, times: Sequence[float], reference: Sequence[float]) -> Finding:
    """Return a ratio of times, or that they are too short to be told from noise."""
    try:
        return Measured(claim, ratio(times, reference))
    except ValueError as error:
        return Failed.of(claim, error)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" Peak memory: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB."


def training(device: torch.device, size: Size) -> Iterator[Finding]:
    """Epochs of an auto-encoder: the perceptron, and the convolutional network."""
    splits, space = data.load(size.images)
    yield from beside_cpu("perceptron", epochs(splits, space), device, size)
    shape = (3, size.side, size.side)
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size.n_colour, *shape), generator=noise, dtype=torch.uint8)
    examples = Examples(pixels, scale=1 / 127.5, offset=-1.0)
    colour = Splits(examples, Examples(pixels[:50]), Examples(pixels[:50]), fingerprint="noise")
    prepare = epochs(colour, Space("image", shape, (-1.0, 1.0)), width=size.width)
    yield from on_device("convolutions", prepare, device, size)


def epochs(splits: Splits, space: Space, **params: object) -> Prepare:
    """Return the fit of iml-gaussian, whose second stage takes no time that counts."""

    def prepare(device: torch.device, n: int) -> Callable[[], Tensor]:
        model = data.build("iml-gaussian", space, seed=0, epochs=n, **params).to(device)
        train, valid = splits.train.to(device), splits.valid.to(device)
        context = CheckContext()
        context.device = device

        def fit() -> Tensor:
            model.fit(train, valid, context)
            return torch.tensor(context.history[-1].values["loss"])

        return fit

    return prepare


def fit_mixture(device: torch.device, size: Size) -> Iterator[Finding]:
    """Iterations of a mixture's fit, beside scikit-learn's, too."""
    model, splits = data.autoencoder(size.images, size.latent_dim)
    h = torch.cat([data.embed(model, splits.train), data.embed(model, splits.valid)])
    start = GaussianMixture(size.latent_dim, size.n_components, max_iter=1)
    start.fit(h, generator=torch.Generator().manual_seed(0))

    def prepare(where: torch.device, n: int) -> Callable[[], Tensor]:
        points = h.to(where)
        fit = mixture.imlbench_fit(copy.deepcopy(start).to(where), points)(n)
        return lambda: fit().log_prob(points[:1000])

    yield from beside_cpu("EM", prepare, device, size, tolerance=1e-2)
    library = per_iteration(mixture.sklearn_fit(start, h.double()), more=2)
    ours = per_iteration(lambda n: synchronised(prepare(device, n), device), more=size.more)
    times = interleaved({"library": library, "ours": ours}, 1, warm_up=False)
    yield Seconds("EM, scikit-learn", spread(times["library"]))
    yield _ratio("EM: scikit-learn / device", times["library"], times["ours"])


def fit_hmm(device: torch.device, size: Size) -> Iterator[Finding]:
    """Iterations of a hidden Markov model's fit; they do not depend on what the points are."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 14, (size.n_recordings,), generator=generator).tolist()
    h = torch.randn(sum(lengths), 80, generator=generator)
    start = GaussianHMM(80, size.n_states, max_iter=1)
    start.fit(h, generator=generator, lengths=lengths)

    def prepare(where: torch.device, n: int) -> Callable[[], Tensor]:
        points = h.to(where)
        fit = hmm.imlbench_fit(copy.deepcopy(start).to(where), points, lengths)(n)
        return lambda: torch.tensor(fit().log_likelihoods[-1])

    yield from beside_cpu("EM", prepare, device, size, tolerance=1e-3)


def kernel_density(device: torch.device, size: Size) -> Iterator[Finding]:
    """Kernel density estimates of test images, with a thousand training images as samples."""
    splits, _ = data.load(size.images)
    x, samples = splits.test[: size.n_test].flatten(1), splits.train[:1000].flatten(1)

    def prepare(where: torch.device, n: int) -> Callable[[], Tensor]:
        inputs = x.to(where), samples.to(where)
        return lambda: torch.cat([kde_log_prob(*inputs, [0.2]).log_density for _ in range(n)])

    yield from beside_cpu("estimate", prepare, device, size, tolerance=2e-4)


def likelihood(device: torch.device, size: Size) -> Iterator[Finding]:
    """Log-volumes of a decoder at the embeddings of test images, as likelihoods need them."""
    model, splits = data.autoencoder(size.images, min(20, size.latent_dim))
    network = model.autoencoder
    h = network.encode(splits.test[: size.n_test // 10])

    def prepare(where: torch.device, n: int) -> Callable[[], Tensor]:
        decoder, parts = copy.deepcopy(network).to(where), h.to(where).split(100)
        return lambda: torch.cat([decoder.log_volume_manifold(part) for part in n * parts])

    yield from beside_cpu("volumes", prepare, device, size, tolerance=1e-2)


def _claims(name: str, share: float, why: str, faster: float | None = None) -> tuple[Claim, ...]:
    """Return what is expected of a device: its share of peak, and how much faster it is."""
    found = [Claim(f"{name}: share of peak", share, why, unit="%")]
    if faster is not None:
        found.append(Claim(f"{name}: CPU / device", faster, "products of large matrices, 16 cores"))
    return tuple(found)


def make_cases(device: torch.device, size: Size) -> list[Case]:
    """Return all cases for a device; predictions are for one of the size of an H200."""

    def case(
        function: Callable[[torch.device, Size], Iterator[Finding]],
        title: str,
        about: str,
        *claims: Claim,
    ) -> Case:
        name = function.__name__.replace("_", "-")
        return Case(name, title, about, claims, functools.partial(function, device, size))

    return [
        case(
            training,
            "Epochs of iml's auto-encoders",
            "perceptron: 784-600-20 on MNIST, batches of 500. convolutions: width 128, on "
            f"{size.n_colour:,} images of noise, {size.side}x{size.side} pixels.",
            *_claims("perceptron", 5, "a hundred kernels a step, of 10 us, for 3e9 operations", 5),
            *_claims("convolutions", 20, "cuDNN's deterministic algorithms, in TF32"),
        ),
        case(
            fit_mixture,
            "EM iterations of a mixture",
            f"{size.n_components} components with full covariances, all embeddings of "
            f"{size.images} that are not for testing, K = {size.latent_dim}. scikit-learn: "
            "float64, on the CPU, once.",
            *_claims("EM", 25, "products of blocks; second moments in float64", 30),
            Claim("EM: scikit-learn / device", 150, "7 times the CPU's code, and that 30 times"),
        ),
        case(
            fit_hmm,
            "EM iterations of a hidden Markov model",
            f"{size.n_states} states, {size.n_recordings:,} recordings of 4 to 13 points in 80 "
            "dimensions.",
            *_claims("EM", 5, "13 steps, one after the other, of small products", 5),
        ),
        case(
            kernel_density,
            "Kernel density estimates",
            f"{size.n_test:,} test images of {size.images}, 1,000 samples, bandwidth 0.2.",
            *_claims("estimate", 10, "three passes over the distances, which memory limits", 20),
        ),
        case(
            likelihood,
            "Manifold log-volumes",
            f"{size.n_test // 10:,} test images of {size.images}, a hundred at a time.",
            *_claims("volumes", 10, "blocks of a hundred images are small", 10),
        ),
    ]
