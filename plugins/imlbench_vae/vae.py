"""The variational auto-encoder (https://arxiv.org/abs/1312.6114)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from imlbench import Examples, FitContext, Model, Params, Space, from_data
from imlbench.networks import (
    convolutional_decoder,
    convolutional_encoder,
    fill_sizes,
    is_convolutional,
    perceptron,
    require_at_most,
    usual_latent_dim,
)
from imlbench.training import OneCycleAdam, Precision, n_steps_for, train_epochs


class VAEParams(Params):
    """Parameters of ``vae``."""

    latent_dim: int = from_data(ge=1)
    """Number of latent dimensions, K; by default 20, for 64x64 images 100, and never more than the
    data have."""
    hidden_dim: int = from_data(ge=1)
    """Width of the perceptrons' hidden layers; by default 600."""
    width: int = from_data(ge=1)
    """Channels of the widest images inside convolutional networks, d; by default 128."""
    epochs: int = Field(18, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(128, ge=1)
    """Examples per step; fewer on small data, so that an epoch has at least 50 steps."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak of Adam's one-cycle schedule."""
    precision: Precision = "auto"
    """Of the networks' products during training: bfloat16 for wide perceptrons and large batches on
    processors made for it, otherwise float32; the record says which it was."""


class VAE(Model[VAEParams]):
    r"""Variational auto-encoder: a perceptron K-600-D and its mirror, or the DC-GAN's networks.

    It maximises the evidence lower bound

    .. math:: E_{q(h \mid x)}[\log p(x \mid h)] - KL(q(h \mid x) \,\|\, \mathcal N(0, I))

    with a Bernoulli observation model for data in [0, 1], and otherwise a Gaussian one whose
    variance is learnt. A sample of an image is the decoder's mean; a sample of a vector has the
    observation noise added.
    """

    name = "vae"
    family = "vae"

    def __init__(self, params: VAEParams, space: Space) -> None:
        super().__init__(params, space)
        self.is_bernoulli = space.value_range == (0.0, 1.0)
        self.encoder, self.decoder = self._make_networks()
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=not self.is_bernoulli)

    def _make_networks(self) -> tuple[nn.Module, nn.Module]:
        """Return an encoder to mean and log-variance, and a decoder without output activation."""
        p, space = self.params, self.space
        if is_convolutional(space):
            encoder = convolutional_encoder(space, 2 * p.latent_dim, p.width, batch_norm=True)
            return encoder, convolutional_decoder(p.latent_dim, space, p.width, batch_norm=True)
        encoder = perceptron(space.n_dims, p.hidden_dim, 2 * p.latent_dim)
        decoder = perceptron(p.latent_dim, p.hidden_dim, space.n_dims)
        unflatten = nn.Unflatten(1, space.event_shape)
        return nn.Sequential(nn.Flatten(), encoder), nn.Sequential(decoder, unflatten)

    @classmethod
    def resolve(cls, params: VAEParams, space: Space) -> VAEParams:
        """Fill in the sizes of the networks; there can be no more latents than dimensions."""
        latent_dim = min(usual_latent_dim(space), space.n_dims)
        params = fill_sizes(params.filled(latent_dim=latent_dim), space)
        require_at_most("latent_dim", params.latent_dim, space.n_dims, "the dimensions of the data")
        return params

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Maximise the evidence lower bound by Adam."""
        p = self.params
        n_steps = n_steps_for(len(train), p.batch_size, p.epochs)
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = OneCycleAdam(trainable, p.learning_rate, n_steps)
        noise = context.generator("posterior noise")

        def step(rows: Tensor) -> dict[str, Tensor]:
            loss = self.loss(train[rows], noise)
            optimizer.step(loss)
            return {"loss": loss}

        train_epochs(
            step,
            train,
            n_epochs=p.epochs,
            batch_size=p.batch_size,
            context=context,
            stage="vae",
            precision=p.precision,
            parts=[self, optimizer],
        )

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the negative evidence lower bound, nats per example, from one posterior sample."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        h = mean + (0.5 * log_variance).exp() * noise
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (self._negative_log_observation(x, self.decoder(h)) + kl) / len(x)

    def _negative_log_observation(self, x: Tensor, output: Tensor) -> Tensor:
        """Return -log p(x | h), summed over everything."""
        if self.is_bernoulli:
            return F.binary_cross_entropy_with_logits(output, x, reduction="sum")
        z = (x - self._mean(output)) * (-self.log_scale).exp()
        return (0.5 * z.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).sum()

    def _mean(self, output: Tensor) -> Tensor:
        has_range = self.space.value_range is not None
        return self.space.from_unit(output.sigmoid()) if has_range else output

    def encode(self, x: Tensor) -> Tensor:
        """Return the posterior means, shape (N, K)."""
        mean: Tensor = self.encoder(x).chunk(2, dim=1)[0]
        return mean

    def decode(self, h: Tensor) -> Tensor:
        """Return the means of the observation model."""
        return self._mean(self.decoder(h))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Decode standard normal latents."""
        device = self.log_scale.device
        h = torch.randn(n, self.params.latent_dim, generator=generator, device=device)
        x = self.decode(h)
        if self.space.kind != "vector":
            return x
        noise = torch.randn(x.shape, generator=generator, device=device)
        return x + self.log_scale.exp() * noise
