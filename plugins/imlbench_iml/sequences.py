"""Models of time: base distributions of sequences of latents, and the models that use them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from imlbench import Examples, FitContext, Kind, Space
from imlbench.densities import Density, GaussianHMM, GaussianMixture
from imlbench.densities.density import Report
from imlbench_iml.models import IML, IMLParams, require_at_most

_LOG_2PI = math.log(2 * math.pi)
_LEAST, _GREATEST = math.log(0.01), math.log(10.0)  # standard deviations, of the latents' own
_CHECK_EVERY = 20  # steps between looks at held-out sequences


class SequenceIML(IML):
    """IML whose base distribution is one of sequences; its samples follow each other in time."""

    kinds: frozenset[Kind] = frozenset({"sequence"})

    def can(self, capability: str) -> bool:
        """A chunk has no density without those before it: ``base_log_prob`` is not defined."""
        return capability != "base_log_prob" and super().can(capability)


class IMLHMM(SequenceIML):
    """IML with a hidden Markov model as base distribution, as in the paper's audio experiments.

    Each state emits latents of independent Gaussian coordinates. That assumption depends on the
    axes, so the latents are turned to the principal axes of the training chunks'.
    """

    name = "iml-hmm"
    axes: Tensor

    class Params(IMLParams):
        """Parameters of ``iml-hmm``."""

        n_states: int = Field(300, ge=1)
        """Hidden states; at most as many as there are training chunks."""
        transition_prior: float = Field(0.01, ge=0)
        """Added to every expected count of starts and of transitions, so that what the training
        recordings lack is improbable, not impossible."""
        variance_prior: float = Field(0.001, ge=0)
        """Chunks of average variance that every state is given beside its own, so that a state of
        few chunks is not too narrow."""

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space)
        self.register_buffer("axes", torch.eye(params.latent_dim))

    def make_density(self) -> Density:
        """Return a hidden Markov model with diagonal covariances."""
        p = self.params
        return GaussianHMM(p.latent_dim, p.n_states, transition_prior=p.transition_prior)

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then the hidden Markov model."""
        n_states = self.params.n_states
        require_at_most("n_states", n_states, len(train), "the number of training chunks")
        self.axes.copy_(torch.eye(len(self.axes)))
        super().fit(train, valid, context)

    def fit_density(self, h: Tensor, **arguments: Any) -> None:
        """Choose the axes, and fit the hidden Markov model to latents along them.

        Its prior of the variances is in units of the latents'.
        """
        centred = (h - h.mean(0)).double().nan_to_num()  # the density will refuse what is no number
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(h))
        self.axes.copy_(axes)
        self.density.variance_prior = self.params.variance_prior * variance.mean().item()
        arguments["valid"] = arguments["valid"] @ self.axes
        super().fit_density(h @ self.axes, **arguments)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents along the axes, (N, K)."""
        return super().encode(x) @ self.axes

    def decode(self, h: Tensor) -> Tensor:
        """Return chunks for latents along the axes, (N, K)."""
        return super().decode(h @ self.axes.mT)


class IMLRNN(SequenceIML):
    """IML with a recurrent network as base distribution: a mixture given everything before.

    It is fitted to recordings that follow each other as if they were one, and learns by itself
    where one ends and what comes then; so what it generates goes on to the next recording.
    """

    name = "iml-rnn"

    class Params(IMLParams):
        """Parameters of ``iml-rnn``."""

        n_components: int = Field(30, ge=1)
        """Components of the mixture that the network predicts, with diagonal covariances."""
        n_units: int = Field(64, ge=1)
        """Units of the recurrent layer."""
        n_steps: int = Field(1000, ge=1)
        """Most steps of Adam; held-out recordings decide when to stop."""

    def make_density(self) -> Density:
        """Return a recurrent network with mixture-density output."""
        p = self.params
        return RecurrentMixture(p.latent_dim, p.n_components, n_units=p.n_units, max_iter=p.n_steps)

    def fit_density(self, h: Tensor, **arguments: Any) -> None:
        """Fit the network to all recordings as one."""
        super().fit_density(h, **arguments | {"lengths": None, "valid_lengths": None})


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
        self.input_noise, self.patience = input_noise, patience
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
        h = self._points("h", h)
        checked = self._lengths("lengths", lengths, len(h))
        held_out = (h, checked)
        if valid is not None:
            valid = self._points("valid", valid).to(h.device)
            held_out = (valid, self._lengths("valid_lengths", valid_lengths, len(valid)))
        self.to(h.device)
        self.mean = h.double().mean(0)
        scale = h.double().std(0, correction=0)
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        z = self._standardise(h)
        self._initialise(z, generator)
        with torch.enable_grad():
            self._optimise(z, checked, held_out, generator, report)
        return self

    @torch.no_grad()
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
        self,
        z: Tensor,
        lengths: list[int],
        held_out: tuple[Tensor, list[int]],
        generator: Generator,
        report: Report | None,
    ) -> None:
        """Take steps of Adam; keep the parameters that were best on held-out recordings."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / self.max_iter)
        stretches = Stretches(lengths, self.n_chunks, generator, z.device)
        best, greatest, n_worse = self._snapshot(), -torch.inf, 0
        for iteration in range(1, self.max_iter + 1):
            loss = self._loss(z, *stretches.draw(self.batch_size), generator)
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
        self.load_state_dict(best)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def _loss(self, z: Tensor, rows: Tensor, inside: Tensor, generator: Generator) -> Tensor:
        """Negative log-density per chunk and dimension of stretches (B, T), where ``inside``."""
        target = z[rows]
        noise = torch.randn(target.shape, generator=generator, device=generator.device)
        u, _ = self.cell(self._past(target + self.input_noise * noise.to(z.device)))
        return -self._log_mixture(u, target)[inside].mean() / self.n_dims

    @torch.no_grad()
    @single_threaded()
    def log_prob(self, h: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        h = self._points("h", h)
        checked = self._lengths("lengths", lengths, len(h))
        z = self._standardise(h.to(self.device))
        exact = (h.to(self.device).double() - self.mean) / self.scale
        parts = []
        for part, target in zip(z.split(checked), exact.split(checked), strict=True):
            u, _ = self.cell(self._past(part[None]))
            parts.append(self._log_mixture(u[0], target))
        return (torch.cat(parts) - self.scale.log().sum()).to(h.device)

    @torch.no_grad()
    @single_threaded()
    def sample_components(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        n = self._at_least("n", n, 1)
        where = {"generator": generator, "device": generator.device}
        noise = torch.randn(n, self.n_dims, **where).to(self.device)
        uniform = torch.rand(n, **where).to(self.device)
        z, state = torch.zeros(self.n_dims, device=self.device), None
        points, components = [], []
        for t in range(n):
            u, state = self.cell(z[None, None], state)
            log_weight, mean, log_scale = self._mixture(u[0, 0])
            cumulative = log_weight.exp().cumsum(0)
            component = torch.searchsorted(cumulative, uniform[t] * cumulative[-1], right=True)
            component = component.clamp(max=self.n_components - 1)
            z = mean[component] + log_scale[component].exp() * noise[t]
            points.append(z)
            components.append(component)
        h = self.mean + self.scale * torch.stack(points)
        return h.float(), torch.stack(components)

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
        self._where = {"generator": generator, "device": generator.device}
        self._lengths = torch.tensor(lengths, device=generator.device)
        self._first = self._lengths.cumsum(0) - self._lengths
        self._n_chunks, self._device = n_chunks, device

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Return rows of chunks (n, T), and which of them are inside their recording (n, T)."""
        weights = (self._lengths / self._n_chunks).clamp(min=1)
        chosen = torch.multinomial(weights, n, replacement=True, generator=self._where["generator"])
        length = self._lengths[chosen]
        n_starts = (length - self._n_chunks).clamp(min=0) + 1
        start = (torch.rand(n, **self._where) * n_starts).long()
        steps = torch.arange(min(self._n_chunks, int(length.max())), device=length.device)
        inside = steps < length[:, None]
        rows = self._first[chosen, None] + (start[:, None] + steps).minimum(length[:, None] - 1)
        return rows.to(self._device), inside.to(self._device)
