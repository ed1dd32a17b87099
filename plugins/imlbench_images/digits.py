"""scikit-learn's handwritten digits: tiny, bundled, always there."""

from __future__ import annotations

import torch
from pydantic import Field
from sklearn.datasets import load_digits

from imlbench import Dataset, Examples, Params, Sources, Space, Splits
from imlbench_images.splitting import hold_out


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels in [0, 1]; needs no download."""

    name = "digits"

    class Params(Params):
        """Parameters of ``digits``."""

        valid_size: int = Field(200, ge=1)
        """Examples held out for validation."""
        test_size: int = Field(297, ge=1)
        """Examples held out for testing."""
        split_seed: int = Field(0, ge=0)
        """Determines which examples are held out."""

    @property
    def space(self) -> Space:
        """One grey image."""
        return Space("image", (1, 8, 8), (0.0, 1.0))

    def load(self, sources: Sources) -> Splits:
        """Read the bundled images and split them by seed."""
        images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
        seed = self.params.split_seed
        rest, test = hold_out(len(images), self.params.test_size, seed, self.name)
        train, valid = hold_out(len(rest), self.params.valid_size, seed, self.name)
        parts = (images[rest[train]], images[rest[valid]], images[test])
        return Splits(*(Examples(part, scale=1 / 16) for part in parts))
