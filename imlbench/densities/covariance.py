r"""The shapes a mixture's covariances can have: how each is evaluated, estimated and drawn from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LogDensities = Callable[[Tensor], Tensor]
r"""Points :math:`(B, K)` → their log-densities under every component, :math:`(B, C)`, float64."""

_STRIP = 32  # columns of a triangular factor that are multiplied at once
_STRIP_BYTES = 1 << 21  # of their products at once, on a CPU: what a core's own cache holds
_FEW = 32  # dimensions up to which products of all pairs of coordinates are formed at once
_NEGLIGIBLE = 1e-16  # responsibilities below it are left out of full second moments
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Moments:
    r"""Moments of points :math:`x_n = h_n - o`, weighted by responsibilities :math:`r_{nc}`.

    Arguments:
        origin: :math:`o`, near the mean of the data, so that little cancels; shape :math:`(K,)`.
        counts: :math:`\sum_n r_{nc}`, shape :math:`(C,)`.
        sums: :math:`\sum_n r_{nc} x_n`, shape :math:`(C, K)`.
        squares: Second moments, in the form that the covariances have.
    """

    origin: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor

    def add(self, h: Tensor, responsibilities: Tensor, covariance: Covariance) -> None:
        """Adds a block of points."""
        x = h.double() - self.origin
        self.counts.add_(responsibilities.sum(0))
        self.sums.addmm_(responsibilities.T, x)
        covariance.add_squares(self.squares, x, responsibilities)


class DiagonalNormal:
    r"""Log-densities of normal distributions with diagonal precisions, as one matrix product.

    .. math:: \log N(h; m, \mathrm{diag}(1/p)) =
        - \tfrac12 x^2 \cdot p + x \cdot (p\,m') + \mathrm{const}, \qquad x = h - o,\ m' = m - o

    Always float64, where the cancellation in the expanded square is harmless.
    """

    def __init__(self, means: Tensor, precisions: Tensor) -> None:
        self.origin = means.mean(0)
        centred = means - self.origin
        self.weight = torch.cat([-precisions / 2, centred * precisions], dim=1).T
        log_scale = (precisions.log() - _LOG_2PI).sum(1) / 2
        self.bias = log_scale - (centred.square() * precisions).sum(1) / 2

    def __call__(self, h: Tensor) -> Tensor:
        x = h.double() - self.origin
        return torch.addmm(self.bias, torch.cat([x.square(), x], dim=1), self.weight)


class TriangularNormal:
    r"""Log-densities of normal distributions with full precisions :math:`P P^\top`.

    .. math:: \log N(h; m, (P P^\top)^{-1}) =
        - \tfrac12 \lVert (h - m) P \rVert^2 + \log\det P - \tfrac{K}{2} \log 2\pi

    :math:`P` is upper triangular; its columns are taken in strips, all components of a strip in one
    matrix product, which leaves out most of the zeros below the diagonal.

    All log-densities are NaN where the rounding of ``dtype`` would show, and those of a component
    whose covariance is not positive definite: who looks at their sum has to wait only once.

    Arguments:
        means: Shape :math:`(C, K)`, float64.
        covariances: Shape :math:`(C, K, K)`, float64.
        dtype: Type of the products. The rounding of float64 is taken as it comes.
    """

    def __init__(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> None:
        self.n_components, n_dims = means.shape
        factors = precision_factor(covariances)
        reach = (means - means.mean(0)).square().sum(1).amax() + _traces(covariances).amax()
        steepest = torch.linalg.vector_norm(factors, dim=1).amax()
        self.dtype = dtype
        self.origin = means.mean(0).to(dtype)
        log_scale = factors.diagonal(dim1=1, dim2=2).log().sum(1) - n_dims * _LOG_2PI / 2
        suffices = _suffices(dtype, reach.sqrt() * steepest)
        self.log_scale = torch.where(suffices, log_scale, torch.nan)
        offsets = torch.einsum("ck,ckj->cj", self.origin.double() - means, factors)
        n_strips = math.ceil(n_dims / _STRIP)
        edges = [round(i * n_dims / n_strips) for i in range(n_strips + 1)]
        self.strips = [
            (
                1 + stop,
                torch.cat([offsets[None], factors.transpose(0, 1)])[: 1 + stop, :, start:stop]
                .reshape(1 + stop, -1)
                .to(dtype),
            )
            for start, stop in pairwise(edges)
        ]

    def __call__(self, h: Tensor) -> Tensor:
        row_bytes = self.n_components * _STRIP * self.dtype.itemsize
        n_rows = max(_STRIP_BYTES // row_bytes, 64) if h.device.type == "cpu" else len(h)
        squared = torch.cat([self._squared_distances(rows) for rows in h.split(n_rows)])
        largest = torch.finfo(self.dtype).max
        return self.log_scale - squared.clamp_(max=largest).double() / 2

    def _squared_distances(self, h: Tensor) -> Tensor:
        x = torch.nn.functional.pad(h.to(self.dtype) - self.origin, (1, 0), value=1.0)
        squared = x.new_zeros(len(x), self.n_components)
        for stop, weight in self.strips:
            y = x[:, :stop] @ weight
            squared += y.square_().view(len(x), self.n_components, -1).sum(2)
        return squared


def _suffices(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """Whether rounding terms of this magnitude moves their sum, of order 1, by less than 1e-3."""
    if dtype == torch.float64:
        return torch.ones_like(magnitude, dtype=torch.bool)
    return magnitude * (torch.finfo(dtype).eps / 2) < 1e-3


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def centre(blocks: Sequence[Tensor]) -> Tensor:
    """Mean of points that come in blocks of shape (n, K); float64."""
    return torch.stack([h.double().sum(0) for h in blocks]).sum(0) / sum(map(len, blocks))


def scatter(blocks: Sequence[Tensor], mean: Tensor) -> Tensor:
    """Sum of the outer products of points less their mean, shape (K, K); float64."""
    total = mean.new_zeros(len(mean), len(mean))
    for h in blocks:
        x = h.double() - mean
        total.addmm_(x.T, x)
    return total


def precision_factor(covariances: Tensor) -> Tensor:
    r"""Upper triangular :math:`P` with :math:`P P^\top = \Sigma^{-1}`; batched.

    NaN where a matrix is not positive definite; nobody waits to know.
    """
    lower, failed = torch.linalg.cholesky_ex(covariances)
    lower = torch.where(failed[..., None, None] > 0, torch.nan, lower)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT


def raised(matrices: Tensor, floor: float) -> Tensor:
    """Makes matrices symmetric that are so up to rounding, and adds ``floor`` to the diagonals."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return (matrices + matrices.mT) / 2 + floor * eye


def positive_definite(matrices: Tensor, floor: float) -> Tensor:
    r"""Adds ``floor`` to the diagonals; where a matrix still has no Cholesky factor, ever more.

    Arguments:
        matrices: Symmetric up to rounding, shape :math:`(*, K, K)`, float64, finite.
        floor: What every diagonal gets, in squared units of the data, at least 0.

    Returns:
        Positive definite matrices of the same shape.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    scale = matrices.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]
    least = 1e-15 * scale + 1e-30
    matrices, jitter = raised(matrices, 0.0), torch.full_like(scale, floor)
    while True:
        candidates = matrices + jitter * eye
        failed = torch.linalg.cholesky_ex(candidates).info[..., None, None] > 0
        if not failed.any():
            return candidates
        jitter = torch.where(failed, torch.maximum(10 * jitter, least), jitter)


class Covariance(ABC):
    """One shape of covariance, without state: the parameters stay with the density."""

    @abstractmethod
    def identity(self, n_components: int, n_dims: int) -> Tensor:
        """Identity covariances, float64; their shape is the shape of the parameter."""

    @abstractmethod
    def log_densities(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> LogDensities:
        """The components as a function of points; ``dtype`` is what its products may use."""

    @abstractmethod
    def add_squares(self, squares: Tensor, x: Tensor, responsibilities: Tensor) -> None:
        """Adds the second moments of a block of centred points, float64."""

    @abstractmethod
    def estimate(self, moments: Moments, means: Tensor, floor: float) -> Tensor:
        """Covariances of greatest likelihood about ``means`` (about the origin), plus a floor.

        Rounding may leave them not quite positive definite: see :meth:`mend`.
        """

    def mend(self, covariances: Tensor) -> Tensor:
        """The covariances; those that are not positive definite get more on their diagonals."""
        return covariances

    @abstractmethod
    def colour(self, noise: Tensor, components: Tensor, covariances: Tensor) -> Tensor:
        """Gives white noise of shape (n, K) the covariances of the components (n,)."""

    @abstractmethod
    def invert(self, covariances: Tensor) -> Tensor:
        """Precisions, in the same form."""

    @abstractmethod
    def is_positive(self, covariances: Tensor) -> bool:
        """Whether every covariance is positive definite."""

    def keep(self, kept: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """The new covariances where ``kept``, shape (C,), is true; elsewhere the old ones."""
        return torch.where(kept.view(-1, *[1] * (new.ndim - 1)), new, old)


class Full(Covariance):
    r"""A covariance for every component, shape :math:`(C, K, K)`."""

    def identity(self, n_components: int, n_dims: int) -> Tensor:
        return torch.eye(n_dims, dtype=torch.float64).repeat(n_components, 1, 1)

    def log_densities(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> LogDensities:
        return TriangularNormal(means, covariances, dtype)

    def add_squares(self, squares: Tensor, x: Tensor, responsibilities: Tensor) -> None:
        if x.shape[1] <= _FEW:
            k = x.shape[1]
            pairs = torch.cat([x[:, i : i + 1] * x[:, i:] for i in range(k)], dim=1)
            row, column = torch.triu_indices(k, k, device=x.device)
            squares[:, row, column] += responsibilities.T @ pairs
            squares[:, column, row] = squares[:, row, column]
            return
        for square, weight in zip(squares, responsibilities.T.contiguous(), strict=True):
            y = x
            if x.device.type == "cpu":  # elsewhere, to wait for a number of points costs more
                rows = (weight > _NEGLIGIBLE).nonzero().squeeze(1)
                y, weight = x[rows], weight[rows]
            square.addmm_((y * weight[:, None]).T, y)

    def estimate(self, moments: Moments, means: Tensor, floor: float) -> Tensor:
        squares = moments.squares / moments.counts[:, None, None]
        return raised(squares - means[:, :, None] * means[:, None, :], floor)

    def mend(self, covariances: Tensor) -> Tensor:
        return positive_definite(covariances, 0.0)

    def colour(self, noise: Tensor, components: Tensor, covariances: Tensor) -> Tensor:
        factors = torch.linalg.cholesky(covariances)
        out = torch.empty_like(noise)
        for component in components.unique().tolist():
            rows = (components == component).nonzero().squeeze(1)
            out[rows] = noise[rows] @ factors[component].T
        return out

    def invert(self, covariances: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(covariances))

    def is_positive(self, covariances: Tensor) -> bool:
        return not bool(torch.linalg.cholesky_ex(covariances).info.any())


class Tied(Covariance):
    r"""One covariance that all components share, shape :math:`(K, K)`."""

    def identity(self, n_components: int, n_dims: int) -> Tensor:
        return torch.eye(n_dims, dtype=torch.float64)

    def log_densities(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> LogDensities:
        factor, origin = precision_factor(covariances), means.mean(0)
        whitened = (means - origin) @ factor
        white = DiagonalNormal(whitened, torch.ones_like(whitened))
        log_scale = factor.diagonal().log().sum()
        return lambda h: white((h.double() - origin) @ factor) + log_scale

    def add_squares(self, squares: Tensor, x: Tensor, responsibilities: Tensor) -> None:
        squares.addmm_(x.T, x)

    def estimate(self, moments: Moments, means: Tensor, floor: float) -> Tensor:
        between = means.T @ (means * moments.counts[:, None])
        return raised((moments.squares - between) / moments.counts.sum(), floor)

    def mend(self, covariances: Tensor) -> Tensor:
        return positive_definite(covariances, 0.0)

    def colour(self, noise: Tensor, components: Tensor, covariances: Tensor) -> Tensor:
        return noise @ torch.linalg.cholesky(covariances).T

    def invert(self, covariances: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(covariances))

    def is_positive(self, covariances: Tensor) -> bool:
        return not bool(torch.linalg.cholesky_ex(covariances).info.any())

    def keep(self, kept: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return new


class Diagonal(Covariance):
    r"""Variances of every component and dimension, shape :math:`(C, K)`."""

    def identity(self, n_components: int, n_dims: int) -> Tensor:
        return torch.ones(n_components, n_dims, dtype=torch.float64)

    def log_densities(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> LogDensities:
        return DiagonalNormal(means, 1 / covariances)

    def add_squares(self, squares: Tensor, x: Tensor, responsibilities: Tensor) -> None:
        squares.addmm_(responsibilities.T, x.square())

    def estimate(self, moments: Moments, means: Tensor, floor: float) -> Tensor:
        squares = moments.squares / moments.counts[:, None]
        variances = (squares - means.square()).clamp(min=0) + floor
        return torch.maximum(variances, 1e-15 * squares + 1e-30)

    def colour(self, noise: Tensor, components: Tensor, covariances: Tensor) -> Tensor:
        return noise * covariances.sqrt()[components]

    def invert(self, covariances: Tensor) -> Tensor:
        return 1 / covariances

    def is_positive(self, covariances: Tensor) -> bool:
        return bool((covariances > 0).all())


class Spherical(Covariance):
    r"""One variance for every component, shape :math:`(C,)`."""

    def identity(self, n_components: int, n_dims: int) -> Tensor:
        return torch.ones(n_components, dtype=torch.float64)

    def log_densities(self, means: Tensor, covariances: Tensor, dtype: torch.dtype) -> LogDensities:
        return DiagonalNormal(means, (1 / covariances)[:, None].expand_as(means))

    def add_squares(self, squares: Tensor, x: Tensor, responsibilities: Tensor) -> None:
        squares.addmv_(responsibilities.T, x.square().mean(1))

    def estimate(self, moments: Moments, means: Tensor, floor: float) -> Tensor:
        squares = moments.squares / moments.counts
        variances = (squares - means.square().mean(1)).clamp(min=0) + floor
        return torch.maximum(variances, 1e-15 * squares + 1e-30)

    def colour(self, noise: Tensor, components: Tensor, covariances: Tensor) -> Tensor:
        return noise * covariances.sqrt()[components, None]

    def invert(self, covariances: Tensor) -> Tensor:
        return 1 / covariances

    def is_positive(self, covariances: Tensor) -> bool:
        return bool((covariances > 0).all())


COVARIANCES: dict[str, Covariance] = {
    "full": Full(),
    "diag": Diagonal(),
    "tied": Tied(),
    "spherical": Spherical(),
}
"""Every shape by the name that scikit-learn gives it."""
