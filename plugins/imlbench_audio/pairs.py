"""Kernel density estimates on pairs of successive chunks: what samples know of time.

Held-out recordings are whole; a model's samples are one sequence for every draw. Generated pairs
may reach from one recording into the next; pairs of the test split never do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from imlbench import Evaluation, Examples, Kind, Metric, Params, Score
from imlbench.densities import kde_log_prob
from imlbench_audio.framing import lengths_of, recordings_of
from imlbench_audio.spectra import power

BAND_EDGES = (10, 13, 16, 20, 25, 32, 40, 50, 63, 80, 100, 126, 158, 200, 252, 317, 401)
"""Bins of 10 Hz where bands begin: 16 bands of a third of an octave, from 100 Hz to 4 kHz."""


class PairKDEParams(Params):
    """Parameters of ``kde_pairs``."""

    log10_h_min: float = Field(-1.5, ge=-10, le=10)
    """Decimal logarithm of the least standard deviation that is tried, in units of the features."""
    log10_h_max: float = Field(0.7, ge=-10, le=10)
    """Decimal logarithm of the greatest."""
    n_h: int = Field(41, ge=2)
    """How many are tried, in equal ratios."""

    @model_validator(mode="after")
    def _is_a_range(self) -> PairKDEParams:
        if self.log10_h_min >= self.log10_h_max:
            raise ValueError(f"log10_h_min must be less than log10_h_max; got {self.log10_h_min}")
        return self


class WaveformPairKDEParams(PairKDEParams):
    """Parameters of ``kde_pairs_waveform``."""

    log10_h_min: float = Field(-1.3, ge=-10, le=10)
    """Decimal logarithm of the least standard deviation that is tried, in units of the data."""
    log10_h_max: float = Field(0.3, ge=-10, le=10)
    """Decimal logarithm of the greatest."""


P = TypeVar("P", bound=PairKDEParams)


class _PairKDE(Metric[P]):
    """Kernel density estimate on pairs of successive chunks, h chosen on the validation split."""

    unit = "nats"
    higher_is_better = True
    needs_samples = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    @staticmethod
    @abstractmethod
    def features(chunks: Tensor) -> Tensor:
        """Return what is compared of chunks (N, 800), shape (N, D)."""

    def compute(self, evaluation: Evaluation) -> Score:
        """Choose the bandwidth, then compute the mean log-density of pairs of the test set."""
        p, device, splits = self.params, evaluation.device, evaluation.splits
        valid, test = (
            self._pairs(recordings_of(split), device) for split in (splits.valid, splits.test)
        )
        draws = [self._pairs([draw], device) for draw in evaluation.samples]
        grid = torch.logspace(p.log10_h_min, p.log10_h_max, p.n_h).tolist()
        tried = kde_log_prob(valid, draws[0], grid).log_density.mean(dim=1)
        h = grid[int(tried.argmax())]
        values = torch.stack([kde_log_prob(test, pairs, [h]).log_density[0] for pairs in draws])
        return Score.mean(
            values.mean(dim=0),
            _groups_of_pairs(splits.test),
            h=float(f"{h:.4g}"),
            M=len(draws[0]),
            draws=len(draws),
        )

    def _pairs(self, sequences: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return every chunk's features beside its successor's, within sequences, (M, 2 D)."""
        found = [self.features(chunks.to(device)) for chunks in sequences if len(chunks) > 1]
        return torch.cat([torch.cat([f[:-1], f[1:]], dim=1) for f in found])


def _groups_of_pairs(split: Examples) -> Tensor | None:
    """Return the group of every pair's first chunk, if the split has groups."""
    if split.groups is None:
        return None
    return torch.cat([groups[:-1] for groups in split.groups.split(list(lengths_of(split)))])


class WaveformPairKDE(_PairKDE[WaveformPairKDEParams]):
    """Kernel density estimate on the waveforms of pairs of successive chunks.

    h is the best on validation data. Waveforms of equal sounds are far apart when their phases
    differ, and a thousand samples are too few for all phases: on spoken digits real recordings
    score no more in order than with their chunks shuffled (``reference-recordings`` and
    ``reference-train``), and more at half their loudness. ``kde_pairs`` has neither fault.
    """

    name = "kde_pairs_waveform"
    position = 42

    @staticmethod
    def features(chunks: Tensor) -> Tensor:
        """Return the waveforms."""
        return chunks


class PairKDE(_PairKDE[PairKDEParams]):
    """Kernel density estimate on the spectra of pairs of successive chunks.

    A density of the decimal logarithms of mean powers in 16 bands, thirds of octaves from 100 Hz,
    of both chunks; h is the best on validation data. Blind to phase, it sees what time is made of.
    """

    name = "kde_pairs"
    position = 1

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
