r"""Log-likelihood of the test set under a kernel density estimate made of model samples.

.. math:: \log \hat p(x) = \log \frac 1 M \sum_{m=1}^M \mathcal N(x; s_m, h^2 I)

It rewards smooth samples: a thousand k-means centroids score far above a thousand real images.
Read it beside the reference models, never alone (https://arxiv.org/abs/1511.01844).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from imlbench import Evaluation, Examples, Metric, Params, Score
from imlbench.densities import kde_log_prob


class KDEParams(Params):
    """Parameters of ``kde`` and of ``kde_paper``."""

    h: float = Field(0.2, gt=0)
    """Standard deviation of the kernel, in units of the data; 0.2 reproduces the paper's Table 1.
    """


class TunedKDEParams(Params):
    """Parameters of ``kde_tuned``."""

    log10_h_min: float = Field(-2.0, ge=-10, le=10)
    """Decimal logarithm of the least standard deviation that is tried, in units of the data."""
    log10_h_max: float = Field(0.5, ge=-10, le=10)
    """Decimal logarithm of the greatest."""
    n_h: int = Field(61, ge=2)
    """How many are tried, in equal ratios: 61 from 0.01 to 3.16 are steps of 10 %."""

    @model_validator(mode="after")
    def _is_a_range(self) -> TunedKDEParams:
        if self.log10_h_min >= self.log10_h_max:
            raise ValueError(f"log10_h_min must be less than log10_h_max; got {self.log10_h_min}")
        return self


class KDE(Metric[KDEParams]):
    """Kernel density estimate, normalised; mean over test examples and draws."""

    name = "kde"
    unit = "nats"
    higher_is_better = True
    reference = "https://arxiv.org/abs/1511.01844"
    position = 40
    needs_samples = True

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean log-density of the test set."""
        h = self.params.h
        return score(evaluation, mean_over_draws(evaluation, h), h)


class PaperKDE(Metric[KDEParams]):
    r"""Kernel density estimate on the scale of the paper's Table 1.

    The paper sums over the samples and does not divide by their number, so that the value is
    ``kde`` :math:`+ \log M` and grows with :math:`M`.
    """

    name = "kde_paper"
    unit = "nats"
    higher_is_better = True
    reference = "https://arxiv.org/abs/1803.04357"
    position = 0
    needs_samples = True

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean log-sum over samples."""
        h, n_samples = self.params.h, evaluation.samples.shape[1]
        return score(evaluation, mean_over_draws(evaluation, h) + math.log(n_samples), h)


class TunedKDE(Metric[TunedKDEParams]):
    """Kernel density estimate, normalised, with the bandwidth that is best on the validation split.

    The bandwidth is chosen for every model by itself, from a geometric grid, on validation examples
    and the first draw.
    """

    name = "kde_tuned"
    unit = "nats"
    higher_is_better = True
    reference = "https://arxiv.org/abs/1511.01844"
    position = 41
    needs_samples = True

    def compute(self, evaluation: Evaluation) -> Score:
        """Choose the bandwidth, then compute the mean log-density of the test set."""
        p = self.params
        grid = torch.logspace(p.log10_h_min, p.log10_h_max, p.n_h).tolist()
        valid = evaluation.splits.valid
        tried = log_density(evaluation, valid, evaluation.samples[0], grid).mean(dim=1)
        h = grid[int(tried.argmax())]
        return score(evaluation, mean_over_draws(evaluation, h), float(f"{h:.4g}"))


def log_density(
    evaluation: Evaluation, split: Examples, samples: Tensor, bandwidths: list[float]
) -> Tensor:
    """Return normalised log-densities, nats, shape (n_bandwidths, N)."""
    samples = samples.flatten(1).to(evaluation.device)
    parts = [
        kde_log_prob(x.flatten(1).to(evaluation.device), samples, bandwidths).log_density.cpu()
        for x in split.batches(5000)
    ]
    return torch.cat(parts, dim=1)


def mean_over_draws(evaluation: Evaluation, h: float) -> Tensor:
    """Return per-example log-densities of the test set, averaged over the draws, shape (N,)."""
    test = evaluation.splits.test
    draws = [log_density(evaluation, test, samples, [h])[0] for samples in evaluation.samples]
    return torch.stack(draws).mean(dim=0)


def score(evaluation: Evaluation, values: Tensor, h: float) -> Score:
    """Return the mean of the test examples' values, with what it depends on."""
    n_draws, n_samples = evaluation.samples.shape[:2]
    return Score.mean(values, evaluation.splits.test.groups, h=h, M=n_samples, draws=n_draws)
