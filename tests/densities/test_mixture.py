"""Gaussian mixtures against scipy, scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import entropy, multivariate_normal
from sklearn import mixture
from torch import Generator, Tensor

from imlbench.densities import Gaussian, GaussianMixture, perplexity
from imlbench.densities.covariance import COVARIANCES, TriangularNormal
from imlbench.densities.kmeans import kmeans

TYPES = tuple(COVARIANCES)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def overlapping(n: int = 2000, k: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points of four correlated, overlapping groups."""
    h = torch.randn(n, k, generator=seeded(), dtype=torch.float64)
    turn = torch.randn(4, k, k, generator=seeded(1), dtype=torch.float64)
    group = torch.arange(n) % 4
    centre = 2 * torch.randn(4, k, generator=seeded(2), dtype=torch.float64)
    return (torch.einsum("nk,nkj->nj", h, turn[group]) + centre[group]).to(dtype)


def start(covariance_type: str, c: int = 6, k: int = 5, **options: object) -> GaussianMixture:
    means = 2 * torch.randn(c, k, generator=seeded(3), dtype=torch.float64)
    covariances = COVARIANCES[covariance_type].identity(c, k) * 2.0
    weights = torch.arange(1.0, c + 1)
    return GaussianMixture.from_parameters(
        weights, means, covariances, covariance_type=covariance_type, **options
    )


def test_gaussian_equals_scipy() -> None:
    h = overlapping()
    density = Gaussian(5, reg_covar=0.0).fit(h, generator=seeded())
    x = h.double().numpy()
    scipy = multivariate_normal(x.mean(0), np.cov(x.T, bias=True))
    # float64 on both sides; the covariance's condition number of about 1e2 costs two digits.
    np.testing.assert_allclose(density.log_prob(h), scipy.logpdf(x), rtol=0, atol=1e-11)


