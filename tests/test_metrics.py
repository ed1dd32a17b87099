"""Metrics against scipy in float64, and against what was measured on the real data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from imlbench import Evaluation, Examples, Params, Score, Sources, Splits
from imlbench_images.digits import Digits, DigitsParams
from imlbench_images.mnist import MNIST, MNISTParams
from imlbench_metrics import imlbench_metrics
from imlbench_metrics.components import ComponentsInUse
from imlbench_metrics.kde import KDE, KDEParams, PaperKDE, TunedKDE, TunedKDEParams
from imlbench_metrics.likelihood import (
    BaseLogLikelihood,
    LayerwiseLogLikelihood,
    LogLikelihood,
    ManifoldLogLikelihood,
)
from imlbench_metrics.reconstruction import ReconstructionError


def brute_force_kde(x: torch.Tensor, samples: torch.Tensor, h: float) -> np.ndarray:
    """Mean over samples of a Gaussian kernel, in float64, over all pairs."""
    x, samples = x.flatten(1).double().numpy(), samples.flatten(1).double().numpy()
    exponent = -cdist(x, samples, "sqeuclidean") / (2 * h**2)
    constant = x.shape[1] / 2 * math.log(2 * math.pi * h**2) + math.log(len(samples))
    return logsumexp(exponent, axis=1) - constant


def evaluation_of(dataset, splits: Splits, samples: torch.Tensor, model=None) -> Evaluation:
    return Evaluation(
        dataset=dataset, splits=splits, draws=samples, model=model, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def digits() -> Evaluation:
    dataset = Digits(DigitsParams())
    splits = dataset.load(Sources())
    samples = torch.rand(3, 100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return evaluation_of(dataset, splits, samples)


def test_kde_is_the_mean_over_draws_of_scipys(digits):
    truth = np.mean([brute_force_kde(digits.splits.test[:], s, 0.2) for s in digits.samples], 0)
    score = KDE(KDEParams()).compute(digits)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=0, atol=1e-4)
    assert score.value == pytest.approx(truth.mean(), abs=1e-4)
    assert score.stderr == pytest.approx(truth.std(ddof=1) / math.sqrt(len(truth)), abs=1e-4)
    assert score.settings == {"h": 0.2, "M": 100, "draws": 3}


def test_kde_paper_leaves_out_the_number_of_samples(digits):
    difference = (
        PaperKDE(KDEParams()).compute(digits).per_example
        - KDE(KDEParams()).compute(digits).per_example
    )
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(100)))


def test_tuned_kde_takes_the_bandwidth_that_is_best_on_validation_data(digits):
    score = TunedKDE(TunedKDEParams()).compute(digits)
    h = score.settings["h"]
    valid = digits.splits.valid[:]
    best = brute_force_kde(valid, digits.samples[0], h).mean()
    for other in (0.85 * h, 1.15 * h):
        assert brute_force_kde(valid, digits.samples[0], other).mean() < best
    assert score.value > KDE(KDEParams()).compute(digits).value


@pytest.mark.parametrize("h", [0.1, 0.5])
def test_the_bandwidth_is_a_parameter(digits, h):
    truth = np.mean([brute_force_kde(digits.splits.test[:], s, h) for s in digits.samples], 0)
    score = KDE(KDEParams(h=h)).compute(digits)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=0, atol=1e-4 * 0.2 / h)
    paper = PaperKDE(KDEParams(h=h)).compute(digits)
    assert paper.value == pytest.approx(score.value + math.log(100))
    assert paper.settings == score.settings == {"h": h, "M": 100, "draws": 3}


def test_the_grid_of_bandwidths_is_a_parameter(digits):
    params = TunedKDEParams(log10_h_min=-1.0, log10_h_max=-0.5, n_h=2)
    valid = digits.splits.valid[:]
    tried = [brute_force_kde(valid, digits.samples[0], h).mean() for h in (0.1, 10**-0.5)]
    assert tried[0] < tried[1]
    assert TunedKDE(params).compute(digits).settings["h"] == pytest.approx(10**-0.5, rel=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        lambda: KDEParams(h=0),
        lambda: TunedKDEParams(n_h=1),
        lambda: TunedKDEParams(log10_h_min=0.5),
    ],
)
def test_impossible_bandwidths_are_refused(params):
    with pytest.raises(ValidationError):
        params()


class _Model:
    """Densities and latents with closed forms, of images of 64 pixels."""

    def encode(self, x):
        return x.flatten(1)[:, ::2]

    def decode(self, h):
        return h.repeat_interleave(2, dim=1).unflatten(1, (1, 8, 8))

    def log_prob(self, x):
        return -x.flatten(1).square().sum(1) / 2 - 32 * math.log(2 * math.pi)

    def log_prob_manifold(self, x):
        return 2 * self.log_prob(x)

    def log_prob_layerwise(self, x):
        return 3 * self.log_prob(x)

    def base_log_prob(self, x):
        return 4 * self.log_prob(x)

    def effective_components(self):
        return 2.5


@pytest.mark.parametrize(
    ("metric", "factor"),
    [
        (LogLikelihood, 1),
        (ManifoldLogLikelihood, 2),
        (LayerwiseLogLikelihood, 3),
        (BaseLogLikelihood, 4),
    ],
)
def test_log_likelihoods_are_means_of_the_models_own_densities(digits, metric, factor):
    x = digits.splits.test[:].flatten(1).double().numpy()
    truth = factor * scipy.stats.norm.logpdf(x).sum(axis=1)
    given = evaluation_of(digits.dataset, digits.splits, None, _Model())
    score = metric(Params()).compute(given)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=1e-5)  # float32
    assert score.stderr == pytest.approx(scipy.stats.sem(truth), rel=1e-4)


def test_the_reconstruction_error_is_summed_over_pixels(digits):
    x = digits.splits.test[:].flatten(1).numpy().astype(float)
    truth = np.square(x - x[:, ::2].repeat(2, axis=1)).sum(axis=1)
    given = evaluation_of(digits.dataset, digits.splits, None, _Model())
    score = ReconstructionError(Params()).compute(given)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=1e-5)  # float32


def test_the_components_in_use_are_the_models_own_number(digits):
    given = evaluation_of(digits.dataset, digits.splits, None, _Model())
    assert ComponentsInUse(Params()).compute(given).value == 2.5


def test_groups_of_the_test_split_enter_the_standard_error(digits):
    """Every example twice: the standard error is that of the single ones."""
    once, model = digits.splits.test, _Model()
    groups = torch.arange(len(once)).repeat_interleave(2)
    twice = Examples(once.stored[groups], scale=once.scale, groups=groups)
    samples = digits.samples
    metrics = [cls(cls.params_type()) for cls in imlbench_metrics() if not cls.requires_of_dataset]
    assert len(metrics) == 9
    for metric in metrics:
        scores = [
            metric.compute(
                evaluation_of(
                    digits.dataset, Splits(once, digits.splits.valid, test, "x"), samples, model
                )
            )
            for test in (once, twice)
        ]
        assert scores[0].value == pytest.approx(scores[1].value)
        assert scores[0].stderr == pytest.approx(scores[1].stderr), metric.name


def test_metrics_look_at_samples_if_they_say_so(digits):
    given = evaluation_of(digits.dataset, digits.splits, None, _Model())
    for cls in imlbench_metrics():
        if not cls.requires_of_dataset:
            metric = cls(cls.params_type())
            if metric.needs_samples:
                with pytest.raises(RuntimeError, match="needs_samples"):
                    metric.compute(given)
            else:
                metric.compute(given)


def test_mean_has_the_standard_error_of_the_mean():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    score = Score.mean(values)
    assert (score.value, score.stderr) == (4.0, pytest.approx(values.std().item() / 2))


def test_a_thousand_training_images_score_as_was_measured(data_dir):
    """128 +- 2 on Table 1's scale, for the thousand that seed 0 chooses from all 60,000.

    The choice matters: twelve of them gave 129.2 on average, with a spread of 1.7 (float64).
    """
    dataset = MNIST(MNISTParams())
    splits = dataset.load(Sources(data_dir, offline=True))
    stored = np.fromfile(data_dir / "MNIST/raw/train-images-idx3-ubyte", np.uint8)[16:]
    images = torch.from_numpy(stored.astype(np.float32) / 255).reshape(60_000, 1, 28, 28)
    chosen = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:1000]
    samples = images[chosen][None]
    evaluation = evaluation_of(dataset, splits, samples)
    normalised = KDE(KDEParams()).compute(evaluation).value
    assert normalised == pytest.approx(121.1, abs=2)
    assert normalised + math.log(1000) == pytest.approx(128, abs=2)
    truth = brute_force_kde(splits.test[:500], samples[0], 0.2)
    one = evaluation_of(dataset, splits, samples[:1])
    found = KDE(KDEParams()).compute(one).per_example[:500].numpy()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4)


def test_a_sample_on_a_test_point_counts_its_full_height():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    dataset = Digits(DigitsParams())
    splits = Splits(Examples(x), Examples(x), Examples(x))
    score = KDE(KDEParams()).compute(evaluation_of(dataset, splits, x[None]))
    truth = brute_force_kde(x, x, 0.2)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=0, atol=1e-4)
