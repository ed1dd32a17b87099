"""Cutting a validation split from the training set."""

from __future__ import annotations

import torch
from torch import Tensor

from imlbench import DataError


def hold_out(n: int, n_held_out: int, seed: int, dataset: str) -> tuple[Tensor, Tensor]:
    """Return the indices to keep and those to hold out, both in ascending order.

    Arguments:
        n: How many examples there are.
        n_held_out: How many to hold out.
        seed: Determines which.
        dataset: For the message.

    Raises:
        DataError: There would be nothing left.
    """
    if n_held_out >= n:
        raise DataError(
            f"dataset {dataset}: the examples to hold out must be fewer than the {n} there are; "
            f"got {n_held_out}. Choose a smaller {dataset}.valid_size."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[n_held_out:].sort().values, order[:n_held_out].sort().values
