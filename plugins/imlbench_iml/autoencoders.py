r"""Stage one of the IML models: auto-encoders, their parameters, their loss, and their training.

What ``imlbench_iml.models`` adds to this module is the base distribution: nothing here depends on
it, so that a fitted auto-encoder serves them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn

from imlbench import Examples, FitContext, ParameterError, Params, Space, from_data
from imlbench.networks import (
    HIDDEN_DIM,
    Bounded,
    Unrounded,
    convolutional_decoder,
    convolutional_encoder,
    fill_sizes,
    is_convolutional,
    require_at_most,
    usual_latent_dim,
)
from imlbench.training import OneCycleAdam, Precision, n_steps_for, train_epochs
from imlbench_iml.invertible import InvertibleNetwork, Layer, Sigmoid, TallLinear, Tanh

TRAINING = {"epochs": 18, "batch_size": 500, "learning_rate": 3e-3, "precision": "auto"}
"""Usual parameters of the training; they do not apply to a bijection, which needs none."""


class IMLParams(Params):
    """Parameters of every IML model: those of the auto-encoder."""

    latent_dim: int = from_data(ge=1)
    """Number of latent dimensions, K; by default 20, for 64x64 images 100, for sequences 80, and
    for data of fewer dimensions all there are."""
    hidden_dim: int = from_data(ge=1)
    """Width of the perceptron's hidden layer; by default 600, or as wide as narrower data."""
    width: int = from_data(ge=2)
    """Channels of the widest layers inside a convolutional network, d; by default 128, and for
    sequences 16, where the paper has 128."""
    filter_length: int = from_data(ge=2, multiple_of=2)
    """Length of the filters for sequences, in samples; by default 40, where the paper has 200."""
    epochs: int = from_data(ge=1)
    """Passes of the auto-encoder over the training set; by default 18."""
    batch_size: int = from_data(ge=1)
    """Examples per step; by default 500, for sequences 50. Fewer on small data, so that an epoch
    has at least 50 steps."""
    noise: float = from_data(ge=0)
    """Standard deviation of the noise that the perceptron's encoder must undo while it is trained,
    added to the inverse of the output activation, where black is -5.6 and white 5.6; by default 4
    for 784 pixels and in proportion to the root of their number, as the norm of an image is. Zero
    is the paper's plain reconstruction, which all other auto-encoders are trained by."""
    learning_rate: float = from_data(gt=0)
    """Peak of Adam's one-cycle schedule; by default 3e-3, for convolutions on images 5e-4."""
    precision: Precision = from_data()
    """Of the auto-encoder's products during training. By default auto: bfloat16 for wide
    perceptrons and large batches on processors made for it, otherwise float32; the record says
    which it was. Embeddings and likelihoods are computed in float32."""


P = TypeVar("P", bound=IMLParams)


