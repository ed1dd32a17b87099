"""Reading audio files: decoded, mixed down, resampled, scaled; refused if something is wrong."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from imlbench import DataError
from imlbench_audio.framing import RATE

SILENCE = 1e-4
"""Standard deviation below which a recording is silent, of full scale: -80 dB."""

BLOCK_SIZE = 2**16
"""Samples that are decoded at a time."""


def read_recording(path: Path, dataset: str, min_seconds: float) -> Tensor:
    """Read a recording of any format that libsndfile knows: WAV, AIFF, FLAC, Ogg, Opus, MP3.

    Channels are averaged, the sampling rate becomes 8 kHz, and the whole is divided by its
    standard deviation.

    Damage is recognised where the format lets one see it: a file that stops short of what its
    header announces, or that does not decode to its end. Changed samples inside an uncompressed
    file cannot be seen, nor that the end is missing from an MP3 without a length in its header.
    Of such an MP3 libsndfile guesses the length: if its bit rate varies, the end may be left out.

    Arguments:
        path: The file.
        dataset: Name of the dataset, for messages.
        min_seconds: A shorter recording is refused.

    Returns:
        float32 of shape (n_samples,), at 8 kHz, of standard deviation 1.

    Raises:
        DataError: The file is unreadable, not audio, damaged, too short, or silent.
    """
    samples, rate = _decode(path, dataset)
    where = f"dataset {dataset}: {path}"
    if len(samples) < min_seconds * rate:
        raise DataError(
            f"{where} must last at least {min_seconds:g} s; got {len(samples) / rate:.3g} s. "
            "Use a longer recording."
        )
    if not np.isfinite(samples).all():
        raise DataError(
            f"{where} must hold finite numbers; got NaN or infinite ones. Export it again."
        )
    signal = resample(samples, rate)
    std = signal.std()
    if std < SILENCE:
        raise DataError(
            f"{where} must hold sound below 4 kHz; got silence (standard deviation {std:.1g} of "
            "full scale). Use another recording, or take the file away."
        )
    return torch.from_numpy((signal / std).astype(np.float32))


def resample(samples: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    """Change the sampling rate to 8 kHz with a polyphase low-pass filter.

    Tones below 3.4 kHz keep their level within 0.1 dB; those above 5 kHz, which would be folded
    back, are suppressed by 55 dB or more. In between the filter falls, by 6 dB at 4 kHz.

    Arguments:
        samples: Shape (n_samples,).
        rate: Their number per second.
    """
    import scipy.signal

    common = math.gcd(RATE, rate)
    # Continued with their mean, so that a constant offset makes no clicks at the ends.
    resampled: NDArray[np.float64] = scipy.signal.resample_poly(
        samples, RATE // common, rate // common, padtype="mean"
    )
    return resampled


def _decode(path: Path, dataset: str) -> tuple[NDArray[np.float64], int]:
    """Return the mean of the channels, and the sampling rate."""
    where = f"dataset {dataset}: {path}"
    try:
        with path.open("rb") as content:
            cut = _is_cut(content)
    except OSError as error:
        raise DataError(
            f"{where} must be a readable file; got '{error.strerror}'. Mend it, or name another."
        ) from error
    try:
        with soundfile.SoundFile(path) as file:
            n_announced, rate = file.frames, file.samplerate
            samples = _read(file)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a file named *.raw
        raise DataError(
            f"{where} must be audio (WAV, AIFF, FLAC, Ogg, Opus or MP3); "
            "got something else, or too little of it. Use another file."
        ) from error
    if cut or len(samples) < n_announced:
        raise DataError(
            f"{where} must decode to its end; got damage, after {len(samples) / rate:.3g} s or "
            "earlier. Copy it again from the original, or encode it anew."
        )
    return samples, rate


def _read(file: soundfile.SoundFile) -> NDArray[np.float64]:
    """Return the mean of the channels, as far as the file can be decoded."""
    blocks: list[NDArray[np.float64]] = []
    # Little by little, as all channels may be much more than their mean; not by file.blocks(),
    # which goes on to the announced length with whatever is in memory.
    with contextlib.suppress(soundfile.SoundFileError):  # too few samples say it
        while not blocks or len(blocks[-1]) == BLOCK_SIZE:
            blocks.append(file.read(BLOCK_SIZE, always_2d=True).mean(axis=1))
    return np.concatenate([np.empty(0), *blocks])


def _is_cut(file: BinaryIO) -> bool:
    """Whether a file ends before its own marks say so; False for formats without such marks.

    FLAC and MP3 are left to the decoder, which knows how many samples there should be.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    if head[:4] in (b"RIFF", b"FORM"):
        announced = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big")
        return announced + 8 > size + 1 and announced != 0xFFFFFFFF  # which says "not known"
    if head[:4] == b"OggS":
        file.seek(max(0, size - 2**17))  # two pages of the largest size
        return not _ends_with_last_page(file.read())
    return False


def _ends_with_last_page(tail: bytes) -> bool:
    """Whether the last Ogg page is complete and marked as the last of its stream (RFC 3533)."""
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    n_segments = page[26]
    return len(page) >= 27 + n_segments + sum(page[27 : 27 + n_segments])
