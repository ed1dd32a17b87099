"""Dirichlet-process mixtures of Gaussians, fitted by variational inference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor
from torch.distributions import Beta, kl_divergence

from imlbench.densities.covariance import (
    Moments,
    positive_definite,
    precision_factor,
    raised,
    scatter,
)
from imlbench.densities.em import EMOptions
from imlbench.densities.mixture import Mixture
from imlbench.densities.weights import perplexity

if TYPE_CHECKING:
    from sklearn.mixture import BayesianGaussianMixture

_SHARE = 1e-3  # of the points: what a component needs to count as one that is in use


class DirichletProcessMixture(Mixture):
    r"""A Dirichlet-process mixture of Gaussians, truncated, by mean-field variational inference.

    .. math::
        v_c \sim \mathrm{Beta}(1, \alpha), \quad \pi_c = v_c \prod_{j<c} (1 - v_j), \quad
        \Lambda_c \sim W(\nu_0, (\Sigma_0)^{-1}), \quad
        \mu_c \sim N(\bar h, (\kappa_0 \Lambda_c)^{-1})

    with scikit-learn's defaults: :math:`\alpha = 1/C`, :math:`\kappa_0 = 1`, :math:`\nu_0 = K`,
    :math:`\bar h` and :math:`\Sigma_0` the mean and the covariance of the training points.
    :meth:`log_prob` and :meth:`sample` use the mixture at the posterior means of weights, means and
    precisions, not the posterior predictive density. ``weights``, ``means`` and ``covariances``
    are its parameters. Without held-out points the criterion of a fit is the evidence lower bound
    per point, rather than the likelihood.

    References:
        | Variational Inference for Dirichlet Process Mixtures (Blei and Jordan, 2006)
        | https://doi.org/10.1214/06-BA104

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The truncation :math:`C`: the most components there can be.
        concentration: :math:`\alpha`, positive; by default :math:`1/C`. Larger ones use more
            components.
        options: See :class:`EMOptions`. ``max_iter`` is 200 by default, ``init`` may be
            ``"current"`` to start from the posterior that the density has, and the other backend,
            ``"scikit-learn"``, starts from its own k-means whatever ``init``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = torch.randn(1000, 2, generator=generator)
        >>> h[:300] += 8.0
        >>> mixture = DirichletProcessMixture(2, n_components=5, tol=1e-5, max_iter=500)
        >>> mixture.fit(h, generator=generator).n_effective
        2
    """

    concentrations: Tensor
    mean_precisions: Tensor
    degrees_of_freedom: Tensor
    _scale: Tensor

    def __init__(
        self,
        n_dims: int,
        n_components: int = 50,
        *,
        concentration: float | None = None,
        **options: Unpack[EMOptions],
    ) -> None:
        options = EMOptions(max_iter=200) | options
        super().__init__(n_dims, n_components, covariance_type="full", **options)
        self.concentration = 1 / n_components if concentration is None else concentration
        if not 0 < self.concentration < math.inf:
            raise ValueError(
                f"DirichletProcessMixture: concentration must be positive and finite; "
                f"got {concentration}. Leave it out for 1 / n_components."
            )
        double = torch.float64
        self.register_buffer("concentrations", torch.ones(n_components, 2, dtype=double))
        self.register_buffer("mean_precisions", torch.ones(n_components, dtype=double))
        self.register_buffer(
            "degrees_of_freedom", torch.full((n_components,), float(n_dims), dtype=double)
        )

    @property
    def n_effective(self) -> int:
        """The number of components that more than 0.1 % of the training points belong to."""
        counts = self.concentrations[:, 0] - 1
        return int((counts > _SHARE * counts.sum()).sum())

    @property
    def perplexity(self) -> float:
        """How many equal weights would be as spread as those of the components."""
        return perplexity(self.weights)

    def _prepare(self, h: Tensor) -> None:
        super()._prepare(h)
        covariance = scatter(self._blocks(h), self._origin) / max(len(h) - 1, 1)
        self._scale = positive_definite(covariance, 0.0)

    def _log_weights(self) -> Tensor:
        r""":math:`E[\log \pi_c] + \tfrac12 E[\log\det\Lambda_c]` less the plug-in's, and so on."""
        nu = self.degrees_of_freedom
        sticks = self.concentrations.digamma() - self.concentrations.sum(1, keepdim=True).digamma()
        log_weights = sticks[:, 0] + sticks[:, 1].cumsum(0) - sticks[:, 1]
        log_det = self._digamma(nu) + self.n_dims * (2 / nu).log()
        return log_weights + log_det / 2 - self.n_dims / (2 * self.mean_precisions)

    def _digamma(self, nu: Tensor) -> Tensor:
        r"""The multivariate digamma function, :math:`\psi_K(\nu / 2)`."""
        return ((nu[:, None] - torch.arange(self.n_dims, device=nu.device)) / 2).digamma().sum(1)

    def _penalty(self) -> Tensor:
        """Divergence of the posterior over sticks, means and precisions from the prior."""
        ones = torch.ones_like(self.weights)
        prior = Beta(ones, self.concentration * ones, validate_args=False)  # nobody has to wait
        posterior = Beta(self.concentrations[:, 0], self.concentrations[:, 1], validate_args=False)
        sticks = kl_divergence(posterior, prior)
        factors = precision_factor(self.covariances)
        rest = self._normal_divergence(factors) + self._wishart_divergence(factors)
        return (sticks + rest).sum()

    def _normal_divergence(self, factors: Tensor) -> Tensor:
        r"""Expected KL of the means given the precisions, from the prior; :math:`\kappa_0 = 1`."""
        kappa = self.mean_precisions
        shift = torch.einsum("ck,ckj->cj", self.means - self._origin, factors)
        return (self.n_dims * (kappa.log() + 1 / kappa - 1) + shift.square().sum(1)) / 2

    def _wishart_divergence(self, factors: Tensor) -> Tensor:
        r"""KL of the precisions, :math:`W(\nu, (\nu\Sigma)^{-1})`, from the prior."""
        k, nu, nu_0 = self.n_dims, self.degrees_of_freedom, float(self.n_dims)
        root = torch.linalg.cholesky_ex(self._scale).L
        trace = (root.T @ factors).square().sum((1, 2))
        log_det = -2 * (factors.diagonal(dim1=1, dim2=2).log().sum(1) + root.diagonal().log().sum())
        log_gamma = torch.mvlgamma(torch.full_like(nu, nu_0 / 2), k) - torch.mvlgamma(nu / 2, k)
        moved = k * (nu_0 * nu.log() - nu) + (nu - nu_0) * self._digamma(nu)
        return (nu_0 * log_det + trace + moved) / 2 + log_gamma

    def _maximisation(self, statistics: Moments) -> None:
        counts = statistics.counts
        safe = replace(statistics, counts=counts.clamp(min=1e-12))
        means = safe.sums / safe.counts[:, None]
        within = self._covariance.estimate(safe, means, self.reg_covar) * counts[:, None, None]
        kappa, nu = 1 + counts, self.n_dims + counts
        between = (counts / kappa)[:, None, None] * means[:, :, None] * means[:, None, :]
        rest = counts.flip(0).cumsum(0).flip(0) - counts
        self.concentrations = torch.stack([1 + counts, self.concentration + rest], dim=1)
        self.mean_precisions, self.degrees_of_freedom = kappa, nu
        self.means = self._origin + means * (counts / kappa)[:, None]
        total = self._scale + within + between
        self.covariances = raised(total / nu[:, None, None], 0.0)
        self.weights = self._mean_weights()

    def _mean_weights(self) -> Tensor:
        """Posterior means of the weights; what the truncation leaves over is spread evenly."""
        kept = self.concentrations[:, 0] / self.concentrations.sum(1)
        weights = kept * torch.cat([kept.new_ones(1), (1 - kept).cumprod(0)[:-1]])
        return weights / weights.sum()

    def _library_model(self) -> BayesianGaussianMixture:
        from sklearn.mixture import BayesianGaussianMixture

        return BayesianGaussianMixture(
            weight_concentration_prior_type="dirichlet_process",
            weight_concentration_prior=self.concentration,
        )

    def _take_over(self, model: BayesianGaussianMixture) -> None:
        super()._take_over(model)
        given = {
            "concentrations": torch.stack(
                [torch.tensor(w) for w in model.weight_concentration_], 1
            ),
            "mean_precisions": torch.tensor(model.mean_precision_),
            "degrees_of_freedom": torch.tensor(model.degrees_of_freedom_),
        }
        for name, value in given.items():
            setattr(self, name, value.to(self.device))
