"""What a job on audio leaves to be heard and seen: recordings, spectrograms, states over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal
import soundfile
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from imlbench import Evaluation
from imlbench_audio.framing import HOP, RATE, overlap_add
from imlbench_audio.metrics import recordings

SECONDS = 10
"""Length of what is written and drawn."""

PEAK = 0.9
"""Greatest value in a WAV file, of full scale."""

RANGE = 70
"""Decibels of the colour scale, downwards from the loudest point of the real audio."""


def write_artifacts(evaluation: Evaluation, folder: Path) -> None:
    """Write what :meth:`imlbench_audio.audio.AudioDataset.draw` promises."""
    signals = excerpts(evaluation)
    gain = PEAK / signals["real"].abs().max().item()
    for name, signal in signals.items():
        write_wav(signal, folder / f"{name}.wav", gain)
    title = f"{evaluation.model.name} on {evaluation.dataset.name}"
    draw_spectrograms(signals, title, folder / "spectrograms.png")
    if evaluation.model.can("sample_components"):
        draw_states(evaluation, title, folder / "states.png")


def excerpts(evaluation: Evaluation) -> dict[str, Tensor]:
    """Return real, perhaps reconstructed, and generated audio, at most 10 s each, (n_samples,)."""
    model: Any = evaluation.model
    chosen, n_samples = [], 0
    for chunks in recordings(evaluation.splits.test):
        if n_samples < SECONDS * RATE:
            chosen.append(chunks)
            n_samples += (len(chunks) + 1) * HOP
    signals = {"real": chosen}
    if model.can("encode") and model.can("decode"):
        signals["reconstructed"] = [
            model.decode(model.encode(chunks.to(evaluation.device))).cpu() for chunks in chosen
        ]
    signals["generated"] = [evaluation.samples[0]]
    return {name: _join(sequences) for name, sequences in signals.items()}


def _join(sequences: list[Tensor]) -> Tensor:
    """Return the audio of sequences of chunks, one after the other, at most 10 s of it."""
    return torch.cat([overlap_add(chunks) for chunks in sequences])[: SECONDS * RATE]


def write_wav(signal: Tensor, path: Path, gain: float) -> None:
    """Write 16-bit mono at 8 kHz.

    Arguments:
        signal: Shape (n_samples,).
        path: The file.
        gain: What to multiply by; less, if the signal would exceed 0.9 of full scale.
    """
    gain = min(gain, PEAK / max(signal.abs().max().item(), 1e-9))
    soundfile.write(path, (gain * signal).numpy(), RATE, "PCM_16")


def spectrogram(signal: Tensor) -> NDArray[np.float64]:
    """Return the power in dB in windows of 32 ms every 8 ms, shape (129, n_windows)."""
    _, _, density = scipy.signal.spectrogram(
        signal.double().numpy(), RATE, "hann", nperseg=256, noverlap=192, detrend=False
    )
    return 10 * np.log10(density + 1e-20)


def draw_spectrograms(signals: Mapping[str, Tensor], title: str, path: Path) -> None:
    """Draw spectrograms below each other: time in seconds, frequency in kHz, one colour scale."""
    figure = Figure(figsize=(9, 0.6 + 2.1 * len(signals)), layout="constrained")
    columns: list[Axes] = list(figure.subplots(len(signals), sharex=True, squeeze=False)[:, 0])
    top = spectrogram(signals["real"]).max()
    for axes, (name, signal) in zip(columns, signals.items(), strict=True):
        _show(axes, signal, top)
        axes.set_title(name)
    columns[-1].set_xlabel("time in s")
    figure.colorbar(columns[0].images[0], ax=columns, label="power in dB, 0 the loudest real")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _show(axes: Axes, signal: Tensor, top: float) -> None:
    axes.imshow(
        spectrogram(signal) - top,
        origin="lower",
        aspect="auto",
        extent=(0, len(signal) / RATE, 0, RATE / 2000),
        vmin=-RANGE,
        vmax=0,
        cmap="magma",
    )
    axes.set_ylabel("kHz")


def draw_states(evaluation: Evaluation, title: str, path: Path) -> None:
    """Draw newly generated audio above the component, or state, that every chunk came from."""
    model: Any = evaluation.model
    generator = torch.Generator(evaluation.device).manual_seed(0)
    chunks, component = model.sample_components(SECONDS * RATE // HOP, generator)
    signal, n = overlap_add(chunks.cpu()), int(component.max()) + 1
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    _show(above, signal, spectrogram(signal).max())
    below.stairs(
        component.cpu(), (torch.arange(len(component) + 1) + 0.5) * HOP / RATE, baseline=None
    )
    below.set(xlabel="time in s", ylabel="component", ylim=(-0.02 * n, 1.02 * n))
    figure.suptitle(f"{title}: generated, and its components")
    figure.savefig(path, dpi=110)
