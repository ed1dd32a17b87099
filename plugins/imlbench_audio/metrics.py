r"""Metrics of sequences: what modelling time buys, and how near the sound comes.

Held-out recordings are whole; a model's samples are one sequence for every draw. Successive chunks
are much alike: standard errors take stretches of 2 s of a recording as independent, not chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from imlbench import Evaluation, Examples, Kind, Metric, Score
from imlbench.densities import kde_log_prob
from imlbench_audio.framing import HOP, RATE, frame, overlap_add

STRETCH = 2 * RATE // HOP
"""Chunks that hang together, for standard errors: 2 s."""

BAND_EDGES = (10, 13, 16, 20, 25, 32, 40, 50, 63, 80, 100, 126, 158, 200, 252, 317, 401)
"""Bins of 10 Hz where bands begin: 16 bands of a third of an octave, from 100 Hz to 4 kHz."""

FLOOR = 1e-6
"""Power, relative to the greatest, below which spectra count as equal: -60 dB."""


def recordings(split: Examples) -> list[Tensor]:
    """Return the chunks of every recording, each of shape (n_chunks, 800)."""
    return list(split[:].split(list(lengths_of(split))))


def lengths_of(split: Examples) -> tuple[int, ...]:
    """Return the number of chunks of each recording."""
    return split.lengths or (len(split),)


def mean_of_chunks(values: Tensor, lengths: Sequence[int], **settings: float | int | str) -> Score:
    r"""Return the mean of values per chunk, with a standard error that allows for dependence.

    .. math:: \frac 1 N \sqrt{\frac{G}{G - 1} \sum_{g=1}^G
        \Bigl(\sum_{t \in g} (v_t - \bar v) \Bigr)^2}

    with G stretches g of at most 2 s, none in two recordings.

    Arguments:
        values: One value per chunk, shape (N,).
        lengths: Number of values of each recording.
        settings: What the value depends on.
    """
    values = values.detach().to("cpu", torch.float64)
    parts = [part for recording in values.split(list(lengths)) for part in recording.split(STRETCH)]
    sums = torch.stack([(part - values.mean()).sum() for part in parts])
    correction = len(parts) / max(len(parts) - 1, 1)
    stderr = (sums.square().sum() * correction).sqrt().item() / len(values)
    return Score(values.mean().item(), stderr if len(parts) > 1 else None, values, settings)


class SequenceLogLikelihood(Metric):
    r"""Log-likelihood of held-out latents, of every chunk given those before it in its recording.

    :math:`\log p_0(h_t \mid h_1, \dots, h_{t-1})`; models that take chunks as exchangeable have
    :math:`\log p_0(h_t)`. Without any volume: comparable between models that share an auto-encoder.
    """

    name = "sequence_log_likelihood"
    unit = "nats"
    higher_is_better = True
    requires = frozenset({"base_log_prob_sequence"})
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean over the chunks of the test set."""
        test = evaluation.splits.test
        order = torch.arange(len(test))
        return mean_of_chunks(in_order(evaluation, order), lengths_of(test))


class ShuffledLogLikelihood(Metric):
    """The same as ``sequence_log_likelihood`` with the chunks of each recording in random order.

    What it lacks of that is what the model knows about time; nothing, if chunks are exchangeable.
    """

    name = "sequence_log_likelihood_shuffled"
    unit = "nats"
    higher_is_better = None
    requires = frozenset({"base_log_prob_sequence"})
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean over the chunks of the test set; values are in the original order."""
        lengths = lengths_of(evaluation.splits.test)
        order = shuffled(lengths, torch.Generator().manual_seed(0))
        values = in_order(evaluation, order)
        return mean_of_chunks(torch.empty_like(values).scatter(0, order, values), lengths)


def shuffled(lengths: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a permutation of all chunks that leaves each in its recording, shape (N,)."""
    parts, first = [], 0
    for length in lengths:
        parts.append(first + torch.randperm(length, generator=generator))
        first += length
    return torch.cat(parts)


def in_order(evaluation: Evaluation, order: Tensor) -> Tensor:
    """Return the conditional log-densities of the test chunks when they come in ``order``, (N,)."""
    model: Any = evaluation.model
    test = evaluation.splits.test
    values: Tensor = model.base_log_prob_sequence(
        test[order].to(evaluation.device), lengths_of(test)
    )
    return values.double().cpu()


