"""A bowed-string étude made in code: a score of scales and arpeggios, and an instrument."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.signal
from numpy.typing import NDArray

from imlbench_audio.framing import RATE

Signal = NDArray[np.float64]

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)

KEYS = ((55, MAJOR), (62, MAJOR), (57, MINOR), (60, MAJOR), (64, MINOR))
"""Tonic, as a MIDI number (G3, D4, A3, C4, E4), and scale."""

RESONANCES = ((280, 12, 2.0), (460, 14, 2.5), (560, 12, 1.5), (1100, 6, 1.0), (2400, 3, 1.5))
"""Of the body: frequency in Hz, quality, gain; roughly those of a violin."""


class Note(NamedTuple):
    """One note of the score.

    Arguments:
        pitch: MIDI number; 69 is 440 Hz.
        seconds: How long it lasts.
        slurred: Whether the next one is played on the same bow stroke.
    """

    pitch: int
    seconds: float
    slurred: bool


def score() -> Iterator[Note]:
    """Yield the étude, which never ends: 12 s in each key, with other slurs at every return.

    Each section is a scale over two octaves and an arpeggio, both up and down, and a long note.
    """
    for n_slurred in itertools.cycle((1, 2, 4)):
        for tonic, scale in KEYS:
            octaves = [tonic + 12 * octave + step for octave in (0, 1) for step in scale]
            up = [*octaves, tonic + 24]
            chord = [up[degree] for degree in (0, 2, 4, 7, 9, 11, 14)]
            runs = [*up, *up[-2::-1], *chord, *chord[-2::-1]]
            for n, pitch in enumerate(runs, start=1):
                yield Note(pitch, 0.25, slurred=n % n_slurred != 0)
            yield Note(tonic, 1.5, slurred=False)


def synthesize(seconds: float, generator: np.random.Generator) -> Signal:
    """Play the beginning of the étude.

    Arguments:
        seconds: How long.
        generator: Source of what varies from note to note, of the bow's noise and of the room.

    Returns:
        Shape (8000 * seconds,), at 8 kHz, in [-1, 1], in steps of a 16-bit recording.

    Example:
        >>> synthesize(0.5, np.random.default_rng(0)).shape
        (4000,)
    """
    n_samples = round(seconds * RATE)
    strokes = Strokes(n_samples, generator)
    frequency = strokes.frequency()
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    bow_noise = strokes.noise_level(phase) * generator.standard_normal(n_samples)
    dry = body(strokes.gain() * (sawtooth(phase, frequency) + bow_noise))
    sound = dry + 0.3 * room(dry, generator)
    # Rounding hides the last bits, in which processors differ.
    rounded: Signal = np.round(sound / np.abs(sound).max() * 32767)
    return rounded / 32768


class Strokes:
    """How a player performs the score: pitch and loudness at every sample.

    Arguments:
        n_samples: How many samples to play.
        generator: Source of the unevenness.
    """

    def __init__(self, n_samples: int, generator: np.random.Generator) -> None:
        played = itertools.islice(score(), 2 + 8 * n_samples // RATE)  # more than needed
        pitch, seconds, slurred = (np.array(column) for column in zip(*played, strict=True))
        n_notes, self._n_samples, self._generator = len(pitch), n_samples, generator
        lengths = np.round(seconds * RATE * (1 + 0.02 * generator.standard_normal(n_notes)))
        note = np.repeat(np.arange(n_notes), lengths.astype(int))[:n_samples]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self._since = (np.arange(n_samples) - starts[note]) / RATE
        self._left = lengths[note] / RATE - self._since
        self._pitch = (pitch + 0.04 * generator.standard_normal(n_notes))[note]
        self._loudness = np.exp(0.12 * generator.standard_normal(n_notes))[note]
        self._slur_before = np.concatenate([[False], slurred[:-1]])[note]
        self._slur_after = slurred[note]

    def frequency(self) -> Signal:
        """Return the fundamental in Hz: small slides, and a vibrato that begins after 0.1 s."""
        slide = scipy.signal.windows.hann(round(0.02 * RATE))
        smooth: Signal = scipy.signal.fftconvolve(self._pitch - 60, slide / slide.sum(), "same")
        pitch = smooth + 60
        time = np.arange(self._n_samples) / RATE
        depth = 0.18 * np.clip((self._since - 0.1) / 0.3, 0, 1)  # in semitones
        vibrato = depth * np.sin(2 * np.pi * 5.6 * time)
        frequency: Signal = 440 * 2 ** ((pitch + vibrato - 69) / 12)
        return frequency

    def gain(self) -> Signal:
        """Return the loudness: ramps of 40 ms at every note, shallow ones inside a slur."""
        rise = np.clip(self._since / 0.04, 0, 1)
        fall = np.clip(self._left / 0.04, 0, 1)
        rise = np.where(self._slur_before, 0.7 + 0.3 * rise, rise)
        fall = np.where(self._slur_after, 0.7 + 0.3 * fall, fall)
        trembling: Signal = scipy.signal.sosfilt(
            scipy.signal.butter(2, 6, fs=RATE, output="sos"),
            self._generator.standard_normal(self._n_samples),
        )
        gain: Signal = self._loudness * rise * fall * (1 + 0.1 * trembling / trembling.std())
        return gain

    def noise_level(self, phase: Signal) -> Signal:
        """Return the bow's noise, relative to the tone: most when the string slips, and at first.

        Arguments:
            phase: Of the fundamental, in radians.
        """
        scratch = np.where(self._slur_before, 0, 0.3 * np.exp(-self._since / 0.02))
        return 0.04 * (1 + np.cos(phase)) + scratch


def sawtooth(phase: Signal, frequency: Signal) -> Signal:
    r"""Return :math:`\sum_k \sin(k \phi) / k` over the harmonics below 3900 Hz.

    Arguments:
        phase: :math:`\phi`, in radians.
        frequency: In Hz; the last harmonic fades over 200 Hz, so that none begins abruptly.
    """
    sound = np.zeros_like(phase)
    for k in range(1, 1 + int(3900 / frequency.min())):
        sound += np.clip((3900 - k * frequency) / 200, 0, 1) * np.sin(k * phase) / k
    return sound


def body(sound: Signal) -> Signal:
    """Add the resonances of the body."""
    result = 0.3 * sound
    for frequency, quality, gain in RESONANCES:
        numerator, denominator = scipy.signal.iirpeak(frequency, quality, fs=RATE)
        result += gain * scipy.signal.lfilter(numerator, denominator, sound)
    return result


def room(sound: Signal, generator: np.random.Generator) -> Signal:
    """Return the echoes: noise that falls by 60 dB in 0.5 s, of unit energy."""
    time = np.arange(RATE // 2) / RATE
    response = 10 ** (-3 * time / 0.5) * generator.standard_normal(len(time))
    response /= np.sqrt(np.square(response).sum())
    echoes: Signal = scipy.signal.fftconvolve(sound, response)[: len(sound)]
    return echoes
