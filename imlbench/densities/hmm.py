"""Hidden Markov models with diagonal Gaussian emissions: base distributions of sequences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Self, TypeVar, Unpack

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from imlbench.densities.covariance import DiagonalNormal, centre
from imlbench.densities.density import Points
from imlbench.densities.draws import library_seed, normal
from imlbench.densities.em import EMOptions, LatentDensity
from imlbench.densities.kmeans import kmeans

_LEAST = 1e-100  # smaller transition probabilities count as this one; see GaussianHMM
_UNVISITED = 1e-5  # expected points below which a state keeps its emissions
_BLOCK = 1 << 22  # posterior probabilities held at once
_PIECE = 256  # points of a recording that a recursion runs over at once, beside other pieces
_GAP = 1e-10  # by which neighbouring pieces may differ in what they know where they meet

Result = TypeVar("Result")


class Packed(NamedTuple):
    """Windows of the recordings side by side: all first points, then all second points, and so on.

    A window is a piece of a recording with a run-in and a run-out, points that its neighbours
    answer for: a recursion forgets on them that it knew nothing of what lies beyond.

    Arguments:
        order: Point of every packed row, shape (M,).
        starts: Where every step begins, and at last M; windows are in order of falling length, so
            those that are still running at a step are the first ones.
        own: Packed row of every point, in the window of its own piece, shape (N,).
        firsts: Points that begin a recording, shape (R,).
        lasts: Points that end a recording, shape (R,).
        opens: Whether the windows, in order, begin with their recordings, shape (W,).
        seams: Points that begin a piece within a recording, shape (S,).
        beyond: Packed rows of the seams in the windows of the pieces before them, shape (S,).
        ahead: Packed rows of the points before the seams in the windows after them, shape (S,).
    """

    order: Tensor
    starts: list[int]
    own: Tensor
    firsts: Tensor
    lasts: Tensor
    opens: Tensor
    seams: Tensor
    beyond: Tensor
    ahead: Tensor

    @property
    def sizes(self) -> list[int]:
        """How many windows are running at every step."""
        return [stop - start for start, stop in pairwise(self.starts)]

    def forward_gap(self, predicted: Tensor) -> Tensor:
        """How far apart neighbours are about seams, given what they predict of their points."""
        return _gap(predicted[self.own[self.seams]], predicted[self.beyond])

    def backward_gap(self, future: Tensor) -> Tensor:
        """How far apart neighbours are about seams, given what they know of the future."""
        return _gap(future[self.own[self.seams - 1]], future[self.ahead])


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    """The greatest distance of rows in Hilbert's projective metric, relative; at least 0."""
    ratio = ours / theirs
    spread = ratio.amax(1) / ratio.amin(1)
    return torch.cat([spread, spread.new_ones(1)]).amax() - 1


