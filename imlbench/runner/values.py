"""Plain values: what plugins hand over as JSON may come from numpy or torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from pydantic import JsonValue


def as_json(value: object) -> JsonValue:
    """Return a value as JSON knows it: numbers and arrays of numpy and torch become plain ones.

    Raises:
        TypeError: It is nothing that JSON knows.
        ValueError: It is NaN or infinite, which JSON does not know.

    Example:
        >>> as_json({"n": np.int64(3), "rates": (torch.tensor(0.5), 1)})
        {'n': 3, 'rates': [0.5, 1]}
    """
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite; got {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    raise TypeError(f"must be a number, a text, a list or a mapping; got {type(value).__name__}")
