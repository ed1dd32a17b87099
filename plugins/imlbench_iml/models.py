"""The IML models: one auto-encoder, and a base distribution for each model.

Algorithm 1 of "Learning the Base Distribution in Implicit Generative Models"
(https://arxiv.org/abs/1803.04357).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from imlbench import Examples, FitContext, Kind, Model, ParameterError, Params, Space
from imlbench.densities import Density, DirichletProcessMixture, Gaussian, GaussianMixture
from imlbench.networks import is_convolutional
from imlbench.training import OneCycleAdam, n_steps_for, train_epochs
from imlbench_iml.autoencoders import make_autoencoder


class IMLParams(Params):
    """Parameters of every IML model: those of the auto-encoder."""

    latent_dim: int | None = Field(None, ge=1)
    """Number of latent dimensions, K; by default 20, for 64x64 images 100, for sequences 80, and
    for data of fewer dimensions all there are."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of the perceptron's hidden layer; by default 600, or as wide as narrower data."""
    width: int | None = Field(None, ge=2)
    """Channels of the widest layers inside a convolutional network, d; by default 128, and for
    sequences 16, where the paper has 128."""
    filter_length: int = Field(40, ge=2, multiple_of=2)
    """Length of the filters for sequences, in samples; the paper has 200."""
    epochs: int = Field(18, ge=1)
    """Passes of the auto-encoder over the training set."""
    batch_size: int | None = Field(None, ge=1)
    """Examples per step; by default 500, for sequences 50. Fewer on small data, so that an epoch
    has at least 50 steps."""
    noise: float | None = Field(None, ge=0)
    """Standard deviation of the noise that the perceptron's encoder must undo while it is trained,
    added to the inverse of the output activation, where black is -5.6 and white 5.6; by default 4
    for 784 pixels and in proportion to the root of their number, as the norm of an image is, and 0
    for other auto-encoders. Zero is the paper's plain reconstruction."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak of Adam's one-cycle schedule; by default 3e-3, for convolutions on images 5e-4."""


