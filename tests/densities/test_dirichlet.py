"""The Dirichlet-process mixture against scikit-learn's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import BayesianGaussianMixture
from torch import Generator, Tensor

from imlbench.densities import DirichletProcessMixture


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def groups(n: int = 900, k: int = 4) -> Tensor:
    h = torch.randn(n, k, generator=seeded(), dtype=torch.float64)
    turn = torch.randn(3, k, k, generator=seeded(1), dtype=torch.float64)
    group = torch.arange(n) % 3
    return torch.einsum("nk,nkj->nj", h, turn[group]) + 8 * group[:, None]


def scikit_learn(h: Tensor, max_iter: int, seed: int = 0) -> BayesianGaussianMixture:
    model = BayesianGaussianMixture(
        n_components=8,
        weight_concentration_prior_type="dirichlet_process",
        max_iter=max_iter,
        tol=0.0,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(h.numpy())


def taken_over(model: BayesianGaussianMixture, **options: object) -> DirichletProcessMixture:
    density = DirichletProcessMixture(4, 8, init="current", **options)
    density._take_over(model)
    return density


def test_follows_scikit_learn() -> None:
    h = groups()
    ours = taken_over(scikit_learn(h, 1), max_iter=20, tol=-math.inf)
    ours.fit(h, generator=seeded())
    assert ours.n_iter == 20
    theirs = taken_over(scikit_learn(h, 21))
    for name, value in ours.state_dict().items():
        # float64 on both sides, over 20 iterations.
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-7, atol=1e-9)
    ours_log_prob, theirs_log_prob = ours.log_prob(h), theirs.log_prob(h)
    torch.testing.assert_close(ours_log_prob, theirs_log_prob, rtol=0, atol=1e-7)


def test_bound_differs_from_scikit_learns_by_a_constant() -> None:
    h = groups()
    # At a fixed point their bound, which lags by half an iteration and lacks constants that depend
    # on the data and the prior alone, moves as ours does from one optimum to another.
    models = [scikit_learn(h, 300, seed) for seed in range(3)]
    ours = [taken_over(m, max_iter=1).fit(h, generator=seeded()).log_likelihoods[0] for m in models]
    offsets = [float(m.lower_bound_) - 900 * o for m, o in zip(models, ours, strict=True)]
    assert np.ptp([m.lower_bound_ for m in models]) > 1
    assert np.ptp(offsets) < 1e-3


def test_bound_never_falls() -> None:
    density = DirichletProcessMixture(4, 8, max_iter=40, tol=-math.inf, reg_covar=0.0)
    density.fit(groups(), generator=seeded())
    assert np.diff(density.log_likelihoods).min() > -1e-10  # rounding of a mean of order 10


def test_counts_the_components_in_use() -> None:
    density = DirichletProcessMixture(4, 12, max_iter=500, tol=1e-5)
    density.fit(groups(), generator=seeded())
    assert density.n_effective == 3
    # Three components of a third each; the rest of the prior's mass adds a little.
    assert density.perplexity == pytest.approx(3, abs=0.1)


def test_concentration_is_used() -> None:
    few = DirichletProcessMixture(4, 12, concentration=1e-6, max_iter=50)
    many = DirichletProcessMixture(4, 12, concentration=1e6, max_iter=50)
    few.fit(groups(), generator=seeded())
    many.fit(groups(), generator=seeded())
    assert few.perplexity < many.perplexity


def test_library_gives_its_posterior() -> None:
    density = DirichletProcessMixture(4, 8, backend="scikit-learn", max_iter=300)
    density.fit(groups(), generator=seeded())
    assert density.n_effective >= 3
    continued = DirichletProcessMixture(4, 8, init="current", max_iter=300, tol=1e-6)
    continued.load_state_dict(density.state_dict())
    continued.fit(groups(), generator=seeded())
    assert continued.log_likelihoods[-1] >= continued.log_likelihoods[0]


def test_covariances_are_full() -> None:
    with pytest.raises(TypeError, match="covariance_type"):
        DirichletProcessMixture(2, covariance_type="diag")


@pytest.mark.parametrize("concentration", [0.0, -1.0, math.inf, math.nan])
def test_bad_concentration_is_refused(concentration: float) -> None:
    with pytest.raises(ValueError, match="concentration must be positive"):
        DirichletProcessMixture(2, concentration=concentration)
