"""The IML models: one auto-encoder, and a base distribution for each model.

Algorithm 1 of "Learning the Base Distribution in Implicit Generative Models"
(https://arxiv.org/abs/1803.04357).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from imlbench import Examples, FitContext, Model, ParameterError, Params, Space
from imlbench.densities import Density, GaussianMixture
from imlbench.training import OneCycleAdam, n_steps_for, train_epochs
from imlbench_iml.invertible import InvertibleNetwork, Sigmoid, TallLinear, Tanh


class IMLParams(Params):
    """Parameters of every IML model: those of the auto-encoder."""

    latent_dim: int | None = Field(None, ge=1)
    """Number of latent dimensions, K; by default 20, or all there are if the data have fewer."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of the hidden layer; by default 600, or as wide as the data if they are narrower."""
    epochs: int = Field(25, ge=1)
    """Passes of the auto-encoder over the training set."""
    batch_size: int = Field(500, ge=1)
    """Examples per step; fewer on small data, so that an epoch has at least 50 steps."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of the one-cycle schedule of Adam."""


class IML(Model):
    r"""Implicit maximum likelihood, in two stages.

    1. An auto-encoder is trained: :math:`\min \sum_n \|f(f^{-1}(x_n)) - x_n\|^2`.
    2. A base distribution is fitted to the embeddings: :math:`\max \sum_n \log p_0(f^{-1}(x_n))`.

    A sample is :math:`f(h)` with :math:`h \sim p_0`. The first stage is shared by all models of the
    family that have the same parameters.
    """

    family = "iml"
    Params = IMLParams

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space)
        self.autoencoder = make_autoencoder(params, space)
        self.density = self.make_density()

    @abstractmethod
    def make_density(self) -> Density:
        """Return the base distribution over R^K, not fitted."""

    @classmethod
    def resolve(cls, params: Any, space: Space) -> Any:
        """Fill in the widths; both must fit into the data, or there is no left inverse."""
        n_dims = space.n_dims
        hidden = params.hidden_dim or min(600, n_dims)
        latent = params.latent_dim or min(20, hidden)
        if hidden > n_dims:
            problem = f"must be at most {n_dims}, the number of dimensions; got {hidden}."
            raise ParameterError("hidden_dim", problem)
        if latent > hidden:
            problem = f"must be at most {hidden}, the number of hidden units; got {latent}."
            raise ParameterError("latent_dim", problem)
        return params.model_copy(update={"hidden_dim": hidden, "latent_dim": latent})

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then fit the base distribution."""
        settings = self.params.model_dump(include=set(IMLParams.model_fields))
        context.fit_once(
            "autoencoder",
            self.autoencoder,
            settings,
            lambda: self._fit_autoencoder(train, context),
        )
        with torch.no_grad():
            h, h_valid = (self._embed(split) for split in (train, valid))
        self.density.fit(
            h,
            valid=h_valid,
            generator=context.generator("density"),
            report=lambda step, n_steps, value: context.report(
                "density", step, n_steps, log_likelihood=value
            ),
        )

    def _fit_autoencoder(self, train: Examples, context: FitContext) -> None:
        p = self.params
        n_steps = n_steps_for(len(train), p.batch_size, p.epochs)
        optimizer = OneCycleAdam(self.autoencoder.parameters(), p.learning_rate, n_steps)

        def step(x: Tensor) -> dict[str, Tensor]:
            loss = self.reconstruction_loss(x)
            optimizer.step(loss)
            return {"loss": loss}

        train_epochs(
            step,
            train,
            n_epochs=p.epochs,
            batch_size=p.batch_size,
            context=context,
            stage="autoencoder",
        )

    def reconstruction_loss(self, x: Tensor) -> Tensor:
        """Return the squared error, summed over an example and averaged over the batch."""
        return (self.decode(self.encode(x)) - x).square().sum() / len(x)

    def _embed(self, split: Examples) -> Tensor:
        return torch.cat([self.encode(x) for x in split.batches(5000)])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw latents from the base distribution and decode them."""
        return self.decode(self.density.sample(n, generator).float())

    def sample_components(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples, and say which component of the base distribution each came from."""
        h, component = self.density.sample_components(n, generator)
        return self.decode(h.float()), component

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents (N, K)."""
        return self.autoencoder.encode(x)

    def decode(self, h: Tensor) -> Tensor:
        """Return data for latents (N, K)."""
        return self.autoencoder.decode(h)

    def base_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the latents of x, nats, (N,)."""
        return self.density.log_prob(self.encode(x))

    def log_prob_layerwise(self, x: Tensor) -> Tensor:
        """Return the log-density with the layers' volumes added up, nats, (N,)."""
        h = self.encode(x)
        return self.density.log_prob(h) - self.autoencoder.log_volume_layerwise(h)

    def log_prob_manifold(self, x: Tensor) -> Tensor:
        """Return the log-density on the decoder's manifold, nats, (N,)."""
        h = self.encode(x)
        volumes = [self.autoencoder.log_volume_manifold(part) for part in h.split(100)]
        return self.density.log_prob(h) - torch.cat(volumes)


def make_autoencoder(params: Any, space: Space) -> InvertibleNetwork:
    """Return the invertible perceptron of the paper, for data of any shape.

    Arguments:
        params: Resolved parameters, with ``latent_dim`` and ``hidden_dim``.
        space: The space of the data; sets the output's size and activation.
    """
    inner = [TallLinear(params.latent_dim, params.hidden_dim), Tanh()]
    outer = [TallLinear(params.hidden_dim, space.n_dims)]
    bounds = [Sigmoid(*space.value_range)] if space.value_range else []
    return InvertibleNetwork([*inner, *outer, *bounds], space.event_shape)


class IMLGMM(IML):
    """Invertible perceptron with a Gaussian mixture as base distribution."""

    name = "iml-gmm"

    class Params(IMLParams):
        """Parameters of ``iml-gmm``."""

        n_components: int = Field(30, ge=1)
        """Components of the mixture, each with a full covariance."""

    def make_density(self) -> Density:
        """Return a mixture of full-covariance Gaussians."""
        return GaussianMixture(self.params.latent_dim, n_components=self.params.n_components)
