"""The networks that plugins share, and their usual sizes: perceptrons, and the DC-GAN's."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from imlbench.api import Params, Space
from imlbench.errors import ParameterError

P = TypeVar("P", bound=Params)

HIDDEN_DIM = 600
"""Usual width of a perceptron's hidden layer."""
WIDTH = 128
"""Usual number of channels of the DC-GAN's networks next to the image."""


def is_convolutional(space: Space) -> bool:
    """Whether data call for convolutions: square images whose side is a power of two, at least 32.

    Example:
        >>> [is_convolutional(Space("image", (1, side, side))) for side in (8, 28, 64)]
        [False, False, True]
    """
    if space.kind != "image":
        return False
    _, height, width = space.event_shape
    return height == width and width >= 32 and math.log2(width).is_integer()


def usual_latent_dim(space: Space) -> int:
    """Return the usual number of latent dimensions, K: 100 for the DC-GAN, 20 for a perceptron."""
    return 100 if is_convolutional(space) else 20


def fill_sizes(params: P, space: Space) -> P:
    """Return parameters with the usual sizes of the networks for the data, where none are given.

    Either ``width`` or ``hidden_dim`` is left without a value, as the networks do not have it.

    Arguments:
        params: Parameters with ``latent_dim``, ``hidden_dim`` and ``width``.
        space: The space of the data.
    """
    if is_convolutional(space):
        return params.filled(latent_dim=usual_latent_dim(space), width=WIDTH).without("hidden_dim")
    return params.filled(latent_dim=usual_latent_dim(space), hidden_dim=HIDDEN_DIM).without("width")


def require_at_most(name: str, size: int, limit: int, what: str) -> None:
    """Check a size that the data limit.

    Arguments:
        name: The parameter.
        size: Its value.
        limit: The largest value that the data allow.
        what: What the limit is, such as ``"the dimensions of the data"``.

    Raises:
        ParameterError: The size is larger.
    """
    if size > limit:
        raise ParameterError(name, f"must be at most {limit}, {what}; got {size}.")


def perceptron(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return linear layers of the given sizes with activations between them.

    Example:
        >>> perceptron(20, 600, 784)[2].out_features
        784
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1], Unrounded())


def convolutional_decoder(
    latent_dim: int, space: Space, width: int, *, batch_norm: bool
) -> nn.Sequential:
    r"""Return the DC-GAN's generator without its output activation (https://arxiv.org/abs/1511.06434).

    A 4x4 map of ``8 * width`` channels for 64x64 images, then doublings of the side; ReLU between.

    Arguments:
        latent_dim: Number of input dimensions, K.
        space: The space of the images.
        width: Channels of the last hidden layer, d.
        batch_norm: Normalise hidden layers, as the DC-GAN does.

    Returns:
        A module from (N, K) to :math:`(N, *event\_shape)`.
    """
    channels = _channels(space, width)[::-1]
    layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1))]
    for index, n_out in enumerate(channels):
        n_in, stride, padding = (channels[index - 1], 2, 1) if index else (latent_dim, 1, 0)
        is_last = index == len(channels) - 1
        use_norm = batch_norm and not is_last
        layers.append(nn.ConvTranspose2d(n_in, n_out, 4, stride, padding, bias=not use_norm))
        if use_norm:
            layers.append(nn.BatchNorm2d(n_out))
        if not is_last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers, Unrounded())


def convolutional_encoder(
    space: Space, n_out: int, width: int, *, batch_norm: bool
) -> nn.Sequential:
    r"""Return the mirror image of :func:`convolutional_decoder`: the DC-GAN's discriminator.

    Leaky ReLU between; batch normalisation, if any, not after the first layer.

    Arguments:
        space: The space of the images.
        n_out: Number of outputs.
        width: Channels of the first hidden layer, d.
        batch_norm: Normalise hidden layers, as the DC-GAN does.

    Returns:
        A module from :math:`(N, *event\_shape)` to (N, n_out).
    """
    channels = _channels(space, width)
    layers: list[nn.Module] = []
    for index, (n_in, n_next) in enumerate(pairwise(channels)):
        use_norm = batch_norm and index > 0
        layers.append(nn.Conv2d(n_in, n_next, 4, 2, 1, bias=not use_norm))
        if use_norm:
            layers.append(nn.BatchNorm2d(n_next))
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(
        *layers, nn.Conv2d(channels[-1], n_out, 4, 1, 0), nn.Flatten(), Unrounded()
    )


def _channels(space: Space, width: int) -> list[int]:
    """Return the channels from the image inwards to the 4x4 map."""
    n_halvings = int(math.log2(space.event_shape[-1])) - 2
    return [space.event_shape[0], *(width * 2**index for index in range(n_halvings))]


def unrounded(x: Tensor) -> Tensor:
    """Return a tensor in full precision: float32, if autocast has rounded it to less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Unrounded(nn.Module):
    """Ends a network: losses and log-densities are computed from its output, and not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return unrounded(x)


class Bounded(nn.Module):
    """Squashes real numbers into the value range of a space by tanh; no change if it has none.

    Arguments:
        space: The space of the data.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def forward(self, t: Tensor) -> Tensor:
        if self.space.value_range is None:
            return t
        return self.space.from_unit((t.tanh() + 1) / 2)
