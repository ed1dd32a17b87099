"""Which generative model fits this data best, and by how much?

The public names for plugin authors. Importing this package loads no torch; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imlbench.api import (
        Dataset,
        Evaluation,
        Examples,
        FitContext,
        Kind,
        Metric,
        Model,
        Params,
        Score,
        Sources,
        Space,
        Splits,
    )
    from imlbench.errors import DataError, Diverged, ParameterError, UserError
    from imlbench.hookspecs import hookimpl

__all__ = [
    "DataError",
    "Dataset",
    "Diverged",
    "Evaluation",
    "Examples",
    "FitContext",
    "Kind",
    "Metric",
    "Model",
    "ParameterError",
    "Params",
    "Score",
    "Sources",
    "Space",
    "Splits",
    "UserError",
    "hookimpl",
]

_NOT_IN_API = {
    "DataError": "errors",
    "Diverged": "errors",
    "ParameterError": "errors",
    "UserError": "errors",
    "hookimpl": "hookspecs",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("imlbench")
    if name not in __all__:
        raise AttributeError(f"module 'imlbench' has no attribute '{name}'")
    return getattr(import_module(f"imlbench.{_NOT_IN_API.get(name, 'api')}"), name)
