"""What every base distribution offers: fit to points, evaluate, sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Generator, Tensor, nn

Report = Callable[[int, int, float], None]
"""Progress of a fit: ``report(iteration, max_iter, log_likelihood)``, nats per point."""

_LARGEST = 1e100  # beyond it, squares leave the range of float64


class Points(NamedTuple):
    """Points that have been checked, of recordings that follow each other.

    Arguments:
        h: The points, shape (N, K), float32 or float64, finite, without a graph.
        lengths: The number of points of each recording, positive, summing to N.
    """

    h: Tensor
    lengths: list[int]


class Density(nn.Module, ABC):
    r"""Base class of the densities :math:`p(h)` on :math:`\mathbb{R}^K`.

    Parameters are float64 buffers whose shapes follow from the constructor's arguments, so
    ``state_dict`` and ``load_state_dict`` (or safetensors) carry a fitted density into a new object
    built with the same arguments. Before it is fitted, a density is a standard normal one.

    Randomness comes from the given generators alone, which may live on the CPU or on the device of
    the parameters; the same seed on the same device gives the same result. No method keeps a graph.

    Subclasses have ``_fit``, ``_log_prob`` and ``_sample``, whose arguments have been checked.

    Arguments:
        n_dims: The number of dimensions :math:`K`, at least 1.
    """

    _n_min = 1  # points that a fit needs

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.n_dims = self._at_least("n_dims", n_dims, 1)

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
        r"""Fits the density to points by maximum likelihood, and moves it to their device.

        Arguments:
            h: Points, shape :math:`(N, K)`, floating point, finite.
            generator: Source of all randomness, on the CPU or on the device of ``h``.
            valid: Held-out points, shape :math:`(N', K)`. Where a fit iterates, their mean
                log-likelihood decides when it stops and which iteration's parameters it keeps;
                without them the training points' decides when it stops, and the last are kept.
            lengths: The number of points of each recording, in order; sums to :math:`N`. Only
                densities of sequences look at it.
            valid_lengths: The same for ``valid``.
            report: Called after every iteration.

        Returns:
            The density itself.

        Raises:
            ValueError: If an argument has the wrong shape or type, or is not finite.
        """
        train, held_out = self._points("h", h, n_min=self._n_min), None
        train_lengths = self._lengths("lengths", lengths, len(train))
        if valid is not None:
            valid = self._points("valid", valid).to(h.device)
            held_out = Points(valid, self._lengths("valid_lengths", valid_lengths, len(valid)))
        self.to(h.device)
        self._fit(Points(train, train_lengths), held_out, generator, report)
        return self

    @torch.no_grad()
    def log_prob(self, h: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        r"""Log-density of every point, computed in float64 whatever the type of ``h``.

        Arguments:
            h: Points, shape :math:`(N, K)`.
            lengths: The number of points of each recording; sums to :math:`N`. A density of
                sequences gives :math:`\log p(h_t \mid h_1, \dots, h_{t-1})`, which sum to the
                log-density of each recording; for any other density it makes no difference.

        Returns:
            Log-densities in nats, shape :math:`(N,)`, float64, on the device of ``h``.

        Raises:
            ValueError: If an argument has the wrong shape, or ``h`` is not finite.
        """
        h = self._points("h", h)
        points = Points(h, self._lengths("lengths", lengths, len(h)))
        return self._log_prob(points).to(h.device)

    @torch.no_grad()
    def sample_components(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        r"""Draws points, and says which component (or state) each one comes from.

        Arguments:
            n: The number of points, at least 1.
            generator: Source of randomness.

        Returns:
            Points, shape :math:`(n, K)`, float32, what decoders take, in random order (a density of
            sequences: in order of time); and their components, shape :math:`(n,)`, int64.

        Raises:
            ValueError: If ``n`` is less than 1.
        """
        return self._sample(self._at_least("n", n, 1), generator)

    def sample(self, n: int, generator: Generator) -> Tensor:
        r"""Draws points: the first result of :meth:`sample_components`, shape :math:`(n, K)`."""
        return self.sample_components(n, generator)[0]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.buffers()).device

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return f"n_dims={self.n_dims}"

    @abstractmethod
    def _fit(
        self, train: Points, valid: Points | None, generator: Generator, report: Report | None
    ) -> None:
        """Sets the parameters, which are on the points' device."""

    @abstractmethod
    def _log_prob(self, points: Points) -> Tensor:
        """Log-densities of points on any device, shape (N,), float64, on any device."""

    @abstractmethod
    def _sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws n points (n, K), float32, and their components (n,), int64."""

    def _snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters, for ``load_state_dict``."""
        return {name: value.clone() for name, value in self.state_dict().items()}

    def _at_least(self, name: str, value: int, minimum: int) -> int:
        if value < minimum:
            raise ValueError(
                f"{type(self).__name__}: {name} must be at least {minimum}; got {value}. "
                f"Give a larger {name}."
            )
        return value

    def _one_of(self, name: str, value: str, choices: Sequence[str]) -> None:
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__}: {name} must be one of {', '.join(choices)}; "
                f"got {value!r}. Choose one of them."
            )

    def _points(self, name: str, h: Tensor, n_min: int = 1) -> Tensor:
        """Checks points; returns them as float32 or float64, without their graph."""
        where = f"{type(self).__name__}: {name}"
        if h.ndim != 2 or h.shape[1] != self.n_dims:
            raise ValueError(
                f"{where} must be of shape (N, {self.n_dims}); got {tuple(h.shape)}. "
                f"Flatten each point, or set n_dims to match."
            )
        if not h.is_floating_point():
            raise ValueError(f"{where} must be floating point; got {h.dtype}. Call h.float().")
        if len(h) < n_min:
            raise ValueError(
                f"{where} must be at least {n_min} points; got {len(h)}. "
                f"Give more points, or fit fewer components."
            )
        h = h.detach()
        if not all(bool((block.abs() < _LARGEST).all()) for block in h.split(1 << 16)):
            raise ValueError(
                f"{where} must be finite (below {_LARGEST:g}); got NaN, infinite or huge values. "
                f"Look for a diverged encoder, or drop these points."
            )
        return h if h.dtype in (torch.float32, torch.float64) else h.float()

    def _lengths(self, name: str, lengths: Sequence[int] | None, n: int) -> list[int]:
        """Checks the lengths of recordings; without any, the points are one recording."""
        lengths = [n] if lengths is None else [int(length) for length in lengths]
        if min(lengths, default=0) < 1 or sum(lengths) != n:
            raise ValueError(
                f"{type(self).__name__}: {name} must be positive and sum to {n}, the number of "
                f"points; got {len(lengths)} that sum to {sum(lengths)}. Give one per recording."
            )
        return lengths
