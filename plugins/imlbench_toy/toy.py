"""Distributions in the plane with known density, for calibration."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from imlbench import Dataset, Examples, Params, Sources, Space, Splits, available_if


class Density(ABC):
    """A distribution in the plane, in float64.

    Class attributes:
        bounds: Smallest and largest coordinates, ``((x, x), (y, y))``, of a box outside of which
            there is less than 1e-12 of the mass.
        detail: Standard deviation of the narrowest feature.
    """

    bounds: ClassVar[tuple[tuple[float, float], tuple[float, float]]]
    detail: ClassVar[float]

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` independent points, shape (n, 2), in random order."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density in nats, shape (N,), of float64 points of shape (N, 2)."""

    @functools.cached_property
    def entropy(self) -> float:
        r"""The differential entropy :math:`-\int p \log p`, in nats, to within 1e-6.

        The trapezoidal rule, whose error falls exponentially for smooth functions that vanish at
        the bounds, with two nodes to the standard deviation of the narrowest feature.
        """
        step = self.detail / 2
        x, y = (torch.arange(low, high, step, dtype=torch.float64) for low, high in self.bounds)
        log_p = self.log_prob(torch.cartesian_prod(x, y))
        return -(log_p.exp() * log_p).sum().item() * step**2


class Mixture(Density):
    r"""Gaussians of equal weight.

    .. math:: p(x) = \frac1C \sum_c N(x; \mu_c, A_c A_c^\top)

    Arguments:
        means: The :math:`\mu_c`, shape (C, 2).
        factors: The :math:`A_c`, lower triangular, shape (C, 2, 2).
    """

    def __init__(self, means: Tensor, factors: Tensor) -> None:
        self.means, self.factors = means, factors

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        component = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, 2, 1, generator=generator, dtype=torch.float64)
        return self.means[component] + (self.factors[component] @ noise).squeeze(-1)

    def log_joint(self, x: Tensor) -> Tensor:
        """Return the log-density of every point with every component, nats, shape (N, C)."""
        means, whiten = self.means.to(x.device), self.factors.inverse().to(x.device)
        distances = torch.einsum("cij,ncj->nci", whiten, x[:, None] - means).square().sum(-1)
        log_prob = whiten.det().log() - distances / 2 - math.log(2 * math.pi)
        return log_prob - math.log(len(means))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_joint(x).logsumexp(1)


class TwoGaussians(Mixture):
    """Two elongated Gaussians, at -1.5 and 1.5 on the first axis, leaning to either side.

    Standard deviations are 0.6 and 0.2, along the directions of 45 and 135 degrees for the left
    one and the other way round for the right one, so that no linear map takes both to spheres.
    """

    bounds, detail = ((-6.0, 6.0), (-5.0, 5.0)), 0.2

    def __init__(self) -> None:
        means = torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=torch.float64)
        long, short = 0.6**2, 0.2**2
        variance, covariance = (long + short) / 2, (long - short) / 2
        covariances = [
            [[variance, sign * covariance], [sign * covariance, variance]] for sign in (1, -1)
        ]
        super().__init__(
            means, torch.linalg.cholesky(torch.tensor(covariances, dtype=torch.float64))
        )


class Grid(Mixture):
    """25 spherical Gaussians of standard deviation 0.2, at -4, -2, 0, 2, 4 on either axis."""

    bounds, detail = ((-5.6, 5.6), (-5.6, 5.6)), 0.2

    def __init__(self) -> None:
        ticks = (-4.0, -2.0, 0.0, 2.0, 4.0)
        means = torch.tensor(list(itertools.product(ticks, ticks)), dtype=torch.float64)
        super().__init__(means, 0.2 * torch.eye(2, dtype=torch.float64).expand(25, 2, 2))


