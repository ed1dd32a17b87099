"""Mixtures of Gaussians: one iteration of expectation-maximisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn import mixture as sklearn_mixture
from torch import Tensor

from imlbench.densities import GaussianMixture
from speed import data
from speed.case import Agreement, Case, Claim, Failed, Finding, Measured, Note, Seconds
from speed.measure import Timer, interleaved, per_iteration, ratio, spread

FIRST, MORE = 1, 2
N_ITER = FIRST + MORE

Prepare = Callable[[int], Callable[[], Any]]

PREDICTED = ((20, 5.6, 3.0, 3.0), (80, 6.6, 3.5, 3.3), (140, 9.3, 5.0, 4.6))
"""K, then the ratios for scikit-learn in float64, in float32, and for pomegranate."""


def _claims() -> Iterator[Claim]:
    for k, double, single, pomegranate in PREDICTED:
        yield Claim(
            f"K = {k}: scikit-learn",
            double,
            "an earlier sketch; triangular float32 products beat full float64 ones four times, "
            "and second moments skip points of no weight",
            at_least=4.0,
        )
        yield Claim(
            f"K = {k}: scikit-learn, float32",
            single,
            "its products then take half the time, its overheads the same",
        )
        yield Claim(
            f"K = {k}: pomegranate",
            pomegranate,
            "the products of scikit-learn, in float32, component by component",
        )


def imlbench_fit(start: GaussianMixture, h: Tensor) -> Prepare:
    """Return the fit of imlbench from a start."""

    def prepare(n_iter: int) -> Callable[[], Any]:
        model = GaussianMixture.from_parameters(
            start.weights, start.means, start.covariances, max_iter=n_iter, tol=-np.inf
        )
        return lambda: model.fit(h, generator=torch.Generator())

    return prepare


def sklearn_fit(start: GaussianMixture, h: Tensor) -> Prepare:
    """Return the fit of scikit-learn from the same start, in the precision of the points."""
    points = h.numpy()
    given = {
        "weights_init": start.weights,
        "means_init": start.means,
        "precisions_init": torch.cholesky_inverse(torch.linalg.cholesky(start.covariances)),
    }
    arrays = {name: value.numpy().astype(points.dtype) for name, value in given.items()}

    def prepare(n_iter: int) -> Callable[[], Any]:
        model = sklearn_mixture.GaussianMixture(
            len(start.means), tol=0, max_iter=n_iter, init_params="random", random_state=0, **arrays
        )
        return lambda: model.fit(points)

    return prepare


def pomegranate_fit(start: GaussianMixture, h: Tensor) -> Prepare:
    """Return the fit of pomegranate from the same start, in float32, which is its default."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    def prepare(n_iter: int) -> Callable[[], Any]:
        components = [
            Normal(mean, covariance)
            for mean, covariance in zip(start.means.float(), start.covariances.float(), strict=True)
        ]
        priors = start.weights.float()
        model = GeneralMixtureModel(components, priors=priors, max_iter=n_iter, tol=-np.inf)
        return lambda: model.fit(h)

    return prepare


def run(
    latent_dims: Sequence[int] = (20, 80, 140),
    n_points: int = 60_000,
    n_components: int = 30,
    repetitions: int = 3,
) -> Iterator[Finding]:
    """Measure every number of dimensions in turn."""
    for k in latent_dims:
        h = data.mnist_embeddings(k)[:n_points]
        generator = torch.Generator().manual_seed(0)
        start = GaussianMixture(k, n_components, max_iter=1).fit(h, generator=generator)
        yield from _compare(f"K = {k}: ", start, h, repetitions)


def _compare(prefix: str, start: GaussianMixture, h: Tensor, repetitions: int) -> Iterator[Finding]:
    fits = {
        "imlbench": imlbench_fit(start, h),
        "scikit-learn": sklearn_fit(start, h.double()),
        "scikit-learn, float32": sklearn_fit(start, h),
        "pomegranate": pomegranate_fit(start, h),
    }
    log_likelihoods: dict[str, float] = {}
    timers: dict[str, Timer] = {}
    for name, prepare in fits.items():
        try:  # also warms up
            fitted = prepare(N_ITER)()
        except Exception as error:
            if name in ("imlbench", "scikit-learn"):
                raise
            yield Failed.of(prefix + name, error)
            continue
        log_likelihoods[name] = _log_likelihood(fitted, h)
        timers[name] = per_iteration(prepare, FIRST, MORE)
    times = interleaved(timers, repetitions, warm_up=False)
    for name in timers:
        yield Seconds(f"{prefix}{name}, one iteration", spread(times[name]))
        if name != "imlbench":
            yield Measured(prefix + name, ratio(times[name], times["imlbench"]))
    difference = {
        name: abs(value - log_likelihoods["imlbench"]) for name, value in log_likelihoods.items()
    }
    yield Agreement(
        f"{prefix}log-likelihood per point after {N_ITER} iterations, scikit-learn",
        difference["scikit-learn"],
        1e-3,
    )
    for name in ("scikit-learn, float32", "pomegranate"):
        if name in difference:
            yield Note(
                f"{prefix}log-likelihood per point after {N_ITER} iterations of {name} differs "
                f"by {difference[name]:.2g} nats."
            )


def _log_likelihood(fitted: Any, h: Tensor) -> float:
    """Return the mean over points, by the library's own method."""
    if isinstance(fitted, GaussianMixture):
        return float(fitted.log_prob(h).mean())
    if isinstance(fitted, sklearn_mixture.GaussianMixture):
        return float(fitted.score(h.numpy().astype(fitted.means_.dtype)))
    return float(fitted.log_probability(h).double().mean())


CASE = Case(
    "mixture",
    "Time of one EM iteration, in units of imlbench's",
    "30 components with full covariances, 60,000 embeddings of MNIST (float32), all from one "
    "start. A library's time per iteration is that of a fit with three iterations less that of "
    "one with one iteration, halved. scikit-learn gets the points in float64 and, in rows "
    "of their own, in float32.",
    tuple(_claims()),
    run,
    needs=("pomegranate",),
)
