"""Dirichlet-process mixtures of Gaussians, fitted by variational inference."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.distributions import Beta, kl_divergence

from imlbench.densities.covariance import Moments, positive_definite, precision_factor
from imlbench.densities.draws import library_seed
from imlbench.densities.em import Init
from imlbench.densities.mixture import Mixture

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
        reg_covar: What is added to every variance, in squared units of the data, at least 0.
        max_iter: Most iterations.
        tol: The fit stops when an iteration gains less than this, in nats per point.
        n_init: Restarts of k-means; the best one is where the fit starts.
        init: ``"kmeans"``, or ``"current"`` to start from the posterior that the density has.
        backend: ``"torch"``, or ``"sklearn"`` to fit with scikit-learn's class, which ignores
            ``valid`` and starts from its own k-means.

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
        reg_covar: float = 1e-6,
        max_iter: int = 200,
        tol: float = 1e-3,
        n_init: int = 1,
        init: Init = "kmeans",
        backend: Literal["torch", "sklearn"] = "torch",
    ) -> None:
        super().__init__(
            n_dims,
            n_components,
            covariance_type="full",
            reg_covar=reg_covar,
            max_iter=max_iter,
            tol=tol,
            n_init=n_init,
            init=init,
            backend=backend,
        )
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
        r"""The exponential of the weights' entropy: how many equal weights would be as spread."""
        return float(torch.special.entr(self.weights).sum().exp())

    def _prepare(self, h: Tensor) -> None:
        super()._prepare(h)
        scatter = torch.zeros_like(self.covariances[0])
        for block in self._blocks(h):
            x = block.double() - self._origin
            scatter.addmm_(x.T, x)
        self._scale = positive_definite(scatter / max(len(h) - 1, 1), 0.0)

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

    def _penalty(self) -> float:
        """Divergence of the posterior over sticks, means and precisions from the prior."""
        prior = Beta(torch.ones_like(self.weights), self.concentration)
        sticks = kl_divergence(Beta(self.concentrations[:, 0], self.concentrations[:, 1]), prior)
        factors = precision_factor(self.covariances)
        rest = self._normal_divergence(factors) + self._wishart_divergence(factors)
        return float((sticks + rest).sum())

    def _normal_divergence(self, factors: Tensor) -> Tensor:
        r"""Expected KL of the means given the precisions, from the prior; :math:`\kappa_0 = 1`."""
        kappa = self.mean_precisions
        shift = torch.einsum("ck,ckj->cj", self.means - self._origin, factors)
        return (self.n_dims * (kappa.log() + 1 / kappa - 1) + shift.square().sum(1)) / 2

    def _wishart_divergence(self, factors: Tensor) -> Tensor:
        r"""KL of the precisions, :math:`W(\nu, (\nu\Sigma)^{-1})`, from the prior."""
        k, nu, nu_0 = self.n_dims, self.degrees_of_freedom, torch.tensor(float(self.n_dims))
        root = torch.linalg.cholesky(self._scale)
        trace = (root.T @ factors).square().sum((1, 2))
        log_det = -2 * (factors.diagonal(dim1=1, dim2=2).log().sum(1) + root.diagonal().log().sum())
        log_gamma = torch.mvlgamma(nu_0.to(nu) / 2, k) - torch.mvlgamma(nu / 2, k)
        moved = k * (nu_0 * nu.log() - nu) + (nu - nu_0) * self._digamma(nu)
        return (nu_0 * log_det + trace + moved) / 2 + log_gamma

    def _maximisation(self, statistics: Moments) -> None:
        counts = statistics.counts
        safe = replace(statistics, counts=counts.clamp(min=1e-12))
        means = safe.sums / safe.counts[:, None]
        scatter = self._covariance.estimate(safe, means, self.reg_covar) * counts[:, None, None]
        kappa, nu = 1 + counts, self.n_dims + counts
        between = (counts / kappa)[:, None, None] * means[:, :, None] * means[:, None, :]
        rest = counts.flip(0).cumsum(0).flip(0) - counts
        self.concentrations = torch.stack([1 + counts, self.concentration + rest], dim=1)
        self.mean_precisions, self.degrees_of_freedom = kappa, nu
        self.means = self._origin + means * (counts / kappa)[:, None]
        total = self._scale + scatter + between
        self.covariances = positive_definite(total / nu[:, None, None], 0.0)
        self.weights = self._mean_weights()

    def _mean_weights(self) -> Tensor:
        """Posterior means of the weights; what the truncation leaves over is spread evenly."""
        kept = self.concentrations[:, 0] / self.concentrations.sum(1)
        weights = kept * torch.cat([kept.new_ones(1), (1 - kept).cumprod(0)[:-1]])
        return weights / weights.sum()

    def _fit_library(self, h: Tensor, lengths: list[int], generator: Generator) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import BayesianGaussianMixture

        model = BayesianGaussianMixture(
            n_components=self.n_components,
            weight_concentration_prior_type="dirichlet_process",
            weight_concentration_prior=self.concentration,
            tol=max(self.tol, 0.0),
            reg_covar=self.reg_covar,
            max_iter=self.max_iter,
            n_init=self.n_init,
            random_state=library_seed(generator),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(h.double().cpu().numpy())
        self._take_over(model)

    def _take_over(self, model: Any) -> None:
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
