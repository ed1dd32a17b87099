"""What ``imlbench plugins`` prints: everything that is registered, and one plugin in full."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from tabulate import tabulate

from imlbench.errors import UserError, unknown
from imlbench.registry import Registry


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def describe_all(registry: Registry) -> str:
    """Return a list of models, datasets, metrics and broken plugins."""
    parts = []
    for title, classes in (
        ("Models", registry.models),
        ("Datasets", registry.datasets),
        ("Metrics", registry.metrics),
    ):
        rows = [
            (name, textwrap.shorten(_summary(cls), 56, placeholder=" …"))
            for name, cls in sorted(classes.items())
        ]
        parts.append(f"{title}\n{textwrap.indent(tabulate(rows, tablefmt='plain'), '  ')}")
    origins = [(p.name, p.distribution, p.error or "ok") for p in registry.plugins]
    parts.append(f"Plugins\n{textwrap.indent(tabulate(origins, tablefmt='plain'), '  ')}")
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
        annotation = getattr(field.annotation, "__name__", None) or str(field.annotation)
        kind = str(field.annotation) if "|" in str(field.annotation) else annotation
        default = "from the data" if field.default is None else repr(field.default)
        text = " ".join((field.description or "").split())
        lines += ["", f"  {parameter} ({kind}, default {default})"]
        lines += textwrap.wrap(text, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
