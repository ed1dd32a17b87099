"""The toy distributions: their densities and entropies against independent truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.datasets import make_moons

from imlbench import Modes, Sources
from imlbench_toy.toy import DENSITIES, Toy2D, Toy2DParams

SHAPES = sorted(DENSITIES)


def make(shape: str, **params: int) -> Toy2D:
    return Toy2D(Toy2DParams(shape=shape, **params))


def cells(shape: str, n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The probability of each of n x n cells, by the midpoint rule on 5 x 5 points each; edges."""
    bounds = DENSITIES[shape].bounds
    edges = [np.linspace(low, high, n + 1) for low, high in bounds]
    fine = [np.linspace(low, high, 5 * n, endpoint=False) for low, high in bounds]
    steps = [axis[1] - axis[0] for axis in fine]
    x, y = (torch.tensor(axis + step / 2) for axis, step in zip(fine, steps, strict=True))
    density = make(shape).log_prob(torch.cartesian_prod(x, y)).exp().numpy()
    return density.reshape(n, 5, n, 5).sum((1, 3)) * math.prod(steps), edges


@pytest.mark.parametrize("shape", SHAPES)
def test_the_density_integrates_to_one(shape):
    mass, _ = cells(shape, 25)
    assert mass.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_follow_the_density(shape):
    mass, edges = cells(shape, 25)
    samples = make(shape, n_train=20000).load(Sources()).train[:].numpy()
    counts, _, _ = np.histogram2d(*samples.T, bins=edges)
    expected, counts = mass.ravel() * len(samples), counts.ravel()
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi2, len(expected) - 1) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_is_minus_the_mean_log_density_of_samples(shape):
    dataset = make(shape, n_test=20000)
    log_prob = dataset.log_prob(dataset.load(Sources()).test[:])
    assert log_prob.shape == (20000,)
    assert log_prob.dtype == torch.float64
    error = (-log_prob.mean() - dataset.entropy).item()
    assert abs(error) < 4 * log_prob.std().item() / math.sqrt(len(log_prob))


def test_entropy_of_the_ring_is_the_radial_integral():
    ring = make("ring")

    def integrand(r: float) -> float:
        log_p = ring.log_prob(torch.tensor([[r, 0.0]], dtype=torch.float64)).item()
        return -2 * math.pi * r * math.exp(log_p) * log_p

    truth, _ = integrate.quad(integrand, 0, 2, epsabs=1e-10, points=[1.0])
    assert ring.entropy == pytest.approx(truth, abs=1e-6)


def test_entropy_of_the_grid_is_twice_that_of_a_row():
    def integrand(x: float) -> float:
        p = stats.norm.pdf(x, [-4, -2, 0, 2, 4], 0.2).mean()
        return -p * math.log(p)

    row, _ = integrate.quad(integrand, -5.6, 5.6, epsabs=1e-10, points=range(-5, 6), limit=200)
    assert make("grid").entropy == pytest.approx(2 * row, abs=1e-6)


@pytest.mark.parametrize("shape", ["two-gaussians", "grid"])
def test_mixtures_agree_with_scipy(shape):
    dataset, density = make(shape), DENSITIES[shape]()
    x = dataset.load(Sources()).test[:50]
    parts = [
        stats.multivariate_normal(mean, factor @ factor.T).pdf(x)
        for mean, factor in zip(density.means.numpy(), density.factors.numpy(), strict=True)
    ]
    np.testing.assert_allclose(dataset.log_prob(x), np.log(np.mean(parts, 0)), atol=1e-8)


@pytest.mark.parametrize("point", [(1.0, 0.0), (0.5, 0.25), (-1.2, 0.3), (3.0, -2.0), (0.0, 4.9)])
def test_moons_agree_with_adaptive_integration(point):
    def integrand(t: float) -> float:
        first = (math.cos(t), math.sin(t))
        moons = (first, (1 - first[0], 0.5 - first[1]))
        squares = (math.dist(point, moon) ** 2 for moon in moons)
        return sum(math.exp((closest**2 - square) / (2 * 0.1**2)) for square in squares)

    angles = np.linspace(0, math.pi, 2001)
    closest = min(
        math.dist(point, p)
        for t in angles
        for p in ((math.cos(t), math.sin(t)), (1 - math.cos(t), 0.5 - math.sin(t)))
    )
    integral, _ = integrate.quad(
        integrand, 0, math.pi, epsabs=0, epsrel=1e-11, limit=500, points=angles[200:-1:200]
    )
    truth = math.log(integral / (4 * math.pi**2 * 0.1**2)) - closest**2 / (2 * 0.1**2)
    found = make("moons").log_prob(torch.tensor([point], dtype=torch.float64)).item()
    assert found == pytest.approx(truth, abs=1e-8)


def test_moons_are_those_of_scikit_learn():
    dataset = make("moons")
    theirs, _ = make_moons(4000, noise=0.1, random_state=0)
    log_prob = dataset.log_prob(torch.tensor(theirs))
    error = (-log_prob.mean() - dataset.entropy).item()
    assert abs(error) < 4 * log_prob.std().item() / math.sqrt(len(log_prob))


def test_a_single_gaussian_is_far_from_the_two():
    dataset = make("two-gaussians")
    x = dataset.load(Sources()).train[:].numpy()
    gaussian = stats.multivariate_normal(x.mean(0), np.cov(x.T))
    assert -gaussian.logpdf(x).mean() - dataset.entropy > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_points_depend_on_the_seed_alone(shape):
    before = torch.get_rng_state()
    first, again = make(shape).load(Sources()), make(shape).load(Sources(offline=True))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != make(shape, data_seed=1).load(Sources()).fingerprint
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_differ_and_do_not_depend_on_each_others_size():
    small, large = (make("ring", n_train=n).load(Sources()) for n in (100, 3000))
    assert [len(small.train), len(small.valid), len(small.test)] == [100, 2000, 5000]
    assert small.train[:].shape == (100, 2)
    assert torch.equal(small.test[:], large.test[:])
    assert not torch.equal(small.valid[:], small.test[:2000])
    assert not torch.equal(large.train[:2000], large.valid[:])


def test_log_prob_is_finite_far_away_and_keeps_its_hands_off_its_input():
    x = torch.tensor([[0.0, 0.0], [30.0, -30.0]])
    for shape in SHAPES:
        assert make(shape).log_prob(x).isfinite().all()
        assert make(shape).log_prob(x[:0]).shape == (0,)
    assert x.tolist() == [[0, 0], [30, -30]]


def test_points_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"toy-2d: x must be of shape \(N, 2\); got \(2,\)"):
        make("ring").log_prob(torch.zeros(2))


def test_only_mixtures_have_modes():
    assert [shape for shape in SHAPES if make(shape).can(Modes)] == ["grid", "two-gaussians"]
    assert not hasattr(make("ring"), "mode")
    x = torch.tensor([[-4.1, -2.0], [3.9, 4.1]])
    assert make("grid").mode(x).tolist() == [1, 24]  # the grid's rows of five, from -4, -4
