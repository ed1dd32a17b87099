"""What a case is: claims that are stated before anything is measured, and what measuring finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """What is expected of a number.

    Arguments:
        name: What it is; at most 30 characters, for the table.
        predicted: Its value, as predicted.
        because: Where the prediction comes from.
        at_least: The target, if it is to be large.
        at_most: The target, if it is to be small.
        unit: Its unit; ``"x"`` for a ratio of two times.
    """

    name: str
    predicted: float
    because: str
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"


@dataclass(frozen=True)
class Spread:
    """The median of repetitions, with the smallest and the largest."""

    value: float
    low: float
    high: float

    @classmethod
    def single(cls, value: float) -> Spread:
        """Return a number that was measured once."""
        return cls(value, value, value)


@dataclass(frozen=True)
class Measured:
    """What a claim's number came out as."""

    claim: str
    spread: Spread


@dataclass(frozen=True)
class Failed:
    """Why a claim's number could not be measured."""

    claim: str
    reason: str

    @classmethod
    def of(cls, claim: str, error: Exception) -> Failed:
        """Return the failure of another library, whose limits are a finding."""
        first_line = str(error).partition("\n")[0]
        return cls(claim, f"{type(error).__name__}: {first_line}")


@dataclass(frozen=True)
class Seconds:
    """A time, for the record."""

    name: str
    spread: Spread


@dataclass(frozen=True)
class Agreement:
    """How far two results are apart that must be the same; NaN is too far."""

    name: str
    difference: float
    tolerance: float
    unit: str = "nats"

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Note:
    """A sentence for the record."""

    text: str


Finding = Measured | Failed | Seconds | Agreement | Note


@dataclass(frozen=True)
class Case:
    """One comparison.

    Arguments:
        name: Its name on the command line.
        title: What the numbers in its table are.
        about: How it is made fair.
        claims: What is expected, in the order of the table.
        run: Measures; a function of a module, as it runs in a process of its own.
        needs: Packages of the extra ``speed`` that it imports.
    """

    name: str
    title: str
    about: str
    claims: tuple[Claim, ...]
    run: Callable[[], Iterator[Finding]]
    needs: tuple[str, ...] = ()


Record = dict[str, Any]
"""A case and its findings, as JSON: what the tables are made of."""
