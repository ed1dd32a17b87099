"""The registry: plugins found by entry point, their classes by name, family and glob."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar, cast

import pluggy

from imlbench.api import (
    AnyArtifact,
    AnyDataset,
    AnyMetric,
    AnyModel,
    Artifact,
    Dataset,
    Metric,
    Model,
    hookspecs,
)
from imlbench.api.capabilities import members
from imlbench.api.params import AnyPlugin, Params
from imlbench.errors import ANYTHING, UserError, brief, unknown
from imlbench.plan.installed import GROUP

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names become parts of files and columns."""

PluginClass = type[AnyPlugin]
_C = TypeVar("_C", bound=PluginClass)


@dataclass(frozen=True)
class Plugin:
    """One entry point, as found.

    Arguments:
        name: The entry point's name.
        distribution: The installed distribution that ships it, with its version.
        error: Why it is not used; empty if it is.
    """

    name: str
    distribution: str
    error: str = ""


class Registry:
    """The models, datasets, metrics and artifacts that can be named.

    A plugin that fails to import, or whose hook raises or returns something else than classes of
    the right kind, is left out as a whole and listed in ``plugins`` with its error.

    Arguments:
        sources: Entry points to load; by default the installed ones of the group ``imlbench``.
        announce: Called with the name of each, before it is imported.
        barred: Those that are left out, and why: they have ended an earlier process.

    Raises:
        UserError: Two plugins give one name; the message names both classes.
    """

    def __init__(
        self,
        sources: Iterable[EntryPoint] | None = None,
        *,
        announce: Callable[[str], None] = lambda name: None,
        barred: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._announce, self._barred = announce, barred
        self.plugins: list[Plugin] = []
        self.models: dict[str, type[AnyModel]] = {}
        self.datasets: dict[str, type[AnyDataset]] = {}
        self.metrics: dict[str, type[AnyMetric]] = {}
        self.artifacts: dict[str, type[AnyArtifact]] = {}
        self._shipped_by: dict[type, str] = {}
        manager = pluggy.PluginManager("imlbench")
        manager.add_hookspecs(hookspecs)
        for source in sorted(
            entry_points(group=GROUP) if sources is None else sources, key=lambda found: found.name
        ):
            self._add(manager, source)

    def _add(self, manager: pluggy.PluginManager, source: EntryPoint) -> None:
        dist = source.dist
        distribution = f"{dist.name} {dist.version}" if dist else "unknown distribution"
        here = os.getcwd()
        try:
            if source.name in self._barred:
                raise ImportError(self._barred[source.name])
            self._announce(source.name)
            manager.register(source.load(), name=source.name)
            manager.check_pending()
            models = _classes(manager.hook.imlbench_models, source.name, Model)
            datasets = _classes(manager.hook.imlbench_datasets, source.name, Dataset)
            metrics = _classes(manager.hook.imlbench_metrics, source.name, Metric)
            artifacts = _classes(manager.hook.imlbench_artifacts, source.name, Artifact)
        except ANYTHING as error:  # somebody else's code: anything can come, none may stop us
            if manager.has_plugin(source.name):
                manager.unregister(name=source.name)
            self.plugins.append(Plugin(source.name, distribution, brief(error)))
            return
        finally:
            os.chdir(here)
        self.plugins.append(Plugin(source.name, distribution))
        _merge(self.models, models, "model")
        _merge(self.datasets, datasets, "dataset")
        _merge(self.metrics, metrics, "metric")
        _merge(self.artifacts, artifacts, "artifact")
        for cls in (*models, *datasets, *metrics, *artifacts):
            self._shipped_by[cls] = distribution

    def shipped_by(self, cls: type) -> str:
        """Return the distribution, with its version, that a class came from."""
        return self._shipped_by[cls]

    @property
    def broken(self) -> list[Plugin]:
        """The plugins that were left out."""
        return [plugin for plugin in self.plugins if plugin.error]

    @property
    def classes(self) -> dict[str, PluginClass]:
        """Every registered class by name; of two kinds with one name, the model, then the data."""
        return {**self.artifacts, **self.metrics, **self.datasets, **self.models}

    def select_models(self, patterns: Sequence[str]) -> list[type[AnyModel]]:
        """Return the models that the patterns name: a name, a family, or a glob of either.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.models, patterns, "model")

    def select_datasets(self, patterns: Sequence[str]) -> list[type[AnyDataset]]:
        """Return the datasets that the patterns name: a name or a glob.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.datasets, patterns, "dataset")

    def select_metrics(self, patterns: Sequence[str]) -> list[type[AnyMetric]]:
        """Return the metrics that the patterns name: a name or a glob.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.metrics, patterns, "metric")


def family_of(cls: PluginClass) -> str:
    """Return a model's family; other plugins have none."""
    return getattr(cls, "family", "")


def _classes(hook: pluggy.HookCaller, plugin: str, base: PluginClass) -> list[Any]:
    """Call one plugin's own implementation of a hook, and check what it returns."""
    found: list[Any] = []
    for implementation in hook.get_hookimpls():
        if implementation.plugin_name == plugin:
            found += cast("list[Any]", implementation.function())
    for cls in found:
        where = f"{hook.name} returned {cls!r}, which"
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise TypeError(f"{where} is not a subclass of imlbench.{base.__name__}")
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise TypeError(f"{where} lacks the methods {missing}")
        _check_attributes(cls, where)
    return found


def _check_attributes(cls: PluginClass, where: str) -> None:
    """Refuse what would only be noticed when a job is run."""
    name = getattr(cls, "name", "")
    if not name:
        raise TypeError(f"{where} has no name")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise TypeError(
            f"{where} must be named by letters, digits, '-', '_' and '.', 64 at most; got {name!r}"
        )
    if not issubclass(cls.params_type, Params):
        raise TypeError(f"{where} must have parameters derived from imlbench.Params")
    for capability in (*getattr(cls, "requires", ()), *getattr(cls, "requires_of_dataset", ())):
        members(capability)  # refuses what is no protocol
    if issubclass(cls, Metric) and not hasattr(cls, "higher_is_better"):
        raise TypeError(f"{where} must say higher_is_better: True, False or None")


def _merge(known: dict[str, _C], new: list[_C], what: str) -> None:
    for cls in new:
        if known.get(cls.name, cls) is not cls:
            both = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (known[cls.name], cls))
            raise UserError(
                f"plugins: the {what} name '{cls.name}' must be unique; {both} both have it. "
                "Uninstall one of them."
            )
        known[cls.name] = cls


def _select(known: Mapping[str, _C], patterns: Sequence[str], what: str) -> list[_C]:
    chosen: dict[str, _C] = {}
    errors: list[str] = []
    for pattern in patterns:
        matches = {
            name: cls
            for name, cls in known.items()
            if fnmatchcase(name, pattern) or fnmatchcase(family_of(cls), pattern)
        }
        if not matches:
            families = {family_of(cls) for cls in known.values()} - {""}
            errors.append(unknown(what, pattern, {*known, *families}))
        chosen |= matches
    if errors:
        raise UserError(*errors)
    return list(chosen.values())
