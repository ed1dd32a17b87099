"""Images in rows and columns, pixel by pixel: what the figures of image models are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from imlbench import Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
"""Pixels to the inch, by which matplotlib sizes text."""

MIN_PIXELS = 56
"""Smaller images are enlarged to at least this size, so that a person can see them."""

GAP = 2
"""White pixels around images."""


@dataclass(frozen=True)
class Panel:
    """Images side by side under a title.

    Arguments:
        title: What they are.
        images: In rows from left to right, shape (N, C, H, W).
        n_columns: Images in a row.
        row_labels: Stand on the left; none, or one for each row.
        column_labels: Stand below; none, or one for each column.
        caption: Stands below these.
    """

    title: str
    images: Tensor
    n_columns: int
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    caption: str = ""


def tile(images: Tensor, space: Space, n_columns: int, gap: int = GAP) -> NDArray[np.uint8]:
    """Return images in rows and columns, enlarged by a whole number if they are small.

    Arguments:
        images: Shape (N, C, H, W); values are clipped to the space's range, or, if it has none,
            stretched from their least to their greatest.
        space: What an image is.
        n_columns: Images in a row.
        gap: White pixels between images and around them.

    Returns:
        Shape (height, width, 3).
    """
    if space.value_range is None:
        space = replace(space, value_range=(images.min().item(), images.max().item()))
    unit = space.to_unit(images).clamp(0, 1).mul(255).round().byte()
    zoom = zoom_of(space)
    unit = unit.repeat_interleave(zoom, dim=-2).repeat_interleave(zoom, dim=-1)
    _, _, height, width = unit.shape
    n_rows = -(-len(unit) // n_columns)
    shape = gap + n_rows * (height + gap), gap + n_columns * (width + gap), 3
    canvas = np.full(shape, 255, np.uint8)
    for number, image in enumerate(unit):
        top = gap + number // n_columns * (height + gap)
        left = gap + number % n_columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.movedim(0, -1).numpy()
    return canvas


def zoom_of(space: Space) -> int:
    """Return by how much images are enlarged."""
    return -(-MIN_PIXELS // space.event_shape[-1])


class _Layout:
    """Places panels from left to right, to the pixel: matplotlib's own layouts blur images."""

    heading, title, label, caption, margin = 44, 30, 20, 20, 16
    row_label = 120
    min_width = 620

    def __init__(self, panels: Sequence[tuple[Panel, NDArray[np.uint8]]]) -> None:
        self._left = []
        right = 0
        for panel, pixels in panels:
            left = right + (self.row_label if panel.row_labels else self.margin)
            self._left.append(left)
            right = left + pixels.shape[1]
        self.width = max(right + self.margin, self.min_width)
        self._indent = (self.width - right - self.margin) // 2
        labelled = any(panel.column_labels for panel, _ in panels)
        captioned = any(panel.caption for panel, _ in panels)
        self._bottom = self.margin + self.label * labelled + self.caption * captioned
        self._tallest = max(pixels.shape[0] for _, pixels in panels)
        self.height = self.heading + self.title + self._tallest + self._bottom

    def box(self, number: int, pixels: NDArray[np.uint8]) -> tuple[float, float, float, float]:
        """Return left, bottom, width and height of a panel as shares of the figure."""
        height, width, _ = pixels.shape
        bottom = self._bottom + self._tallest - height
        return (
            (self._left[number] + self._indent) / self.width,
            bottom / self.height,
            width / self.width,
            height / self.height,
        )


def write_panels(heading: str, panels: Sequence[Panel], space: Space, path: Path) -> None:
    """Write panels side by side as a PNG; every pixel of an image is a whole number of its own.

    Arguments:
        heading: Stands above all.
        panels: At least one.
        space: What an image is.
        path: The file.
    """
    from matplotlib.figure import Figure

    tiled = [(panel, tile(panel.images, space, panel.n_columns)) for panel in panels]
    layout = _Layout(tiled)
    figure = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI)
    figure.text(0.5, 1 - 14 / layout.height, heading, ha="center", va="top", size=11)
    for number, (panel, pixels) in enumerate(tiled):
        _draw(figure, panel, pixels, layout.box(number, pixels))
    figure.savefig(path, dpi=DPI)


def _draw(
    figure: Figure,
    panel: Panel,
    pixels: NDArray[np.uint8],
    box: tuple[float, float, float, float],
) -> None:
    axes = figure.add_axes(box)
    axes.imshow(pixels, interpolation="none", aspect="auto")
    axes.set_title(panel.title, size=9, pad=4)
    axes.spines[:].set_visible(False)
    n_rows = -(-len(panel.images) // panel.n_columns)
    axes.set_yticks(_centres(n_rows, pixels.shape[0])[: len(panel.row_labels)], panel.row_labels)
    columns = _centres(panel.n_columns, pixels.shape[1])
    axes.set_xticks(columns[: len(panel.column_labels)], panel.column_labels)
    axes.tick_params(length=0, labelsize=8, pad=3)
    axes.set_xlabel(panel.caption, size=8)


def _centres(n: int, size: int) -> NDArray[np.float64]:
    """Return where the middles of n images are along ``size`` pixels."""
    return GAP / 2 - 0.5 + (size - GAP) / n * (np.arange(n, dtype=np.float64) + 0.5)
