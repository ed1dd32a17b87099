"""scikit-learn's handwritten digits: tiny, bundled, always there."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from imlbench import Dataset, Examples, Params, Sources, Space, Splits
from imlbench_images.splitting import hold_out


class DigitsParams(Params):
    """Parameters of ``digits``."""

    valid_size: int = Field(200, ge=1)
    """Examples held out for validation."""
    test_size: int = Field(297, ge=1)
    """Examples held out for testing."""
    split_seed: int = Field(0, ge=0)
    """Determines which examples are held out."""


class Digits(Dataset[DigitsParams]):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels in [0, 1]; needs no download.

    Labelled by ``digit``, 0 to 9.
    """

    name = "digits"

    @property
    def space(self) -> Space:
        """One grey image."""
        return Space("image", (1, 8, 8), (0.0, 1.0))

    def load(self, sources: Sources) -> Splits:
        """Read the bundled images and split them by seed."""
        from sklearn.datasets import load_digits

        bundle = load_digits()
        images = torch.from_numpy(bundle.images).to(torch.uint8)[:, None]
        digits = torch.from_numpy(bundle.target).to(torch.int64)

        def examples(rows: Tensor) -> Examples:
            return Examples(images[rows], scale=1 / 16, labels={"digit": digits[rows]})

        seed = self.params.split_seed
        rest, test = hold_out(len(images), self.params.test_size, seed, self.name)
        train, valid = hold_out(len(rest), self.params.valid_size, seed, self.name)
        return Splits(examples(rest[train]), examples(rest[valid]), examples(test))
