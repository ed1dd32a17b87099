"""The hidden Markov model against hmmlearn, and against sums over all paths."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hmmlearn import hmm as hmmlearn
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Generator, Tensor

from imlbench.densities import GaussianHMM
from imlbench.densities.density import Points
from imlbench.densities.hmm import pack

LENGTHS = [40, 7, 1, 90, 12, 7, 143]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def model(c: int = 5, k: int = 3, seed: int = 0, **options: object) -> GaussianHMM:
    draws = [torch.rand(size, generator=seeded(seed), dtype=torch.float64) for size in (c, (c, c))]
    start, transitions = (d / d.sum(-1, keepdim=True) for d in draws)
    means = 3 * torch.randn(c, k, generator=seeded(seed + 1), dtype=torch.float64)
    variances = 0.5 + torch.rand(c, k, generator=seeded(seed + 2), dtype=torch.float64)
    return GaussianHMM.from_parameters(start, transitions, means, variances, **options)


def recordings(n: int = 300) -> Tensor:
    return model(seed=7).sample(n, seeded())


def library(density: GaussianHMM, **options: object) -> hmmlearn.GaussianHMM:
    twin = hmmlearn.GaussianHMM(density.n_components, init_params="", **options)
    twin.n_features = density.n_dims
    twin.startprob_, twin.transmat_ = density.start.numpy(), density.transitions.numpy()
    twin.means_, twin.covars_ = density.means.numpy(), density.variances.numpy()
    return twin


def per_recording(log_prob: Tensor, lengths: list[int]) -> list[float]:
    return [float(part.sum()) for part in log_prob.split(lengths)]


def test_equals_the_sum_over_all_paths() -> None:
    density, h = model(c=3), recordings(6)
    x = h.double().numpy()
    emission = norm(density.means.numpy()[:, None], density.variances.sqrt().numpy()[:, None])
    log_b = emission.logpdf(x[None]).sum(-1)
    log_pi, log_a = density.start.log().numpy(), density.transitions.log().numpy()
    for t in range(1, 7):
        paths = [
            log_pi[z[0]]
            + sum(log_a[i, j] for i, j in itertools.pairwise(z))
            + sum(log_b[state, i] for i, state in enumerate(z))
            for z in itertools.product(range(3), repeat=t)
        ]
        # float64 on both sides.
        assert float(density.log_prob(h[:t]).sum()) == pytest.approx(logsumexp(paths), abs=1e-10)


@pytest.mark.parametrize("implementation", ["log", "scaling"])
def test_log_prob_equals_hmmlearn(implementation: str) -> None:
    density, h = model(), recordings()
    twin = library(density, implementation=implementation)
    x = h.double().numpy()
    theirs = [twin.score(x[i:j]) for i, j in itertools.pairwise(np.cumsum([0, *LENGTHS]))]
    ours = per_recording(density.log_prob(h, LENGTHS), LENGTHS)
    # hmmlearn adds nothing; float64 on both sides, over up to 143 steps.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("implementation", ["log", "scaling"])
def test_em_follows_hmmlearn(implementation: str) -> None:
    h = recordings()
    ours = model(max_iter=15, tol=-math.inf).fit(h, generator=seeded(), lengths=LENGTHS)
    twin = library(model(), n_iter=15, tol=-math.inf, implementation=implementation)
    twin.fit(h.double().numpy(), LENGTHS)
    np.testing.assert_allclose(
        np.array(ours.log_likelihoods)[:15],
        np.array(twin.monitor_.history) / 300,
        rtol=0,
        atol=1e-8,
    )
    # Rounding of 1e-16, amplified over 15 iterations; their recursions round differently.
    for mine, theirs in [
        (ours.start, twin.startprob_),
        (ours.transitions, twin.transmat_),
        (ours.means, twin.means_),
        (ours.variances, twin._covars_),
    ]:
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-8)


def test_library_backend_equals_ours() -> None:
    h = recordings()
    options = {"max_iter": 10, "tol": -math.inf}
    ours = model(**options).fit(h, generator=seeded(), lengths=LENGTHS)
    theirs = model(backend="hmmlearn", **options).fit(h, generator=seeded(), lengths=LENGTHS)
    torch.testing.assert_close(ours.log_prob(h), theirs.log_prob(h), rtol=0, atol=1e-6)


def test_library_backend_starts_by_itself() -> None:
    h = recordings()
    density = GaussianHMM(3, 5, backend="hmmlearn").fit(h, generator=seeded(), lengths=LENGTHS)
    assert float(density.log_prob(h, LENGTHS).mean()) > float(model().log_prob(h, LENGTHS).mean())


def test_recordings_are_independent() -> None:
    density, h = model(), recordings()
    together = density.log_prob(h, LENGTHS)
    apart = torch.cat([density.log_prob(part) for part in h.split(LENGTHS)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)
    assert not torch.allclose(together, density.log_prob(h))


def test_groups_of_recordings_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    h = recordings()
    whole = model(max_iter=3).fit(h, generator=seeded(), lengths=LENGTHS)
    monkeypatch.setattr("imlbench.densities.hmm._BLOCK", 50 * 5)
    split = model(max_iter=3).fit(h, generator=seeded(), lengths=LENGTHS)
    torch.testing.assert_close(whole.means, split.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        whole.log_prob(h, LENGTHS), split.log_prob(h, LENGTHS), rtol=0, atol=1e-9
    )


def test_first_terms_are_those_of_a_mixture() -> None:
    density, h = model(), recordings(20)
    joint = norm(density.means[:, None], density.variances.sqrt()[:, None]).logpdf(h.double()[None])
    expected = logsumexp(joint.sum(-1), axis=0, b=density.start.numpy()[:, None])
    np.testing.assert_allclose(density.log_prob(h, [1] * 20), expected, rtol=0, atol=1e-10)


def test_pack_sorts_by_step() -> None:
    packed = pack([2, 3, 1], 256, torch.device("cpu"))
    assert packed.order.tolist() == [2, 0, 5, 3, 1, 4]
    assert packed.starts == [0, 3, 5, 6]
    assert packed.own.tolist() == [1, 4, 0, 3, 5, 2]
    assert packed.firsts.tolist() == [0, 2, 5]
    assert packed.lasts.tolist() == [1, 4, 5]
    assert packed.opens.all()
    assert not len(packed.seams)


def test_pack_cuts_long_recordings() -> None:
    packed = pack([3, 24], 8, torch.device("cpu"))
    windows = {0: [], 1: [], 2: [], 3: []}  # in order of falling length, the middle piece first
    for start, size in zip(packed.starts, packed.sizes, strict=False):
        for window, point in enumerate(packed.order[start : start + size].tolist()):
            windows[window].append(point)
    assert list(windows.values()) == [
        list(range(10, 20)),
        list(range(3, 12)),
        list(range(18, 27)),
        [0, 1, 2],
    ]
    assert packed.opens.tolist() == [False, True, False, True]
    assert packed.order[packed.own].tolist() == list(range(27))
    assert packed.seams.tolist() == [11, 19]
    assert packed.order[packed.beyond].tolist() == [11, 19]
    assert packed.order[packed.ahead].tolist() == [10, 18]
    assert not set(packed.beyond.tolist()) & set(packed.own.tolist())
    assert not set(packed.ahead.tolist()) & set(packed.own.tolist())


def chain(stay: float, overlap: float) -> GaussianHMM:
    """Two states that are left with probability 1 - stay, and are hard to tell apart."""
    transitions = torch.tensor([[stay, 1 - stay], [1 - stay, stay]], dtype=torch.float64)
    means = torch.tensor([[0.0], [1 / overlap]])
    half, ones = torch.full((2,), 0.5), torch.ones(2, 1)
    return GaussianHMM.from_parameters(half, transitions, means, ones, max_iter=1, tol=-math.inf)


@pytest.mark.parametrize(
    ("density", "piece", "joined"),
    [
        (model(max_iter=1, tol=-math.inf), 128, True),
        (chain(0.7, overlap=1.0), 256, True),
        (chain(0.9, overlap=10.0), 256, False),  # over 32 points it forgets by 0.8 ^ 32 = 1e-3 ...
        (chain(0.9, overlap=10.0), 1024, True),  # ... and by 1e-12 over 128
        (chain(1 - 1e-9, overlap=100.0), 256, False),  # forgets nothing
        (chain(0.0, overlap=100.0), 256, False),  # nor does what goes in circles
    ],
)
def test_pieces_do_not_show(
    density: GaussianHMM, piece: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = torch.randn(4000, density.n_dims, generator=seeded(), dtype=torch.float64)
    lengths = [3000, 1, 999]
    density._prepare(h)
    assert (float(density._statistics(Points(h, lengths), piece)[2]) <= 1e-10) == joined
    fitted = {}
    for most in (piece, 10_000):
        monkeypatch.setattr("imlbench.densities.hmm._PIECE", most)
        start = copy.deepcopy(density)
        log_prob = start.log_prob(h, lengths)
        fitted[most] = log_prob, start.fit(h, generator=seeded(), lengths=lengths)
    # Pieces are apart by 1e-10 at most where they meet, and forget that too.
    torch.testing.assert_close(fitted[piece][0], fitted[10_000][0], rtol=0, atol=1e-9)
    for name, value in fitted[piece][1].state_dict().items():
        expected = fitted[10_000][1].state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    twin = library(density, implementation="log")
    exact = sum(twin.score(part.numpy()) for part in h.split(lengths))
    assert float(fitted[piece][0].sum()) == pytest.approx(exact, rel=1e-9)


def test_underflow_does_not_lose_the_right_path() -> None:
    """A state thousands of nats behind at one step explains the next one."""
    tiny = 1e-60
    density = GaussianHMM.from_parameters(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[1 - tiny, tiny], [tiny, 1 - tiny]], dtype=torch.float64),
        torch.tensor([[0.0], [100.0]]),
        torch.ones(2, 1),
    )
    h = torch.tensor([[2.0], [100.0], [0.0]], dtype=torch.float64)
    exact = library(density, implementation="log").score(h.numpy())
    assert float(density.log_prob(h).sum()) == pytest.approx(exact, abs=1e-9)


def test_zero_transitions_are_kept_where_a_path_exists() -> None:
    density = model(c=3)
    density.transitions = torch.tensor(
        [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    density.start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    h = density.sample(50, seeded())
    exact = library(density, implementation="log").score(h.double().numpy())
    assert float(density.log_prob(h).sum()) == pytest.approx(exact, abs=1e-9)


def test_an_unvisited_state_keeps_its_emissions() -> None:
    density = model(c=3, max_iter=3)
    density.means[2] = 1e6
    density.fit(recordings(), generator=seeded())
    assert density.means[2].tolist() == [1e6] * 3
    assert bool(density.transitions.isfinite().all())
    torch.testing.assert_close(density.transitions.sum(1), torch.ones(3).double())


def test_likelihood_never_falls() -> None:
    density = GaussianHMM(3, 6, max_iter=30, variance_prior=0.0, tol=-math.inf)
    density.fit(recordings(), generator=seeded(), lengths=LENGTHS)
    assert np.diff(density.log_likelihoods).min() > -1e-10  # rounding of a mean of order 10


def test_samples_follow_the_chain() -> None:
    density = model(c=3)
    h, state = density.sample_components(50_000, seeded())
    seen = torch.zeros(3, 3, dtype=torch.float64)
    seen.index_put_((state[:-1], state[1:]), torch.ones(49_999).double(), accumulate=True)
    # A frequency over at least 10,000 departures has a standard error below 0.005.
    torch.testing.assert_close(
        seen / seen.sum(1, keepdim=True), density.transitions, rtol=0, atol=0.025
    )
    for c in range(3):
        x = h[state == c].double()
        torch.testing.assert_close(x.mean(0), density.means[c], rtol=0, atol=0.05)
        torch.testing.assert_close(x.var(0), density.variances[c], rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", ["torch", "hmmlearn"])
def test_samples_are_recordings_one_after_another(backend: str) -> None:
    """Recordings that go 0, 9, 18 and end there, or 0 and 9 only, every third one."""
    lengths = [3, 3, 2] * 40
    level = torch.cat([torch.arange(n) for n in lengths])
    h = 9.0 * level[:, None] + torch.randn(len(level), 1, generator=seeded())
    density = GaussianHMM(1, 3, backend=backend, n_init=4)
    density.fit(h, generator=seeded(), lengths=lengths)
    order = density.means.flatten().argsort()
    expected = torch.tensor([0, 1 / 3, 1]).double()
    torch.testing.assert_close(density.ends[order], expected, rtol=0, atol=1e-3)
    state = density.sample_components(30_000, seeded(1))[1]
    found = order.argsort()[state]
    assert found[0] == 0
    # Of 30,000 steps 11,250 are from the second level: a standard error of 0.0044.
    steps = found.diff()
    after_second = steps[found[:-1] == 1]
    assert set(steps.tolist()) == {1, -1, -2}
    assert float((after_second == -1).double().mean()) == pytest.approx(1 / 3, abs=0.02)


def test_ends_are_known_from_the_start_and_a_single_recording_has_none() -> None:
    """With a state for every other point the start is best for held-out points."""
    h, valid = torch.randn(2, 60, 3, generator=seeded())
    density = GaussianHMM(3, 30)
    density.fit(h, generator=seeded(), lengths=[3] * 20, valid=valid, valid_lengths=[3] * 20)
    assert density.n_iter == 0
    assert float(density.ends.max()) > 0.3
    assert not GaussianHMM(3, 4).fit(h, generator=seeded()).ends.any()


def test_fit_recovers_the_model() -> None:
    truth = model(c=3)
    h, valid = truth.sample(6000, seeded()).split([4000, 2000])
    density = GaussianHMM(3, 3, n_init=4).fit(h, generator=seeded(), valid=valid)
    # 4,000 points leave about 30 parameters / (2 x 4,000) nats to be lost; but one recording says
    # nothing of where another one starts.
    assert float((truth.log_prob(valid) - density.log_prob(valid))[1:].mean()) < 0.02


def test_a_transition_prior_smooths() -> None:
    h = recordings()
    plain = model(max_iter=20).fit(h, generator=seeded(), lengths=LENGTHS)
    options = {"max_iter": 20, "tol": -math.inf, "transition_prior": 0.5}
    ours = model(**options).fit(h, generator=seeded(), lengths=LENGTHS)
    theirs = model(backend="hmmlearn", **options).fit(h, generator=seeded(), lengths=LENGTHS)
    assert float(plain.transitions.min()) < 1e-4 < float(ours.transitions.min())
    torch.testing.assert_close(ours.transitions, theirs.transitions, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.start, theirs.start, rtol=1e-6, atol=1e-8)


def test_bad_parameters_are_refused() -> None:
    good = model()
    parts = [good.start, good.transitions, good.means, good.variances]
    for index, bad, message in [
        (0, good.start[:-1], r"start must be finite, of shape \(5,\)"),
        (0, good.start * 2, "start must be at least 0 and sum to one"),
        (1, -good.transitions, "transitions must be at least 0"),
        (3, -good.variances, "variances must be positive"),
        (2, good.means * math.nan, "means must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            GaussianHMM.from_parameters(*parts[:index], bad, *parts[index + 1 :])
    with pytest.raises(ValueError, match="variance_prior must be finite"):
        GaussianHMM(2, variance_prior=-1.0)
    with pytest.raises(ValueError, match="transition_prior must be finite"):
        GaussianHMM(2, transition_prior=math.inf)
    with pytest.raises(ValueError, match="backend must be one of torch, hmmlearn"):
        GaussianHMM(2, backend="scikit-learn")
    with pytest.raises(ValueError, match="lengths must be positive"):
        good.log_prob(recordings(), [300, 0])
