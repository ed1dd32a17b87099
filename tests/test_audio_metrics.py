"""Metrics of sequences against scipy and numpy, and what a job on audio leaves behind."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from matplotlib.image import imread
from pydantic import ValidationError
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from imlbench import Evaluation, Examples, Params, Score, Splits
from imlbench.api.capabilities import members
from imlbench_audio import imlbench_metrics
from imlbench_audio.artifacts import Recordings, Spectrograms, States, spectrogram
from imlbench_audio.framing import chunked, frame, overlap_add, stretches
from imlbench_audio.likelihood import SequenceLogLikelihood, ShuffledLogLikelihood, shuffled
from imlbench_audio.pairs import (
    BAND_EDGES,
    PairKDE,
    PairKDEParams,
    WaveformPairKDE,
    WaveformPairKDEParams,
)
from imlbench_audio.signals import LogSpectralDistance, ReconstructionSNR
from imlbench_audio.violin import SynthViolin, SynthViolinParams


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alternating(n: int, seed: int, shuffle: bool = False) -> torch.Tensor:
    """Chunks of two tones in turn, with noise; or the same in random order."""
    time = torch.arange(800) / 8000
    tones = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (440, 1500)])
    chunks = tones[torch.arange(n) % 2] * torch.hann_window(800) + 0.05 * noise(n, 800, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return chunks[torch.randperm(n, generator=generator)] if shuffle else chunks


def evaluation(test: Examples, samples: torch.Tensor, model=None, valid=None) -> Evaluation:
    dataset = SynthViolin(SynthViolinParams())
    splits = Splits(test, valid or test, test)
    return Evaluation(
        dataset=dataset, splits=splits, draws=samples, model=model, device=torch.device("cpu")
    )


def pairs_of(features: np.ndarray, lengths) -> np.ndarray:
    found, first = [], 0
    for length in lengths:
        for t in range(first, first + length - 1):
            found.append(np.concatenate([features[t], features[t + 1]]))
        first += length
    return np.array(found)


def brute_force_kde(x: np.ndarray, samples: np.ndarray, h: float) -> np.ndarray:
    exponent = -cdist(x, samples, "sqeuclidean") / (2 * h**2)
    constant = x.shape[1] / 2 * math.log(2 * math.pi * h**2) + math.log(len(samples))
    return logsumexp(exponent, axis=1) - constant


def loudness(chunks: torch.Tensor) -> np.ndarray:
    spectrum = np.abs(np.fft.rfft(chunks.double().numpy())) ** 2
    bands = [spectrum[:, a:b].mean(1) for a, b in itertools.pairwise(BAND_EDGES)]
    return np.log10(np.stack(bands, axis=1) + 0.01)


WAVEFORM, BANDS = WaveformPairKDE(WaveformPairKDEParams()), PairKDE(PairKDEParams())


@pytest.mark.parametrize(
    ("metric", "features"),
    [(WAVEFORM, lambda x: x.double().numpy()), (BANDS, loudness)],
)
def test_pair_kde_is_scipys_on_pairs_within_recordings(metric, features):
    lengths = (5, 1, 14)
    test = Examples(noise(20, 800), lengths=lengths)
    samples = noise(2, 30, 800, seed=1)
    score = metric.compute(evaluation(test, samples))
    x = pairs_of(features(test[:]), lengths)
    draws = [pairs_of(features(draw), [30]) for draw in samples]
    truth = np.mean([brute_force_kde(x, d, score.settings["h"]) for d in draws], axis=0)
    # h is recorded with four digits.
    np.testing.assert_allclose(score.per_example.numpy(), truth, rtol=2e-3)
    assert len(truth) == 4 + 13
    assert score.value == pytest.approx(score.per_example.mean().item())
    best = brute_force_kde(x, draws[0], score.settings["h"]).mean()
    for factor in (0.85, 1.15):
        assert brute_force_kde(x, draws[0], factor * score.settings["h"]).mean() < best


@pytest.mark.parametrize("metric", [WAVEFORM, BANDS])
def test_pair_kde_prefers_a_model_of_time(metric):
    test = Examples(alternating(60, 0), lengths=(30, 30))
    in_time, without = (
        metric.compute(evaluation(test, alternating(100, 1, shuffle)[None])).value
        for shuffle in (False, True)
    )
    assert in_time > without + 0.5


def test_standard_error_takes_stretches_as_independent():
    lengths = (100, 30)
    steps = np.repeat(np.random.default_rng(0).standard_normal(13), 10)
    score = Score.mean(torch.from_numpy(steps), stretches(lengths))
    parts = np.split(steps, [40, 80, 100])
    sums = np.array([(part - steps.mean()).sum() for part in parts])
    assert score.value == pytest.approx(steps.mean())
    assert score.stderr == pytest.approx(math.sqrt(4 / 3 * (sums**2).sum()) / 130)
    assert Score.mean(torch.zeros(10), stretches((10,))).stderr is None


def test_standard_error_of_independent_single_chunks_is_the_usual_one():
    values = noise(500).double()
    score = Score.mean(values, stretches((1,) * 500))
    assert score.stderr == pytest.approx(values.std().item() / math.sqrt(500))


class _Differences:
    """A "density" of the chunk before, for a look at the order in which chunks come."""

    def base_log_prob_sequence(self, x, lengths):
        parts = [x[:, 0]] if lengths is None else x[:, 0].split(list(lengths))
        return torch.cat([-torch.diff(part, prepend=torch.zeros(1)).abs() for part in parts])


def test_sequence_log_likelihood_knows_order_and_recordings():
    lengths = (6, 1, 9)
    x = torch.zeros(16, 800)
    x[:, 0] = torch.arange(16.0)
    test = Examples(x, lengths=lengths)
    given = evaluation(test, x[None], _Differences())
    score = SequenceLogLikelihood(Params()).compute(given)
    np.testing.assert_allclose(score.per_example, -np.array([0, *[1] * 5, 6, 7, *[1] * 8]))
    order = shuffled(lengths, torch.Generator().manual_seed(0)).tolist()
    assert [sorted(order[a:b]) for a, b in ((0, 6), (6, 7), (7, 16))] == [
        list(range(6)),
        [6],
        list(range(7, 16)),
    ]
    again = ShuffledLogLikelihood(Params()).compute(given)
    before = {now: last for last, now in itertools.pairwise(order)}
    expected = [
        -abs(t - (0 if t in (order[0], order[6], order[7]) else before[t])) for t in range(16)
    ]
    np.testing.assert_allclose(again.per_example, expected)
    assert again.value < score.value


class _Coarse:
    """An auto-encoder that halves: its error is half of the signal, 6.02 dB below it."""

    name = "coarse"

    def encode(self, x):
        return x / 2

    def decode(self, h):
        return h

    def can(self, capability):
        return all(hasattr(self, name) for name in members(capability))


def test_reconstruction_snr_is_that_of_the_audio():
    test = chunked([noise(4000), noise(900, seed=1)])
    score = ReconstructionSNR(Params()).compute(evaluation(test, test[:][None], _Coarse()))
    assert score.value == pytest.approx(20 * math.log10(2))
    model = SimpleNamespace(encode=lambda x: x, decode=lambda h: h + 0.1 * noise(*h.shape, seed=2))
    one = chunked([noise(4000)])
    score = ReconstructionSNR(Params()).compute(evaluation(one, one[:][None], model))
    x, error = overlap_add(one[:]), overlap_add(0.1 * noise(len(one), 800, seed=2))
    assert score.value == pytest.approx(
        10 * np.log10(np.square(x.numpy()).sum() / np.square(error.numpy()).sum()), abs=1e-4
    )


def test_log_spectral_distance_is_that_of_scipys_spectra():
    real, generated = noise(8000), scipy.signal.lfilter([1, 0.9], [1], noise(8000, seed=1).numpy())
    samples = frame(torch.from_numpy(generated).float())
    score = LogSpectralDistance(Params()).compute(evaluation(chunked([real]), samples[None]))

    def spectrum(chunks):
        _, p = scipy.signal.welch(
            overlap_add(chunks).double().numpy(),
            window="hann",
            nperseg=800,
            noverlap=400,
            detrend=False,
            return_onesided=False,
        )
        return p[:401]

    a, b = spectrum(samples), spectrum(frame(real))
    floor = 1e-6 * b.max()
    truth = np.sqrt(np.mean((10 * np.log10((a + floor) / (b + floor))) ** 2))
    assert score.value == pytest.approx(truth, rel=1e-4)
    assert (
        LogSpectralDistance(Params()).compute(evaluation(chunked([real]), frame(real)[None])).value
        < 0.2
    )


def test_twice_as_loud_is_six_decibels_away():
    test = chunked([noise(8000)])
    score = LogSpectralDistance(Params()).compute(evaluation(test, 2 * test[:][None]))
    assert score.value == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_groups_of_the_test_split_enter_the_standard_error():
    """Pairs have the group of their first chunk, chunks their own: stretches of a recording."""
    test = chunked([noise(33_000), noise(20_000, seed=1)])  # 82 and 49 chunks
    given = evaluation(test, noise(1, 60, 800, seed=2), _Differences())
    for metric, n_less, cuts in (
        (BANDS, 1, [40, 80, 81, 121]),  # of 81 and 48 pairs
        (SequenceLogLikelihood(Params()), 0, [40, 80, 82, 122]),
    ):
        score = metric.compute(given)
        values = score.per_example.numpy()
        assert len(values) == 131 - 2 * n_less
        sums = [(part - values.mean()).sum() for part in np.split(values, cuts)]
        truth = math.sqrt(5 / 4 * np.square(sums).sum()) / len(values)
        assert score.stderr == pytest.approx(truth), metric.name


def test_metrics_look_at_samples_if_they_say_so():
    test = chunked([noise(4000)])
    given = evaluation(test, None, _Everything())
    for cls in imlbench_metrics():
        metric = cls(cls.params_type())
        if metric.needs_samples:
            with pytest.raises(RuntimeError, match="needs_samples"):
                metric.compute(given)
        else:
            metric.compute(given)


class _Everything(_Coarse, _Differences):
    pass


@pytest.mark.parametrize("params", [PairKDEParams, WaveformPairKDEParams])
def test_impossible_grids_are_refused(params):
    for wrong in ({"n_h": 1}, {"log10_h_min": 1.0}):
        with pytest.raises(ValidationError):
            params(**wrong)


class _WithStates(_Coarse):
    def sample_components(self, n, generator):
        return torch.randn(n, 800, generator=generator), torch.arange(n) // 10


def write(artifact, given: Evaluation, folder: Path) -> list[str]:
    """Write an artifact; return the names of its files."""
    artifact(Params()).write(given, folder)
    return sorted(path.name for path in folder.iterdir())


def test_recordings_can_be_heard(tmp_path):
    test = chunked([noise(50_000), noise(50_000, seed=1)])
    given = evaluation(test, 30 * noise(1, 250, 800, seed=2), _Coarse())
    names = ["generated.wav", "real.wav", "reconstructed.wav"]
    assert write(Recordings, given, tmp_path) == names
    for name in names:
        signal, rate = soundfile.read(tmp_path / name)
        assert (rate, signal.shape) == (8000, (80_000,))
        assert 0.4 < np.abs(signal).max() <= 0.9001
    real = soundfile.read(tmp_path / "real.wav")[0]
    expected = overlap_add(frame(noise(50_000))).numpy()
    np.testing.assert_allclose(
        real[:50_000], expected[:50_000] * real[500] / expected[500], atol=2e-3
    )
    half = soundfile.read(tmp_path / "reconstructed.wav")[0]
    np.testing.assert_allclose(half, real / 2, atol=1e-4)  # one gain for both


@pytest.mark.parametrize("artifact", [Spectrograms, States])
def test_audio_can_be_seen(tmp_path, artifact):
    test = chunked([noise(50_000), noise(50_000, seed=1)])
    given = evaluation(test, 30 * noise(1, 250, 800, seed=2), _WithStates())
    assert all(given.model.can(capability) for capability in artifact.requires)
    assert write(artifact, given, tmp_path) == [f"{artifact.name}.png"]
    pixels = imread(tmp_path / f"{artifact.name}.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.1  # something is drawn


def test_the_spectrogram_of_a_tone_has_its_power_at_its_frequency():
    time = torch.arange(16_000, dtype=torch.float64) / 8000
    decibels = spectrogram(torch.sin(2 * math.pi * 1000 * time))
    assert (decibels.argmax(axis=0) == 1000 * 256 // 8000).all()
    assert decibels.shape == (129, 1 + (16_000 - 256) // 64)


def test_silence_can_be_written_too(tmp_path):
    test = chunked([noise(4000)])
    model = SimpleNamespace(name="x", can=lambda capability: False)
    given = evaluation(test, torch.zeros(1, 20, 800), model)
    assert write(Recordings, given, tmp_path) == ["generated.wav", "real.wav"]
    assert not soundfile.read(tmp_path / "generated.wav")[0].any()
    assert write(Spectrograms, given, tmp_path)[-1] == "spectrograms.png"