class Ring(Density):
    r"""Points of the unit circle plus Gaussian noise of standard deviation :math:`s = 0.1`.

    The integral over the circle has a closed form, with :math:`r = \|x\|`:

    .. math:: p(x) = \frac{1}{2 \pi s^2} \exp\!\left(-\frac{r^2 + 1}{2 s^2}\right)
              I_0\!\left(\frac{r}{s^2}\right)
    """

    bounds, detail = ((-1.8, 1.8), (-1.8, 1.8)), 0.1

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        return _circle(angle) + _noise(n, self.detail, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        variance, r = self.detail**2, x.norm(dim=1)
        log_bessel = torch.special.i0e(r / variance).log()  # of I0(r / s²) exp(-r / s²)
        return log_bessel - (r - 1) ** 2 / (2 * variance) - math.log(2 * math.pi * variance)


class Moons(Density):
    r"""Two interleaved half circles plus Gaussian noise of standard deviation :math:`s = 0.1`.

    The first moon is :math:`(\cos t, \sin t)`, the second :math:`(1 - \cos t, 1/2 - \sin t)`, with
    :math:`t` uniform in :math:`[0, \pi]`: the geometry of :func:`sklearn.datasets.make_moons`.

    .. math:: p(x) = \frac12 \sum_m \frac1\pi \int_0^\pi N(x; c_m(t), s^2 I) \, dt

    The integral has no closed form. It is computed by Gauss-Legendre quadrature with 256 nodes,
    to within 1e-9 nats for points less than 5 from the origin.
    """

    bounds, detail = ((-1.8, 2.8), (-1.3, 1.8)), 0.1

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        first = _circle(math.pi * torch.rand(n, generator=generator, dtype=torch.float64))
        is_second = torch.randint(2, (n, 1), generator=generator) == 1
        moons = torch.where(is_second, self._mirror(first), first)
        return moons + _noise(n, self.detail, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        if len(x) > 10000:  # bounds the memory
            return torch.cat([self.log_prob(part) for part in x.split(10000)])
        moons = torch.stack([self._moon(x), self._moon(self._mirror(x))])
        return moons.logsumexp(0) - math.log(2)

    def _moon(self, x: Tensor) -> Tensor:
        """Log-density of the first moon."""
        variance, (points, log_weights) = self.detail**2, _half_circle()
        terms = x @ points.T.to(x.device) / variance + log_weights.to(x.device)
        log_integral = terms.logsumexp(1) - (x.square().sum(1) + 1) / (2 * variance)
        return log_integral - math.log(2 * math.pi * variance)

    @staticmethod
    def _mirror(x: Tensor) -> Tensor:
        """Reflect about the point (1/2, 1/4), which takes either moon to the other."""
        return x.new_tensor([1.0, 0.5]) - x


def _circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


@functools.cache
def _half_circle() -> tuple[Tensor, Tensor]:
    """Nodes of the upper half circle, shape (256, 2), and logarithms of their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(256)
    angles = torch.from_numpy((nodes + 1) * math.pi / 2)
    return _circle(angles), torch.from_numpy(weights / 2).log()


def _noise(n: int, std: float, generator: torch.Generator) -> Tensor:
    return std * torch.randn(n, 2, generator=generator, dtype=torch.float64)


DENSITIES: dict[str, type[Density]] = {
    "two-gaussians": TwoGaussians,
    "ring": Ring,
    "grid": Grid,
    "moons": Moons,
}


class Toy2DParams(Params):
    """Parameters of ``toy-2d``."""

    shape: Literal["two-gaussians", "ring", "grid", "moons"] = "two-gaussians"
    """The distribution."""
    n_train: int = Field(10_000, ge=1)
    """Points for training."""
    n_valid: int = Field(2_000, ge=1)
    """Points for validation."""
    n_test: int = Field(5_000, ge=1)
    """Points for testing."""
    data_seed: int = Field(0, ge=0)
    """Determines the points; the splits do not depend on each other's size."""


class Toy2D(Dataset[Toy2DParams]):
    """Points in the plane: two Gaussians, a ring, 25 Gaussians on a grid, or two moons.

    Their density and entropy are known, so that what a metric says can be compared with the truth:
    the log-likelihood of the true model is, on average, minus the entropy.
    """

    name = "toy-2d"

    def __init__(self, params: Toy2DParams) -> None:
        super().__init__(params)
        self._density = DENSITIES[params.shape]()

    @property
    def space(self) -> Space:
        """A point."""
        return Space("vector", (2,))

    def load(self, sources: Sources) -> Splits:
        """Draw the points."""
        sizes = (self.params.n_train, self.params.n_valid, self.params.n_test)
        seeds = np.random.SeedSequence(self.params.data_seed).generate_state(3, np.uint64)
        train, valid, test = map(self._draw, sizes, seeds.tolist())
        return Splits(train, valid, test)

    def _draw(self, n: int, seed: int) -> Examples:
        points = self._density.sample(n, torch.Generator().manual_seed(seed))
        return Examples(points.to(torch.float32))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the true log-density.

        Arguments:
            x: Points of shape (N, 2), of any floating type, on any device.

        Returns:
            float64 of shape (N,), in nats, on the same device.

        Raises:
            ValueError: ``x`` has another shape.

        Example:
            >>> ring = Toy2D(Toy2DParams(shape="ring"))
            >>> ring.log_prob(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
            tensor([-0.4530, -0.4530], dtype=torch.float64)
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"toy-2d: x must be of shape (N, 2); got {tuple(x.shape)}")
        return self._density.log_prob(x.to(torch.float64))

    @available_if(lambda self: isinstance(self._density, Mixture))
    def mode(self, x: Tensor) -> Tensor:
        """Return the component that most likely drew each point, int64 of shape (N,)."""
        assert isinstance(self._density, Mixture)
        return self._density.log_joint(x.to(torch.float64)).argmax(dim=1)

    @property
    def entropy(self) -> float:
        """The true differential entropy, in nats, by numerical integration, to within 1e-6.

        Example:
            >>> grid = Toy2D(Toy2DParams(shape="grid"))
            >>> round(grid.entropy, 4), round(math.log(25 * 2 * math.pi * math.e * 0.2**2), 4)
            (2.8379, 2.8379)
        """
        return self._density.entropy
