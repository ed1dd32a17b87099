"""Image datasets."""

from imlbench import hookimpl
from imlbench.api import AnyDataset


@hookimpl
def imlbench_datasets() -> list[type[AnyDataset]]:
    """Return the dataset classes."""
    from imlbench_images import celeba, digits, mnist

    return [celeba.CelebA, digits.Digits, mnist.MNIST]