def test_gaussian_is_a_mixture_of_one() -> None:
    h = overlapping()
    one = GaussianMixture(5, 1).fit(h, generator=seeded())
    single = Gaussian(5).fit(h, generator=seeded())
    torch.testing.assert_close(one.log_prob(h), single.log_prob(h), rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_log_prob_equals_scipy(covariance_type: str) -> None:
    h = overlapping()
    density = start(covariance_type, max_iter=5).fit(h, generator=seeded())
    full = {
        "full": lambda c: density.covariances[c],
        "tied": lambda c: density.covariances,
        "diag": lambda c: density.covariances[c].diag(),
        "spherical": lambda c: density.covariances[c] * torch.eye(5).double(),
    }[covariance_type]
    joint = [
        math.log(density.weights[c])
        + multivariate_normal(density.means[c].numpy(), full(c).numpy()).logpdf(h.double().numpy())
        for c in range(6)
    ]
    np.testing.assert_allclose(density.log_prob(h), logsumexp(joint, axis=0), rtol=0, atol=1e-10)
    posterior = np.exp(joint - logsumexp(joint, axis=0)).T
    np.testing.assert_allclose(density.responsibilities(h), posterior, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_em_follows_scikit_learn(covariance_type: str, dtype: torch.dtype) -> None:
    h = overlapping(dtype=dtype)
    options = {"max_iter": 10, "tol": -math.inf}
    ours = start(covariance_type, **options).fit(h, generator=seeded())
    theirs = start(covariance_type, backend="scikit-learn", max_iter=10, tol=0.0)
    theirs.fit(h, generator=seeded())
    # Ten iterations amplify the E-step's rounding: 6e-8 relative in float32 (with float64 moments),
    # 1e-16 in float64.
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.log_prob(h), theirs.log_prob(h), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_likelihood_never_falls(covariance_type: str) -> None:
    density = GaussianMixture(
        5, 6, covariance_type=covariance_type, reg_covar=0.0, max_iter=30, tol=-math.inf
    )
    density.fit(overlapping(dtype=torch.float64), generator=seeded())
    gains = np.diff(density.log_likelihoods)
    assert len(gains) == 30
    assert gains.min() > -1e-10  # rounding of a mean of order 10


def test_fit_is_as_good_as_scikit_learns() -> None:
    h, test = overlapping(4000).split([2000, 2000])
    ours = GaussianMixture(5, 4, n_init=4).fit(h, generator=seeded())
    theirs = mixture.GaussianMixture(4, n_init=4, random_state=0).fit(h.double().numpy())
    # Different starts may end in different optima; this one both should find.
    assert float(ours.log_prob(test).mean()) > theirs.score(test.double().numpy()) - 0.01


def test_fit_ends_when_it_gains_little() -> None:
    density = GaussianMixture(5, 4, tol=1e-2).fit(overlapping(), generator=seeded())
    assert density.converged
    assert len(density.log_likelihoods) < 100
    assert (
        np.diff(density.log_likelihoods)[-1] < 1e-2 <= np.diff(density.log_likelihoods)[:-1].min()
    )


def test_held_out_points_stop_overfitting() -> None:
    h, valid = overlapping(300).split([100, 200])
    density = GaussianMixture(5, 15, tol=1e-3).fit(h, generator=seeded(), valid=valid)
    to_the_end = GaussianMixture(5, 15, tol=1e-3).fit(h, generator=seeded())
    assert density.log_prob(valid).mean() > to_the_end.log_prob(valid).mean() + 1


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    h = overlapping()
    whole = start("full", max_iter=3).fit(h, generator=seeded())
    monkeypatch.setattr("imlbench.densities.mixture._BLOCK_BYTES", 1)
    blocked = start("full", max_iter=3).fit(h, generator=seeded())
    torch.testing.assert_close(whole.means, blocked.means, rtol=1e-5, atol=1e-6)  # float32 products
    torch.testing.assert_close(whole.log_prob(h), blocked.log_prob(h), rtol=0, atol=1e-5)


def test_strips_leave_out_only_zeros() -> None:
    k = 70  # three strips, of unequal width
    root = torch.randn(3, k, k, generator=seeded(), dtype=torch.float64)
    covariances = root @ root.mT + torch.eye(k)
    means = torch.randn(3, k, generator=seeded(1), dtype=torch.float64)
    h = torch.randn(20, k, generator=seeded(2), dtype=torch.float64)
    ours = TriangularNormal(means, covariances, torch.float64)(h)
    for c in range(3):
        scipy = multivariate_normal(means[c].numpy(), covariances[c].numpy())
        np.testing.assert_allclose(ours[:, c], scipy.logpdf(h.numpy()), rtol=1e-10)


def test_float32_gives_way_where_it_would_show() -> None:
    means = torch.tensor([[0.0, 0.0], [1000.0, 0.0]], dtype=torch.float64)
    h = means.repeat_interleave(500, 0) + 0.01 * torch.randn(1000, 2, generator=seeded()).double()
    narrow = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1) * 1e-4
    assert TriangularNormal(means, narrow * 1e4, torch.float32)(h.float()).isfinite().all()
    assert TriangularNormal(means, narrow, torch.float32)(h.float()).isnan().all()
    ours = GaussianMixture.from_parameters(torch.ones(2), means, narrow, max_iter=3, reg_covar=0.0)
    ours.fit(h.float(), generator=seeded())
    for c, x in enumerate(h.float().double().split(500)):
        # The rounding of float64, relative to moments about a mean 500 away.
        torch.testing.assert_close(ours.means[c], x.mean(0), rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.covariances[c], x.T.cov(correction=0), rtol=1e-4, atol=1e-9)


def test_a_covariance_that_is_not_positive_definite_is_raised() -> None:
    flat = torch.ones(1, 3, 3, dtype=torch.float64)
    bad = -torch.eye(3, dtype=torch.float64)[None] * 1e-9
    means, h = torch.zeros(1, 3), torch.randn(50, 3, generator=seeded(), dtype=torch.float64)
    assert TriangularNormal(means.double(), flat + bad, torch.float64)(h).isnan().all()
    density = GaussianMixture.from_parameters(torch.ones(1), means, flat - 2 * bad, max_iter=1)
    density.covariances = flat + bad
    density.fit(h, generator=seeded())
    assert all(math.isfinite(value) for value in density.log_likelihoods)
    expected = h.T.cov(correction=0) + 1e-6 * torch.eye(3)
    torch.testing.assert_close(density.covariances[0], expected, rtol=1e-10, atol=1e-12)


def test_samples_come_in_random_order_with_their_components() -> None:
    density = start("full")
    h, component = density.sample_components(40_000, seeded())
    frequency = torch.bincount(component, minlength=6) / 40_000
    # Four standard errors of a frequency of 40,000 draws are at most 0.01.
    torch.testing.assert_close(frequency.double(), density.weights, rtol=0, atol=0.01)
    assert bool((component.diff() < 0).any())
    for c in range(6):
        mean = h[component == c].double().mean(0)
        torch.testing.assert_close(mean, density.means[c], rtol=0, atol=0.1)


def test_sample_covariances_are_the_components_own() -> None:
    density = start("full", max_iter=5).fit(overlapping(), generator=seeded())
    h, component = density.sample_components(100_000, seeded())
    for c in range(6):
        x = h[component == c].double()
        scale = density.covariances[c].diagonal().amax()
        # Entries of a covariance of over 1,000 points are known to about 4 % of its scale.
        torch.testing.assert_close(
            x.T.cov() / scale, density.covariances[c] / scale, rtol=0, atol=0.15
        )


def test_a_component_without_points_gets_weight_zero() -> None:
    means = torch.tensor([[0.0], [1e6]])
    density = GaussianMixture.from_parameters(torch.ones(2), means, torch.ones(2, 1, 1))
    density.fit(torch.randn(100, 1, generator=seeded()), generator=seeded())
    assert density.weights.tolist() == [1.0, 0.0]
    assert float(density.means[1]) == 1e6
    assert bool(density.log_prob(torch.zeros(1, 1)).isfinite())
    assert density.sample_components(1000, seeded())[1].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"n_init": 0}, "n_init must be at least 1"),
        ({"reg_covar": -1.0}, "reg_covar must be finite and at least 0"),
        ({"covariance_type": "round"}, "covariance_type must be one of full, diag"),
        ({"backend": "hmmlearn"}, "backend must be one of torch, scikit-learn"),
        ({"init": "random"}, "init must be one of kmeans, current"),
    ],
)
def test_bad_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(2, **change)


