"""The variational auto-encoder (https://arxiv.org/abs/1312.6114)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from imlbench import Examples, FitContext, Model, Params, Space
from imlbench.training import OneCycleAdam, n_steps_for, train_epochs


class VAE(Model):
    r"""Variational auto-encoder with one hidden layer, as in the paper: K-600-D and its mirror.

    It maximises the evidence lower bound

    .. math:: E_{q(h \mid x)}[\log p(x \mid h)] - KL(q(h \mid x) \,\|\, \mathcal N(0, I))

    with a Bernoulli observation model for data in [0, 1], and otherwise a Gaussian one whose
    variance is learnt. A sample of an image is the decoder's mean; a sample of a vector has the
    observation noise added.
    """

    name = "vae"
    family = "vae"
    kinds = frozenset({"vector", "image"})

    class Params(Params):
        """Parameters of ``vae``."""

        latent_dim: int = Field(20, ge=1)
        """Number of latent dimensions, K."""
        hidden_dim: int = Field(600, ge=1)
        """Width of the hidden layers."""
        epochs: int = Field(25, ge=1)
        """Passes over the training set."""
        batch_size: int = Field(500, ge=1)
        """Examples per step; fewer on small data, so that an epoch has at least 50 steps."""
        learning_rate: float = Field(3e-3, gt=0)
        """Peak of the one-cycle schedule of Adam."""

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space)
        latent, hidden, dims = params.latent_dim, params.hidden_dim, space.n_dims
        self.is_bernoulli = space.value_range == (0.0, 1.0)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(dims, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.Tanh(),
            nn.Linear(hidden, dims),
            nn.Unflatten(1, space.event_shape),
        )
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=not self.is_bernoulli)

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Maximise the evidence lower bound by Adam."""
        p = self.params
        n_steps = n_steps_for(len(train), p.batch_size, p.epochs)
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = OneCycleAdam(trainable, p.learning_rate, n_steps)
        noise = context.generator("posterior noise")

        def step(x: Tensor) -> dict[str, Tensor]:
            loss = self.loss(x, noise)
            optimizer.step(loss)
            return {"loss": loss}

        train_epochs(
            step, train, n_epochs=p.epochs, batch_size=p.batch_size, context=context, stage="vae"
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
        if self.space.value_range is None:
            return output
        low, high = self.space.value_range
        return low + (high - low) * output.sigmoid()

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
