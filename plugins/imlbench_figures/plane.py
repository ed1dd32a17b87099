"""Figures of what lies in a plane: data of two dimensions, and two latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from imlbench import Artifact, Autoencoding, Evaluation, Examples, Params
from imlbench.api import AnyModel
from imlbench.densities import DirichletProcessMixture, Gaussian, GaussianHMM, GaussianMixture
from imlbench_figures.images import heading, rows_of_some, some
from imlbench_figures.mosaic import DPI, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_POINTS = 2000
"""Points in a scatter plot."""

N_GRID = 12
"""Latents along each axis that are decoded."""

MIN_WEIGHT = 1e-3
"""Components of less weight are not drawn."""

MAX_CLASSES = 10
"""As many colours as can be told apart."""


class Plane(Artifact[Params]):
    """Data and samples in the plane, and the embeddings of the data if there are two latents.

    Ellipses are two standard deviations of every component of the base distribution; in data space
    they are what the decoder makes of them.
    """

    name = "plane"

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``plane.png``, if the data have two dimensions."""
        if evaluation.dataset.space.event_shape != (2,):
            return
        from matplotlib.figure import Figure

        data, samples = some(evaluation.splits.test, N_POINTS), evaluation.samples[0, :N_POINTS]
        h, view = planar_latents(evaluation, data), View.of(data)
        n_panels = 2 + (h is not None)
        width = 4.3 * n_panels
        figure = Figure(figsize=(width, 4.7))  # to have it laid out would take half of the time
        figure.subplots_adjust(0.7 / width, 0.12, 1 - 0.15 / width, 0.84, wspace=0.22)
        left, right, *others = figure.subplots(1, n_panels)
        scatter(left, data, view, "C0")
        label(left, "data (test split)", "x")
        scatter(right, samples, view, "C1")
        label(right, f"samples{view.outside(samples)}", "x")
        if h is not None:
            curves = outlines(evaluation.model)
            draw_outlines(right, decode(evaluation, curves))
            scatter(others[0], h, View.of(h), "C0")
            label(others[0], "embeddings of the data", "h")
            draw_outlines(others[0], curves)
        figure.suptitle(heading(evaluation, "data and samples"))
        figure.savefig(folder / "plane.png", dpi=DPI)


class Latents(Artifact[Params]):
    """Embeddings of training examples with the components' ellipses; and what latents decode to.

    Ellipses are two standard deviations of every component of the base distribution.
    """

    name = "latents"
    requires = (Autoencoding,)

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``latents.png``, if there are two latents; 2-D data are left to ``plane``."""
        space, train = evaluation.dataset.space, evaluation.splits.train
        h = planar_latents(evaluation, some(train, N_POINTS))
        if h is None or space.event_shape == (2,):
            return
        from matplotlib.figure import Figure

        view, curves, n_panels = View.of(h), outlines(evaluation.model), 1 + (space.kind == "image")
        figure = Figure(figsize=(5.6 * n_panels + 0.6, 5.8), layout="constrained")
        columns = figure.subplots(1, n_panels, squeeze=False)[0]
        scatter_classes(columns[0], h, train, view)
        label(columns[0], "embeddings (training split)", "h")
        if space.kind == "image":
            show_decoded(columns[1], evaluation, view)
            label(columns[1], "what latents decode to", "h")
            draw_outlines(columns[1], curves, color="C1")
        draw_outlines(columns[0], curves)
        figure.suptitle(heading(evaluation, "latent space"))
        figure.savefig(folder / "latents.png", dpi=DPI)


class View(NamedTuple):
    """A square part of the plane.

    Arguments:
        x: Its centre's first coordinate.
        y: Its centre's second coordinate.
        radius: Half of its side.
    """

    x: float
    y: float
    radius: float

    @classmethod
    def of(cls, points: Tensor) -> View:
        """Return what shows all points but the farthest thousandth, and a margin around them."""
        ends = points.double().quantile(torch.tensor([0.001, 0.999]).double(), dim=0)
        x, y = ends.mean(dim=0).tolist()
        return cls(x, y, max(0.6 * (ends[1] - ends[0]).max().item(), 1e-6))

    def outside(self, points: Tensor) -> str:
        """Return a remark on the share of points outside of it; empty if there are none."""
        distance = (points - torch.tensor([self.x, self.y])).abs().amax(dim=1)
        n_outside = int((distance > self.radius).sum())
        return f" ({n_outside / len(points):.2g} outside)" if n_outside else ""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Least and greatest first, least and greatest second coordinate."""
        x, y, radius = self
        return x - radius, x + radius, y - radius, y + radius