class IML(Model):
    r"""Implicit maximum likelihood, in two stages.

    1. An auto-encoder is trained: :math:`\min \sum_n \|f(f^{-1}(x_n)) - x_n\|^2`; the perceptron's
       encoder sees its input with noise, see :meth:`reconstruction_loss`.
    2. A base distribution is fitted to the embeddings: :math:`\max \sum_n \log p_0(f^{-1}(x_n))`.

    A sample is :math:`f(h)` with :math:`h \sim p_0`. The first stage is shared by all models of the
    family that have the same parameters.
    """

    family = "iml"
    kinds: frozenset[Kind] = frozenset({"vector", "image", "sequence"})
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
        """Fill in what depends on the data; sizes must fit into them, or nothing inverts."""
        convolutional, dims = is_convolutional(space), space.n_dims
        hidden, latent = params.hidden_dim, params.latent_dim
        is_perceptron = space.kind == "image" and not convolutional
        if is_perceptron:
            hidden = hidden or min(600, dims)
            require_at_most("hidden_dim", hidden, dims, "the dimensions of the data")
        usual = 80 if space.kind == "sequence" else 100 if convolutional else 20
        latent = latent or min(usual, hidden if is_perceptron else dims)
        require_at_most("latent_dim", latent, dims, "the dimensions of the data")
        if is_perceptron:
            require_at_most("latent_dim", latent, hidden, "hidden_dim")
        can_have_noise = is_perceptron and space.value_range is not None
        usual_noise = 4.0 * (dims / 784) ** 0.5 if can_have_noise else 0.0
        if params.noise and not can_have_noise:
            problem = f"must be 0 where the output has no sigmoid; got {params.noise}."
            raise ParameterError("noise", problem)
        return params.model_copy(
            update={
                "hidden_dim": hidden,
                "latent_dim": latent,
                "batch_size": params.batch_size or (50 if space.kind == "sequence" else 500),
                "width": params.width or (16 if space.kind == "sequence" else 128),
                "noise": usual_noise if params.noise is None else params.noise,
                "learning_rate": params.learning_rate or (5e-4 if convolutional else 3e-3),
            }
        )

    def can(self, capability: str) -> bool:
        """Densities of the data need a decoder whose volume is known, exact ones a bijection."""
        if capability in ("log_prob_layerwise", "log_prob_manifold"):
            return self.autoencoder.has_volume
        if capability == "log_prob":
            return self.autoencoder.is_bijective
        if capability == "base_log_prob_sequence":
            return self.space.kind == "sequence"
        return super().can(capability)

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then fit the base distribution."""
        n_components = getattr(self.params, "n_components", 1)
        require_at_most("n_components", n_components, len(train), "the number of training examples")
        if not self.autoencoder.is_bijective:  # a bijection reconstructs whatever it is given
            context.fit_once(
                "autoencoder",
                self.autoencoder,
                self.params.model_dump(include=set(IMLParams.model_fields)),
                lambda: self._fit_autoencoder(train, context),
            )
        with torch.no_grad():
            h, h_valid = (self._embed(split) for split in (train, valid))
        self.fit_density(
            h,
            valid=h_valid,
            lengths=train.lengths,
            valid_lengths=valid.lengths,
            generator=context.generator("density"),
            report=lambda step, n_steps, value: context.report(
                "density", step, n_steps, log_likelihood=value
            ),
        )

    def fit_density(self, h: Tensor, **arguments: Any) -> None:
        """Fit the base distribution to embeddings (N, K); ``arguments`` are those of its fit."""
        self.density.fit(h, **arguments)

    def _fit_autoencoder(self, train: Examples, context: FitContext) -> None:
        p = self.params
        n_steps = n_steps_for(len(train), p.batch_size, p.epochs)
        optimizer = OneCycleAdam(self.autoencoder.parameters(), p.learning_rate, n_steps)
        generator = context.generator("noise")

        def step(x: Tensor) -> dict[str, Tensor]:
            loss = self.reconstruction_loss(x, generator)
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

    def reconstruction_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the squared error, summed over an example and averaged over the batch.

        With noise this is a denoising auto-encoder (Vincent et al., ICML 2008): the straight lines
        of the inverse activation magnify what is invisible in a pixel a hundredfold, and the
        encoder learns to ignore it. The base distribution is fitted to embeddings without noise.
        """
        if self.params.noise:
            shape = (len(x), self.space.n_dims)
            noise = torch.randn(shape, generator=generator, device=x.device)
            h = self.autoencoder.encode(x, self.params.noise * noise)
        else:
            h = self.encode(x)
        return (self.decode(h) - x).square().sum() / len(x)

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

    def base_log_prob_sequence(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        r"""Return the log-density of every chunk's latents, given the chunks before it.

        Arguments:
            x: The chunks of whole recordings, shape :math:`(N, *event\_shape)`.
            lengths: The number of chunks of each recording; sums to N.

        Returns:
            :math:`\log p_0(h_t \mid h_1, \dots, h_{t-1})` in nats, shape (N,). If the base
            distribution takes chunks as exchangeable, :math:`\log p_0(h_t)`.
        """
        h = torch.cat([self.encode(part) for part in x.split(1000)])
        return self.density.log_prob(h, lengths)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density of the data, by the change of variables, nats, (N,)."""
        return self.log_prob_layerwise(x)

    def log_prob_layerwise(self, x: Tensor) -> Tensor:
        """Return the log-density with the layers' volumes added up, nats, (N,)."""
        h = self.encode(x)
        return self.density.log_prob(h) - self.autoencoder.log_volume_layerwise(h)

    def log_prob_manifold(self, x: Tensor) -> Tensor:
        """Return the log-density on the decoder's manifold, nats, (N,)."""
        h = self.encode(x)
        volumes = [self.autoencoder.log_volume_manifold(part) for part in h.split(100)]
        return self.density.log_prob(h) - torch.cat(volumes)


def require_at_most(name: str, size: int, limit: int, what: str) -> None:
    """Raise :class:`ParameterError` if ``size``, the value of parameter ``name``, is too large."""
    if size > limit:
        raise ParameterError(name, f"must be at most {limit}, {what}; got {size}.")


class IMLGaussian(IML):
    """IML with one Gaussian as base distribution: what learning a richer one is compared with."""

    name = "iml-gaussian"

    def make_density(self) -> Density:
        """Return a Gaussian with a full covariance."""
        return Gaussian(self.params.latent_dim)


class IMLGMM(IML):
    """IML with a mixture of Gaussians as base distribution."""

    name = "iml-gmm"

    class Params(IMLParams):
        """Parameters of ``iml-gmm``."""

        n_components: int = Field(30, ge=1)
        """Components of the mixture, each with a full covariance."""

    def make_density(self) -> Density:
        """Return a mixture of full-covariance Gaussians."""
        return GaussianMixture(self.params.latent_dim, n_components=self.params.n_components)

    def effective_components(self) -> float:
        """Return how many components are in use: the perplexity of their weights."""
        return perplexity(self.density.weights)


class IMLDPGMM(IML):
    """IML with a Dirichlet-process mixture of Gaussians, which finds the number of components."""

    name = "iml-dpgmm"

    class Params(IMLParams):
        """Parameters of ``iml-dpgmm``."""

        n_components: int = Field(60, ge=1)
        """Truncation: the most components there can be, each with a full covariance."""

    def make_density(self) -> Density:
        """Return a Dirichlet-process mixture of full-covariance Gaussians."""
        return DirichletProcessMixture(
            self.params.latent_dim, n_components=self.params.n_components
        )

    def effective_components(self) -> float:
        """Return how many components are in use: the perplexity of their weights."""
        return perplexity(self.density.weights)


def perplexity(weights: Tensor) -> float:
    r"""Return :math:`\exp(-\sum_k w_k \log w_k)`, which is n for n equal weights.

    Example:
        >>> round(perplexity(torch.tensor([0.5, 0.5, 0.0])), 3)
        2.0
    """
    return torch.special.entr(weights).sum().exp().item()
