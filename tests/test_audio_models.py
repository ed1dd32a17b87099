"""Models of time: against hmmlearn, numerical integration, and what they must refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hmmlearn.hmm import GaussianHMM as Library
from torch import Generator

from imlbench import BaseLogProb, BaseLogProbSequence, Examples, ParameterError, Space
from imlbench.networks import Unrounded
from imlbench.testing import SPACES, CheckContext, check_model, make_splits
from imlbench_iml.autoencoders import ChunkAutoencoder, IMLParams
from imlbench_iml.models import IMLGMM, Latents
from imlbench_iml.recurrent import RecurrentMixture, Stretches
from imlbench_iml.sequences import IMLHMM, IMLRNN
from imlbench_vae.vae import VAE

CHUNKS = SPACES["sequence"]
QUICK = {"epochs": 1, "latent_dim": 3, "width": 4, "filter_length": 8}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def make(cls, space: Space = CHUNKS, **params):
    return cls(cls.resolve(cls.params_type(**params), space), space)


def fitted(cls, splits, **params):
    torch.manual_seed(0)
    model = make(cls, **params)
    model.fit(splits.train, splits.valid, CheckContext())
    return model.eval().requires_grad_(False)


def waves(n: int = 600, period: int = 6, k: int = 1, noise: float = 0.1) -> torch.Tensor:
    """A sine that is easy to predict from what was before, and hard without."""
    phase = 2 * torch.pi * torch.arange(n) / period
    return torch.sin(phase)[:, None].repeat(1, k) + noise * torch.randn(n, k, generator=seeded(1))


@pytest.fixture(scope="module")
def rnn() -> RecurrentMixture:
    density = RecurrentMixture(1, 3, n_units=16, max_iter=150, n_chunks=30, learning_rate=0.02)
    return density.fit(waves(), generator=seeded(), lengths=[300, 300])


@pytest.mark.parametrize(
    ("cls", "params"),
    [
        (IMLHMM, {"n_states": 4}),
        (IMLRNN, {"n_components": 2, "n_units": 8, "n_steps": 20}),
        (IMLGMM, {"n_components": 2}),
    ],
)
def test_models_of_chunks_keep_the_contract(cls, params):
    check_model(cls, CHUNKS, **QUICK, **params)


def test_vae_keeps_the_contract_on_chunks():
    check_model(VAE, CHUNKS, epochs=1, latent_dim=3, hidden_dim=8)


def test_likelihood_of_held_out_recordings_is_hmmlearns():
    splits = make_splits(CHUNKS, 200)
    model = fitted(IMLHMM, splits, **QUICK, n_states=5)
    density = model.density
    twin = Library(5, init_params="")
    twin.n_features = density.n_dims
    twin.startprob_, twin.transmat_ = density.start.numpy(), density.transitions.numpy()
    twin.means_, twin.covars_ = density.means.numpy(), density.variances.numpy()
    x, lengths = splits.test[:], (11, 1, 18)
    ours = model.base_log_prob_sequence(x, lengths)
    h = model.encode(x).double().numpy()
    theirs = [twin.score(h[a:b]) for a, b in itertools.pairwise(np.cumsum([0, *lengths]))]
    assert ours.sum().item() / 30 == pytest.approx(sum(theirs) / 30, abs=1e-6)


@pytest.mark.parametrize(
    ("cls", "params", "lengths", "valid_lengths"),
    [
        (IMLHMM, {"n_states": 2}, (30, 30), (15, 15)),
        (IMLRNN, {"n_components": 2, "n_units": 4, "n_steps": 20}, None, None),
    ],
)
def test_the_hmm_is_fitted_to_recordings_and_the_rnn_to_one_stream(
    cls, params, lengths, valid_lengths
):
    splits = make_splits(CHUNKS, 60)
    seen = {}
    model = make(cls, **QUICK, **params)
    fit = model.density.fit
    model.density.fit = lambda h, **arguments: (seen.update(arguments), fit(h, **arguments))
    model.fit(splits.train, splits.valid, CheckContext())
    assert (seen["lengths"], seen["valid_lengths"]) == (lengths, valid_lengths)
    x = splits.test[:]
    expected = model.density.log_prob(model.encode(x), (15, 15))
    torch.testing.assert_close(model.base_log_prob_sequence(x, (15, 15)), expected)


def test_one_latent_dimension_is_enough_for_the_hmm():
    splits = make_splits(CHUNKS, 60)
    model = fitted(IMLHMM, splits, **{**QUICK, "latent_dim": 1}, n_states=2)
    assert model.sample(5, seeded()).shape == (5, 800)


def test_a_diverged_encoder_is_told_by_the_density():
    model = make(IMLHMM, **QUICK, n_states=2)
    latents = Latents(torch.full((9, 3), torch.nan), (9,))
    with pytest.raises(ValueError, match="must be finite"):
        model.fit_density(latents, latents, CheckContext())


def test_the_hmms_latents_are_uncorrelated_and_decode_as_before():
    splits = make_splits(CHUNKS, 200)
    model = fitted(IMLHMM, splits, **QUICK, n_states=2)
    x = splits.train[:]
    h = model.encode(x).double()
    correlation = h.T.corrcoef()
    # Axes of float32: 3 latents whose variances differ by less than three orders of magnitude.
    torch.testing.assert_close(correlation, torch.eye(3).double(), rtol=0, atol=1e-3)
    again = model.autoencoder.decode(model.autoencoder.encode(x))
    torch.testing.assert_close(model.decode(model.encode(x)), again, rtol=0, atol=1e-5)


def test_exchangeable_models_give_chunks_the_same_density_in_any_order():
    splits = make_splits(CHUNKS, 60)
    model = fitted(IMLGMM, splits, **QUICK, n_components=2)
    x = splits.test[:]
    torch.testing.assert_close(
        model.base_log_prob_sequence(x, (15, 15)),
        model.base_log_prob_sequence(x.flip(0), (30,)).flip(0),
    )


def test_a_model_of_time_has_no_density_of_a_single_chunk():
    model = make(IMLHMM, **QUICK, n_states=2)
    assert not model.can(BaseLogProb)
    assert model.can(BaseLogProbSequence)
    assert not make(IMLGMM, Space("vector", (2,))).can(BaseLogProbSequence)


def test_fewer_chunks_than_states_are_refused_before_training():
    splits = make_splits(CHUNKS, 40)
    with pytest.raises(ParameterError, match=r"^n_states must be at most 40, .*; got 300\.$"):
        fitted(IMLHMM, splits, **QUICK)


def test_the_papers_sizes():
    params = IMLHMM.resolve(IMLHMM.params_type(), CHUNKS)
    assert (params.latent_dim, params.n_states) == (80, 300)
    network = ChunkAutoencoder(IMLParams(latent_dim=80, width=128, filter_length=200), CHUNKS)
    layers = [m for m in network.encoder if isinstance(m, torch.nn.Conv1d)]
    assert [tuple(m.weight.shape) for m in layers] == [(64, 1, 200), (128, 64, 200), (80, 128, 200)]
    sizes = []
    x = torch.zeros(1, 800)
    for module in (*network.encoder, *network.decoder):
        x = module(x)
        if not isinstance(module, Unrounded):
            sizes.append(x.shape[-1])
    assert sizes == [800, 400, 400, 200, 200, 1, 80, 1, 200, 200, 400, 400, 800, 800, 800]


# The recurrent density


def test_conditionals_integrate_to_one(rnn):
    past = waves(8, noise=0.3)

    def density(value: float) -> float:
        h = torch.cat([past, torch.tensor([[value]])])
        return rnn.log_prob(h)[-1].exp().item()

    total, _ = scipy.integrate.quad(density, -8, 8, limit=400, points=[-1, 0, 1])
    assert total == pytest.approx(1, abs=1e-6)


def test_before_it_is_fitted_it_is_standard_normal():
    h = torch.randn(7, 2, generator=seeded())
    truth = scipy.stats.norm.logpdf(h.double().numpy()).sum(1)
    np.testing.assert_allclose(RecurrentMixture(2, 3).log_prob(h).numpy(), truth, atol=1e-6)


def test_it_predicts_from_the_past_and_not_from_the_future(rnn):
    h = waves(120)
    known = rnn.log_prob(h)
    assert known[12:].mean() > rnn.log_prob(h[torch.randperm(120, generator=seeded())]).mean() + 0.5
    changed = h.clone()
    changed[60:] += 3
    torch.testing.assert_close(rnn.log_prob(changed)[:60], known[:60])


def test_recordings_are_independent(rnn):
    a, b = waves(50), waves(30).flip(0)
    apart = torch.cat([rnn.log_prob(a), rnn.log_prob(b)])
    torch.testing.assert_close(rnn.log_prob(torch.cat([a, b]), [50, 30]), apart)


def test_first_samples_have_the_first_density(rnn):
    draws = torch.cat([rnn.sample(1, seeded(seed)) for seed in range(1500)])[:, 0].double().numpy()
    grid = np.linspace(-6, 6, 4001)
    points = torch.from_numpy(grid)[:, None]
    density = rnn.log_prob(points, [1] * len(points)).exp().numpy()
    distribution = scipy.integrate.cumulative_trapezoid(density, grid, initial=0)
    test = scipy.stats.kstest(draws, lambda x: np.interp(x, grid, distribution))
    assert test.pvalue > 0.01


def test_samples_are_as_likely_as_the_model_expects(rnn):
    """The mean of log p over its own samples is the negative entropy, as for held-out waves."""
    samples = rnn.sample(400, seeded(5))
    assert rnn.log_prob(samples).mean().item() == pytest.approx(
        rnn.log_prob(waves(400)).mean().item(), abs=0.5
    )


def test_seeds_decide():
    def fit(seed):
        density = RecurrentMixture(1, 2, n_units=4, max_iter=20, n_chunks=10)
        return density.fit(waves(100), generator=seeded(seed), valid=waves(30))

    one, same, other = fit(0), fit(0), fit(1)
    h = waves(20)
    assert torch.equal(one.log_prob(h), same.log_prob(h))
    assert not torch.equal(one.log_prob(h), other.log_prob(h))
    assert torch.equal(one.sample(9, seeded(3)), same.sample(9, seeded(3)))
    assert not torch.equal(one.sample(9, seeded(3)), one.sample(9, seeded(4)))
    points, component = one.sample_components(9, seeded(3))
    assert torch.equal(points, one.sample(9, seeded(3)))
    assert set(component.tolist()) <= {0, 1}


def test_dimensions_without_spread_and_threads_are_left_alone():
    h = torch.cat([waves(60), torch.full((60, 1), 2.0)], dim=1)
    n_threads = torch.get_num_threads()
    density = RecurrentMixture(2, 2, n_units=4, max_iter=20).fit(h, generator=seeded())
    assert density.log_prob(h).isfinite().all()
    assert torch.get_num_threads() == n_threads


def test_stretches_are_inside_their_recordings():
    lengths = [3, 50, 1]
    stretches = Stretches(lengths, 10, seeded(), torch.device("cpu"))
    rows, inside = stretches.draw(200)
    assert rows.shape == inside.shape == (200, 10)
    recording = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    for row, valid in zip(rows, inside, strict=True):
        found = row[valid]
        assert len(set(recording[found].tolist())) == 1
        assert torch.equal(found.diff(), torch.ones(len(found) - 1, dtype=torch.long))
        assert len(found) == min(10, lengths[recording[found[0]]])
    assert set(rows[inside].tolist()) == set(range(54))


def test_the_autoencoder_learns():
    time = torch.arange(800) / 8000
    frequency = torch.linspace(200, 600, 300)[:, None]
    x = torch.sin(2 * torch.pi * frequency * time) * torch.hann_window(800)
    splits = make_splits(CHUNKS, 40)
    splits.train = Examples(x, lengths=(300,))
    model = fitted(IMLGMM, splits, **{**QUICK, "epochs": 5, "latent_dim": 16}, n_components=1)
    error = (model.decode(model.encode(x)) - x).square().sum() / x.square().sum()
    assert error < 0.6
