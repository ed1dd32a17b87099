"""Log-likelihoods that a model can compute itself; the kinds are never mixed."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

from torch import Tensor

from imlbench import (
    BaseLogProb,
    Evaluation,
    LogProb,
    LogProbLayerwise,
    LogProbManifold,
    Metric,
    Params,
    Score,
)
from imlbench.api import AnyModel

PAPER = "https://arxiv.org/abs/1803.04357"
"""Increasing the Generative Capacity of Deep Models by Invertible Layers and Mixtures."""


class _LogLikelihood(Metric[Params]):
    """Mean over the test set of one of a model's log-densities."""

    unit = "nats"
    higher_is_better = True

    @abstractmethod
    def log_density(self, model: AnyModel, x: Tensor) -> Tensor:
        """Return the log-density of every example of x, nats, shape (N,)."""

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean log-density of the test set."""
        model, test = evaluation.model, evaluation.splits.test
        values = evaluation.per_example(lambda x: self.log_density(model, x), test)
        return Score.mean(values, test.groups)


class LogLikelihood(_LogLikelihood):
    """Exact log-likelihood: the model's density with respect to volume in data space."""

    name = "log_likelihood"
    position = 10
    requires = (LogProb,)

    def log_density(self, model: AnyModel, x: Tensor) -> Tensor:
        """Return the density in data space."""
        return cast(LogProb, model).log_prob(x)


class ManifoldLogLikelihood(_LogLikelihood):
    r"""Log-likelihood on the decoder's manifold, with the true volume.

    .. math:: \log p_0(h) - \tfrac 1 2 \log\det J^\top J, \quad J = \partial f / \partial h

    A density with respect to area on a K-dimensional surface: comparable between models of equal K
    only, and never with a density in data space.
    """

    name = "log_likelihood_manifold"
    position = 12
    requires = (LogProbManifold,)

    def log_density(self, model: AnyModel, x: Tensor) -> Tensor:
        """Return the density on the manifold."""
        return cast(LogProbManifold, model).log_prob_manifold(x)


class LayerwiseLogLikelihood(_LogLikelihood):
    r"""Log-likelihood as the paper computes it: the layers' volumes added up.

    Not the decoder's true volume unless every layer is square; kept for comparison with Figure 3 of
    https://arxiv.org/abs/1803.04357.
    """

    name = "log_likelihood_layerwise"
    reference = PAPER
    position = 50
    requires = (LogProbLayerwise,)

    def log_density(self, model: AnyModel, x: Tensor) -> Tensor:
        """Return the density with the layers' own volumes."""
        return cast(LogProbLayerwise, model).log_prob_layerwise(x)


class BaseLogLikelihood(_LogLikelihood):
    """Log-likelihood of the latents under the base distribution, without any volume."""

    name = "base_log_likelihood"
    position = 51
    requires = (BaseLogProb,)

    def log_density(self, model: AnyModel, x: Tensor) -> Tensor:
        """Return the density of the latents."""
        return cast(BaseLogProb, model).base_log_prob(x)
