"""Power spectra of chunks and of the audio that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imlbench_audio.framing import frame, overlap_add


def power(chunks: Tensor) -> Tensor:
    """Return the power spectra of windowed chunks (N, 800) in bins of 10 Hz, shape (N, 401)."""
    spectrum: Tensor = torch.fft.rfft(chunks)
    return spectrum.abs().square()


def average_spectrum(sequences: Sequence[Tensor]) -> Tensor:
    """Return the mean power spectrum of the audio that the chunks make, float64, shape (401,)."""
    spectra = [power(frame(overlap_add(chunks))).double() for chunks in sequences]
    return torch.cat(spectra).mean(dim=0)
