"""What a job on audio leaves to be heard and seen: recordings, spectrograms, states over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from imlbench import Artifact, Autoencoding, Evaluation, Kind, Params, SampleComponents
from imlbench_audio.framing import HOP, RATE, overlap_add, recordings_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECONDS = 10
"""Length of what is written and drawn."""

PEAK = 0.9
"""Greatest value in a WAV file, of full scale."""

RANGE = 70
"""Decibels of the colour scale, downwards from the loudest point of the real audio."""

DPI = 120


class Recordings(Artifact[Params]):
    """Audio, 10 s of each: real, the same through the auto-encoder if there is one, and generated.

    Real is the beginning of the test split, generated that of the first draw. All have one gain;
    what would exceed full scale has less.
    """

    name = "recordings"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``real.wav``, perhaps ``reconstructed.wav``, and ``generated.wav``."""
        signals = excerpts(evaluation)
        gain = PEAK / signals["real"].abs().max().item()
        for name, signal in signals.items():
            write_wav(signal, folder / f"{name}.wav", gain)


class Spectrograms(Artifact[Params]):
    """Spectrograms of what ``recordings`` writes, on one scale of colours (Fig. 6 to 8)."""

    name = "spectrograms"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``spectrograms.png``."""
        from matplotlib.figure import Figure

        signals = excerpts(evaluation)
        figure = Figure(figsize=(9, 0.8 + 2.2 * len(signals)), layout="constrained")
        rows = figure.subplots(len(signals), sharex=True, squeeze=False)[:, 0]
        top = spectrogram(signals["real"]).max()
        for axes, (name, signal) in zip(rows, signals.items(), strict=True):
            show_spectrogram(axes, signal, top)
            axes.set_title(name)
        rows[-1].set_xlabel("time in s")
        figure.colorbar(rows[0].images[0], ax=list(rows), label="power in dB, 0 the loudest real")
        figure.suptitle(f"{evaluation.model.name} on {evaluation.dataset.name}: spectrograms")
        save(figure, folder / "spectrograms.png")


class States(Artifact[Params]):
    """Newly generated audio above the component, or state, that every chunk came from."""

    name = "states"
    requires = (SampleComponents,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write ``states.png``."""
        from matplotlib.figure import Figure

        model = cast(SampleComponents, evaluation.model)
        n_chunks = SECONDS * RATE // HOP - 1  # they overlap by half
        chunks, component = model.sample_components(n_chunks, evaluation.generator("states"))
        signal = overlap_add(chunks.cpu())
        middles = (torch.arange(n_chunks) + 1) * HOP / RATE
        figure = Figure(figsize=(9, 5), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        show_spectrogram(above, signal, spectrogram(signal).max())
        above.set_title("generated audio")
        below.scatter(middles, component.cpu(), marker="|", s=30, linewidths=1.5)
        below.set(xlabel="time in s", ylabel="number", title="component of every chunk")
        below.yaxis.get_major_locator().set_params(integer=True)
        below.grid(alpha=0.3)
        figure.colorbar(above.images[0], ax=above, label="power in dB, 0 the loudest")
        figure.suptitle(f"{evaluation.model.name} on {evaluation.dataset.name}: components in time")
        save(figure, folder / "states.png")


def excerpts(evaluation: Evaluation) -> dict[str, Tensor]:
    """Return real, perhaps reconstructed, and generated audio, at most 10 s each, (n_samples,)."""
    chosen: list[Tensor] = []
    n_samples = 0
    for chunks in recordings_of(evaluation.splits.test):
        if n_samples < SECONDS * RATE:
            chosen.append(chunks)
            n_samples += (len(chunks) + 1) * HOP
    signals = {"real": chosen}
    if evaluation.model.can(Autoencoding):
        model = cast(Autoencoding, evaluation.model)
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
    import scipy.signal

    density: NDArray[np.float64]
    _, _, density = scipy.signal.spectrogram(
        signal.double().numpy(), RATE, "hann", nperseg=256, noverlap=192, detrend=False
    )
    return 10 * np.log10(density + 1e-20)


def show_spectrogram(axes: Axes, signal: Tensor, top: float) -> None:
    """Show time in seconds, frequency in kHz, and power in dB below ``top``."""
    axes.imshow(
        spectrogram(signal) - top,
        origin="lower",
        aspect="auto",
        extent=(0, len(signal) / RATE, 0, RATE / 2000),
        vmin=-RANGE,
        vmax=0,
        cmap="magma",
    )
    axes.set_ylabel("frequency in kHz")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of 160 colours: spectrograms of all would take three times the space.

    Arguments:
        figure: The figure.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = picture.quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
