"""The registry: plugins found by entry point, their classes by name, family and glob."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar, cast

import pluggy

from imlbench import hookspecs
from imlbench.api import Dataset, Metric, Model
from imlbench.errors import UserError, unknown

GROUP = "imlbench"

_T = TypeVar("_T", bound=type[Model] | type[Dataset] | type[Metric])


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
    """The models, datasets and metrics that can be named.

    A plugin that fails to import, or whose hook raises or returns something else than classes of
    the right kind, is left out as a whole and listed in ``plugins`` with its error.

    Arguments:
        sources: Entry points to load; by default the installed ones of the group ``imlbench``.

    Raises:
        UserError: Two plugins give one name; the message names both classes.
    """

    def __init__(self, sources: Iterable[EntryPoint] | None = None) -> None:
        self.plugins: list[Plugin] = []
        self.models: dict[str, type[Model]] = {}
        self.datasets: dict[str, type[Dataset]] = {}
        self.metrics: dict[str, type[Metric]] = {}
        self._shipped_by: dict[type, str] = {}
        manager = pluggy.PluginManager("imlbench")
        manager.add_hookspecs(hookspecs)
        for source in entry_points(group=GROUP) if sources is None else sources:
            self._add(manager, source)

    def _add(self, manager: pluggy.PluginManager, source: EntryPoint) -> None:
        dist = source.dist
        distribution = f"{dist.name} {dist.version}" if dist else "unknown distribution"
        try:
            manager.register(source.load(), name=source.name)
            manager.check_pending()
            models = _classes(manager.hook.imlbench_models, source.name, Model)
            datasets = _classes(manager.hook.imlbench_datasets, source.name, Dataset)
            metrics = _classes(manager.hook.imlbench_metrics, source.name, Metric)
        except Exception as error:  # somebody else's code: anything can come, none may stop us
            if manager.has_plugin(source.name):
                manager.unregister(name=source.name)
            self.plugins.append(
                Plugin(source.name, distribution, f"{type(error).__name__}: {error}")
            )
            return
        self.plugins.append(Plugin(source.name, distribution))
        _merge(self.models, models, "model")
        _merge(self.datasets, datasets, "dataset")
        _merge(self.metrics, metrics, "metric")
        self._shipped_by.update(dict.fromkeys([*models, *datasets, *metrics], distribution))

    def shipped_by(self, cls: type) -> str:
        """Return the distribution, with its version, that a class came from."""
        return self._shipped_by[cls]

    def code(self, cls: type) -> str:
        """Return what identifies the code of a class: distribution, version, and source.

        A result is reused only if this is the same; so it is not after any edit of the plugin's
        package, whether its version was raised or not.
        """
        return f"{self._shipped_by[cls]} {_source_digest(cls.__module__.partition('.')[0])}"

    @property
    def broken(self) -> list[Plugin]:
        """The plugins that were left out."""
        return [plugin for plugin in self.plugins if plugin.error]

    def select_models(self, patterns: Sequence[str]) -> list[type[Model]]:
        """Return the models that the patterns name: a name, a family, or a glob of either.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.models, patterns, "model", lambda cls: cls.family)

    def select_datasets(self, patterns: Sequence[str]) -> list[type[Dataset]]:
        """Return the datasets that the patterns name: a name or a glob.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.datasets, patterns, "dataset")

    def select_metrics(self, patterns: Sequence[str]) -> list[type[Metric]]:
        """Return the metrics that the patterns name: a name or a glob.

        Raises:
            UserError: One message for every pattern that names nothing.
        """
        return _select(self.metrics, patterns, "metric")


def _classes(hook: pluggy.HookCaller, plugin: str, base: type) -> list[Any]:
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
        if not getattr(cls, "name", ""):
            raise TypeError(f"{where} has no name")
    return found


@functools.cache
def _source_digest(module: str) -> str:
    """Return a hash of a top-level module's Python source, and of the toolkits that plugins use."""
    own = Path(getattr(sys.modules[module], "__file__", None) or "nowhere")
    harness = Path(__file__).parent
    files = [harness / "training.py", harness / "networks.py", *(harness / "densities").iterdir()]
    files += own.parent.rglob("*.py") if own.name == "__init__.py" else [own]
    content = hashlib.sha256()
    for file in sorted(file for file in files if file.suffix == ".py" and file.is_file()):
        content.update(file.read_bytes())
    return content.hexdigest()[:12]


def _merge(known: dict[str, Any], new: list[Any], what: str) -> None:
    for cls in new:
        if known.get(cls.name, cls) is not cls:
            both = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (known[cls.name], cls))
            raise UserError(
                f"plugins: the {what} name '{cls.name}' must be unique; {both} both have it. "
                "Uninstall one of them."
            )
        known[cls.name] = cls


def _select(
    known: dict[str, _T],
    patterns: Sequence[str],
    what: str,
    family: Callable[[Any], str] = lambda cls: "",
) -> list[_T]:
    chosen: dict[str, _T] = {}
    errors: list[str] = []
    for pattern in patterns:
        matches = {
            name: cls
            for name, cls in known.items()
            if fnmatchcase(name, pattern) or fnmatchcase(family(cls), pattern)
        }
        if not matches:
            families = {family(cls) for cls in known.values()} - {""}
            errors.append(unknown(what, pattern, {*known, *families}))
        chosen |= matches
    if errors:
        raise UserError(*errors)
    return list(chosen.values())
