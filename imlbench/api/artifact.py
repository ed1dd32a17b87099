"""What an artifact plugin implements: figures, audio and tables of a fitted model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from imlbench.api.metric import Evaluation
from imlbench.api.params import P, Parametrised
from imlbench.api.space import KINDS, Kind


class Artifact(Parametrised[P], ABC):
    """An artifact plugin: files that show a fitted model to a person.

    Class attributes:
        requires: Capabilities that the model must have, such as ``(Autoencoding,)``.
        requires_of_dataset: Capabilities that the dataset must have.
        kinds: The kinds of data it makes sense for.

    Arguments:
        params: The parameters, of the class in the brackets.
    """

    requires: ClassVar[tuple[type[object], ...]] = ()
    requires_of_dataset: ClassVar[tuple[type[object], ...]] = ()
    kinds: ClassVar[frozenset[Kind]] = KINDS

    def __init__(self, params: P) -> None:
        self.params = params

    @abstractmethod
    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write the files; called without gradients.

        Arguments:
            evaluation: The fitted model, its samples, and the data.
            folder: An empty folder. What is in it afterwards is kept; nothing is a good answer,
                where there is nothing to show.
        """


AnyArtifact = Artifact[Any]
"""An artifact of whatever parameters: what the harness handles."""
