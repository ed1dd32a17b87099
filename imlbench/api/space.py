"""What one example is, known before any data are read. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["vector", "image", "sequence"]
KINDS: frozenset[Kind] = frozenset({"vector", "image", "sequence"})


@dataclass(frozen=True)
class Space:
    """What one example is, known before any data are read.

    Arguments:
        kind: ``"vector"``, ``"image"`` (channels first) or ``"sequence"`` (a chunk of a recording).
        event_shape: The shape of one example, such as ``(1, 28, 28)``.
        value_range: Smallest and largest possible value, or ``None`` where values have no bounds.

    Example:
        >>> Space("image", (1, 28, 28), (0.0, 1.0)).n_dims
        784
    """

    kind: Kind
    event_shape: tuple[int, ...]
    value_range: tuple[float, float] | None = None

    @property
    def n_dims(self) -> int:
        """The number of scalars in one example."""
        return math.prod(self.event_shape)

    def from_unit(self, unit: Tensor) -> Tensor:
        """Take [0, 1] to the range of values; without one, return ``unit`` as it is.

        Example:
            >>> import torch
            >>> Space("image", (1, 1, 1), (-1.0, 1.0)).from_unit(torch.tensor([0.0, 0.75]))
            tensor([-1.0000,  0.5000])
        """
        if self.value_range is None:
            return unit
        low, high = self.value_range
        return low + (high - low) * unit

    def to_unit(self, x: Tensor) -> Tensor:
        """Take the range of values to [0, 1], the inverse of :meth:`from_unit`."""
        if self.value_range is None:
            return x
        low, high = self.value_range
        return (x - low) / (high - low)
