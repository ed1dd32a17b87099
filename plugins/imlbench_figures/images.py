"""Figures of models of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from imlbench import (
    Artifact,
    Autoencoding,
    Evaluation,
    Examples,
    Kind,
    Params,
    SampleComponents,
    Space,
)
from imlbench.densities import kde_log_prob
from imlbench_figures.mosaic import Panel, write_panels

N_SHOWN = 12
"""Images that are reconstructed, and samples whose nearest training image is shown."""

N_COMPARED = 100
"""Samples and test images whose distances to the training set are compared."""

N_COMPONENTS, N_EACH = 10, 10
"""Components that are shown, and samples of each."""

N_DRAWN = 2000
"""Samples that are drawn to find those of every component."""


class Samples(Artifact[Params]):
    """Samples beside as many real images of the test split."""

    name = "samples"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``samples.png``."""
        space = evaluation.dataset.space
        side = side_of(space)
        real = some(evaluation.splits.test, side**2)
        panels = [
            Panel("samples", evaluation.samples[0, : side**2], side),
            Panel("real images (test split)", real, side),
        ]
        write_panels(heading(evaluation, "samples"), panels, space, folder / "samples.png")


class Nearest(Artifact[Params]):
    """Samples above the training image that is nearest to each: does the model only copy?

    The distance is Euclidean, over all pixels. What it is for test images, which no model has seen,
    stands beside it: samples that are much nearer may be copies.
    """

    name = "nearest"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``nearest.png``."""
        device, train, test = evaluation.device, evaluation.splits.train, evaluation.splits.test
        samples = evaluation.samples[0, :N_COMPARED]
        rows, distances = nearest(samples, train, device)
        of_test = evaluation.once(
            "nearest of test images",
            {"n": N_COMPARED},
            lambda: {"distances": nearest(some(test, N_COMPARED), train, device)[1]},
        )["distances"]
        shown = samples[:N_SHOWN]
        panel = Panel(
            "samples, each above its nearest training image, and their distance",
            torch.cat([shown, train[rows[:N_SHOWN]]]),
            len(shown),
            ["sample", "nearest\ntraining image"],
            [f"{distance:#.3g}" for distance in distances[:N_SHOWN].tolist()],
            "Euclidean distance to the nearest training image: median "
            f"{distances.median():#.3g} of {len(distances)} samples, "
            f"{of_test.median():#.3g} of {len(of_test)} test images",
        )
        title = heading(evaluation, "nearest training images")
        write_panels(title, [panel], evaluation.dataset.space, folder / "nearest.png")


class Reconstructions(Artifact[Params]):
    """Test images above their reconstructions."""

    name = "reconstructions"
    requires = (Autoencoding,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``reconstructions.png``."""
        model = cast(Autoencoding, evaluation.model)
        x = some(evaluation.splits.test, N_SHOWN)
        again = model.decode(model.encode(x.to(evaluation.device))).cpu()
        errors = (again - x).square().flatten(1).sum(dim=1)
        panel = Panel(
            "test images, each above its reconstruction",
            torch.cat([x, again]),
            len(x),
            ["test image", "reconstruction"],
            [f"{error:#.3g}" for error in errors.tolist()],
            "squared error, summed over the pixels",
        )
        title = heading(evaluation, "reconstructions")
        write_panels(title, [panel], evaluation.dataset.space, folder / "reconstructions.png")


class Components(Artifact[Params]):
    """Samples in rows, a row for each of the most frequent components of the base distribution."""

    name = "components"
    requires = (SampleComponents,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``components.png``; nothing if no component has ten of 2,000 samples."""
        model = cast(SampleComponents, evaluation.model)
        x, component = model.sample_components(N_DRAWN, evaluation.generator("components"))
        counts = component.bincount()
        frequent = counts.argsort(descending=True, stable=True)[:N_COMPONENTS].tolist()
        shown = [number for number in frequent if counts[number] >= N_EACH]
        if not shown:
            return
        panel = Panel(
            f"samples of the {len(shown)} most frequent components, and their shares",
            torch.cat([x[component == number][:N_EACH] for number in shown]).cpu(),
            N_EACH,
            [f"component {number}\n{counts[number] / N_DRAWN:.1%}" for number in shown],
        )
        title = heading(evaluation, "components")
        write_panels(title, [panel], evaluation.dataset.space, folder / "components.png")


def heading(evaluation: Evaluation, what: str) -> str:
    """Return the heading of a figure: of which model, and on which data."""
    return f"{evaluation.model.name} on {evaluation.dataset.name}: {what}"


def side_of(space: Space) -> int:
    """Return how many images stand in a row and in a column: fewer of large ones.

    Example:
        >>> [side_of(Space("image", shape)) for shape in ((1, 28, 28), (3, 64, 64))]
        [10, 6]
    """
    return min(10, max(4, math.isqrt(450_000 // space.n_dims)))


def some(split: Examples, n: int) -> Tensor:
    """Return n examples, or all if there are fewer, evenly spaced over a split."""
    return split[rows_of_some(split, n)]


def rows_of_some(split: Examples, n: int) -> Tensor:
    """Return which examples :func:`some` returns."""
    return torch.linspace(0, len(split) - 1, min(n, len(split)), dtype=torch.float64).long()


def nearest(x: Tensor, split: Examples, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of the example that is nearest to each image, and the distance.

    Arguments:
        x: Images, shape (N, C, H, W).
        split: Where to look.
        device: Where to compute.

    Returns:
        int64 and float64, each of shape (N,), on the CPU.
    """
    x, first = x.flatten(1).to(device), 0
    rows, squared = (
        torch.zeros(len(x), dtype=torch.int64),
        torch.full((len(x),), torch.inf).double(),
    )
    for batch in split.batches(1000):
        found = kde_log_prob(x, batch.flatten(1).to(device), [1.0])
        distance = found.squared_distance.cpu()
        rows = torch.where(distance < squared, first + found.nearest.cpu(), rows)
        squared = torch.minimum(squared, distance)
        first += len(batch)
    return rows, squared.sqrt()
