"""The contracts: what a plugin implements, and what the harness hands to it.

Importing this package loads no torch; using a name of tensors does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imlbench.api.artifact import AnyArtifact, Artifact
    from imlbench.api.capabilities import (
        Autoencoding,
        BaseLogProb,
        BaseLogProbSequence,
        EffectiveComponents,
        LogProb,
        LogProbLayerwise,
        LogProbManifold,
        Modes,
        SampleComponents,
        SampleGiven,
        available_if,
    )
    from imlbench.api.data import Examples, Splits
    from imlbench.api.dataset import AnyDataset, Dataset
    from imlbench.api.hookspecs import hookimpl
    from imlbench.api.metric import AnyMetric, Evaluation, Metric, Score
    from imlbench.api.model import AnyModel, FitContext, Model
    from imlbench.api.params import Params, from_data
    from imlbench.api.sources import Sources
    from imlbench.api.space import KINDS, Kind, Space

__all__ = [
    "KINDS",
    "AnyArtifact",
    "AnyDataset",
    "AnyMetric",
    "AnyModel",
    "Artifact",
    "Autoencoding",
    "BaseLogProb",
    "BaseLogProbSequence",
    "Dataset",
    "EffectiveComponents",
    "Evaluation",
    "Examples",
    "FitContext",
    "Kind",
    "LogProb",
    "LogProbLayerwise",
    "LogProbManifold",
    "Metric",
    "Model",
    "Modes",
    "Params",
    "SampleComponents",
    "SampleGiven",
    "Score",
    "Sources",
    "Space",
    "Splits",
    "available_if",
    "from_data",
    "hookimpl",
]

_HOMES = {
    "AnyArtifact": "artifact",
    "AnyDataset": "dataset",
    "AnyMetric": "metric",
    "AnyModel": "model",
    "Artifact": "artifact",
    "Autoencoding": "capabilities",
    "BaseLogProb": "capabilities",
    "BaseLogProbSequence": "capabilities",
    "Dataset": "dataset",
    "EffectiveComponents": "capabilities",
    "Evaluation": "metric",
    "Examples": "data",
    "FitContext": "model",
    "KINDS": "space",
    "Kind": "space",
    "LogProb": "capabilities",
    "LogProbLayerwise": "capabilities",
    "LogProbManifold": "capabilities",
    "Metric": "metric",
    "Model": "model",
    "Modes": "capabilities",
    "Params": "params",
    "SampleComponents": "capabilities",
    "SampleGiven": "capabilities",
    "Score": "metric",
    "Sources": "sources",
    "Space": "space",
    "Splits": "data",
    "available_if": "capabilities",
    "from_data": "params",
    "hookimpl": "hookspecs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
