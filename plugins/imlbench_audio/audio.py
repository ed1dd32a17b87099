"""What all datasets of audio have in common."""

from __future__ import annotations

from pathlib import Path

from imlbench import Dataset, Evaluation, Space
from imlbench_audio.framing import CHUNK_SIZE


class AudioDataset(Dataset):
    """A dataset of recordings in Hann-windowed chunks of 100 ms, 8 kHz."""

    @property
    def space(self) -> Space:
        """A chunk."""
        return Space("sequence", (CHUNK_SIZE,))

    def draw(self, evaluation: Evaluation, folder: Path) -> None:
        """Write what there is to hear and see, of 10 s each.

        ========================  ==============================================================
        ``real.wav``              the beginning of the test split
        ``reconstructed.wav``     the same through the auto-encoder, if there is one
        ``generated.wav``         the beginning of the first draw
        ``spectrograms.png``      of these, on one scale of colours (Fig. 6 to 8)
        ``states.png``            generated audio above the component of every chunk
        ========================  ==============================================================

        Arguments:
            evaluation: The fitted model, its samples, and the data.
            folder: An existing one.
        """
        from imlbench_audio.artifacts import write_artifacts  # loads matplotlib

        write_artifacts(evaluation, folder)
