"""Data as every plugin sees them: examples, and the three splits of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Index = int | slice | Tensor
"""What picks examples: one, a range, or a tensor of numbers or of truth values."""


class Examples:
    r"""One split of a dataset: stored compactly, read as float32.

    Reading gives ``stored * scale + offset``. Storage may be uint8 and may lie in a memory-mapped
    file, so that no run holds a float copy of a large set.

    Arguments:
        stored: The stored values, shape :math:`(N, *event\_shape)`.
        scale: Factor from stored values to values of the dataset's range.
        offset: Added after scaling.
        lengths: For sequences, the number of chunks of each recording, in order; sums to :math:`N`.
        labels: What is known of each example, by name, such as ``{"digit": ...}``; int64, (N,).
        groups: Which examples hang together, such as those of one patient: a number for each,
            int64, (N,). Standard errors take groups as independent, not examples. By default the
            recordings, if there are ``lengths``.

    Raises:
        ValueError: Lengths, labels or groups do not fit the number of examples.

    Example:
        >>> pixels = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
        >>> Examples(pixels, scale=1 / 255)[1]
        tensor([0.2000, 0.4000])
    """

    def __init__(
        self,
        stored: Tensor,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
        lengths: tuple[int, ...] | None = None,
        labels: Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> None:
        self._stored, self._is_shared = stored, False
        self._written = _times_written(stored)
        self.scale, self.offset, self.lengths = scale, offset, lengths
        self.labels: Mapping[str, Tensor] = labels or {}
        if groups is None and lengths is not None:
            groups = torch.repeat_interleave(torch.tensor(lengths))
        self.groups = groups
        named = {
            "groups": groups,
            **{f"label {name}": label for name, label in self.labels.items()},
        }
        for what, values in named.items():
            if values is not None and values.shape != (len(stored),):
                raise ValueError(
                    f"Examples: {what} must be one number for each of {len(stored)} examples; "
                    f"got shape {tuple(values.shape)}. Check lengths and labels."
                )

    @property
    def stored(self) -> Tensor:
        """The stored values."""
        if self._is_shared:
            self._stored, self._is_shared = self._stored.clone(), False
            self._written = _times_written(self._stored)
        return self._stored

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has written into the storage, as far as torch can tell."""
        return _times_written(self._stored) == self._written

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: Index) -> Tensor:
        return self._stored[index].to(torch.float32).mul(self.scale).add_(self.offset)

    def to(self, device: torch.device) -> Examples:
        """Return the same examples with their storage and labels on ``device``."""
        moved = Examples(
            self._stored.to(device),
            scale=self.scale,
            offset=self.offset,
            lengths=self.lengths,
            labels={name: label.to(device) for name, label in self.labels.items()},
            groups=self.groups,
        )
        moved._is_shared = self._is_shared and moved._stored is self._stored
        return moved

    def fresh(self) -> Examples:
        """Return the same examples, for somebody who may write into them: these stay as they are.

        The storage is copied when it is asked for; reading examples needs no copy.
        """
        copy = Examples(
            self._stored,
            scale=self.scale,
            offset=self.offset,
            lengths=self.lengths,
            labels={name: label.clone() for name, label in self.labels.items()},
            groups=None if self.groups is None else self.groups.clone(),
        )
        copy._is_shared = True
        return copy

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the numbers of all examples once, in random order, in batches.

        A conditional model reads ``train[rows]`` and ``train.labels["digit"][rows]``.

        Arguments:
            batch_size: Numbers per batch; the last batch may be smaller.
            generator: Source of the permutation, on the device of the storage.

        Yields:
            int64 tensors of shape (B,), on the device of the storage.
        """
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        yield from order.to(self._stored.device).split(batch_size)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        r"""Yield all examples once, in order, or shuffled if a generator is given.

        Arguments:
            batch_size: Examples per batch; the last batch may be smaller.
            generator: Source of the permutation, on the device of the storage.

        Yields:
            float32 tensors of shape :math:`(B, *event\_shape)`.
        """
        if generator is not None:
            yield from (self[rows] for rows in self.shuffled(batch_size, generator))
            return
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def digest(self) -> str:
        """Return the SHA-256 of the content: storage, scale, offset, lengths, labels, groups."""
        header = f"{tuple(self._stored.shape)} {self._stored.dtype} {self.scale} {self.offset}"
        content = hashlib.sha256(f"{header} {self.lengths} {sorted(self.labels)}".encode())
        named = [self.labels[name] for name in sorted(self.labels)]
        for values in (self._stored, *named, *([] if self.groups is None else [self.groups])):
            for part in values.split(4096):
                content.update(part.contiguous().numpy().data)
        return content.hexdigest()


def _times_written(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class Splits:
    """A loaded dataset.

    Arguments:
        train: What models are fitted to.
        valid: For early stopping and for choosing settings of a metric; never part of ``test``.
        test: What metrics are computed on.
        fingerprint: Hash of the decoded content; computed if not given.
    """

    train: Examples
    valid: Examples
    test: Examples
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            digests = " ".join(part.digest() for part in (self.train, self.valid, self.test))
            self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()[:16]

    @property
    def are_untouched(self) -> bool:
        """Whether nobody has written into the data; see :attr:`Examples.is_untouched`."""
        return all(part.is_untouched for part in (self.train, self.valid, self.test))

    def fresh(self) -> Splits:
        """Return the same data for somebody who may write into them; see :class:`Examples`."""
        train, valid, test = (part.fresh() for part in (self.train, self.valid, self.test))
        return Splits(train, valid, test, self.fingerprint)
