"""Gaussian mixtures, fitted by expectation-maximisation."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self, Unpack

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from imlbench.densities.covariance import (
    COVARIANCES,
    DiagonalNormal,
    LogDensities,
    Moments,
    centre,
)
from imlbench.densities.density import Points
from imlbench.densities.draws import categorical, library_seed, normal
from imlbench.densities.em import EMOptions, LatentDensity
from imlbench.densities.kmeans import kmeans

if TYPE_CHECKING:
    from sklearn.mixture import BayesianGaussianMixture
    from sklearn.mixture import GaussianMixture as Library

CovarianceType = Literal["full", "diag", "tied", "spherical"]

_BLOCK_BYTES = 1 << 24  # of the widest intermediate of a block, on a CPU: what its caches hold
_EMPTY = 1e-8  # a component with fewer points than this gets weight zero and keeps its shape


class Mixture(LatentDensity[Moments]):
    """What mixtures share: blocked evaluation, moments, and sampling.

    The arguments are those of :class:`GaussianMixture`.
    """

    library = "scikit-learn"

    weights: Tensor
    means: Tensor
    covariances: Tensor
    _origin: Tensor
    _dtype: torch.dtype  # of the products of a fit

    def __init__(
        self,
        n_dims: int,
        n_components: int = 30,
        *,
        covariance_type: CovarianceType = "full",
        **options: Unpack[EMOptions],
    ) -> None:
        super().__init__(n_dims, n_components, **options)
        self._one_of("covariance_type", covariance_type, tuple(COVARIANCES))
        self.covariance_type = covariance_type
        self._covariance = COVARIANCES[covariance_type]
        double = torch.float64
        self.register_buffer("weights", torch.full((n_components,), 1 / n_components, dtype=double))
        self.register_buffer("means", torch.zeros(n_components, n_dims, dtype=double))
        self.register_buffer("covariances", self._covariance.identity(n_components, n_dims))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, covariance_type={self.covariance_type!r}"

    @torch.no_grad()
    def responsibilities(self, h: Tensor) -> Tensor:
        r"""Posterior probability of every component given a point, :math:`p(c \mid h_n)`.

        Arguments:
            h: Points, shape :math:`(N, K)`.

        Returns:
            Probabilities, shape :math:`(N, C)`, float64, on the device of ``h``.

        Raises:
            ValueError: If ``h`` has the wrong shape or is not finite.
        """
        h = self._points("h", h)
        joint = self._log_joint(torch.float64)
        blocks = [joint(block.to(self.device)).softmax(1) for block in self._blocks(h)]
        return torch.cat(blocks).to(h.device)

    def _log_prob(self, points: Points) -> Tensor:
        joint = self._log_joint(torch.float64)
        blocks = self._blocks(points.h)
        return torch.cat([joint(block.to(self.device)).logsumexp(1) for block in blocks])

    def _sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        components = categorical(self.weights.double(), n, generator).to(self.device)
        noise = normal((n, self.n_dims), generator, self.device)
        noise = self._covariance.colour(noise, components, self.covariances.double())
        return (self.means[components] + noise).float(), components

    def _log_joint(self, dtype: torch.dtype, log_weights: Tensor | None = None) -> LogDensities:
        r"""Points → :math:`\log w_c N(h; m_c, \Sigma_c)`; products may be taken in ``dtype``."""
        densities = self._covariance.log_densities(
            self.means.double(), self.covariances.double(), dtype
        )
        offset = self.weights.double().log() if log_weights is None else log_weights
        return lambda h: densities(h).add_(offset)

    def _log_weights(self) -> Tensor:
        """Log-weights for the E-step, shape (C,)."""
        return self.weights.double().log()

    def _penalty(self) -> Tensor:
        """What the criterion takes off the sum of the E-step's log-densities, in nats; scalar."""
        return self.weights.new_zeros(())

    def _blocks(self, h: Tensor) -> Sequence[Tensor]:
        width = self.n_components * min(self.n_dims, 32) * 4
        budget = _BLOCK_BYTES if h.device.type == "cpu" else 32 * _BLOCK_BYTES
        return h.split(min(max(budget // width, 64), 1 << 16))

    def _moments(self, h: Tensor, posterior: Callable[[Tensor], Tensor]) -> Moments:
        """Moments of all points; ``posterior`` gives the responsibilities of a block."""
        zeros = self._origin.new_zeros
        moments = Moments(
            self._origin,
            zeros(self.n_components),
            zeros(self.n_components, self.n_dims),
            zeros(self.covariances.shape),
        )
        for block in self._blocks(h):
            moments.add(block, posterior(block), self._covariance)
        return moments

    def _prepare(self, h: Tensor) -> None:
        self._origin, self._dtype = centre(self._blocks(h)), h.dtype

    def _initialise(self, points: Points, generator: Generator) -> None:
        h = points.h
        self.means = kmeans(h, self.n_components, generator=generator, n_init=self.n_init)
        nearest = DiagonalNormal(self.means, torch.ones_like(self.means))
        self._maximisation(
            self._moments(h, lambda x: one_hot(nearest(x).argmax(1), self.n_components).double())
        )

    @abstractmethod
    def _library_model(self) -> Library | BayesianGaussianMixture:
        """scikit-learn's mixture of this kind, not fitted, with what only this kind knows."""

    def _fit_library(self, points: Points, generator: Generator) -> None:
        from sklearn.exceptions import ConvergenceWarning

        model = self._library_model().set_params(
            n_components=self.n_components,
            tol=max(self.tol, 0.0),
            reg_covar=self.reg_covar,
            max_iter=self.max_iter,
            n_init=self.n_init,
            random_state=library_seed(generator),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(points.h.double().cpu().numpy())
        self._take_over(model)

    def _take_over(self, model: Library | BayesianGaussianMixture) -> None:
        """Copies what a fitted mixture of scikit-learn has found."""
        for name in ("weights", "means", "covariances"):
            value = torch.as_tensor(getattr(model, f"{name}_"), dtype=torch.float64)
            setattr(self, name, value.clone().to(self.device))
        self.log_likelihoods = [float(model.lower_bound_)]
        self.n_iter, self.converged = int(model.n_iter_), bool(model.converged_)

    def _expectation(self, points: Points) -> tuple[Moments, float]:
        moments, total = self._statistics(points.h)
        value = float(total)
        if math.isnan(value):  # a covariance has no Cholesky factor, or rounding would show
            self.covariances = self._covariance.mend(self.covariances)
            self._dtype = torch.float64
            moments, total = self._statistics(points.h)
            value = float(total)
        return moments, value / len(points.h)

    def _statistics(self, h: Tensor) -> tuple[Moments, Tensor]:
        """Moments of the points, and the criterion: NaN if they could not be computed."""
        joint = self._log_joint(self._dtype, self._log_weights())
        total = -self._penalty()

        def posterior(block: Tensor) -> Tensor:
            log_joint = joint(block)
            log_density = log_joint.logsumexp(1, keepdim=True)
            total.add_(log_density.sum())
            return log_joint.sub_(log_density).exp_()

        return self._moments(h, posterior), total

    def _log_likelihood(self, points: Points) -> float:
        h = points.h
        joint = self._log_joint(self._dtype)
        return float(sum(joint(block).logsumexp(1).sum() for block in self._blocks(h))) / len(h)


class GaussianMixture(Mixture):
    r"""A mixture of Gaussians, fitted by expectation-maximisation.

    .. math:: p(h) = \sum_{c=1}^{C} w_c \, N(h; m_c, \Sigma_c)

    The products of the E-step run in the precision of the points, as long as its rounding does not
    show; moments are always summed in float64 about the mean of the data. A component that loses
    all its points gets weight zero.

    References:
        | Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
        | https://www.jstor.org/stable/2984875

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The number of components :math:`C`.
        covariance_type: ``"full"``: ``covariances`` has shape :math:`(C, K, K)`; ``"diag"``:
            :math:`(C, K)`; ``"tied"``, one for all components: :math:`(K, K)`; ``"spherical"``:
            :math:`(C,)`.
        options: See :class:`EMOptions`. Where a covariance with ``reg_covar`` is still not positive
            definite, more is added to it; the other backend is ``"scikit-learn"``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = torch.randn(1000, 2, generator=generator)
        >>> h[:300] += 8.0
        >>> mixture = GaussianMixture(2, n_components=2).fit(h, generator=generator)
        >>> mixture.weights.sort().values
        tensor([0.3000, 0.7000], dtype=torch.float64)
        >>> mixture.sample(5, generator).shape
        torch.Size([5, 2])
    """

    @classmethod
    def from_parameters(
        cls,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        covariance_type: CovarianceType = "full",
        **options: Unpack[EMOptions],
    ) -> Self:
        r"""Builds a mixture with the given parameters; fitting it starts from them.

        Arguments:
            weights: Shape :math:`(C,)`, not negative; normalised to sum to one.
            means: Shape :math:`(C, K)`.
            covariances: In the shape that belongs to ``covariance_type``, positive definite.
            covariance_type: As in the constructor.
            options: Further arguments of the constructor.

        Returns:
            The mixture, on the device of ``means``.

        Raises:
            ValueError: If shapes do not fit together, or values are not those of a mixture.
        """
        options = EMOptions(init="current") | options
        mixture = cls(means.shape[1], len(means), covariance_type=covariance_type, **options)
        mixture.to(means.device)._set_parameters(
            "Check covariance_type.", weights=weights, means=means, covariances=covariances
        )
        if bool((mixture.weights < 0).any()) or not bool(mixture.weights.sum() > 0):
            raise ValueError(
                f"{cls.__name__}.from_parameters: weights must be at least 0 and not all 0; "
                f"got {weights.tolist()}. Normalise counts of points."
            )
        mixture.weights /= mixture.weights.sum()
        if not mixture._covariance.is_positive(mixture.covariances):
            raise ValueError(
                f"{cls.__name__}.from_parameters: covariances must be positive definite; got one "
                f"that is not. Add a small number to its diagonal."
            )
        return mixture

    def _maximisation(self, statistics: Moments) -> None:
        counts = statistics.counts
        kept = counts > _EMPTY
        safe = replace(statistics, counts=counts.clamp(min=_EMPTY))
        means = safe.sums / safe.counts[:, None]
        covariances = self._covariance.estimate(safe, means, self.reg_covar)
        self.weights = counts / counts.sum()
        self.means = torch.where(kept[:, None], means + statistics.origin, self.means)
        self.covariances = self._covariance.keep(kept, covariances, self.covariances)

    def _library_model(self) -> Library:
        from sklearn.mixture import GaussianMixture as Library

        start = {}
        if self.init == "current":
            start = {
                "weights_init": self.weights.cpu().numpy(),
                "means_init": self.means.cpu().numpy(),
                "precisions_init": self._covariance.invert(self.covariances).cpu().numpy(),
            }
        return Library(covariance_type=self.covariance_type, **start)
