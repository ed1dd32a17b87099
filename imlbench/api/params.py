"""Parameters of plugins: frozen, checked, and complete once the data are known."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

LARGEST = 2**53
"""The largest integer that JSON's readers agree on."""


class Params(BaseModel):
    """Base of every plugin's parameters: frozen, and unknown names are errors.

    A docstring under a field is its help text. A field that is :func:`from_data` has no value until
    the plugin has resolved its parameters; one that does not apply to the data never has one, and
    is recorded and shown nowhere.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_other_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse truth values where numbers are wanted, and integers that nobody can mean."""
        kinds = _kinds_of(cls, info.field_name or "")
        if isinstance(value, bool) and bool not in kinds and {int, float} & kinds:
            raise ValueError("must be a number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"must be at most {LARGEST} in size")
        return value

    def filled(self, **defaults: object) -> Self:
        """Return a copy in which the fields that have no value yet have these.

        Example:
            >>> class Width(Params):
            ...     width: int = from_data(ge=1)
            >>> Width().filled(width=600), Width(width=7).filled(width=600)
            (Width(width=600), Width(width=7))
        """
        new = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=new)

    def without(self, *names: str) -> Self:
        """Return a copy in which the named fields have no value: they do not apply to the data."""
        return self.model_copy(update=dict.fromkeys(names))

    def settings(self) -> dict[str, JsonValue]:
        """Return the fields that have a value, as JSON values."""
        settings: dict[str, JsonValue] = self.model_dump(mode="json", exclude_none=True)
        return settings


@functools.cache
def _kinds_of(cls: type[Params], field: str) -> set[object]:
    return _kinds(cls.model_fields[field].annotation)


def _kinds(annotation: object) -> set[object]:
    """Return the types that an annotation names."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_kinds, parts)) if parts else {annotation}


def from_data(
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    multiple_of: float | None = None,
) -> Any:
    """Declare a field whose default follows from the data.

    Annotate it with the type that it has once the parameters are resolved.

    Arguments:
        ge: The least value.
        gt: A value that it must exceed.
        le: The greatest value.
        multiple_of: What it must be a multiple of.
    """
    return Field(default=None, ge=ge, gt=gt, le=le, multiple_of=multiple_of)


P = TypeVar("P", bound=Params)


class Parametrised(Generic[P]):
    """Base of the plugins' classes: ``class VAE(Model[VAEParams])`` has ``VAEParams``.

    Class attributes:
        name: Its name, everywhere: letters, digits, ``-``, ``_`` and ``.``.
        params_type: The class of the parameters, taken from the brackets.
    """

    name: ClassVar[str]
    params_type: ClassVar[type[Params]] = Params

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            if issubclass(get_origin(base) or object, Parametrised):
                (given,) = get_args(base)
                if isinstance(given, type) and issubclass(given, Params):
                    cls.params_type = given


AnyPlugin = Parametrised[Any]
"""A model, dataset, metric or artifact of whatever parameters."""
