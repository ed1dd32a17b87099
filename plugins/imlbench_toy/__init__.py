"""Data whose density is known: what a metric should say can be computed."""

from imlbench import AnyDataset, hookimpl


@hookimpl
def imlbench_datasets() -> list[type[AnyDataset]]:
    """Return the dataset classes."""
    from imlbench_toy.toy import Toy2D

    return [Toy2D]