def test_bad_parameters_are_refused() -> None:
    w, m, s = torch.ones(2), torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1)
    build = GaussianMixture.from_parameters
    with pytest.raises(ValueError, match=r"covariances must be finite, of shape \(2, 3, 3\)"):
        build(w, m, s[0])
    with pytest.raises(ValueError, match="weights must be at least 0"):
        build(-w, m, s)
    with pytest.raises(ValueError, match="covariances must be positive definite"):
        build(w, m, -s)
    with pytest.raises(ValueError, match="means must be finite"):
        build(w, m * torch.nan, s)


def test_perplexity_is_the_exponential_of_scipys_entropy() -> None:
    weights = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    # float64 on both sides.
    assert perplexity(weights) == pytest.approx(math.exp(entropy(weights.numpy())), rel=1e-12)
    assert perplexity(torch.ones(5) / 5) == pytest.approx(5)


def test_kmeans_restarts_find_the_groups() -> None:
    centres = 20 * torch.randn(8, 3, generator=seeded(1))
    h = centres.repeat(100, 1) + torch.randn(800, 3, generator=seeded())
    found = kmeans(h, 8, generator=seeded(), n_init=8)
    # The mean of 100 points of unit variance is within 4 / sqrt(100) of its centre.
    assert float(torch.cdist(centres.double(), found).amin(1).max()) < 0.7


def test_kmeans_subsamples() -> None:
    h = torch.randn(30_000, 1, generator=seeded())
    h[::2] += 10
    found = kmeans(h, 2, generator=seeded()).flatten().sort().values
    torch.testing.assert_close(found, torch.tensor([0.0, 10.0]).double(), rtol=0, atol=0.05)
