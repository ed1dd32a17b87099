"""One long recording, cut in time: a violin's, anything else's, or a synthetic one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from imlbench import DataError, Params, Sources, Splits
from imlbench_audio.audio import AudioDataset
from imlbench_audio.framing import HOP, chunked
from imlbench_audio.recordings import read_recording

SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")


class ViolinParams(Params):
    """Parameters of ``violin``."""

    path: str | None = Field(None, min_length=1)
    """The audio file: WAV, AIFF, FLAC, Ogg, Opus or MP3, of any instrument."""


class Violin(AudioDataset[ViolinParams]):
    """A recording of at least 10 s, at 8 kHz, in Hann-windowed chunks of 100 ms.

    By default the alphabetically first audio file in the folder ``violin``. The recording is mixed
    down, resampled to 8 kHz and divided by its standard deviation. The first eight tenths are for
    training, the next is for validation and the last for testing; no sample is in two of them.
    """

    name = "violin"

    def load(self, sources: Sources) -> Splits:
        """Read the recording."""
        named = self.params.path
        path = Path(named).expanduser() if named else find_recording(sources)
        return split_in_time(read_recording(path, "violin", min_seconds=10), f"violin: {path}")


class SynthViolinParams(Params):
    """Parameters of ``synth-violin``."""

    seconds: int = Field(120, ge=10, le=600)
    """How long it lasts."""


class SynthViolin(AudioDataset[SynthViolinParams]):
    """A bowed-string étude computed by this program, at 8 kHz; not a recording of a violin.

    Scales and arpeggios played by a band-limited sawtooth with vibrato, bow noise, a resonant body
    and a room. It needs no files, so that everything that works on audio can be tried; what models
    make of it says little about real instruments. Split like ``violin``.
    """

    name = "synth-violin"

    def load(self, sources: Sources) -> Splits:
        """Compute the étude."""
        from imlbench_audio.etude import synthesize  # loads scipy

        signal = torch.from_numpy(synthesize(self.params.seconds, np.random.default_rng(0)))
        scaled = (signal / signal.std(correction=0)).to(torch.float32)
        return split_in_time(scaled, "synth-violin")


def find_recording(sources: Sources) -> Path:
    """Return the first audio file in the folder ``violin``.

    Raises:
        DataError: There is no such folder, or no audio file in it.
    """
    remedy = (
        "There is nothing to download: put a recording of at least 10 s there, or name one by "
        "violin.path. The dataset synth-violin needs no file."
    )
    folder = sources.find("violin")
    if folder is None:
        raise sources.missing("violin", "violin", remedy)
    found = sorted(
        path
        for path in folder.glob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise DataError(
            f"dataset violin: {folder} must hold an audio file ({', '.join(SUFFIXES)}); got none. "
            f"{remedy}"
        )
    return found[0]


def split_in_time(signal: Tensor, where: str) -> Splits:
    """Cut a signal into eight tenths, a tenth and a tenth, at whole hops.

    Arguments:
        signal: Shape (n_samples,), at 8 kHz, of standard deviation 1.
        where: Beginning of the message: the dataset, and the file if there is one.

    Raises:
        DataError: One of the parts is silent.
    """
    cuts = [len(signal) * tenths // 10 // HOP * HOP for tenths in (8, 9)]
    parts = signal.tensor_split(cuts)
    silent = [
        split
        for split, part in zip(("train", "valid", "test"), parts, strict=True)
        if part.std() < 1e-3
    ]
    if silent:
        raise DataError(
            f"dataset {where} must hold sound in its first eight tenths, the ninth and the last "
            f"(train, valid, test); got silence in {', '.join(silent)}. Cut silence off its ends."
        )
    train, valid, test = (chunked([part]) for part in parts)
    return Splits(train, valid, test)
