"""One Gaussian: the simplest base distribution, and the baseline of all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Generator, Tensor

from imlbench.densities.covariance import positive_definite, precision_factor
from imlbench.densities.density import Density, Report
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

    @torch.no_grad()
    def fit(
        self,
        h: Tensor,
        *,
        generator: Generator,
        valid: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        valid_lengths: Sequence[int] | None = None,
        report: Report | None = None,
    ) -> Self:
        h = self._points("h", h)
        self.to(h.device)
        mean = torch.stack([block.double().sum(0) for block in h.split(_BLOCK)]).sum(0) / len(h)
        scatter = torch.zeros_like(self.covariance)
        for block in h.split(_BLOCK):
            x = block.double() - mean
            scatter.addmm_(x.T, x)
        self.mean, self.covariance = mean, positive_definite(scatter / len(h), self.reg_covar)
        return self

    @torch.no_grad()
    def log_prob(self, h: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        h = self._points("h", h)
        mean, factor = self.mean.double(), precision_factor(self.covariance.double())
        constant = factor.diagonal().log().sum() - self.n_dims / 2 * math.log(2 * math.pi)
        squared = [
            ((block.to(self.device).double() - mean) @ factor).square().sum(1)
            for block in h.split(_BLOCK)
        ]
        return (constant - torch.cat(squared) / 2).to(h.device)

    @torch.no_grad()
    def sample_components(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        noise = normal((self._at_least("n", n, 1), self.n_dims), generator, self.device)
        h = self.mean + noise @ torch.linalg.cholesky(self.covariance.double()).T
        return h.float(), torch.zeros(n, dtype=torch.int64, device=self.device)