class _PairKDE(Metric):
    """Kernel density estimate on pairs of successive chunks, h chosen on the validation split.

    Generated pairs may reach from one recording into the next; pairs of the test split never do.
    """

    unit = "nats"
    higher_is_better = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})
    bandwidths: ClassVar[tuple[float, float]]

    @staticmethod
    def features(chunks: Tensor) -> Tensor:
        """Return what is compared of chunks (N, 800), shape (N, D)."""
        return chunks

    def compute(self, evaluation: Evaluation) -> Score:
        """Choose the bandwidth, then compute the mean log-density of pairs of the test set."""
        device, splits = evaluation.device, evaluation.splits
        valid, test = (
            self._pairs(recordings(split), device) for split in (splits.valid, splits.test)
        )
        draws = [self._pairs([draw], device) for draw in evaluation.samples]
        grid = torch.logspace(*self.bandwidths, 41).tolist()
        tried = kde_log_prob(valid, draws[0], grid).log_density.mean(dim=1)
        h = grid[int(tried.argmax())]
        values = torch.stack([kde_log_prob(test, pairs, [h]).log_density[0] for pairs in draws])
        lengths = [n - 1 for n in lengths_of(splits.test) if n > 1]
        settings = {"h": float(f"{h:.4g}"), "M": len(draws[0]), "draws": len(draws)}
        return mean_of_chunks(values.mean(dim=0), lengths, **settings)

    def _pairs(self, sequences: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return every chunk's features beside its successor's, within sequences, (M, 2 D)."""
        found = [self.features(chunks.to(device)) for chunks in sequences if len(chunks) > 1]
        return torch.cat([torch.cat([f[:-1], f[1:]], dim=1) for f in found])


class WaveformPairKDE(_PairKDE):
    """Kernel density estimate on the waveforms of pairs of successive chunks.

    h is the best on validation data. Waveforms of equal sounds are far apart when their phases
    differ, and a thousand samples are too few for all phases: on spoken digits real recordings
    score no more in order than with their chunks shuffled (``reference-recordings`` and
    ``reference-train``), and more at half their loudness. ``kde_pairs`` has neither fault.
    """

    name = "kde_pairs_waveform"
    bandwidths = (-1.3, 0.3)


class PairKDE(_PairKDE):
    """Kernel density estimate on the spectra of pairs of successive chunks.

    A density of the decimal logarithms of mean powers in 16 bands, thirds of octaves from 100 Hz,
    of both chunks; h is the best on validation data. Blind to phase, it sees what time is made of.
    """

    name = "kde_pairs"
    bandwidths = (-1.5, 0.7)

    @staticmethod
    def features(chunks: Tensor) -> Tensor:
        """Return log10 of the mean power in every band, shape (N, 16).

        The constant, 45 dB below the power of white noise as loud as the recordings, makes all
        silence alike.
        """
        bands = power(chunks).split_with_sizes(
            [BAND_EDGES[0], *torch.tensor(BAND_EDGES).diff().tolist()], dim=1
        )
        return (torch.stack([band.mean(dim=1) for band in bands[1:]], dim=1) + 1e-2).log10()


def power(chunks: Tensor) -> Tensor:
    """Return the power spectra of windowed chunks (N, 800) in bins of 10 Hz, shape (N, 401)."""
    return torch.fft.rfft(chunks).abs().square()


class ReconstructionSNR(Metric):
    r"""Signal-to-noise ratio of reconstructed test recordings, after overlap-add.

    :math:`10 \log_{10} \bigl( \sum x^2 / \sum (\hat x - x)^2 \bigr)`, sums over all recordings.
    """

    name = "reconstruction_snr"
    unit = "dB"
    higher_is_better = True
    requires = frozenset({"encode", "decode"})
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the ratio over the test set."""
        model: Any = evaluation.model
        signal = noise = 0.0
        for chunks in recordings(evaluation.splits.test):
            again = model.decode(model.encode(chunks.to(evaluation.device))).cpu()
            x = overlap_add(chunks).double()
            signal += x.square().sum().item()
            noise += (overlap_add(again).double() - x).square().sum().item()
        return Score(10 * torch.tensor(signal / max(noise, 1e-300)).log10().item())


class LogSpectralDistance(Metric):
    r"""Distance between the average spectra of generated and of held-out real audio.

    .. math:: \sqrt{\frac1F \sum_f \Bigl( 10 \log_{10} \frac{P_{gen}(f) + \epsilon}
        {P_{real}(f) + \epsilon} \Bigr)^2}

    with power averaged over Hann-windowed frames of 100 ms of the overlap-added audio, in bins of
    10 Hz; :math:`\epsilon` is 60 dB below the greatest real power. Mean over draws.
    """

    name = "log_spectral_distance"
    unit = "dB"
    higher_is_better = False
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean distance over the draws."""
        real = average_spectrum(recordings(evaluation.splits.test))
        floor = FLOOR * real.max()
        generated = torch.stack([average_spectrum([draw]) for draw in evaluation.samples])
        decibels = 10 * ((generated + floor) / (real + floor)).log10()
        distances = decibels.square().mean(dim=1).sqrt()
        n = len(distances)
        stderr = (distances.std() / n**0.5).item() if n > 1 else None
        return Score(distances.mean().item(), stderr, None, {"draws": n, "floor_db": -60})


def average_spectrum(sequences: Sequence[Tensor]) -> Tensor:
    """Return the mean power spectrum of the audio that the chunks make, float64, shape (401,)."""
    spectra = [power(frame(overlap_add(chunks))).double() for chunks in sequences]
    return torch.cat(spectra).mean(dim=0)
