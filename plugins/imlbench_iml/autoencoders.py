"""Stage one: the auto-encoder that suits the data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from imlbench import Space
from imlbench.networks import (
    Bounded,
    convolutional_decoder,
    convolutional_encoder,
    is_convolutional,
)
from imlbench_iml.invertible import InvertibleNetwork, Layer, Sigmoid, TallLinear, Tanh


class ConvolutionalAutoencoder(nn.Module):
    """The DC-GAN's generator as decoder and its mirror image as encoder, without normalisation.

    Its encoder is only approximately the decoder's inverse, and its volume is not known.

    Arguments:
        latent_dim: Number of latent dimensions, K.
        space: The space of the images.
        width: Channels of the widest hidden images, d.
    """

    has_volume = False
    is_bijective = False

    def __init__(self, latent_dim: int, space: Space, width: int) -> None:
        super().__init__()
        self.encode = convolutional_encoder(space, latent_dim, width, batch_norm=False)
        decoder = convolutional_decoder(latent_dim, space, width, batch_norm=False)
        self.decode = nn.Sequential(decoder, Bounded(space))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x."""
        reconstruction: Tensor = self.decode(self.encode(x))
        return reconstruction


class ChunkAutoencoder(nn.Module):
    r"""The paper's auto-encoder of audio: three convolutions in time each way, tanh between them.

    A chunk of n samples becomes n/2 steps of d/2 channels, n/4 of d, and by a filter over all
    those steps K numbers; the decoder is the mirror image. The paper has d = 128 and filters of 200
    samples. Its volume is not known.

    Arguments:
        latent_dim: Number of latent dimensions, K.
        space: The space of the chunks, of shape (n,), n a multiple of 4.
        width: Channels of the second layer, d, at least 2.
        filter_length: Length of the first two layers' filters, even; each halves the rate.
    """

    has_volume = False
    is_bijective = False

    def __init__(self, latent_dim: int, space: Space, width: int, filter_length: int) -> None:
        super().__init__()
        (n,) = space.event_shape
        halving = {"kernel_size": filter_length, "stride": 2, "padding": filter_length // 2 - 1}
        self.encode = nn.Sequential(
            nn.Unflatten(1, (1, n)),
            nn.Conv1d(1, width // 2, **halving),
            nn.Tanh(),
            nn.Conv1d(width // 2, width, **halving),
            nn.Tanh(),
            nn.Conv1d(width, latent_dim, n // 4),
            nn.Flatten(),
        )
        self.decode = nn.Sequential(
            nn.Unflatten(1, (latent_dim, 1)),
            nn.ConvTranspose1d(latent_dim, width, n // 4),
            nn.Tanh(),
            nn.ConvTranspose1d(width, width // 2, **halving),
            nn.Tanh(),
            nn.ConvTranspose1d(width // 2, 1, **halving),
            nn.Flatten(),
            Bounded(space),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x."""
        reconstruction: Tensor = self.decode(self.encode(x))
        return reconstruction


Autoencoder = InvertibleNetwork | ConvolutionalAutoencoder | ChunkAutoencoder


def make_autoencoder(params: Any, space: Space) -> Autoencoder:
    """Return the auto-encoder of the paper for the kind of data.

    Large images get the convolutional one, other images the invertible perceptron, vectors the
    invertible linear map of Figure 1, and chunks of audio their own convolutions.

    Arguments:
        params: Resolved parameters of an IML model.
        space: The space of the data; sets the output's size and activation.
    """
    if space.kind == "sequence":
        return ChunkAutoencoder(params.latent_dim, space, params.width, params.filter_length)
    if is_convolutional(space):
        return ConvolutionalAutoencoder(params.latent_dim, space, params.width)
    inner, outer = params.latent_dim, space.n_dims
    layers: list[Layer]
    if space.kind == "vector":
        layers = [TallLinear(inner, outer)]
    else:
        hidden = params.hidden_dim
        layers = [TallLinear(inner, hidden), Tanh(), TallLinear(hidden, outer)]
    if space.value_range is not None:
        layers.append(Sigmoid(*space.value_range))
    return InvertibleNetwork(layers, space.event_shape)
