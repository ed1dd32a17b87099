"""The classes of faults: a module each, with a description and a generator of trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.campaign.trials import Lab, Trial


@dataclass(frozen=True)
class FaultClass:
    """A class of faults.

    Arguments:
        name: Its name, as ``--only`` takes it.
        description: What is done, for the report.
        survived: What must be so afterwards, for the report.
        trials: Yields its trials.
    """

    name: str
    description: str
    survived: str
    trials: Callable[[Lab], Iterator[Trial]]