def planar_latents(evaluation: Evaluation, x: Tensor) -> Tensor | None:
    """Return the latents of x on the CPU, shape (N, 2); ``None`` if there are not two of each."""
    if not evaluation.model.can(Autoencoding):
        return None
    h = cast(Autoencoding, evaluation.model).encode(x.to(evaluation.device)).cpu()
    return h if h.shape[1] == 2 else None


def decode(evaluation: Evaluation, h: Tensor) -> Tensor:
    """Return what latents (A, B, 2) decode to, on the CPU, shape (A, B, *event_shape)."""
    model = cast(Autoencoding, evaluation.model)
    x: Tensor = model.decode(h.flatten(0, 1).to(evaluation.device)).cpu().unflatten(0, h.shape[:2])
    return x


def outlines(model: AnyModel) -> Tensor:
    """Return the curves of two standard deviations of the components of a model's density.

    Returns:
        Closed curves, float32 of shape (C, 101, 2); C is 0 if the model has no density of the
        known kinds, or if it is not one of two dimensions.
    """
    moments = moments_of(getattr(model, "density", None))
    if moments is None or moments[1].shape[1] != 2:
        return torch.zeros(0, 101, 2)
    weights, means, covariances = (part.double().cpu() for part in moments)
    kept = weights >= MIN_WEIGHT
    angle = torch.linspace(0, 2 * math.pi, 101, dtype=torch.float64)
    circle = 2 * torch.stack([angle.cos(), angle.sin()])
    factors: Tensor = torch.linalg.cholesky(covariances[kept])
    return ((factors @ circle).mT + means[kept, None]).float()


def moments_of(density: object) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return weights (C,), means (C, K) and covariances (C, K, K) of what is known to have them."""
    if isinstance(density, Gaussian):
        return torch.ones(1), density.mean[None], density.covariance[None]
    if isinstance(density, GaussianHMM):
        return torch.ones(len(density.means)), density.means, density.variances.diag_embed()
    if not isinstance(density, (GaussianMixture, DirichletProcessMixture)):
        return None
    full = density.covariance_type == "full"
    return (density.weights, density.means, density.covariances) if full else None


def scatter(axes: Axes, points: Tensor, view: View, color: str, name: str = "") -> None:
    """Draw points of shape (N, 2); those outside of the view are not seen."""
    x, y = points.numpy().T  # matplotlib would look at a tensor number by number
    axes.scatter(x, y, s=6, alpha=0.5, linewidths=0, color=color, label=name)
    axes.axis(view.extent)
    axes.set_aspect("equal")


def scatter_classes(axes: Axes, h: Tensor, split: Examples, view: View) -> None:
    """Draw the latents of some of a split, in colours if it has labels of a few classes."""
    for name, numbers in sorted(split.labels.items()):
        classes = numbers.unique().tolist()
        if 1 < len(classes) <= MAX_CLASSES:
            shown = numbers[rows_of_some(split, len(h))]
            for n, number in enumerate(classes):
                scatter(axes, h[shown == number], view, f"C{n}", str(number))
            legend = axes.legend(title=name, loc="center left", bbox_to_anchor=(1, 0.5))
            for handle in legend.legend_handles:
                if handle is not None:
                    handle.set(alpha=1, sizes=[30])
            return
    scatter(axes, h, view, "C0")


def show_decoded(axes: Axes, evaluation: Evaluation, view: View) -> None:
    """Show what a grid of latents decodes to, every image where its latents are."""
    least_x, greatest_x, least_y, greatest_y = view.extent
    step = view.radius / N_GRID
    x = torch.linspace(least_x + step, greatest_x - step, N_GRID)
    y = torch.linspace(greatest_y - step, least_y + step, N_GRID)  # images begin at the top
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    images = decode(evaluation, grid).flatten(0, 1)
    pixels = tile(images, evaluation.dataset.space, N_GRID, gap=0)
    axes.imshow(pixels, extent=view.extent, aspect="equal")


def draw_outlines(axes: Axes, curves: Tensor, color: str = "0.15") -> None:
    """Draw curves of shape (C, n, 2)."""
    for curve in curves:
        axes.plot(*curve.numpy().T, color=color, linewidth=1.2)


def label(axes: Axes, title: str, coordinates: str) -> None:
    """Write what is seen, and the names of the coordinates."""
    axes.set(title=title, xlabel=f"${coordinates}_1$", ylabel=f"${coordinates}_2$")
