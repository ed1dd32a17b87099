"""MNIST, read and downloaded by torchvision, with every file's checksum verified."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from imlbench import DataError, Dataset, Examples, Params, Sources, Space, Splits
from imlbench_images.splitting import hold_out

CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of the uncompressed files, as published with torchvision."""


class MNISTParams(Params):
    """Parameters of ``mnist``."""

    valid_size: int = Field(5000, ge=1)
    """Examples of the 60,000 for training that are held out for validation."""
    split_seed: int = Field(0, ge=0)
    """Determines which examples are held out."""
    classes: list[Annotated[int, Field(ge=0, le=9)]] | None = Field(None, min_length=1)
    """Only these digits, such as ``[0, 1]``; by default all."""


class MNIST(Dataset[MNISTParams]):
    """70,000 handwritten digits, 28x28 pixels in [0, 1]; the standard test set of 10,000.

    Labelled by ``digit``, 0 to 9.
    """

    name = "mnist"

    @property
    def space(self) -> Space:
        """One grey image."""
        return Space("image", (1, 28, 28), (0.0, 1.0))

    def load(self, sources: Sources) -> Splits:
        """Read the files, or download them into the cache if there are none."""
        raw, cached = sources.find("MNIST/raw"), sources.cache_dir / "MNIST" / "raw"
        if raw is None or (raw == cached and not all((raw / name).exists() for name in CHECKSUMS)):
            raw = self._download(sources)
        verify_checksums(raw, CHECKSUMS)
        rest, test = (self._read(raw.parent.parent, train) for train in (True, False))
        n_valid, seed = self.params.valid_size, self.params.split_seed
        train, valid = hold_out(len(rest.images), n_valid, seed, self.name)
        return Splits(rest.examples(train), rest.examples(valid), test.examples(slice(None)))

    def _read(self, root: Path, train: bool) -> Labelled:
        """Return one of the two original sets, reduced to the chosen classes."""
        from torchvision.datasets import MNIST as Original

        original = Original(root, train=train)
        chosen = torch.isin(original.targets, torch.tensor(self.params.classes or range(10)))
        return Labelled(original.data[chosen][:, None], original.targets[chosen])

    def _download(self, sources: Sources) -> Path:
        if sources.offline:
            remedy = "Run once without --offline to download it, or name its folder by --data-dir."
            raise sources.missing("mnist", "MNIST/raw", remedy)
        from torchvision.datasets import MNIST as Original

        try:
            Original(sources.cache_dir, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            remedy = f"Download failed ({reason}). Name a folder that has it by --data-dir."
            raise sources.missing("mnist", "MNIST/raw", remedy) from error
        return sources.cache_dir / "MNIST" / "raw"


class Labelled(NamedTuple):
    """Images as they are stored, and the digit that each shows.

    Arguments:
        images: uint8, shape (N, 1, 28, 28).
        digits: int64, shape (N,).
    """

    images: Tensor
    digits: Tensor

    def examples(self, rows: Tensor | slice) -> Examples:
        """Return some of them as examples."""
        return Examples(self.images[rows], scale=1 / 255, labels={"digit": self.digits[rows]})


def verify_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Raise :class:`DataError` if a file is missing or its MD5 is another one."""
    for name, expected in checksums.items():
        path = folder / name
        remedy = "Delete the folder to download it again, or name another by --data-dir."
        try:
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise DataError(
                f"dataset mnist: {path} must be readable; got '{error.strerror}'. {remedy}"
            ) from error
        if found != expected:
            raise DataError(
                f"dataset mnist: {path} must have the MD5 {expected}; got {found}, "
                f"so the file is damaged. {remedy}"
            )
