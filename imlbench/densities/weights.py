"""Weights of a mixture: how many components they amount to."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(weights: Tensor) -> float:
    r"""The exponential of the entropy of weights: how many equal weights would be as spread.

    .. math:: \exp \Bigl( - \sum_{c=1}^{C} w_c \log w_c \Bigr)

    Arguments:
        weights: Shape :math:`(C,)`, not negative, summing to one; weights of zero do not count.

    Returns:
        A number from 1 to :math:`C`.

    Example:
        >>> round(perplexity(torch.tensor([0.5, 0.5, 0.0])), 3)
        2.0
    """
    return float(torch.special.entr(weights).sum().exp())
