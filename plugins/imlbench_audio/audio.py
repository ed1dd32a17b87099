"""What all datasets of audio have in common."""

from __future__ import annotations

from typing import TypeVar

from imlbench import Dataset, Params, Space
from imlbench_audio.framing import CHUNK_SIZE

P = TypeVar("P", bound=Params)


class AudioDataset(Dataset[P]):
    """A dataset of recordings in Hann-windowed chunks of 100 ms, 8 kHz."""

    @property
    def space(self) -> Space:
        """A chunk."""
        return Space("sequence", (CHUNK_SIZE,))
