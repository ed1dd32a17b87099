"""Metrics against scipy in float64, and against what was measured on the real data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from imlbench import Evaluation, Examples, Score, Sources, Splits
from imlbench_images.digits import Digits
from imlbench_images.mnist import MNIST
from imlbench_metrics.kde import KDE, PaperKDE, TunedKDE


def brute_force_kde(x: torch.Tensor, samples: torch.Tensor, h: float) -> np.ndarray:
    """Mean over samples of a Gaussian kernel, in float64, over all pairs."""
    x, samples = x.flatten(1).double().numpy(), samples.flatten(1).double().numpy()
    exponent = -cdist(x, samples, "sqeuclidean") / (2 * h**2)
    constant = x.shape[1] / 2 * math.log(2 * math.pi * h**2) + math.log(len(samples))
    return logsumexp(exponent, axis=1) - constant


def evaluation_of(dataset, splits: Splits, samples: torch.Tensor, model=None) -> Evaluation:
    return Evaluation(dataset, splits, samples, model, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits() -> Evaluation:
    dataset = Digits(Digits.Params())
    splits = dataset.load(Sources())
    samples = torch.rand(3, 100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return evaluation_of(dataset, splits, samples)


def test_kde_is_the_mean_over_draws_of_scipys(digits):
    truth = np.mean([brute_force_kde(digits.splits.test[:], s, 0.2) for s in digits.samples], 0)
    score = KDE().compute(digits)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=0, atol=1e-4)
    assert score.value == pytest.approx(truth.mean(), abs=1e-4)
    assert score.stderr == pytest.approx(truth.std(ddof=1) / math.sqrt(len(truth)), abs=1e-4)
    assert score.settings == {"h": 0.2, "M": 100, "draws": 3}


def test_kde_paper_leaves_out_the_number_of_samples(digits):
    difference = PaperKDE().compute(digits).per_example - KDE().compute(digits).per_example
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(100)))


def test_tuned_kde_takes_the_bandwidth_that_is_best_on_validation_data(digits):
    score = TunedKDE().compute(digits)
    h = score.settings["h"]
    valid = digits.splits.valid[:]
    best = brute_force_kde(valid, digits.samples[0], h).mean()
    for other in (0.85 * h, 1.15 * h):
        assert brute_force_kde(valid, digits.samples[0], other).mean() < best
    assert score.value > KDE().compute(digits).value


def test_mean_has_the_standard_error_of_the_mean():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    score = Score.mean(values)
    assert (score.value, score.stderr) == (4.0, pytest.approx(values.std().item() / 2))


def test_a_thousand_training_images_score_as_was_measured(data_dir):
    """128 +- 2 on Table 1's scale, for the thousand that seed 0 chooses from all 60,000.

    The choice matters: twelve of them gave 129.2 on average, with a spread of 1.7 (float64).
    """
    dataset = MNIST(MNIST.Params())
    splits = dataset.load(Sources(data_dir, offline=True))
    stored = np.fromfile(data_dir / "MNIST/raw/train-images-idx3-ubyte", np.uint8)[16:]
    images = torch.from_numpy(stored.astype(np.float32) / 255).reshape(60_000, 1, 28, 28)
    chosen = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:1000]
    samples = images[chosen][None]
    evaluation = evaluation_of(dataset, splits, samples)
    normalised = KDE().compute(evaluation).value
    assert normalised == pytest.approx(121.1, abs=2)
    assert normalised + math.log(1000) == pytest.approx(128, abs=2)
    truth = brute_force_kde(splits.test[:500], samples[0], 0.2)
    one = evaluation_of(dataset, splits, samples[:1])
    found = KDE().compute(one).per_example[:500].numpy()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4)


def test_a_sample_on_a_test_point_counts_its_full_height():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    dataset = Digits(Digits.Params())
    splits = Splits(Examples(x), Examples(x), Examples(x))
    score = KDE().compute(evaluation_of(dataset, splits, x[None]))
    truth = brute_force_kde(x, x, 0.2)
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=0, atol=1e-4)
