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


def make_autoencoder(params: Any, space: Space) -> InvertibleNetwork | ConvolutionalAutoencoder:
    """Return the auto-encoder of the paper for the kind of data.

    Large images get the convolutional one, other images the invertible perceptron, and vectors the
    invertible linear map of Figure 1.

    Arguments:
        params: Resolved parameters of an IML model.
        space: The space of the data; sets the output's size and activation.
    """
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
