"""What ``imlbench plugins`` prints: everything that is registered, and one plugin in full."""

from __future__ import annotations

import inspect
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from imlbench.errors import UserError, unknown
from imlbench.plan.registry import Registry


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
    """Return a list of models, datasets, metrics, artifacts and broken plugins."""
    parts = []
    for title, classes in (
        ("Models", registry.models),
        ("Datasets", registry.datasets),
        ("Metrics", registry.metrics),
        ("Artifacts", registry.artifacts),
    ):
        parts.append(f"{title}\n{_two_columns({n: _summary(c) for n, c in classes.items()})}")
    origins = {
        p.name: f"{p.distribution}: {f'LEFT OUT, {p.error}' if p.error else 'ok'}"
        for p in registry.plugins
    }
    parts.append(f"Plugins\n{_two_columns(origins)}")
    return "\n\n".join(parts)


def describe_one(registry: Registry, name: str) -> str:
    """Return the documentation and the parameters of one plugin.

    Raises:
        UserError: There is none of that name.
    """
    known = registry.classes
    if name not in known:
        raise UserError(unknown("plugin", name, known))
    cls = known[name]
    lines = [f"{name}: {_summary(cls)}", f"from {registry.shipped_by(cls)}"]
    for parameter, field in cls.params_type.model_fields.items():
        text = " ".join((field.description or "").split())
        lines += ["", f"  {parameter} ({type_name(field.annotation)}, {_default(field)})"]
        lines += textwrap.wrap(text, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is not None:
        return f"default {field.default!r}"
    return "default none" if NoneType in get_args(field.annotation) else "default from the data"


def type_name(annotation: object) -> str:
    """Return a type as a person reads it.

    Example:
        >>> type_name(list[Annotated[int, "at most 9"]] | None), type_name(Literal["tanh", "relu"])
        ('list of int', "'tanh' or 'relu'")
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in arguments if part is not NoneType)
    if origin is not None:
        inner = ", ".join(type_name(part) for part in arguments if part is not Ellipsis)
        return f"{type_name(origin)} of {inner}"
    return getattr(annotation, "__name__", str(annotation))
