"""Draws from an explicit generator, which may live on another device than the result."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def normal(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    """Standard normal numbers in float64."""
    z = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return z.to(device)


def categorical(weights: Tensor, n: int, generator: Generator) -> Tensor:
    """Indices drawn independently in proportion to the last axis of ``weights``; n per row."""
    weights = weights.to(generator.device)
    return torch.multinomial(weights, n, replacement=True, generator=generator)


def library_seed(generator: Generator) -> int:
    """A seed for a library that takes an integer."""
    seed = torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device)
    return int(seed)
