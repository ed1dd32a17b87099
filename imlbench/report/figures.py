"""Figures of one job, drawn from its samples."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from imlbench.api import Evaluation, Space
from imlbench.store import write_atomically

MIN_PIXELS = 56
"""Smaller images are enlarged to at least this size, so that a person can see them."""


def draw_figures(evaluation: Evaluation, folder: Path) -> None:
    """Write the figures that suit the data.

    Arguments:
        evaluation: The fitted model, its samples, and the data.
        folder: Made if it does not exist.
    """
    space = evaluation.dataset.space
    if space.kind == "image":
        write_grid(evaluation.samples[0, :100], space, folder / "samples.png", n_columns=10)


def write_grid(images: Tensor, space: Space, path: Path, *, n_columns: int) -> None:
    """Write images (N, C, H, W) side by side as a PNG; values are clipped to the space's range."""
    low, high = space.value_range or (images.min().item(), images.max().item())
    pixels = ((images - low) / (high - low)).clamp(0, 1)
    zoom = -(-MIN_PIXELS // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, dim=-2).repeat_interleave(zoom, dim=-1)
    grid = make_grid(pixels, nrow=n_columns, padding=2, pad_value=torch.tensor(0.5).item())
    write_atomically(path, lambda temporary: save_image(grid, temporary))
