"""One Gaussian: the simplest base distribution, and the baseline of all others."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from imlbench.densities.covariance import centre, positive_definite, precision_factor, scatter
from imlbench.densities.density import Density, Points, Report
from imlbench.densities.draws import normal

_BLOCK = 1 << 14


class Gaussian(Density):
    r"""A Gaussian with full covariance, fitted in closed form.

    .. math:: \log p(h) = -\tfrac12 (h - m)^\top \Sigma^{-1} (h - m)
        - \tfrac12 \log\det \Sigma - \tfrac{K}{2} \log 2\pi

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        reg_covar: What is added to every variance, in squared units of the data, at least 0.
            Where the covariance is still not positive definite, more is added.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = torch.randn(1000, 2, generator=generator) * torch.tensor([1.0, 3.0])
        >>> Gaussian(2).fit(h, generator=generator).covariance.diagonal().sqrt()
        tensor([1.0012, 3.1244], dtype=torch.float64)
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, n_dims: int, *, reg_covar: float = 1e-6) -> None:
        super().__init__(n_dims)
        self.reg_covar = reg_covar
        self.register_buffer("mean", torch.zeros(n_dims, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(n_dims, dtype=torch.float64))

    def _fit(
        self, train: Points, valid: Points | None, generator: Generator, report: Report | None
    ) -> None:
        blocks = train.h.split(_BLOCK)
        self.mean = centre(blocks)
        covariance = scatter(blocks, self.mean) / len(train.h)
        self.covariance = positive_definite(covariance, self.reg_covar)

    def _log_prob(self, points: Points) -> Tensor:
        mean, factor = self.mean.double(), precision_factor(self.covariance.double())
        constant = factor.diagonal().log().sum() - self.n_dims / 2 * math.log(2 * math.pi)
        squared = [
            ((block.to(self.device).double() - mean) @ factor).square().sum(1)
            for block in points.h.split(_BLOCK)
        ]
        return constant - torch.cat(squared) / 2

    def _sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        noise = normal((n, self.n_dims), generator, self.device)
        h = self.mean + noise @ torch.linalg.cholesky(self.covariance.double()).T
        return h.float(), torch.zeros(n, dtype=torch.int64, device=self.device)
