r"""Signals as overlapping windowed chunks, and back.

Chunk :math:`n` is samples :math:`400 n` to :math:`400 n + 799` of the signal times a periodic Hann
window :math:`w_i = \frac12 (1 - \cos(2 \pi i / 800))`. Because :math:`w_i + w_{i + 400} = 1`,
adding the chunks up where they overlap gives the signal back.

There is no padding in front. At the end zeros are appended until the last chunk is full, so that
every sample is in a chunk and none is dropped. The first 400 samples are in one chunk only, and so
are those from the last chunk's middle on: these come back faded in and faded out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from imlbench import Examples

RATE = 8000
"""Samples per second."""

CHUNK_SIZE = 800
"""Samples in a chunk: 100 ms."""

HOP = CHUNK_SIZE // 2
"""Samples from the start of one chunk to that of the next."""

STRETCH = 2 * RATE // HOP
"""Chunks of a recording that hang together, for standard errors: 2 s."""


def _window(device: torch.device) -> Tensor:
    # Rounded once from float64, so that two halves add up to 1 within 6e-8.
    return torch.hann_window(CHUNK_SIZE, periodic=True, dtype=torch.float64).to(
        device, torch.float32
    )


def n_chunks(n_samples: int) -> int:
    """Return how many chunks a signal has.

    Arguments:
        n_samples: Its length, at least 1.

    Example:
        >>> [n_chunks(n) for n in (1, 800, 801, 1200, 1201)]
        [1, 1, 2, 2, 3]
    """
    return 1 + max(0, -(-(n_samples - CHUNK_SIZE) // HOP))


def frame(signal: Tensor) -> Tensor:
    """Cut a signal into chunks.

    Arguments:
        signal: float32 of shape (n_samples,) with at least one sample, at 8 kHz, on any device.

    Returns:
        float32 of shape (n_chunks, 800), as :func:`n_chunks` counts them.

    Raises:
        ValueError: ``signal`` has another shape.

    Example:
        >>> chunks = frame(torch.ones(1600))
        >>> chunks.shape
        torch.Size([3, 800])
        >>> overlap_add(chunks)[[0, 200, 400, 1199, 1400]]
        tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.5000])
    """
    if signal.ndim != 1 or len(signal) == 0:
        raise ValueError(f"signal must be of shape (n_samples,); got {tuple(signal.shape)}")
    n_padding = (n_chunks(len(signal)) + 1) * HOP - len(signal)
    padded = torch.nn.functional.pad(signal, (0, n_padding))
    return padded.unfold(0, CHUNK_SIZE, HOP) * _window(signal.device)


def overlap_add(chunks: Tensor) -> Tensor:
    """Join chunks into a signal, the inverse of :func:`frame`.

    ``overlap_add(frame(x))`` equals ``x`` within 1e-6 of its largest value from sample 400 to
    sample ``400 * n_chunks - 1``; before and after it is ``x`` times the window. It is
    differentiable.

    Arguments:
        chunks: float32 of shape (n_chunks, 800), windowed; at least one, on any device.

    Returns:
        float32 of shape (400 * (n_chunks + 1),), at 8 kHz: up to 399 samples longer than the
        signal that the chunks were cut from.

    Raises:
        ValueError: ``chunks`` has another shape.
    """
    if chunks.ndim != 2 or len(chunks) == 0 or chunks.shape[1] != CHUNK_SIZE:
        raise ValueError(f"chunks must be of shape (n_chunks, 800); got {tuple(chunks.shape)}")
    silence = chunks.new_zeros(1, HOP)
    rising, falling = chunks[:, :HOP], chunks[:, HOP:]
    return (torch.cat([rising, silence]) + torch.cat([silence, falling])).flatten()


def chunked(
    signals: Iterable[Tensor], labels: Mapping[str, Sequence[int]] | None = None
) -> Examples:
    """Return the chunks of all signals, one recording each.

    Successive chunks are much alike: the groups are stretches of at most 2 s of a recording.

    Arguments:
        signals: At least one, each of shape (n_samples,).
        labels: By name, one number for each signal; its chunks have it.

    Example:
        >>> examples = chunked([torch.ones(1600), torch.ones(800)], {"speaker": [7, 5]})
        >>> examples.lengths, examples.labels["speaker"].tolist(), examples.groups.tolist()
        ((3, 1), [7, 7, 7, 5], [0, 0, 0, 1])
    """
    chunks = [frame(signal) for signal in signals]
    lengths = tuple(map(len, chunks))
    repeats = torch.tensor(lengths)
    return Examples(
        torch.cat(chunks),
        lengths=lengths,
        labels={
            name: torch.tensor(values).repeat_interleave(repeats)
            for name, values in (labels or {}).items()
        },
        groups=stretches(lengths),
    )


def stretches(lengths: Iterable[int]) -> Tensor:
    """Return the number of every chunk's stretch of at most 2 s, none in two recordings.

    Arguments:
        lengths: The number of chunks of each recording.

    Returns:
        int64 of shape (N,), counted from 0.

    Example:
        >>> stretches([90, 3]).bincount()
        tensor([40, 40, 10,  3])
    """
    sizes = [len(part) for n in lengths for part in torch.arange(n).split(STRETCH)]
    return torch.repeat_interleave(torch.tensor(sizes))


def lengths_of(split: Examples) -> tuple[int, ...]:
    """Return the number of chunks of each recording; without any, all are one recording."""
    return split.lengths or (len(split),)


def recordings_of(split: Examples) -> list[Tensor]:
    """Return the chunks of every recording, each of shape (n_chunks, 800)."""
    return list(split[:].split(list(lengths_of(split))))
