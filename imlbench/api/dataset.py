"""What a dataset plugin implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from imlbench.api.capabilities import Capable
from imlbench.api.data import Splits
from imlbench.api.params import P, Parametrised
from imlbench.api.sources import Sources
from imlbench.api.space import Space


class Dataset(Parametrised[P], Capable, ABC):
    """A dataset plugin: a name, parameters, the space of its examples, and how to load them.

    Loading is deterministic: the same parameters and files give the same splits. A dataset whose
    distribution is known may have the capabilities :class:`~imlbench.LogProb` and
    :class:`~imlbench.Modes`.

    Arguments:
        params: The parameters, of the class in the brackets: ``Dataset[DigitsParams]``.
    """

    def __init__(self, params: P) -> None:
        self.params = params

    @property
    @abstractmethod
    def space(self) -> Space:
        """What one example is; must not read any data."""

    @abstractmethod
    def load(self, sources: Sources) -> Splits:
        """Read the data.

        Raises:
            DataError: Files are missing or damaged; the message names the file and the remedy.
        """


AnyDataset = Dataset[Any]
"""A dataset of whatever parameters: what the harness handles."""
