"""Kernel density estimate: exact sums over all pairs, at the speed of a matrix product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 5e-5  # nats: how far rounding may move a log-density
_BLOCK_BYTES = 1 << 23  # of a block of distances
_PAIR_BYTES = 1 << 22  # of a block of differences
_OVERFLOW = 1e25  # an error that says that squares may leave the range of float32
_DENSE = 0.02  # share of pairs beyond which float64 products beat single pairs
_FAINT = -80.0  # log-weight that adds nothing; the exponential of far smaller ones is slow
_ROOT_2PI = math.sqrt(2 * math.pi)


class KernelLogProb(NamedTuple):
    """What :func:`kde_log_prob` returns.

    Arguments:
        log_density: Log-densities in nats, one row per bandwidth, shape (n_bandwidths, N), float64.
        nearest: Index of every point's nearest sample, shape (N,), int64.
        squared_distance: Squared distance to it, shape (N,), float64.
    """

    log_density: Tensor
    nearest: Tensor
    squared_distance: Tensor


@torch.no_grad()
def kde_log_prob(
    x: Tensor, samples: Tensor, bandwidths: Sequence[float], *, block: int | None = None
) -> KernelLogProb:
    r"""Log-density of points under a Gaussian kernel density estimate.

    .. math:: \log p(x_n) = \log \frac1M \sum_{m=1}^{M} N(x_n; s_m, h^2 I)

    The error is at most 1e-4 nats, also where samples nearly coincide with points: distances come
    from one matrix product in the precision of the inputs, and those of the pairs that matter to
    the sum are computed again in float64. Working memory is a few blocks, whatever the inputs.

    Warning:
        Smooth samples score better than real data do; see the benchmark's reference rows.

    Arguments:
        x: Points, shape :math:`(N, D)`.
        samples: Samples :math:`s_m`, shape :math:`(M, D)`, of the type and on the device of ``x``.
        bandwidths: Standard deviations :math:`h`, in units of ``x``, positive.
        block: Points per block; by default as many as 8 MiB of distances hold.

    Returns:
        Log-densities for every bandwidth, and every point's nearest sample.

    Raises:
        ValueError: If shapes, types or devices do not fit, inputs are not finite, or a bandwidth is
            not positive.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> result = kde_log_prob(x, x, bandwidths=[1.0])
        >>> result.log_density
        tensor([[-1.1380, -1.1380]], dtype=torch.float64)
        >>> result.nearest
        tensor([0, 1])
    """
    x, samples = _check(x, samples, bandwidths)
    rows = block or max(_BLOCK_BYTES // (len(samples) * x.element_size()), 16)
    pieces = list(_blocks(x, samples, bandwidths, rows))
    density, nearest, squared = zip(*pieces, strict=True)
    return KernelLogProb(torch.cat(density, 1), torch.cat(nearest), torch.cat(squared))


def _check(x: Tensor, samples: Tensor, bandwidths: Sequence[float]) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or samples.ndim != 2 or x.shape[1] != samples.shape[1]:
        raise ValueError(
            f"kde_log_prob: x and samples must be of shape (N, D) and (M, D); got "
            f"{tuple(x.shape)} and {tuple(samples.shape)}. Flatten them with .flatten(1)."
        )
    if len(x) < 1 or len(samples) < 1:
        raise ValueError(
            f"kde_log_prob: x and samples must be at least one row each; got {len(x)} and "
            f"{len(samples)}. Give some points, and draw some samples."
        )
    if x.dtype != samples.dtype or not x.is_floating_point() or x.device != samples.device:
        raise ValueError(
            f"kde_log_prob: x and samples must be of one floating type on one device; got "
            f"{x.dtype} on {x.device} and {samples.dtype} on {samples.device}. Move them with .to."
        )
    if not bandwidths or not all(0 < h < math.inf for h in bandwidths):
        raise ValueError(
            f"kde_log_prob: bandwidths must be positive numbers; got {list(bandwidths)}. "
            f"Give standard deviations in units of x, such as [0.2]."
        )
    for name, value in (("x", x), ("samples", samples)):
        if not bool(value.sum(1).isfinite().all()):
            raise ValueError(
                f"kde_log_prob: {name} must be finite; got NaN, infinite or huge values. "
                f"Look for a diverged model."
            )
    if x.dtype not in (torch.float32, torch.float64):
        x, samples = x.float(), samples.float()
    return x, samples


def _blocks(
    x: Tensor, samples: Tensor, bandwidths: Sequence[float], rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    norms = _squared_norms(samples)
    largest = float(norms.max())
    for block in x.split(rows):
        error = _rounding(block, largest)
        window = _window(error, bandwidths, len(samples))
        excess, nearest, squared = _distances(block, samples, norms, error, window)
        yield _log_density(excess, squared, bandwidths, x.shape[1]), nearest, squared


def _squared_norms(x: Tensor) -> Tensor:
    """Squared norms in float64, by blocks."""
    rows = max(_PAIR_BYTES // (8 * x.shape[1]), 1)
    return torch.cat([block.double().square().sum(1) for block in x.split(rows)])


def _rounding(x: Tensor, largest: float) -> float:
    r"""Error to expect in :math:`\lVert s \rVert^2 - 2 x \cdot s`, growing with :math:`\sqrt D`.

    References:
        | A New Approach to Probabilistic Rounding Error Analysis (Higham and Mary, 2019)
        | https://epubs.siam.org/doi/10.1137/18M1226312
    """
    unit = torch.finfo(x.dtype).eps / 2
    if x.dtype == torch.float32 and _rounds_products(x.device):
        unit = 2.0**-9
    scale = largest + math.sqrt(largest) * float(torch.linalg.vector_norm(x, dim=1).max())
    return 2 * math.sqrt(x.shape[1]) * unit * scale


def _rounds_products(device: torch.device) -> bool:
    """Whether somebody has allowed products of float32 to be rounded to less."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was allowed by the newer settings, beside which this one refuses
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        return backend.matmul.fp32_precision not in ("ieee", "none")


