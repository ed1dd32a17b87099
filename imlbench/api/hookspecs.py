"""The hooks: a plugin returns classes, and that is all it has to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from imlbench.api import AnyArtifact, AnyDataset, AnyMetric, AnyModel

hookspec = pluggy.HookspecMarker("imlbench")
hookimpl = pluggy.HookimplMarker("imlbench")


@hookspec
def imlbench_models() -> list[type[AnyModel]]:  # type: ignore[empty-body]
    """Return the plugin's model classes."""


@hookspec
def imlbench_datasets() -> list[type[AnyDataset]]:  # type: ignore[empty-body]
    """Return the plugin's dataset classes."""


@hookspec
def imlbench_metrics() -> list[type[AnyMetric]]:  # type: ignore[empty-body]
    """Return the plugin's metric classes."""


@hookspec
def imlbench_artifacts() -> list[type[AnyArtifact]]:  # type: ignore[empty-body]
    """Return the plugin's artifact classes."""
