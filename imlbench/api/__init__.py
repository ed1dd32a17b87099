"""The contracts: what a plugin implements, and what the harness hands to it."""

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
from imlbench.api.data import KINDS, Examples, Kind, Sources, Space, Splits
from imlbench.api.dataset import AnyDataset, Dataset
from imlbench.api.hookspecs import hookimpl
from imlbench.api.metric import AnyMetric, Evaluation, Metric, Score
from imlbench.api.model import AnyModel, FitContext, Model
from imlbench.api.params import Params, from_data

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
