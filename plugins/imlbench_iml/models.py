"""The IML models: one auto-encoder, and a base distribution for each model.

Algorithm 1 of "Learning the Base Distribution in Implicit Generative Models"
(https://arxiv.org/abs/1803.04357). Its first stage, with the auto-encoder's loss, stands in
``imlbench_iml.autoencoders``; its second is the ``fit`` of a density of ``imlbench.densities``.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from imlbench import Examples, FitContext, Model, Space, available_if
from imlbench.densities import (
    Density,
    DirichletProcessMixture,
    Gaussian,
    GaussianMixture,
    perplexity,
)
from imlbench.networks import require_at_most
from imlbench_iml.autoencoders import IMLParams, autoencoder_type, fit_autoencoder

P = TypeVar("P", bound=IMLParams)


class Latents(NamedTuple):
    """The embeddings of one split.

    Arguments:
        h: Shape (N, K).
        lengths: The number of chunks of each recording, if the data are recordings; sums to N.
    """

    h: Tensor
    lengths: Sequence[int] | None


class IML(Model[P]):
    r"""Implicit maximum likelihood, in two stages.

    1. An auto-encoder is trained: :math:`\min \sum_n \|f(f^{-1}(x_n)) - x_n\|^2`; the perceptron's
       encoder sees its input with noise.
    2. A base distribution is fitted to the embeddings: :math:`\max \sum_n \log p_0(f^{-1}(x_n))`.

    A sample is :math:`f(h)` with :math:`h \sim p_0`. The first stage is shared by all models of the
    family that have the same parameters.

    Class attributes:
        is_sequential: Whether the base distribution is one of sequences: a chunk has no density
            then without those before it.
    """

    family = "iml"
    is_sequential: ClassVar[bool] = False

    def __init__(self, params: P, space: Space) -> None:
        super().__init__(params, space)
        self.autoencoder = autoencoder_type(space)(params, space)
        self.density = self.make_density()

    @abstractmethod
    def make_density(self) -> Density:
        """Return the base distribution over R^K, not fitted."""

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        """Fill in what the auto-encoder for the data needs, and leave out what it does not."""
        return autoencoder_type(space).resolve(params, space)

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then fit the base distribution."""
        if not self.autoencoder.is_bijective:  # a bijection reconstructs whatever it is given
            names = set(IMLParams.model_fields)
            settings = self.params.model_dump(mode="json", include=names, exclude_none=True)
            fit = functools.partial(fit_autoencoder, self.autoencoder, self.params, train, context)
            context.fit_once("autoencoder", self.autoencoder, settings, fit)
        with torch.no_grad():
            latents, held_out = self._embed(train), self._embed(valid)
        self.fit_density(latents, held_out, context)

    def fit_density(self, train: Latents, valid: Latents, context: FitContext) -> None:
        """Fit the base distribution to the embeddings."""
        self.density.fit(
            train.h,
            valid=valid.h,
            lengths=train.lengths,
            valid_lengths=valid.lengths,
            generator=context.generator("density"),
            report=lambda step, n_steps, value: context.report(
                "density", step, n_steps, log_likelihood=value
            ),
        )

    def _embed(self, split: Examples) -> Latents:
        return Latents(torch.cat([self.encode(x) for x in split.batches(5000)]), split.lengths)

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

    @available_if(lambda self: not self.is_sequential)
    def base_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the latents of x, nats, (N,)."""
        return self.density.log_prob(self.encode(x))

    @available_if(lambda self: self.space.kind == "sequence")
    def base_log_prob_sequence(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the log-density of every chunk's latents, given the chunks before it.

        See :class:`imlbench.BaseLogProbSequence`.
        """
        h = torch.cat([self.encode(part) for part in x.split(1000)])
        return self.density.log_prob(h, lengths)

    @available_if(lambda self: self.autoencoder.is_bijective)
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density of the data, by the change of variables, nats, (N,)."""
        return self.log_prob_layerwise(x)

    @available_if(lambda self: self.autoencoder.has_volume)
    def log_prob_layerwise(self, x: Tensor) -> Tensor:
        """Return the log-density with the layers' volumes added up, nats, (N,)."""
        h = self.encode(x)
        return self.density.log_prob(h) - self.autoencoder.log_volume_layerwise(h)

    @available_if(lambda self: self.autoencoder.has_volume)
    def log_prob_manifold(self, x: Tensor) -> Tensor:
        """Return the log-density on the decoder's manifold, nats, (N,)."""
        h = self.encode(x)
        volumes = [self.autoencoder.log_volume_manifold(part) for part in h.split(100)]
        return self.density.log_prob(h) - torch.cat(volumes)


class IMLGaussian(IML[IMLParams]):
    """IML with one Gaussian as base distribution: what learning a richer one is compared with."""

    name = "iml-gaussian"

    def make_density(self) -> Density:
        """Return a Gaussian with a full covariance."""
        return Gaussian(self.params.latent_dim)


class IMLGMMParams(IMLParams):
    """Parameters of ``iml-gmm``."""

    n_components: int = Field(30, ge=1)
    """Components of the mixture, each with a full covariance; at most as many as there are
    training examples."""
    backend: Literal["torch", "scikit-learn"] = "torch"
    """What fits the mixture. scikit-learn is slower; it is there to check torch's fit on data of
    one's own. It follows the likelihood of the training data, and ignores the validation data."""


M = TypeVar("M", bound=IMLGMMParams)


class IMLMixture(IML[M]):
    """IML with a mixture of Gaussians as base distribution."""

    density: GaussianMixture | DirichletProcessMixture

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then fit the mixture."""
        n_components = self.params.n_components
        require_at_most("n_components", n_components, len(train), "the number of training examples")
        super().fit(train, valid, context)

    def effective_components(self) -> float:
        """Return how many components are in use: the perplexity of their weights."""
        return perplexity(self.density.weights)


class IMLGMM(IMLMixture[IMLGMMParams]):
    """IML with a mixture of Gaussians as base distribution."""

    name = "iml-gmm"

    def make_density(self) -> Density:
        """Return a mixture of full-covariance Gaussians."""
        p = self.params
        return GaussianMixture(p.latent_dim, p.n_components, backend=p.backend)


class IMLDPGMMParams(IMLGMMParams):
    """Parameters of ``iml-dpgmm``."""

    n_components: int = Field(60, ge=1)
    """Truncation: the most components there can be, each with a full covariance; at most as many as
    there are training examples."""


class IMLDPGMM(IMLMixture[IMLDPGMMParams]):
    """IML with a Dirichlet-process mixture of Gaussians, which finds the number of components."""

    name = "iml-dpgmm"

    def make_density(self) -> Density:
        """Return a Dirichlet-process mixture of full-covariance Gaussians."""
        p = self.params
        return DirichletProcessMixture(p.latent_dim, p.n_components, backend=p.backend)
