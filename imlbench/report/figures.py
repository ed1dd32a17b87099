"""Figures of one job, drawn from its samples and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor
from torchvision.utils import make_grid, save_image

from imlbench.api import Evaluation, Examples, Space
from imlbench.densities import kde_log_prob
from imlbench.store import write_atomically

matplotlib.use("Agg")

MIN_PIXELS = 56
"""Smaller images are enlarged to at least this size, so that a person can see them."""
N_EXAMPLES = 12
"""Test images that are reconstructed, and whose nearest sample is shown."""
N_POINTS = 2000
"""Points in a scatter plot."""


def draw_figures(evaluation: Evaluation, folder: Path) -> None:
    """Write the figures that suit the data and the model.

    ========================  ==================================================================
    ``samples.png``           a hundred samples (images)
    ``components.png``        samples in rows, a row for each of the heaviest components (images)
    ``reconstructions.png``   test images above their reconstructions (images)
    ``nearest.png``           test images above the nearest sample of each (images, Fig. 4 and 5)
    ``plane.png``             data and samples, in data and in latent space (2-D data, Fig. 1)
    ``latents.png``           embeddings and the components' ellipses (K = 2, Fig. 2)
    ========================  ==================================================================

    A dataset may add its own.

    Arguments:
        evaluation: The fitted model, its samples, and the data.
        folder: Made if it does not exist.
    """
    space, model = evaluation.dataset.space, evaluation.model
    folder.mkdir(parents=True, exist_ok=True)
    has_latents = model.can("encode") and model.can("decode")
    if space.kind == "image":
        write_grid(evaluation.samples[0, :100], space, folder / "samples.png", n_columns=10)
        _draw_nearest(evaluation, folder / "nearest.png")
        if has_latents:
            _draw_reconstructions(evaluation, folder / "reconstructions.png")
        if model.can("sample_components"):
            _draw_components(evaluation, folder / "components.png")
    if space.event_shape == (2,):
        _draw_plane(evaluation, folder / "plane.png")
    elif has_latents and _latents(evaluation, evaluation.splits.test[:1]).shape[1] == 2:
        _draw_latents(evaluation, folder / "latents.png")
    if evaluation.dataset.can("draw"):
        dataset: Any = evaluation.dataset
        dataset.draw(evaluation, folder)


def write_grid(images: Tensor, space: Space, path: Path, *, n_columns: int) -> None:
    """Write images (N, C, H, W) side by side as a PNG; values are clipped to the space's range."""
    low, high = space.value_range or (images.min().item(), images.max().item())
    pixels = ((images - low) / (high - low)).clamp(0, 1)
    zoom = -(-MIN_PIXELS // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, dim=-2).repeat_interleave(zoom, dim=-1)
    grid = make_grid(pixels, nrow=n_columns, padding=2, pad_value=0.5)
    write_atomically(path, lambda temporary: save_image(grid, temporary))


def _some(split: Examples) -> Tensor:
    """Return a few examples, evenly spaced over a split."""
    return split[torch.linspace(0, len(split) - 1, N_EXAMPLES).long()]


def _latents(evaluation: Evaluation, x: Tensor) -> Tensor:
    model: Any = evaluation.model
    latents: Tensor = model.encode(x.to(evaluation.device)).cpu()
    return latents


def _draw_reconstructions(evaluation: Evaluation, path: Path) -> None:
    model: Any = evaluation.model
    x = _some(evaluation.splits.test)
    again = model.decode(model.encode(x.to(evaluation.device))).cpu()
    write_grid(torch.cat([x, again]), evaluation.dataset.space, path, n_columns=N_EXAMPLES)


def _draw_nearest(evaluation: Evaluation, path: Path) -> None:
    x, samples = _some(evaluation.splits.test), evaluation.samples[0]
    nearest = samples[kde_log_prob(x.flatten(1), samples.flatten(1), [1.0]).nearest]
    write_grid(torch.cat([x, nearest]), evaluation.dataset.space, path, n_columns=N_EXAMPLES)


def _draw_components(evaluation: Evaluation, path: Path) -> None:
    """Up to ten components, the most frequent first, ten samples of each."""
    model: Any = evaluation.model
    generator = torch.Generator(evaluation.device).manual_seed(0)
    x, component = model.sample_components(5000, generator)
    counts = component.bincount()
    rows = [x[component == k][:10] for k in counts.argsort(descending=True)[:10] if counts[k] >= 10]
    if rows:
        write_grid(torch.cat(rows).cpu(), evaluation.dataset.space, path, n_columns=10)


def _draw_plane(evaluation: Evaluation, path: Path) -> None:
    """Data and samples overlaid; beside it the same in latent space, if there is one (Fig. 1)."""
    model = evaluation.model
    data, samples = evaluation.splits.test[:N_POINTS], evaluation.samples[0, :N_POINTS]
    panels = [("data space", data, samples)]
    if model.can("encode") and _latents(evaluation, data[:1]).shape[1] == 2:
        panels.append(("latent space", _latents(evaluation, data), _latents(evaluation, samples)))
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    for index, (title, observed, drawn) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), index)
        axes.scatter(observed[:, 0], observed[:, 1], s=4, alpha=0.4, linewidths=0, label="data")
        axes.scatter(drawn[:, 0], drawn[:, 1], s=4, alpha=0.4, linewidths=0, label="samples")
        axes.set_title(title)
        axes.set_aspect("equal", "datalim")
        if title == "latent space":
            _add_ellipses(axes, model)
    legend = axes.legend(loc="upper right", markerscale=3)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    figure.suptitle(f"{model.name} on {evaluation.dataset.name}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _draw_latents(evaluation: Evaluation, path: Path) -> None:
    """Embeddings with the components' ellipses, and decoded samples where they lie (Fig. 2)."""
    model, space = evaluation.model, evaluation.dataset.space
    h = _latents(evaluation, evaluation.splits.train[:N_POINTS])
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(h[:, 0], h[:, 1], s=4, alpha=0.4, linewidths=0)
    _add_ellipses(axes, model)
    if space.kind == "image":
        _add_thumbnails(axes, evaluation)
    axes.set_title(f"{model.name} on {evaluation.dataset.name}: embeddings and components")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _add_ellipses(axes: Any, model: Any) -> None:
    """Draw the ellipse of two standard deviations of each component that has any weight."""
    density: Any = getattr(model, "density", None)
    if hasattr(density, "covariance"):  # of a single Gaussian
        components = [(1.0, density.mean.cpu(), density.covariance.cpu())]
    elif hasattr(density, "covariances"):
        weights, means, covariances = density.weights, density.means, density.covariances
        components = list(zip(weights.cpu(), means.cpu(), covariances.cpu(), strict=True))
    else:
        return
    for weight, mean, covariance in components:
        if weight < 1e-3:
            continue
        values, vectors = torch.linalg.eigh(covariance)
        angle = torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])).item()
        height, width = (4 * values.sqrt()).tolist()
        axes.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, fill=False, lw=1.2))


def _add_thumbnails(axes: Any, evaluation: Evaluation) -> None:
    """Show decoded draws of the base distribution where they lie."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    samples = evaluation.samples[0, :20]
    low, high = evaluation.dataset.space.value_range or (0.0, 1.0)
    for position, image in zip(_latents(evaluation, samples), samples, strict=True):
        pixels = ((image - low) / (high - low)).clamp(0, 1).movedim(0, -1).squeeze(-1)
        thumbnail = OffsetImage(pixels.numpy(), zoom=28 / pixels.shape[0], cmap="gray_r")
        axes.add_artist(AnnotationBbox(thumbnail, position.tolist(), frameon=False))
