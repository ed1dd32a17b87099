"""k-means with k-means++ seeds, all restarts at once: where the fits start."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from imlbench.densities.draws import categorical

_N_POINTS = 20_000  # a subsample of this size places the centres well enough to start from
_N_DISTANCES = 1 << 24


def kmeans(
    h: Tensor, n_clusters: int, *, generator: Generator, n_init: int = 1, max_iter: int = 30
) -> Tensor:
    r"""Finds centres :math:`m_c` that make :math:`\sum_n \min_c \lVert h_n - m_c \rVert^2` small.

    Works on a random subsample where there are more than 20,000 points. All restarts advance
    together, as one matrix product per iteration; the best one is returned. Centres coincide where
    there are fewer distinct points than clusters.

    References:
        | k-means++: The Advantages of Careful Seeding (Arthur and Vassilvitskii, 2007)
        | https://dl.acm.org/doi/10.5555/1283383.1283494

    Arguments:
        h: Points, shape :math:`(N, K)`, finite, with :math:`N` at least ``n_clusters``.
        n_clusters: The number of centres :math:`C`.
        generator: Source of randomness.
        n_init: The number of restarts.
        max_iter: Most iterations of Lloyd's algorithm; it stops before when nothing changes.

    Returns:
        Centres, shape :math:`(C, K)`, float64.

    Example:
        >>> h = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> kmeans(h, 2, generator=torch.Generator().manual_seed(0)).sort(0).values
        tensor([[ 0.5000],
                [10.5000]], dtype=torch.float64)
    """
    most = max(20 * n_clusters, min(_N_POINTS, _N_DISTANCES // (n_init * n_clusters)))
    if len(h) > most:
        pick = torch.randperm(len(h), generator=generator, device=generator.device)[:most]
        h = h[pick.to(h.device)]
    x = h.double()
    origin = x.mean(0)
    x = x - origin
    centres = _seed(x, n_clusters, n_init, generator)
    inertia = x.new_full((n_init,), torch.inf)
    for _ in range(max_iter):
        previous, (centres, inertia) = inertia, _lloyd(x, centres)
        if bool((inertia >= previous * (1 - 1e-4)).all()):
            break
    return centres[inertia.argmin()] + origin


def _squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    """From points (N, K) to centres (C, K), shape (N, C)."""
    inner = torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2)
    return inner.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def _seed(x: Tensor, n_clusters: int, n_init: int, generator: Generator) -> Tensor:
    """k-means++ seeds of all restarts, shape (n_init, C, K)."""
    centres = x.new_empty(n_init, n_clusters, x.shape[1])
    nearest = x.new_full((n_init, len(x)), torch.inf)
    weights = torch.ones_like(nearest)
    for k in range(n_clusters):
        chosen = categorical(weights, 1, generator).squeeze(1).to(x.device)
        centres[:, k] = x[chosen]
        nearest = torch.minimum(nearest, _squared_distances(x, x[chosen]).T)
        largest = nearest.amax(1, keepdim=True)
        weights = torch.where(largest > 0, nearest / largest, 1.0)
    return centres


def _lloyd(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Moves every centre to the mean of its points; an empty cluster keeps its centre."""
    n_init, n_clusters, n_dims = centres.shape
    distances = _squared_distances(x, centres.view(-1, n_dims)).view(-1, n_init, n_clusters)
    least, label = distances.min(2)
    member = torch.zeros_like(distances).scatter_(2, label[:, :, None], 1.0).flatten(1)
    counts = member.sum(0)[:, None]
    sums = member.T @ x
    means = torch.where(counts > 0, sums / counts.clamp(min=1), centres.view(-1, n_dims))
    return means.view_as(centres), least.sum(0)