def _window(error: float, bandwidths: Sequence[float], n_samples: int) -> float:
    r"""How far beyond the nearest sample squared distances must be exact.

    Pairs further out have relative weights below :math:`\tau`, and all of them together move the
    log-density by less than :math:`M \tau\, \mathrm{error} / 2h^2`, held to the tolerance.
    """
    width = 0.0
    for h in bandwidths:
        scale = 2 * h * h
        width = max(width, scale * math.log(max(n_samples * error / scale / _TOLERANCE, 1.0)))
    return width + 4 * error


def _distances(
    x: Tensor, samples: Tensor, norms: Tensor, error: float, window: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances less the least of each row; which sample has it; and the least itself."""
    if error > _OVERFLOW:
        return _dense_distances(x, samples, norms)
    excess = (x @ samples.T).mul_(-2).add_(norms.to(x.dtype))
    excess -= excess.amin(1, keepdim=True)
    row, column = (excess <= window).nonzero(as_tuple=True)
    if len(row) > max(_DENSE * excess.numel(), 8 * len(x)):
        return _dense_distances(x, samples, norms)
    exact = _pair_distances(x, samples, row, column)
    squared = exact.new_full((len(x),), torch.inf).scatter_reduce_(0, row, exact, "amin")
    least = exact == squared[row]
    nearest = row.new_full((len(x),), len(samples))
    nearest.scatter_reduce_(0, row[least], column[least], "amin")
    excess[row, column] = (exact - squared[row]).to(x.dtype)
    return excess, nearest, squared


def _dense_distances(x: Tensor, samples: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a float64 product, for the block where many samples are almost as near."""
    excess = norms.repeat(len(x), 1)
    columns = max(_PAIR_BYTES // (8 * len(samples)), 16)
    for a, b in zip(x.split(columns, 1), samples.split(columns, 1), strict=True):
        excess.addmm_(a.double(), b.double().T, alpha=-2)
    least, nearest = excess.min(1)
    squared = _pair_distances(x, samples, torch.arange(len(x), device=x.device), nearest)
    return excess.sub_(least[:, None]), nearest, squared


def _pair_distances(x: Tensor, samples: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Squared distances of single pairs in float64."""
    pairs = max(_PAIR_BYTES // (8 * x.shape[1]), 1)
    out = torch.empty(len(row), dtype=torch.float64, device=x.device)
    for piece, i, j in zip(out.split(pairs), row.split(pairs), column.split(pairs), strict=True):
        difference = x[i].double().sub_(samples[j])
        piece.copy_(difference.square_().sum(1))
    return out


def _log_density(
    excess: Tensor, squared: Tensor, bandwidths: Sequence[float], n_dims: int
) -> Tensor:
    rows = []
    for h in bandwidths:
        total = excess.mul(-1 / (2 * h * h)).clamp_(min=_FAINT).exp_().mean(1).double()
        rows.append(total.log() - squared / (2 * h * h) - n_dims * math.log(h * _ROOT_2PI))
    return torch.stack(rows)
