"""A recurrent network with mixture-density output: the base distribution of ``iml-rnn``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from imlbench.densities import Density, GaussianMixture, Points, Report

_LOG_2PI = math.log(2 * math.pi)
_LEAST, _GREATEST = math.log(0.01), math.log(10.0)  # standard deviations, of the latents' own
_CHECK_EVERY = 20  # steps between looks at held-out sequences


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Compute with one thread: in steps as small as here, several wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class RecurrentMixture(Density):
    r"""An autoregressive recurrent network with mixture-density output.

    .. math:: p(h_1, \dots, h_T) = \prod_{t=1}^T \sum_{c=1}^C w_c(u_t)
        N(h_t; m_c + a(u_t), \mathrm{diag}(s_c b(u_t))^2), \qquad
        u_t = \mathrm{GRU}(u_{t-1}, h_{t-1})

    The network decides on the weights, and moves and stretches all components alike; what tells
    them apart is the same at all times, and starts from a mixture that knows nothing of time. With
    components all its own at every step it would overfit recordings of minutes.

    After :meth:`fit`, ``n_iter`` is the number of steps that were taken.

    Latents are standardised inside. While it is fitted, noise is added to what the network sees of
    the past, but not to what it predicts: it overfits less, and a sampled sequence, which is fed
    its own errors, stays on track.

    References:
        | Generating Sequences with Recurrent Neural Networks (Graves, 2013)
        | https://arxiv.org/abs/1308.0850

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The number of mixture components :math:`C`.
        n_units: Units of the recurrent layer.
        max_iter: Most steps of Adam.
        learning_rate: Of Adam; it falls to zero over ``max_iter`` steps.
        batch_size: Stretches of recordings per step.
        n_chunks: Longest stretch; the network starts afresh at the beginning of each.
        input_noise: Standard deviation of the noise on the past, in units of the latents' own.
        patience: The fit stops after so many looks at ``valid``, every 20 steps, without a gain.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = torch.randn(400, 1, generator=generator)
        >>> h[::2] += 9.0
        >>> rnn = RecurrentMixture(1, 2, n_units=8, max_iter=150, learning_rate=0.03)
        >>> jumps = rnn.fit(h, generator=generator).sample(100, generator).diff(dim=0)
        >>> bool((jumps.abs() > 4).float().mean() > 0.9)
        True
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        n_dims: int,
        n_components: int = 30,
        *,
        n_units: int = 64,
        max_iter: int = 1000,
        learning_rate: float = 5e-3,
        batch_size: int = 16,
        n_chunks: int = 60,
        input_noise: float = 0.3,
        patience: int = 5,
    ) -> None:
        super().__init__(n_dims)
        self.n_components = self._at_least("n_components", n_components, 1)
        self.n_units = self._at_least("n_units", n_units, 1)
        self.max_iter = self._at_least("max_iter", max_iter, 1)
        self.learning_rate, self.batch_size, self.n_chunks = learning_rate, batch_size, n_chunks
        self.input_noise, self.patience, self.n_iter = input_noise, patience, 0
        self.register_buffer("mean", torch.zeros(n_dims, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(n_dims, dtype=torch.float64))
        self.cell = nn.GRU(n_dims, n_units, batch_first=True)
        self.head = nn.Linear(n_units, n_components + 2 * n_dims)
        self.means = nn.Parameter(torch.empty(n_components, n_dims))
        self.log_scales = nn.Parameter(torch.empty(n_components, n_dims))
        for parameter in self.parameters():  # all zero, it is a standard normal density
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"n_dims={self.n_dims}, n_components={self.n_components}, n_units={self.n_units}"

    @single_threaded()
    def _fit(
        self, train: Points, valid: Points | None, generator: Generator, report: Report | None
    ) -> None:
        h = train.h.double()
        self.mean, scale = h.mean(0), h.std(0, correction=0)
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        z = self._standardise(train.h)
        self._initialise(z, generator)
        held_out = train if valid is None else valid
        with torch.enable_grad():
            self._optimise(Points(z, train.lengths), held_out, generator, report)

    def _initialise(self, z: Tensor, generator: Generator) -> None:
        """Start from a mixture, and from a network whose predictions hardly differ from it."""
        mixture = GaussianMixture(
            self.n_dims, self.n_components, covariance_type="diag", reg_covar=0.01, max_iter=20
        ).fit(z, generator=generator)
        self.means.copy_(mixture.means)
        self.log_scales.copy_(mixture.covariances.log() / 2)
        for module, bound in ((self.cell, 1 / math.sqrt(self.n_units)), (self.head, 0.01)):
            for parameter in module.parameters():
                uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(bound * (2 * uniform - 1))
        self.head.bias[: self.n_components] += mixture.weights.log().clamp(min=-10.0)

    def _optimise(
        self, train: Points, held_out: Points, generator: Generator, report: Report | None
    ) -> None:
        """Take steps of Adam; keep the parameters that were best on held-out recordings."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / self.max_iter)
        stretches = Stretches(train.lengths, self.n_chunks, generator, train.h.device)
        best, greatest, n_worse = self._snapshot(), -torch.inf, 0
        for iteration in range(1, self.max_iter + 1):
            loss = self._loss(train.h, *stretches.draw(self.batch_size), generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if iteration % _CHECK_EVERY and iteration < self.max_iter:
                continue
            value = self.log_prob(*held_out).mean().item()
            if report is not None:
                report(iteration, self.max_iter, value)
            n_worse = 0 if value > greatest else n_worse + 1
            if value > greatest:
                greatest, best = value, self._snapshot()
            if n_worse == self.patience:
                break
        self.n_iter = iteration
        self.load_state_dict(best)

    def _loss(self, z: Tensor, rows: Tensor, inside: Tensor, generator: Generator) -> Tensor:
        """Negative log-density per chunk and dimension of stretches (B, T), where ``inside``."""
        target = z[rows]
        noise = torch.randn(target.shape, generator=generator, device=generator.device)
        u, _ = self.cell(self._past(target + self.input_noise * noise.to(z.device)))
        log_density = torch.where(inside, self._log_mixture(u, target), 0.0)
        return -log_density.sum() / inside.sum() / self.n_dims

    @single_threaded()
    def _log_prob(self, points: Points) -> Tensor:
        h, lengths = points.h.to(self.device), points.lengths
        z, exact = self._standardise(h), (h.double() - self.mean) / self.scale
        parts = []
        for part, target in zip(z.split(lengths), exact.split(lengths), strict=True):
            u, _ = self.cell(self._past(part[None]))
            parts.append(self._log_mixture(u[0], target))
        return torch.cat(parts) - self.scale.log().sum()

    @single_threaded()
    def _sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        device = generator.device
        noise = torch.randn(n, self.n_dims, generator=generator, device=device).to(self.device)
        uniform = torch.rand(n, generator=generator, device=device).to(self.device)
        z, state = torch.zeros(1, self.n_dims, device=self.device), None
        points, components = [], []
        for t in range(n):
            u, state = self.cell(z[None], state)
            log_weight, mean, log_scale = self._mixture(u[0, 0])
            cumulative = log_weight.exp().cumsum(0)
            drawn = uniform[t : t + 1] * cumulative[-1]  # a scalar index would be waited for
            component = torch.searchsorted(cumulative, drawn, right=True)
            component = component.clamp(max=self.n_components - 1)
            z = mean[component] + log_scale[component].exp() * noise[t]
            points.append(z)
            components.append(component)
        h = self.mean + self.scale * torch.cat(points)
        return h.float(), torch.cat(components)

    def _standardise(self, h: Tensor) -> Tensor:
        return ((h - self.mean) / self.scale).float()

    def _past(self, z: Tensor) -> Tensor:
        """What the network sees when it predicts z (B, T, K): zeros, then all but the last."""
        return torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)

    def _mixture(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (..., C), means and log standard deviations (..., C, K) for states u."""
        sizes = [self.n_components, self.n_dims, self.n_dims]
        weight, shift, stretch = self.head(u).split(sizes, dim=-1)
        log_scale = (self.log_scales + stretch[..., None, :]).clamp(_LEAST, _GREATEST)
        return weight.log_softmax(-1), self.means + shift[..., None, :], log_scale

    def _log_mixture(self, u: Tensor, z: Tensor) -> Tensor:
        """Log-density of standardised points (..., K) for states (..., n_units), in z's type."""
        log_weight, mean, log_scale = (part.to(z.dtype) for part in self._mixture(u))
        squared = ((z[..., None, :] - mean) * (-log_scale).exp()).square()
        log_normal = -(0.5 * (squared + _LOG_2PI) + log_scale).sum(-1)
        return (log_weight + log_normal).logsumexp(-1)


class Stretches:
    """Random stretches of recordings, every chunk in as many as any other, but near the ends.

    Arguments:
        lengths: The number of chunks of each recording.
        n_chunks: Longest stretch; a shorter recording is a stretch itself.
        generator: Source of randomness.
        device: Where the rows go.
    """

    def __init__(
        self, lengths: list[int], n_chunks: int, generator: Generator, device: torch.device
    ) -> None:
        self._generator = generator
        self._lengths = torch.tensor(lengths, device=generator.device)
        self._first = self._lengths.cumsum(0) - self._lengths
        self._n_chunks, self._device = n_chunks, device
        self._steps = torch.arange(min(n_chunks, max(lengths)), device=generator.device)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Return rows of chunks (n, T), and which of them are inside their recording (n, T)."""
        weights = (self._lengths / self._n_chunks).clamp(min=1)
        chosen = torch.multinomial(weights, n, replacement=True, generator=self._generator)
        length = self._lengths[chosen]
        n_starts = (length - self._n_chunks).clamp(min=0) + 1
        share = torch.rand(n, generator=self._generator, device=length.device)
        start = (share * n_starts).long()
        inside = self._steps < length[:, None]
        steps = (start[:, None] + self._steps).minimum(length[:, None] - 1)
        rows = self._first[chosen, None] + steps
        return rows.to(self._device), inside.to(self._device)
