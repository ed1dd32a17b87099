"""Which generative model fits this data best, and by how much?

The public names, for plugin authors and for notebooks. Importing this package loads no torch; using
a name does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imlbench.api import (
        AnyArtifact,
        AnyDataset,
        AnyMetric,
        AnyModel,
        Artifact,
        Autoencoding,
        BaseLogProb,
        BaseLogProbSequence,
        Dataset,
        EffectiveComponents,
        Evaluation,
        Examples,
        FitContext,
        Kind,
        LogProb,
        LogProbLayerwise,
        LogProbManifold,
        Metric,
        Model,
        Modes,
        Params,
        SampleComponents,
        SampleGiven,
        Score,
        Sources,
        Space,
        Splits,
        available_if,
        from_data,
        hookimpl,
    )
    from imlbench.errors import DataError, Diverged, ParameterError, UserError
    from imlbench.reading import Results, load, results
    from imlbench.session import run

__all__ = [
    "AnyArtifact",
    "AnyDataset",
    "AnyMetric",
    "AnyModel",
    "Artifact",
    "Autoencoding",
    "BaseLogProb",
    "BaseLogProbSequence",
    "DataError",
    "Dataset",
    "Diverged",
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
    "ParameterError",
    "Params",
    "Results",
    "SampleComponents",
    "SampleGiven",
    "Score",
    "Sources",
    "Space",
    "Splits",
    "UserError",
    "available_if",
    "from_data",
    "hookimpl",
    "load",
    "results",
    "run",
]

_NOT_IN_API = {
    "DataError": "errors",
    "Diverged": "errors",
    "ParameterError": "errors",
    "Results": "reading",
    "UserError": "errors",
    "load": "reading",
    "results": "reading",
    "run": "session",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("imlbench")
    if name not in __all__:
        raise AttributeError(f"module 'imlbench' has no attribute '{name}'")
    return getattr(importlib.import_module(f"imlbench.{_NOT_IN_API.get(name, 'api')}"), name)
