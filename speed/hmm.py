"""Hidden Markov models: one iteration of expectation-maximisation."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hmmlearn import hmm
from torch import Tensor

from imlbench.densities import GaussianHMM
from speed import data
from speed.case import Agreement, Case, Claim, Failed, Finding, Measured, Note, Seconds
from speed.measure import Timer, interleaved, per_iteration, ratio, seconds, spread

FIRST, MORE = 1, 2
RECORDINGS, SEQUENCE = "recordings", "sequence"

CLAIMS = (
    Claim(
        f"{RECORDINGS}: hmmlearn, scaling",
        20.0,
        "an earlier sketch; all recordings advance together, as one matrix product per step",
        at_least=5.0,
    ),
    Claim(
        f"{RECORDINGS}: hmmlearn, log",
        200.0,
        "an earlier sketch; an exponential for every pair of states and step",
        at_least=40.0,
    ),
    Claim(
        f"{RECORDINGS}: pomegranate",
        15.0,
        "an exponential for every pair of states and step, like hmmlearn's log, but vectorised",
    ),
    Claim(
        f"{SEQUENCE}: hmmlearn, scaling",
        8.4,
        "an earlier sketch; a step is now a product of a vector and a matrix",
        at_least=5.0,
    ),
    Claim(
        f"{SEQUENCE}: pomegranate",
        15.0,
        "as with recordings, if three tensors of steps x states x states fit in memory",
    ),
)

Prepare = Callable[[int], Callable[[], Any]]


def imlbench_fit(start: GaussianHMM, h: Tensor, lengths: Sequence[int]) -> Prepare:
    """Return the fit of imlbench from a start."""

    def prepare(n_iter: int) -> Callable[[], Any]:
        model = GaussianHMM.from_parameters(
            start.start, start.transitions, start.means, start.variances,
            max_iter=n_iter, tol=-np.inf,
        )  # fmt: skip
        return lambda: model.fit(h, generator=torch.Generator(), lengths=lengths)

    return prepare


def hmmlearn_fit(
    start: GaussianHMM, h: Tensor, lengths: Sequence[int], implementation: str
) -> Prepare:
    """Return the fit of hmmlearn from the same start, in float64, all that it knows."""
    points = h.double().numpy()

    def prepare(n_iter: int) -> Callable[[], Any]:
        model = hmm.GaussianHMM(
            start.n_components,
            init_params="",
            n_iter=n_iter,
            tol=-np.inf,
            implementation=implementation,
        )
        model.n_features = start.n_dims
        model.startprob_, model.transmat_ = start.start.numpy(), start.transitions.numpy()
        model.means_, model.covars_ = start.means.numpy(), start.variances.numpy()
        return lambda: model.fit(points, lengths)

    return prepare


def pomegranate_fit(start: GaussianHMM, h: Tensor, lengths: Sequence[int]) -> Prepare:
    """Return the fit of pomegranate from the same start; at first, an end costs nothing."""
    from pomegranate.distributions import Normal
    from pomegranate.hmm import DenseHMM

    recordings = [h[a:b] for a, b in pairwise(accumulate(lengths, initial=0))]

    def prepare(n_iter: int) -> Callable[[], Any]:
        states = [
            Normal(mean, variance, covariance_type="diag")
            for mean, variance in zip(start.means.float(), start.variances.float(), strict=True)
        ]
        model = DenseHMM(
            states,
            edges=start.transitions.float(),
            starts=start.start.float(),
            ends=torch.ones(len(states)),
            max_iter=n_iter,
        )
        return lambda: model.fit(recordings)

    return prepare


def run(n_recordings: int = 1000, n_states: int = 300, repetitions: int = 3) -> Iterator[Finding]:
    """Measure with the recordings as they are, and with all of them as one sequence."""
    logging.disable(logging.WARNING)  # hmmlearn's, about convergence
    h, lengths = data.digit_embeddings(80)
    lengths = lengths[:n_recordings]
    h = h[: sum(lengths)]
    yield Note(f"{len(lengths)} recordings have {len(h)} chunks.")
    start = GaussianHMM(80, n_states, max_iter=1, transition_prior=0.1)  # no transition is 0
    start.fit(h, generator=torch.Generator().manual_seed(0), lengths=lengths)
    reference = yield from _compare(RECORDINGS, start, h, lengths, repetitions)
    once = seconds(hmmlearn_fit(start, h, lengths, "log")(1))
    yield Measured(f"{RECORDINGS}: hmmlearn, log", ratio([once], [reference]))
    yield Seconds(f"{RECORDINGS}: hmmlearn, log, a fit of one iteration", spread([once]))
    yield Note("hmmlearn's log implementation was run for one iteration, once.")
    yield from _pomegranate(RECORDINGS, start, h, lengths, reference)
    reference = yield from _compare(SEQUENCE, start, h, [len(h)], repetitions)
    yield from _pomegranate(SEQUENCE, start, h, [len(h)], reference)


def _compare(
    layout: str, start: GaussianHMM, h: Tensor, lengths: Sequence[int], repetitions: int
) -> Generator[Finding, None, float]:
    """Compare with hmmlearn; return the seconds of an iteration of imlbench."""
    fits = {
        "imlbench": imlbench_fit(start, h, lengths),
        "hmmlearn, scaling": hmmlearn_fit(start, h, lengths, "scaling"),
    }
    fitted, reference = (prepare(FIRST + MORE)() for prepare in fits.values())  # also warms up
    history = np.array(reference.monitor_.history) / len(h)
    difference = np.abs(history - fitted.log_likelihoods[: len(history)]).max()
    yield Agreement(
        f"{layout}: log-likelihood per chunk before each of {len(history)} iterations, hmmlearn",
        float(difference),
        1e-6,
    )
    timers: dict[str, Timer] = {
        name: per_iteration(prepare, FIRST, MORE) for name, prepare in fits.items()
    }
    times = interleaved(timers, repetitions, warm_up=False)
    for name, values in times.items():
        yield Seconds(f"{layout}: {name}, one iteration", spread(values))
    ours, theirs = times.values()
    yield Measured(f"{layout}: hmmlearn, scaling", ratio(theirs, ours))
    return spread(ours).value


def _pomegranate(
    layout: str, start: GaussianHMM, h: Tensor, lengths: Sequence[int], reference: float
) -> Iterator[Finding]:
    """Time one iteration of pomegranate, if memory lasts."""
    claim = f"{layout}: pomegranate"
    try:
        with _limited_memory():
            fit = pomegranate_fit(start, h, lengths)
            once = seconds(fit(1))
    except Exception as error:
        yield Failed.of(claim, error)
        return
    yield Measured(claim, ratio([once], [reference]))
    yield Seconds(f"{layout}: pomegranate, a fit of one iteration", spread([once]))


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let an allocation beyond the machine's free memory fail, not the machine."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        yield
        return
    facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(0.9 * available), usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


CASE = Case(
    "hmm",
    "Time of one EM iteration, in units of imlbench's",
    "300 states with diagonal covariances, embeddings of spoken digits in 80 dimensions, all from "
    "one start; as 1,000 recordings, and with all of them as one sequence. A library's time per "
    "iteration is that of a fit with three iterations less that of one with one iteration, halved. "
    "hmmlearn has its own priors, which imlbench shares. pomegranate has none, and models where a "
    "recording ends besides: after the first iteration it is another model, so it is timed for one "
    "iteration and its likelihoods are not compared. Its rows, and that of hmmlearn's log "
    "implementation, are whole fits of one iteration, run once. hmmlearn computes with one thread.",
    CLAIMS,
    run,
    needs=("pomegranate",),
)
