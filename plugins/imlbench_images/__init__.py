"""Image datasets."""

from imlbench import Dataset, hookimpl


@hookimpl
def imlbench_datasets() -> list[type[Dataset]]:
    """Return the dataset classes."""
    from imlbench_images import celeba, digits, mnist

    return [celeba.CelebA, digits.Digits, mnist.MNIST]
