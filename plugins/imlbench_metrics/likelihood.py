"""Log-likelihoods that a model can compute itself; the kinds are never mixed."""

from __future__ import annotations

from typing import ClassVar

from imlbench import Evaluation, Metric, Score


class _LogLikelihood(Metric):
    """Mean over the test set of one of a model's log-densities."""

    unit = "nats"
    higher_is_better = True
    log_density: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.requires = frozenset({cls.log_density})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean log-density of the test set."""
        log_density = getattr(evaluation.model, self.log_density)
        return Score.mean(evaluation.per_example(log_density, evaluation.splits.test))


class LogLikelihood(_LogLikelihood):
    """Exact log-likelihood: the model's density with respect to volume in data space."""

    name = "log_likelihood"
    log_density = "log_prob"


class ManifoldLogLikelihood(_LogLikelihood):
    r"""Log-likelihood on the decoder's manifold, with the true volume.

    .. math:: \log p_0(h) - \tfrac 1 2 \log\det J^\top J, \quad J = \partial f / \partial h

    A density with respect to area on a K-dimensional surface: comparable between models of equal K
    only, and never with a density in data space.
    """

    name = "log_likelihood_manifold"
    log_density = "log_prob_manifold"


class LayerwiseLogLikelihood(_LogLikelihood):
    r"""Log-likelihood as the paper computes it: the layers' volumes added up.

    Not the decoder's true volume unless every layer is square; kept for comparison with Figure 3 of
    https://arxiv.org/abs/1803.04357.
    """

    name = "log_likelihood_layerwise"
    log_density = "log_prob_layerwise"


class BaseLogLikelihood(_LogLikelihood):
    """Log-likelihood of the latents under the base distribution, without any volume."""

    name = "base_log_likelihood"
    log_density = "base_log_prob"