class Autoencoder(nn.Module, ABC):
    """A decoder from R^K to data space, and an encoder that is its inverse, more or less.

    Built from parameters that :meth:`resolve` returned, and the space of the data.
    """

    has_volume: bool = False
    """Whether the decoder's change of volume is known."""
    is_bijective: bool = False
    """Whether the encoder inverts the decoder and the decoder the encoder, untrained as it is."""

    @classmethod
    @abstractmethod
    def resolve(cls, params: P, space: Space) -> P:
        """Return the parameters complete for the data, without those that do not apply.

        Raises:
            ParameterError: The parameters and the data contradict each other.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the latents (N, K)."""

    @abstractmethod
    def decode(self, h: Tensor) -> Tensor:
        r"""Return data for latents (N, K), shape :math:`(N, *event\_shape)`."""

    def reconstruct(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return what data are reconstructed as while the auto-encoder is trained.

        Arguments:
            x: The data.
            generator: Source of noise, if there is any.
        """
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the squared error, summed over an example and averaged over the batch."""
        found = self.reconstruct(x, generator)
        return nn.functional.mse_loss(found, x, reduction="sum") / len(x)

    def log_volume_layerwise(self, h: Tensor) -> Tensor:
        """Return the sum of the layers' own log volume changes at h, shape (N,)."""
        raise NotImplementedError(f"the volume of {type(self).__name__} is not known")

    def log_volume_manifold(self, h: Tensor) -> Tensor:
        r"""Return :math:`\frac 1 2 \log\det J^\top J` of the whole decoder at h, shape (N,)."""
        raise NotImplementedError(f"the volume of {type(self).__name__} is not known")


def autoencoder_type(space: Space) -> type[Autoencoder]:
    """Return the paper's auto-encoder for the kind of data."""
    if space.kind == "sequence":
        return ChunkAutoencoder
    if is_convolutional(space):
        return ConvolutionalAutoencoder
    return InvertibleLinear if space.kind == "vector" else InvertiblePerceptron


def fit_autoencoder(
    autoencoder: Autoencoder, params: IMLParams, train: Examples, context: FitContext
) -> None:
    """Minimise the auto-encoder's loss by Adam; ``params`` are resolved."""
    n_steps = n_steps_for(len(train), params.batch_size, params.epochs)
    optimizer = OneCycleAdam(autoencoder.parameters(), params.learning_rate, n_steps)
    generator = context.generator("noise")

    def step(rows: Tensor) -> dict[str, Tensor]:
        loss = autoencoder.loss(train[rows], generator)
        optimizer.step(loss)
        return {"loss": loss}

    train_epochs(
        step,
        train,
        n_epochs=params.epochs,
        batch_size=params.batch_size,
        context=context,
        stage="autoencoder",
        precision=params.precision,
        parts=[autoencoder, optimizer],
    )


class InvertibleLinear(InvertibleNetwork, Autoencoder):
    """The invertible linear map of Figure 1, for vectors; a bijection if K is all dimensions."""

    def __init__(self, params: IMLParams, space: Space) -> None:
        layers = [TallLinear(params.latent_dim, space.n_dims), *_output(space)]
        super().__init__(layers, space.event_shape)

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        _refuse_noise(params)
        params = params.filled(latent_dim=min(usual_latent_dim(space), space.n_dims), **TRAINING)
        require_at_most("latent_dim", params.latent_dim, space.n_dims, "the dimensions of the data")
        if params.latent_dim == space.n_dims:
            params = params.without(*TRAINING)
        return params.without("hidden_dim", "width", "filter_length", "noise")


class InvertiblePerceptron(InvertibleNetwork, Autoencoder):
    """The invertible perceptron, for images; a bijection if both its layers are square."""

    def __init__(self, params: IMLParams, space: Space) -> None:
        latent, hidden = params.latent_dim, params.hidden_dim
        layers = [TallLinear(latent, hidden), Tanh(), TallLinear(hidden, space.n_dims)]
        super().__init__([*layers, *_output(space)], space.event_shape)
        self.noise = params.noise

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        n_dims = space.n_dims
        params = params.filled(hidden_dim=min(HIDDEN_DIM, n_dims), **TRAINING)
        params = params.filled(latent_dim=min(usual_latent_dim(space), params.hidden_dim))
        for name in ("hidden_dim", "latent_dim"):
            require_at_most(name, getattr(params, name), n_dims, "the dimensions of the data")
        require_at_most("latent_dim", params.latent_dim, params.hidden_dim, "hidden_dim")
        if space.value_range is None:
            _refuse_noise(params)
            params = params.without("noise")
        else:
            params = params.filled(noise=4.0 * (n_dims / 784) ** 0.5)
        if params.latent_dim == n_dims:
            params = params.without(*TRAINING, "noise")
        return params.without("width", "filter_length")

    def reconstruct(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return what data are reconstructed as, after noise was added within the encoder.

        With noise this is a denoising auto-encoder (Vincent et al., ICML 2008): the straight lines
        of the inverse activation magnify what is invisible in a pixel a hundredfold, and the
        encoder learns to ignore it. The base distribution is fitted to embeddings without noise.
        """
        if not self.noise:
            return super().reconstruct(x, generator)
        unit = torch.randn(x.flatten(1).shape, generator=generator, device=x.device)
        return self.decode(self.encode(x, self.noise * unit))


def _output(space: Space) -> list[Layer]:
    """Return the output activation of an invertible network, if the data have a range."""
    return [Sigmoid(*space.value_range)] if space.value_range is not None else []


def _refuse_noise(params: IMLParams) -> None:
    if params.noise:
        problem = f"must be 0 where the output has no sigmoid; got {params.noise}."
        raise ParameterError("noise", problem)


class _TwoNetworks(Autoencoder):
    """An encoder with weights of its own: only approximately the decoder's inverse."""

    encoder: nn.Module
    decoder: nn.Module

    def encode(self, x: Tensor) -> Tensor:
        h: Tensor = self.encoder(x)
        return h

    def decode(self, h: Tensor) -> Tensor:
        x: Tensor = self.decoder(h)
        return x


class ConvolutionalAutoencoder(_TwoNetworks):
    """The DC-GAN's generator as decoder and its mirror image as encoder, without normalisation."""

    def __init__(self, params: IMLParams, space: Space) -> None:
        super().__init__()
        latent, width = params.latent_dim, params.width
        self.encoder = convolutional_encoder(space, latent, width, batch_norm=False)
        decoder = convolutional_decoder(latent, space, width, batch_norm=False)
        self.decoder = nn.Sequential(decoder, Bounded(space))

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        _refuse_noise(params)
        params = fill_sizes(params, space).filled(**TRAINING | {"learning_rate": 5e-4})
        require_at_most("latent_dim", params.latent_dim, space.n_dims, "the dimensions of the data")
        return params.without("filter_length", "noise")


class ChunkAutoencoder(_TwoNetworks):
    r"""The paper's auto-encoder of audio: three convolutions in time each way, tanh between them.

    A chunk of n samples, n a multiple of 4, becomes n/2 steps of d/2 channels, n/4 of d, and by a
    filter over all those steps K numbers; the decoder is the mirror image. The paper has d = 128
    and filters of 200 samples.
    """

    def __init__(self, params: IMLParams, space: Space) -> None:
        super().__init__()
        (n,) = space.event_shape
        latent, width = params.latent_dim, params.width
        length = params.filter_length
        halving = (length, 2, length // 2 - 1)  # with stride and padding
        self.encoder = nn.Sequential(
            nn.Unflatten(1, (1, n)),
            nn.Conv1d(1, width // 2, *halving),
            nn.Tanh(),
            nn.Conv1d(width // 2, width, *halving),
            nn.Tanh(),
            nn.Conv1d(width, latent, n // 4),
            nn.Flatten(),
            Unrounded(),
        )
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (latent, 1)),
            nn.ConvTranspose1d(latent, width, n // 4),
            nn.Tanh(),
            nn.ConvTranspose1d(width, width // 2, *halving),
            nn.Tanh(),
            nn.ConvTranspose1d(width // 2, 1, *halving),
            nn.Flatten(),
            Unrounded(),
            Bounded(space),
        )

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        _refuse_noise(params)
        params = params.filled(latent_dim=min(80, space.n_dims), width=16, filter_length=40)
        params = params.filled(**TRAINING | {"batch_size": 50})
        require_at_most("latent_dim", params.latent_dim, space.n_dims, "the dimensions of the data")
        return params.without("hidden_dim", "noise")