def pack(lengths: Sequence[int], piece: int, device: torch.device) -> Packed:
    """Cuts recordings, which follow each other, into windows of even pieces, and packs these.

    Arguments:
        lengths: Points of every recording.
        piece: Most points of a piece; its run-in and run-out have an eighth of it, where the
            recording has that many.
        device: Where the indices go.

    Example:
        >>> packed = pack([1, 3], 8, torch.device("cpu"))
        >>> packed.order.tolist(), packed.starts
        ([1, 0, 2, 3], [0, 2, 3, 4])
    """
    windows = [
        (max(begin - piece // 8, first), begin, end, min(end + piece // 8, last + 1))
        for first, length in zip(accumulate(lengths, initial=0), lengths, strict=False)
        for last in [first + length - 1]
        for begin, end in pairwise(_edges(first, length, piece))
    ]
    window_start, begin, end, window_stop = torch.tensor(windows).unbind(1)
    length = window_stop - window_start
    falling = length.argsort(descending=True, stable=True)
    rank = falling.argsort()
    step = torch.arange(int(length.max()))
    running = (length[falling][None, :] > step[:, None]).nonzero()
    starts = torch.cat([length.new_zeros(1), torch.bincount(running[:, 0]).cumsum(0)])

    def row(point: Tensor, window: Tensor) -> Tensor:
        return starts[point - window_start[window]] + rank[window]

    stops = torch.tensor(lengths).cumsum(0)
    firsts = stops - torch.tensor(lengths)
    point, number = torch.arange(int(stops[-1])), torch.arange(len(windows))
    after = number[~torch.isin(begin, firsts)]
    indices = (
        window_start[falling][running[:, 1]] + running[:, 0],
        row(point, number.repeat_interleave(end - begin)),
        firsts,
        stops - 1,
        torch.isin(window_start[falling], firsts),
        begin[after],
        row(begin[after], after - 1),
        row(begin[after] - 1, after),
    )
    order, *others = (index.to(device, non_blocking=True) for index in indices)
    return Packed(order, starts.tolist(), *others)


def _edges(first: int, length: int, piece: int) -> list[int]:
    """Where the pieces of a recording begin, and where the last one ends."""
    n_pieces = math.ceil(length / piece)
    return [first + i * length // n_pieces for i in range(n_pieces + 1)]


class Filtered(NamedTuple):
    r"""The forward recursion's results in packed order, shape (N, C) but for the last.

    Arguments:
        likelihood: :math:`p(h_t \mid z_t)`, with 1 as every row's greatest.
        predicted: :math:`p(z_t \mid h_1, \dots, h_{t-1})`.
        filtered: :math:`p(z_t \mid h_1, \dots, h_t)`.
        conditional: :math:`\log p(h_t \mid h_1, \dots, h_{t-1})`, shape (N,).
    """

    likelihood: Tensor
    predicted: Tensor
    filtered: Tensor
    conditional: Tensor


@dataclass(frozen=True)
class HMMStatistics:
    """Expected counts and moments of the states, about the origin of the emissions.

    Arguments:
        starts: Expected number of recordings that start in each state, shape (C,).
        ends: Expected number of recordings that end in each state, shape (C,).
        transitions: Expected number of transitions, shape (C, C).
        moments: Responsibilities times 1, the points and their squares, shape (C, 1 + 2 K).
    """

    starts: Tensor
    ends: Tensor
    transitions: Tensor
    moments: Tensor


class HMMOptions(EMOptions, total=False):
    """What :class:`GaussianHMM` can be told beside the shapes of its parameters."""

    variance_prior: float
    transition_prior: float


class GaussianHMM(LatentDensity[HMMStatistics]):
    r"""A hidden Markov model whose states emit points of independent Gaussian coordinates.

    .. math:: p(h_1, \dots, h_T) = \sum_{z} \pi_{z_1} \prod_{t=2}^{T} A_{z_{t-1} z_t}
        \prod_{t=1}^{T} N(h_t; m_{z_t}, \mathrm{diag}(s_{z_t}))

    The forward-backward recursions run over all recordings at once and are scaled, not in
    logarithms. That is exact as long as no start or transition probability is below 1e-100: a
    step's scale is then at least 1e-100, what it loses to underflow at most 1e-308, and no later
    point can make a difference of 208 orders of magnitude good. Smaller probabilities, zeros too,
    count as 1e-100, so a sequence that a model with zeros calls impossible has a tiny density
    rather than none.

    A long recording is cut into pieces that advance together. Each starts some points early, from
    no knowledge of what came before, which the recursions forget exponentially fast; what
    neighbours know where they meet must then agree to 1e-10 in Hilbert's projective metric, which
    no step of a recursion increases, so that log-densities are that close too. Where a model
    forgets more slowly, pieces are made longer, in the end as long as the recordings.

    Samples are recordings one after another: ``ends`` are the shares of the points of a state that
    were the last of their recording, and after such a point a sample starts anew from :math:`\pi`.
    Of a single recording, nobody knows that it ended where it was cut; its model never ends.
    Densities are conditional on where recordings end.

    As in hmmlearn, :math:`s` is the expected sum of squares plus ``variance_prior``, over the
    expected count. A state that is never visited keeps its mean, variances and transitions.

    References:
        | A Tutorial on Hidden Markov Models (Rabiner, 1989)
        | https://doi.org/10.1109/5.18626

    Arguments:
        n_dims: The number of dimensions :math:`K`.
        n_components: The number of states :math:`C`.
        variance_prior: Added to every expected sum of squares, in squared units of the data.
        transition_prior: Added to every expected count of starts and of transitions. With 0 and
            few points per state, transitions that the training recordings lack die out, and
            held-out recordings that have them get a very low density.
        options: See :class:`EMOptions`. ``reg_covar`` is the least variance, and not added; the
            other backend is ``"hmmlearn"``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = torch.randn(600, 1, generator=generator)
        >>> h[::2] += 9.0
        >>> hmm = GaussianHMM(1, n_components=2).fit(h, generator=generator, lengths=[200, 400])
        >>> hmm.transitions.round(decimals=3).abs()
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
        >>> hmm.log_prob(h, lengths=[200, 400]).shape
        torch.Size([600])
    """

    library = "hmmlearn"

    start: Tensor
    ends: Tensor
    transitions: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self,
        n_dims: int,
        n_components: int = 300,
        *,
        variance_prior: float = 1e-2,
        transition_prior: float = 0.0,
        **options: Unpack[EMOptions],
    ) -> None:
        super().__init__(n_dims, n_components, **options)
        for name, prior in (
            ("variance_prior", variance_prior),
            ("transition_prior", transition_prior),
        ):
            if not 0 <= prior < torch.inf:
                raise ValueError(
                    f"GaussianHMM: {name} must be finite and at least 0; got {prior}. "
                    f"Leave it out for hmmlearn's default."
                )
        self.variance_prior, self.transition_prior = variance_prior, transition_prior
        c, double = n_components, torch.float64
        self.register_buffer("start", torch.full((c,), 1 / c, dtype=double))
        self.register_buffer("ends", torch.zeros(c, dtype=double))
        self.register_buffer("transitions", torch.full((c, c), 1 / c, dtype=double))
        self.register_buffer("means", torch.zeros(c, n_dims, dtype=double))
        self.register_buffer("variances", torch.ones(c, n_dims, dtype=double))

    @classmethod
    def from_parameters(
        cls,
        start: Tensor,
        transitions: Tensor,
        means: Tensor,
        variances: Tensor,
        **options: Unpack[HMMOptions],
    ) -> Self:
        r"""Builds a model with the given parameters; fitting it starts from them.

        Its samples are one recording each.

        Arguments:
            start: :math:`\pi`, shape :math:`(C,)`, not negative, summing to one.
            transitions: :math:`A`, shape :math:`(C, C)`, not negative, rows summing to one.
            means: Shape :math:`(C, K)`.
            variances: Shape :math:`(C, K)`, positive.
            options: Further arguments of the constructor.

        Returns:
            The model, on the device of ``means``.

        Raises:
            ValueError: If shapes do not fit together, or values are not those of a model.
        """
        model = cls(means.shape[1], len(means), **HMMOptions(init="current") | options)
        model.to(means.device)._set_parameters(
            "Check the number of states.",
            start=start,
            transitions=transitions,
            means=means,
            variances=variances,
        )
        where = f"{cls.__name__}.from_parameters"
        for name in ("start", "transitions"):
            value = getattr(model, name)
            if bool((value < 0).any()) or bool((value.sum(-1) - 1).abs().max() > 1e-6):
                raise ValueError(
                    f"{where}: {name} must be at least 0 and sum to one; got sums from "
                    f"{float(value.sum(-1).min()):g} to {float(value.sum(-1).max()):g}. "
                    f"Divide by the sums."
                )
        if bool((model.variances <= 0).any()):
            raise ValueError(
                f"{where}: variances must be positive; got {float(model.variances.min()):g}. "
                f"Give variances, not their logarithms."
            )
        return model

    def _log_prob(self, points: Points) -> Tensor:
        points = Points(points.h.to(self.device), points.lengths)
        return self._joined(points, self._conditionals)[0]

    def _sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        device, double = generator.device, torch.float64
        uniform = torch.rand(n, 2, generator=generator, device=device, dtype=double)
        start, ends, transitions = (
            parameter.double().cpu() for parameter in (self.start, self.ends, self.transitions)
        )
        first, following = start.cumsum(0), transitions.cumsum(1)
        row, states = first, list[int]()
        for u, v in uniform.cpu():
            states.append(int(torch.searchsorted(row, u * row[-1], right=True)))
            row = first if v < ends[states[-1]] else following[states[-1]]
        state = torch.tensor(states, device=self.device)
        noise = normal((n, self.n_dims), generator, self.device)
        return (self.means[state] + noise * self.variances[state].sqrt()).float(), state

    def _groups(self, lengths: list[int]) -> Iterator[tuple[slice, list[int]]]:
        """Splits the recordings so that a group's posterior probabilities fit in memory."""
        most = max(_BLOCK // self.n_components, 1)
        begin, end, group = 0, 0, list[int]()
        for length in lengths:
            if group and end + length - begin > most:
                yield slice(begin, end), group
                begin, group = end, []
            group.append(length)
            end += length
        yield slice(begin, end), group

    def _joined(
        self, points: Points, recursion: Callable[[Points, int], tuple[Result, Tensor, Tensor]]
    ) -> tuple[Result, float]:
        """Runs a recursion with ever longer pieces, until neighbours agree where they meet.

        Arguments:
            points: The points.
            recursion: Takes the points and the most points of a piece; gives its result, their
                log-likelihood, and how far apart neighbours are.

        Returns:
            The result, and the log-likelihood of all points in nats.
        """
        piece = _PIECE
        while True:
            result, total, gap = recursion(points, piece)
            log_likelihood, apart = torch.stack([total, gap]).tolist()
            if apart <= _GAP or piece >= max(points.lengths):
                return result, log_likelihood
            piece *= 8

    def _conditionals(self, points: Points, piece: int) -> tuple[Tensor, Tensor, Tensor]:
        r"""Log-densities :math:`\log p(h_t \mid h_1, \dots, h_{t-1})`, shape (N,); sum; gap."""
        emissions = DiagonalNormal(self.means.double(), 1 / self.variances.double())
        h = points.h
        out = torch.empty(len(h), dtype=torch.float64, device=h.device)
        gap = out.new_zeros(())
        for rows, group in self._groups(points.lengths):
            packed = pack(group, piece, h.device)
            filtered = self._forward(emissions(h[rows][packed.order]), packed)
            out[rows] = filtered.conditional[packed.own]
            gap = torch.maximum(gap, packed.forward_gap(filtered.predicted))
        return out, out.sum(), gap

    def _safe_parameters(self) -> tuple[Tensor, Tensor]:
        """Start and transition probabilities, none so small that scaling would lose it."""
        return self.start.double().clamp(min=_LEAST), self.transitions.double().clamp(min=_LEAST)

    def _forward(self, emission: Tensor, packed: Packed) -> Filtered:
        """Runs forward over log-densities of emissions (N, C), whose memory it reuses."""
        start, transitions = self._safe_parameters()
        peak = emission.amax(1)
        likelihood = emission.sub_(peak[:, None]).exp_()
        predicted, filtered = torch.empty_like(emission), torch.empty_like(emission)
        total = torch.empty_like(peak)
        predicted[: packed.starts[1]] = torch.where(packed.opens[:, None], start, 1 / len(start))
        by_step = (x.split(packed.sizes) for x in (predicted, likelihood, filtered, total[:, None]))
        before = None
        for prior, likely, joint, scale in zip(*by_step, strict=True):
            if before is not None:
                torch.mm(before[: len(prior)], transitions, out=prior)
            torch.mul(prior, likely, out=joint)
            torch.sum(joint, 1, keepdim=True, out=scale)
            before = joint.div_(scale)
        return Filtered(likelihood, predicted, filtered, total.log_().add_(peak))

    def _backward(self, likelihood: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        r"""Runs backward over likelihoods of emissions (N, C), whose memory it reuses.

        Returns:
            :math:`p(h_{t+1}, \dots, h_T \mid z_t)` and :math:`p(h_t, \dots, h_T \mid z_t)`, up to
            a constant per row; both (N, C).
        """
        transitions = self._safe_parameters()[1].T
        future, present = torch.ones_like(likelihood), likelihood
        later, now = future.split(packed.sizes), present.split(packed.sizes)
        for t in range(len(now) - 1, 0, -1):
            current = now[t].mul_(later[t])
            current.div_(current.amax(1, keepdim=True))
            torch.mm(current, transitions, out=later[t - 1][: len(current)])
        return future, present

    def _posterior(
        self, h: Tensor, packed: Packed, emissions: DiagonalNormal
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State probabilities (N, C), transition counts (C, C), log-likelihood of points, gap."""
        likelihood, predicted, filtered, conditional = self._forward(
            emissions(h[packed.order]), packed
        )
        future, present = self._backward(likelihood, packed)
        gap = torch.maximum(packed.forward_gap(predicted), packed.backward_gap(future))
        present /= predicted.mul_(present).sum(1, keepdim=True)
        present, filtered, future = (x[packed.own] for x in (present, filtered, future))
        present[packed.firsts] = 0.0  # no transition leads there
        counts = filtered[:-1].T @ present[1:] * self._safe_parameters()[1]
        states = future.mul_(filtered)
        states /= states.sum(1, keepdim=True)
        return states, counts, conditional[packed.own].sum(), gap

    def _prepare(self, h: Tensor) -> None:
        self._origin = centre(h.split(1 << 14))

    def _moments(self, h: Tensor, states: Tensor) -> Tensor:
        x = h.double() - self._origin
        return states.T @ torch.cat([x.new_ones(len(x), 1), x, x.square()], dim=1)

    def _initialise(self, points: Points, generator: Generator) -> None:
        h, c = points.h, self.n_components
        self.means = kmeans(h, c, generator=generator, n_init=self.n_init)
        nearest = DiagonalNormal(self.means, torch.ones_like(self.means))
        self.start, self.transitions = torch.full_like(self.start, 1 / c), self.transitions * 0
        self.transitions += 1 / c
        moments = torch.stack(
            [
                self._moments(block, one_hot(nearest(block).argmax(1), c).double())
                for block in h.split(max(_BLOCK // c, 1))
            ]
        ).sum(0)
        self._set_emissions(moments)
        last = torch.tensor(points.lengths, device=h.device).cumsum(0) - 1
        self._set_ends(torch.bincount(nearest(h[last]).argmax(1), minlength=c), moments[:, 0])

    def _expectation(self, points: Points) -> tuple[HMMStatistics, float]:
        statistics, log_likelihood = self._joined(points, self._statistics)
        return statistics, log_likelihood / len(points.h)

    def _statistics(self, points: Points, piece: int) -> tuple[HMMStatistics, Tensor, Tensor]:
        """Statistics, log-likelihood, and how far apart neighbours are."""
        h = points.h
        emissions = DiagonalNormal(self.means, 1 / self.variances)
        start, counts = torch.zeros_like(self.start), torch.zeros_like(self.transitions)
        ends = torch.zeros_like(self.ends)
        moments = self.means.new_zeros(self.n_components, 1 + 2 * self.n_dims)
        total, gap = self.means.new_zeros(2)
        for rows, group in self._groups(points.lengths):
            x, packed = h[rows], pack(group, piece, h.device)
            states, pairs, log_likelihood, apart = self._posterior(x, packed, emissions)
            start += states[packed.firsts].sum(0)
            ends += states[packed.lasts].sum(0)
            counts += pairs
            moments += self._moments(x, states)
            total, gap = total + log_likelihood, torch.maximum(gap, apart)
        return HMMStatistics(start, ends, counts, moments), total, gap

    def _log_likelihood(self, points: Points) -> float:
        return self._joined(points, self._conditionals)[1] / len(points.h)

    def _maximisation(self, statistics: HMMStatistics) -> None:
        starts = statistics.starts + self.transition_prior
        self.start = starts / starts.sum()
        counts = statistics.transitions + self.transition_prior
        leaving = counts.sum(1, keepdim=True)
        self.transitions = torch.where(leaving > 0, counts / leaving, self.transitions)
        self._set_emissions(statistics.moments)
        self._set_ends(statistics.ends, statistics.moments[:, 0])

    def _set_ends(self, counts: Tensor, visits: Tensor) -> None:
        """Sets the shares of a state's points that are last, from expected numbers of both."""
        ends = (counts / visits.clamp(min=_UNVISITED)).clamp(max=1)
        self.ends = torch.where(counts.sum() > 1.5, ends, 0.0)  # more than one recording

    def _set_emissions(self, moments: Tensor) -> None:
        count, sums, squares = moments.split([1, self.n_dims, self.n_dims], dim=1)
        visited = count > _UNVISITED
        count = count.clamp(min=_UNVISITED)
        means = sums / count
        spread = (squares - means * sums).clamp(min=0)
        variances = ((spread + self.variance_prior) / count).clamp(min=self.reg_covar)
        variances = torch.maximum(variances, 1e-15 * squares / count + 1e-30)
        self.means = torch.where(visited, means + self._origin, self.means)
        self.variances = torch.where(visited, variances, self.variances)

    def _fit_library(self, points: Points, generator: Generator) -> None:
        from hmmlearn.hmm import GaussianHMM as Library

        h, lengths = points
        model = Library(
            self.n_components,
            covars_prior=self.variance_prior,
            startprob_prior=1 + self.transition_prior,
            transmat_prior=1 + self.transition_prior,
            n_iter=self.max_iter,
            tol=self.tol * len(h),
            random_state=library_seed(generator),
            implementation="scaling",
            init_params="" if self.init == "current" else "stmc",
        )
        if self.init == "current":
            model.n_features = self.n_dims
            model.startprob_, model.transmat_ = (
                self.start.cpu().numpy(),
                self.transitions.cpu().numpy(),
            )
            model.means_, model.covars_ = self.means.cpu().numpy(), self.variances.cpu().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(h.double().cpu().numpy(), lengths)
        found = (model.startprob_, model.transmat_, model.means_, model._covars_)
        for name, value in zip(("start", "transitions", "means", "variances"), found, strict=True):
            setattr(self, name, torch.tensor(value, device=self.device))
        self._prepare(h)
        statistics, _ = self._expectation(points)
        self._set_ends(statistics.ends, statistics.moments[:, 0])
        self.log_likelihoods = [value / len(h) for value in model.monitor_.history]
        self.n_iter, self.converged = model.monitor_.iter, bool(model.monitor_.converged)
