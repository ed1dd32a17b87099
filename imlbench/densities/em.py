"""Expectation-maximisation: the loop that all densities with hidden components share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Generic, Literal, TypedDict, TypeVar

import torch
from torch import Generator, Tensor

from imlbench.densities.density import Density, Points, Report

Init = Literal["kmeans", "current"]
Backend = Literal["torch", "scikit-learn", "hmmlearn"]
Statistics = TypeVar("Statistics")


class EMOptions(TypedDict, total=False):
    """What all densities with a hidden component per point can be told about their fit.

    Arguments:
        reg_covar: What is added to every variance, in squared units of the data, at least 0; by
            default 1e-6.
        max_iter: Most iterations, at least 1; by default 100.
        tol: The fit stops when an iteration gains less than this, in nats per point; by default
            1e-3. With ``-inf`` it always makes ``max_iter`` iterations.
        n_init: Restarts of k-means, at least 1; the best one is where the fit starts. By default 1.
        init: ``"kmeans"``, the default, or ``"current"`` to start from the parameters that the
            density has, from ``from_parameters``, ``load_state_dict`` or an earlier fit.
        backend: ``"torch"``, the default, or the library whose fit is to be used instead:
            ``"scikit-learn"`` for mixtures, ``"hmmlearn"`` for hidden Markov models. The library
            fits in float64 on the CPU, follows the training likelihood, and ignores ``valid``.
    """

    reg_covar: float
    max_iter: int
    tol: float
    n_init: int
    init: Init
    backend: Backend


class LatentDensity(Density, Generic[Statistics]):
    """Base class of densities with a hidden component (or state) per point.

    After :meth:`fit`, ``log_likelihoods`` holds the criterion of every iteration in nats per point,
    the start first, ``n_iter`` the iteration whose parameters were kept (the best one for held-out
    points, otherwise the last), and ``converged`` whether the fit ended before ``max_iter``.

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The number of components :math:`C`.
        options: See :class:`EMOptions`.
    """

    library: ClassVar[Backend]
    """The backend besides ``"torch"``."""

    log_likelihoods: list[float]
    n_iter: int
    converged: bool

    def __init__(
        self,
        n_dims: int,
        n_components: int,
        *,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        init: Init = "kmeans",
        backend: Backend = "torch",
    ) -> None:
        super().__init__(n_dims)
        self.n_components = self._n_min = self._at_least("n_components", n_components, 1)
        self.max_iter = self._at_least("max_iter", max_iter, 1)
        self.n_init = self._at_least("n_init", n_init, 1)
        if not 0 <= reg_covar < torch.inf:
            raise ValueError(
                f"{type(self).__name__}: reg_covar must be finite and at least 0; got {reg_covar}. "
                f"Try 1e-6 times the variance of the data."
            )
        self._one_of("init", init, ("kmeans", "current"))
        self._one_of("backend", backend, ("torch", self.library))
        self.reg_covar, self.tol, self.init, self.backend = reg_covar, tol, init, backend
        self.log_likelihoods, self.n_iter, self.converged = [], 0, False

    def extra_repr(self) -> str:
        return f"n_dims={self.n_dims}, n_components={self.n_components}"

    def _prepare(self, h: Tensor) -> None:
        """Computes what every iteration needs to know about the points."""

    @abstractmethod
    def _initialise(self, points: Points, generator: Generator) -> None:
        """Sets the parameters to a start."""

    @abstractmethod
    def _expectation(self, points: Points) -> tuple[Statistics, float]:
        """Sufficient statistics, and the criterion of the parameters as they are, per point."""

    @abstractmethod
    def _maximisation(self, statistics: Statistics) -> None:
        """Sets the parameters to the best ones for the statistics."""

    @abstractmethod
    def _log_likelihood(self, points: Points) -> float:
        """Mean log-likelihood per point, in the precision of the points."""

    @abstractmethod
    def _fit_library(self, points: Points, generator: Generator) -> None:
        """Fits with the library, and takes its parameters over."""

    def _fit(
        self, train: Points, valid: Points | None, generator: Generator, report: Report | None
    ) -> None:
        if self.backend != "torch":
            self._fit_library(train, generator)
            return
        self._prepare(train.h)
        if self.init == "kmeans":
            self._initialise(train, generator)
        self._iterate(train, valid, report)

    def _iterate(self, train: Points, valid: Points | None, report: Report | None) -> None:
        previous = greatest = -torch.inf
        best = self._snapshot()
        self.log_likelihoods, self.n_iter, self.converged = [], 0, False
        for iteration in range(self.max_iter + 1):
            statistics, value = self._expectation(train)
            if valid is not None:
                value = self._log_likelihood(valid)
            self.log_likelihoods.append(value)
            if report is not None:
                report(iteration, self.max_iter, value)
            # With a prior, the training points' likelihood may fall on the way to the optimum.
            if value > greatest or (valid is None and math.isfinite(value)):
                greatest, best, self.n_iter = value, self._snapshot(), iteration
            if value - previous < self.tol:
                self.converged = True
                break
            previous = value
            if iteration < self.max_iter:
                self._maximisation(statistics)
        self.load_state_dict(best)

    def _set_parameters(self, remedy: str, **given: Tensor) -> None:
        """Sets parameters by name, on behalf of ``from_parameters``; refuses those that misfit."""
        for name, value in given.items():
            expected = getattr(self, name).shape
            if value.shape != expected or not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{type(self).__name__}.from_parameters: {name} must be finite, of shape "
                    f"{tuple(expected)}; got {tuple(value.shape)}. {remedy}"
                )
            setattr(self, name, value.detach().double().clone())
