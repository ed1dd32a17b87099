"""Expectation-maximisation: the loop that all densities with hidden components share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, Literal, Self, TypeVar

import torch
from torch import Generator, Tensor

from imlbench.densities.density import Density, Report

Init = Literal["kmeans", "current"]
Statistics = TypeVar("Statistics")


class LatentDensity(Density, Generic[Statistics]):
    """Base class of densities with a hidden component (or state) per point.

    After :meth:`fit`, ``log_likelihoods`` holds the criterion of every iteration in nats per point,
    the start first, ``n_iter`` the iteration whose parameters were kept (the best one for held-out
    points, otherwise the last), and ``converged`` whether the fit ended before ``max_iter``.

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The number of components :math:`C`.
        reg_covar: What is added to every variance, in squared units of the data, at least 0.
        max_iter: Most iterations, at least 1.
        tol: The fit stops when an iteration gains less than this, in nats per point. With ``-inf``
            it always makes ``max_iter`` iterations.
        n_init: Restarts of k-means; the best one is where the fit starts.
        init: ``"kmeans"``, or ``"current"`` to start from the parameters the density has.
        backend: ``"torch"``, or the library whose fit is to be used instead. The library fits in
            float64 on the CPU, follows the training likelihood, and ignores ``valid``.
        library: The name of that library.
    """

    log_likelihoods: list[float]
    n_iter: int
    converged: bool

    def __init__(
        self,
        n_dims: int,
        n_components: int,
        *,
        reg_covar: float,
        max_iter: int,
        tol: float,
        n_init: int,
        init: Init,
        backend: str,
        library: str,
    ) -> None:
        super().__init__(n_dims)
        self.n_components = self._at_least("n_components", n_components, 1)
        self.max_iter = self._at_least("max_iter", max_iter, 1)
        self.n_init = self._at_least("n_init", n_init, 1)
        if not 0 <= reg_covar < torch.inf:
            raise ValueError(
                f"{type(self).__name__}: reg_covar must be finite and at least 0; got {reg_covar}. "
                f"Try 1e-6 times the variance of the data."
            )
        self._one_of("init", init, ("kmeans", "current"))
        self._one_of("backend", backend, ("torch", library))
        self.reg_covar, self.tol, self.init, self.backend = reg_covar, tol, init, backend
        self.log_likelihoods, self.n_iter, self.converged = [], 0, False

    def _prepare(self, h: Tensor) -> None:
        """Computes what every iteration needs to know about the points."""

    @abstractmethod
    def _initialise(self, h: Tensor, lengths: list[int], generator: Generator) -> None:
        """Sets the parameters to a start."""

    @abstractmethod
    def _expectation(self, h: Tensor, lengths: list[int]) -> tuple[Statistics, float]:
        """Sufficient statistics, and the criterion of the parameters as they are, per point."""

    @abstractmethod
    def _maximisation(self, statistics: Statistics) -> None:
        """Sets the parameters to the best ones for the statistics."""

    @abstractmethod
    def _log_likelihood(self, h: Tensor, lengths: list[int]) -> float:
        """Mean log-likelihood per point, in the precision of ``h``."""

    @abstractmethod
    def _fit_library(self, h: Tensor, lengths: list[int], generator: Generator) -> None:
        """Fits with the library, and takes its parameters over."""

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
        h = self._points("h", h, n_min=self.n_components)
        checked = self._lengths("lengths", lengths, len(h))
        held_out = None
        if valid is not None:
            valid = self._points("valid", valid).to(h.device)
            held_out = valid, self._lengths("valid_lengths", valid_lengths, len(valid))
        self.to(h.device)
        if self.backend != "torch":
            self._fit_library(h, checked, generator)
            return self
        self._prepare(h)
        if self.init == "kmeans":
            self._initialise(h, checked, generator)
        self._iterate(h, checked, held_out, report)
        return self

    def _iterate(
        self,
        h: Tensor,
        lengths: list[int],
        held_out: tuple[Tensor, list[int]] | None,
        report: Report | None,
    ) -> None:
        previous = greatest = -torch.inf
        best = self._snapshot()
        self.log_likelihoods, self.n_iter, self.converged = [], 0, False
        for iteration in range(self.max_iter + 1):
            statistics, value = self._expectation(h, lengths)
            if held_out is not None:
                value = self._log_likelihood(*held_out)
            self.log_likelihoods.append(value)
            if report is not None:
                report(iteration, self.max_iter, value)
            # With a prior, the training points' likelihood may fall on the way to the optimum.
            if value > greatest or (held_out is None and math.isfinite(value)):
                greatest, best, self.n_iter = value, self._snapshot(), iteration
            if value - previous < self.tol:
                self.converged = True
                break
            previous = value
            if iteration < self.max_iter:
                self._maximisation(statistics)
        self.load_state_dict(best)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state_dict().items()}
