"""Seeds and generators: everything random in a job follows from its one seed."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed that depends on both arguments alone."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """Return a fresh generator on ``device``, determined by ``seed`` and ``purpose``.

    Draws for one purpose do not depend on how many were made for another.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))
