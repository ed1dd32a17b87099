"""What every density promises, tried on all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Generator, Tensor

from imlbench import densities
from imlbench.densities import (
    Density,
    DirichletProcessMixture,
    Gaussian,
    GaussianHMM,
    GaussianMixture,
)
from tests.accelerator import DEVICE, accelerator

BUILD: dict[str, Callable[[int], Density]] = {
    "gaussian": Gaussian,
    "full": lambda k: GaussianMixture(k, 3, max_iter=20),
    "diag": lambda k: GaussianMixture(k, 3, covariance_type="diag", max_iter=20),
    "tied": lambda k: GaussianMixture(k, 3, covariance_type="tied", max_iter=20),
    "spherical": lambda k: GaussianMixture(k, 3, covariance_type="spherical", max_iter=20),
    "dirichlet": lambda k: DirichletProcessMixture(k, 3, max_iter=20),
    "hmm": lambda k: GaussianHMM(k, 3, max_iter=20),
    "scikit-learn": lambda k: GaussianMixture(k, 3, backend="scikit-learn", max_iter=20),
}
LENGTHS = [100, 150, 50]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def blobs(k: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    h = torch.randn(300, k, generator=seeded(), dtype=dtype)
    return h + 6 * torch.arange(3).repeat_interleave(100)[:, None]


def fitted(name: str, k: int = 2) -> Density:
    return BUILD[name](k).fit(blobs(k), generator=seeded(), lengths=LENGTHS)


@pytest.fixture(params=BUILD)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_density_is_here() -> None:
    exported = {getattr(densities, name) for name in densities.__all__}
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, Density)}
    assert {type(build(2)) for build in BUILD.values()} == classes - {Density}


def test_integrates_to_one_in_two_dimensions(name: str) -> None:
    density = fitted(name)
    axis = torch.arange(-30, 45, 0.25, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    p = density.log_prob(grid, [1] * len(grid)).exp()
    # A smooth density summed on a grid finer than its width converges faster than any power.
    assert float(p.sum()) * 0.25**2 == pytest.approx(1, abs=1e-6)


def test_results_have_the_promised_types(name: str) -> None:
    density = fitted(name, k=3)
    log_prob = density.log_prob(blobs(3))
    assert (log_prob.shape, log_prob.dtype) == ((300,), torch.float64)
    h, component = density.sample_components(7, seeded())
    assert (h.shape, h.dtype) == ((7, 3), torch.float32)
    assert (component.shape, component.dtype) == ((7,), torch.int64)
    assert torch.equal(h, density.sample(7, seeded()))


def test_log_prob_does_not_depend_on_the_type_of_the_points(name: str) -> None:
    density, h = fitted(name), blobs()
    assert torch.equal(density.log_prob(h), density.log_prob(h.double()))


def test_same_seed_gives_the_same_result(name: str) -> None:
    first, second = fitted(name), fitted(name)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert torch.equal(first.sample(9, seeded(1)), second.sample(9, seeded(1)))
    assert not torch.equal(first.sample(9, seeded(1)), first.sample(9, seeded(2)))


def test_global_random_state_is_untouched(name: str) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted(name).sample(5, seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_state_survives_safetensors(name: str) -> None:
    density, other = fitted(name), BUILD[name](2)
    other.load_state_dict(load(save(density.state_dict())))
    assert torch.equal(density.log_prob(blobs()), other.log_prob(blobs()))
    assert torch.equal(density.sample(5, seeded()), other.sample(5, seeded()))


def test_starts_as_a_standard_normal(name: str) -> None:
    h = blobs()
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(h.double()).sum(1)
    torch.testing.assert_close(BUILD[name](2).log_prob(h), expected, rtol=1e-12, atol=0)


def test_samples_follow_the_density(name: str) -> None:
    density = fitted(name)
    h = density.sample(20_000, seeded(3)).double()
    # Each axis of the blobs has mean 6 and standard deviation 5; 20,000 draws pin the mean of
    # independent ones to 0.04. An HMM's are dependent: its own tests look at them.
    if name != "hmm":
        torch.testing.assert_close(h.mean(0), blobs().double().mean(0), atol=0.2, rtol=0)
        torch.testing.assert_close(h.std(0), blobs().double().std(0), atol=0.2, rtol=0)


def test_report_sees_every_iteration(name: str) -> None:
    if name in {"gaussian", "scikit-learn"}:
        pytest.skip("does not iterate here")
    seen: list[tuple[int, int, float]] = []
    density = BUILD[name](2)
    density.fit(blobs(), generator=seeded(), report=lambda *args: seen.append(args))
    assert [i for i, _, _ in seen] == list(range(len(seen)))
    assert {m for _, m, _ in seen} == {20}


def test_held_out_points_choose_the_parameters(name: str) -> None:
    if name in {"gaussian", "scikit-learn"}:
        pytest.skip("does not iterate here")
    valid = blobs()[::7] + 0.5
    values: list[float] = []
    density = BUILD[name](2)
    density.fit(
        blobs(), generator=seeded(), valid=valid, report=lambda *args: values.append(args[2])
    )
    # Both are float64 sums over the same 43 points in another order.
    assert float(density.log_prob(valid).mean()) == pytest.approx(max(values), abs=1e-6)


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.zeros(300), r"h must be of shape \(N, 2\)"),
        (torch.zeros(300, 3), r"h must be of shape \(N, 2\)"),
        (torch.zeros(300, 2, dtype=torch.int64), "h must be floating point"),
        (torch.zeros(0, 2), "h must be at least"),
        (torch.full((300, 2), torch.nan), "h must be finite"),
        (torch.full((300, 2), torch.inf), "h must be finite"),
    ],
)
def test_bad_points_are_refused(name: str, h: Tensor, message: str) -> None:
    density = BUILD[name](2)
    with pytest.raises(ValueError, match=message):
        density.fit(h, generator=seeded())
    with pytest.raises(ValueError, match=message):
        density.log_prob(h)


def test_bad_arguments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="n_dims must be at least 1; got 0"):
        BUILD[name](0)
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        BUILD[name](2).sample(0, seeded())
    if name not in {"gaussian"}:
        with pytest.raises(ValueError, match="h must be at least 3 points; got 2"):
            BUILD[name](2).fit(torch.zeros(2, 2), generator=seeded())


def test_bad_recordings_are_refused(name: str) -> None:
    density, h = BUILD[name](2), blobs()
    with pytest.raises(ValueError, match=": lengths must be positive and sum to 300"):
        density.fit(h, generator=seeded(), lengths=[100, 100])
    with pytest.raises(ValueError, match=": lengths must be positive and sum to 300"):
        density.log_prob(h, [300, 0])
    with pytest.raises(ValueError, match="valid must be finite"):
        density.fit(h, generator=seeded(), valid=h * torch.nan)
    with pytest.raises(ValueError, match="valid_lengths must be positive and sum to 300"):
        density.fit(h, generator=seeded(), valid=h, valid_lengths=[299])


@pytest.mark.parametrize("k", [2, 40])  # second moments of all pairs of dimensions, and not
@pytest.mark.parametrize("held_out", [False, True])
def test_an_iteration_waits_for_nothing_but_its_likelihoods(
    name: str, k: int, held_out: bool
) -> None:
    if name in {"gaussian", "scikit-learn"}:
        pytest.skip("does not iterate here")

    def waits(max_iter: int) -> Counter[str]:
        density = BUILD[name](k)
        density.max_iter, density.tol = max_iter, -math.inf
        with accelerator() as log:
            h = blobs(k).to(DEVICE)
            valid = h[::7] if held_out else None
            density.fit(h, generator=torch.Generator(DEVICE), valid=valid, lengths=LENGTHS)
        return log.waits

    assert (waits(7) - waits(4)).total() == 3 * (1 + held_out)


HARD = {
    "one point, repeated": torch.full((300, 3), 0.1),
    "two points, repeated": torch.tensor([[0.1, 0, 1e3], [0.3, 1, 1e3]]).repeat(150, 1),
    "constant dimension": torch.cat([blobs(2), torch.full((300, 1), 7.0)], dim=1),
    "dimensions in a line": blobs(1) @ torch.tensor([[1.0, 2.0, 3.0]]),
    "far from the origin": blobs(3) + 1e4,
    "scales far apart": blobs(3) * torch.tensor([1e-4, 1.0, 1e4]),
    "one point far away": torch.cat([blobs(3), torch.full((1, 3), 1e8)]),
    "huge": blobs(3) * 1e18,
    "tiny": blobs(3) * 1e-18,
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("reg_covar", [1e-6, 0.0])
def test_degenerate_points_give_finite_densities(name: str, case: str, reg_covar: float) -> None:
    if name == "scikit-learn":
        pytest.skip("scikit-learn refuses some of them")
    density = BUILD[name](3)
    density.reg_covar = reg_covar
    density.fit(HARD[case], generator=seeded())
    assert bool(density.log_prob(HARD[case]).isfinite().all())
    assert bool(density.sample(50, seeded()).isfinite().all())
    for key, value in density.state_dict().items():
        assert bool(value.isfinite().all()), key
