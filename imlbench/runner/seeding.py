"""The global random states, for code that uses them: seeded inside a block, untouched outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states inside the block, and restore them after it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    # Only what is in use: to fork the state of every CUDA device would start them all.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - for plugins that use the global state
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
