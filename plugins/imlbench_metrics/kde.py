r"""Log-likelihood of the test set under a kernel density estimate made of model samples.

.. math:: \log \hat p(x) = \log \frac 1 M \sum_{m=1}^M \mathcal N(x; s_m, h^2 I)

It rewards smooth samples: a thousand k-means centroids score far above a thousand real images.
Read it beside the reference models, never alone (https://arxiv.org/abs/1511.01844).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imlbench import Evaluation, Examples, Metric, Score
from imlbench.densities import kde_log_prob

PAPER_BANDWIDTH = 0.2
"""The standard deviation that reproduces Table 1 of https://arxiv.org/abs/1803.04357."""


def _log_density(
    evaluation: Evaluation, split: Examples, samples: Tensor, bandwidths: list[float]
) -> Tensor:
    """Return normalised log-densities, nats, shape (n_bandwidths, N)."""
    samples = samples.flatten(1).to(evaluation.device)
    parts = [
        kde_log_prob(x.flatten(1).to(evaluation.device), samples, bandwidths).log_density.cpu()
        for x in split.batches(5000)
    ]
    return torch.cat(parts, dim=1)


def _mean_over_draws(evaluation: Evaluation, bandwidth: float) -> Tensor:
    """Return per-example log-densities of the test set, averaged over the draws, shape (N,)."""
    draws = [
        _log_density(evaluation, evaluation.splits.test, samples, [bandwidth])[0]
        for samples in evaluation.samples
    ]
    return torch.stack(draws).mean(dim=0)


def _settings(evaluation: Evaluation, bandwidth: float) -> dict[str, float | int]:
    n_draws, n_samples = evaluation.samples.shape[:2]
    return {"h": bandwidth, "M": n_samples, "draws": n_draws}


class KDE(Metric):
    """Kernel density estimate, normalised, h = 0.2; mean over test examples and draws."""

    name = "kde"
    unit = "nats"
    higher_is_better = True

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean log-density of the test set."""
        values = _mean_over_draws(evaluation, PAPER_BANDWIDTH)
        return Score.mean(values, **_settings(evaluation, PAPER_BANDWIDTH))


class PaperKDE(Metric):
    r"""Kernel density estimate on the scale of the paper's Table 1, h = 0.2.

    The paper sums over the samples and does not divide by their number, so that the value is
    ``kde`` :math:`+ \log M` and grows with :math:`M`.
    """

    name = "kde_paper"
    unit = "nats"
    higher_is_better = True

    def compute(self, evaluation: Evaluation) -> Score:
        r"""Compute the mean log-sum over samples."""
        values = _mean_over_draws(evaluation, PAPER_BANDWIDTH)
        n_samples = evaluation.samples.shape[1]
        return Score.mean(values + math.log(n_samples), **_settings(evaluation, PAPER_BANDWIDTH))


class TunedKDE(Metric):
    """Kernel density estimate, normalised, with the bandwidth that is best on the validation split.

    The bandwidth is chosen for every model by itself, from a geometric grid of steps of about 10 %,
    on validation examples and the first draw.
    """

    name = "kde_tuned"
    unit = "nats"
    higher_is_better = True

    def compute(self, evaluation: Evaluation) -> Score:
        """Choose the bandwidth, then compute the mean log-density of the test set."""
        bandwidths = torch.logspace(-2, 0.5, 61).tolist()
        log_density = _log_density(
            evaluation, evaluation.splits.valid, evaluation.samples[0], bandwidths
        )
        best = bandwidths[int(log_density.mean(dim=1).argmax())]
        values = _mean_over_draws(evaluation, best)
        return Score.mean(values, **{**_settings(evaluation, best), "h": float(f"{best:.4g}")})
