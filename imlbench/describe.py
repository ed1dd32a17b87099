"""What ``imlbench plugins`` prints: everything that is registered, and one plugin in full."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from imlbench.errors import UserError, unknown
from imlbench.registry import Registry


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def _two_columns(texts: dict[str, str], width: int = 80) -> str:
    left = max(map(len, texts), default=0) + 4
    lines = []
    for name, text in sorted(texts.items()):
        first, *more = textwrap.wrap(text, width - left) or [""]
        lines += [f"  {name}".ljust(left) + first, *(" " * left + line for line in more)]
    return "\n".join(lines)


def describe_all(registry: Registry) -> str:
    """Return a list of models, datasets, metrics and broken plugins."""
    parts = []
    for title, classes in (
        ("Models", registry.models),
        ("Datasets", registry.datasets),
        ("Metrics", registry.metrics),
    ):
        parts.append(f"{title}\n{_two_columns({n: _summary(c) for n, c in classes.items()})}")
    origins = {
        p.name: f"{p.distribution}: {f'LEFT OUT, {p.error}' if p.error else 'ok'}"
        for p in registry.plugins
    }
    parts.append(f"Plugins\n{_two_columns(origins)}")
    return "\n\n".join(parts)


def describe_one(registry: Registry, name: str) -> str:
    """Return the documentation and the parameters of one model, dataset or metric.

    Raises:
        UserError: There is none of that name.
    """
    known: dict[str, Any] = {**registry.metrics, **registry.datasets, **registry.models}
    if name not in known:
        raise UserError(unknown("plugin", name, known))
    cls = known[name]
    lines = [f"{name}: {_summary(cls)}", f"from {registry.shipped_by(cls)}"]
    fields = cls.Params.model_fields if hasattr(cls, "Params") else {}
    for parameter, field in fields.items():
        is_plain = isinstance(field.annotation, type) and "[" not in str(field.annotation)
        kind = field.annotation.__name__ if is_plain else str(field.annotation)
        kind = kind.replace("typing.", "")
        default = "from the data" if field.default is None else repr(field.default)
        text = " ".join((field.description or "").split())
        lines += ["", f"  {parameter} ({kind}, default {default})"]
        lines += textwrap.wrap(text, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
