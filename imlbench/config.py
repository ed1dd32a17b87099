"""From ``benchmarks.toml`` and the command line to one validated :class:`Benchmark`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from imlbench.errors import UserError, unknown


def parse_seeds(text: Any) -> Any:
    """Return the seeds that ``"0..2"`` or ``"0,1,2"`` names; anything else as it came.

    Example:
        >>> parse_seeds("0..2,7")
        [0, 1, 2, 7]
    """
    if not isinstance(text, str):
        return text
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        try:
            seeds += range(int(first), int(last) + 1) if dots else [int(first)]
        except ValueError:
            raise ValueError("must be like 0..2 or 0,1,2") from None
    return seeds


Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), BeforeValidator(parse_seeds)
]
Names = Annotated[list[str], Field(min_length=1)]


class _Table(BaseModel):
    """``[defaults]`` or ``[benchmarks.NAME]``: everything optional, nothing else allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    models: Names | None = None
    datasets: Names | None = None
    metrics: Names | None = None
    seeds: Seeds | None = None
    n_samples: Annotated[int, Field(ge=2)] | None = None
    n_draws: Annotated[int, Field(ge=1)] | None = None
    set: dict[str, Any] = {}
    grid: dict[str, Any] = {}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    defaults: _Table = _Table()
    benchmarks: dict[str, _Table] = {}
    published: dict[str, dict[str, dict[str, float]]] = {}


@dataclass(frozen=True)
class Setting:
    """Values for one parameter; more than one value makes a grid.

    Arguments:
        target: The plugin, family or glob it is for; empty for every plugin that has the parameter.
        name: The parameter.
        values: The values, in order.
        origin: Where it was written, for messages.
    """

    target: str
    name: str
    values: tuple[Any, ...]
    origin: str

    @property
    def address(self) -> str:
        """The parameter as the user writes it: ``target.name`` or ``name``."""
        return f"{self.target}.{self.name}" if self.target else self.name


@dataclass(frozen=True)
class Benchmark:
    """What to run: names, still unresolved, and settings; later settings win.

    Arguments:
        name: The benchmark's name in ``benchmarks.toml``; empty for one from the command line.
        models: Names, families or globs.
        datasets: Names or globs.
        metrics: Names or globs.
        seeds: One job each.
        n_samples: Samples per draw.
        n_draws: Independent draws of ``n_samples``.
        settings: Parameters of models and datasets.
    """

    name: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    n_samples: int
    n_draws: int
    settings: tuple[Setting, ...]


def read_file(path: Path) -> _File:
    """Return the defaults, the named benchmarks, and the published values of a TOML file.

    Raises:
        UserError: Unreadable, malformed, or with unknown or invalid keys: all errors at once.
    """
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid TOML: {error}.") from error
    except ValidationError as error:
        raise UserError(*(_table_error(path, problem) for problem in error.errors())) from error


def _table_error(path: Path, problem: Mapping[str, Any]) -> str:
    loc = [str(part) for part in problem["loc"]]
    depth = 2 if loc[0] == "benchmarks" and len(loc) > 1 else 1
    table, key = ".".join(loc[:depth]), ".".join(loc[depth:])
    if problem["type"] == "extra_forbidden":
        tables = list(_File.model_fields) if len(loc) == 1 else list(_Table.model_fields)
        where = f"[{table}]" if key else ""
        return f"{path} {where}: ".replace(" :", ":") + unknown("key", key or table, tables)
    return f"{path} [{table}] {key}: {constraint(problem)}"


def constraint(problem: Mapping[str, Any]) -> str:
    """Return ``must be <constraint>; got <value>.`` for one pydantic error."""
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("should", "must", 1)
    return f"{message}; got {problem['input']!r}."


def make_benchmark(
    name: str | None,
    path: Path | None,
    *,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    seeds: str | None = None,
    settings: Sequence[str] = (),
) -> Benchmark:
    """Combine the defaults, a named benchmark, and the command line, which wins.

    Arguments:
        name: The benchmark's name; ``None`` for one made of the command line alone.
        path: The TOML file; ``None`` if there is none.
        models: Names, families or globs.
        datasets: Names or globs.
        metrics: Names or globs.
        seeds: Such as ``"0..2"`` or ``"0,1"``.
        settings: Such as ``"latent_dim=20,40"`` or ``"iml-gmm.n_components=30"``.

    Raises:
        UserError: Everything that is wrong, at once.
    """
    file = read_file(path) if path else _File()
    defaults, named = file.defaults, file.benchmarks
    errors: list[str] = []
    table = _Table()
    if name is not None:
        if name in named:
            table = named[name]
        else:
            errors.append(f"{path or 'benchmarks.toml'}: {unknown('benchmark', name, named)}")

    def first(key: str, given: Any, fallback: Any) -> Any:
        chosen = (getattr(table, key), getattr(defaults, key), fallback)
        return given or next(value for value in chosen if value is not None)

    chosen = {
        "models": first("models", models, ()),
        "datasets": first("datasets", datasets, ()),
        "metrics": first("metrics", metrics, ("*",)),
    }
    for key, value in chosen.items():
        if not value and not errors:
            errors.append(
                f"command line: --{key} must be given; got nothing. "
                f"Name some, or run a benchmark of benchmarks.toml: {', '.join(named) or 'none'}."
            )
    all_seeds = first("seeds", None, [0])
    if seeds is not None:
        try:
            all_seeds = _Table(seeds=seeds).seeds
        except ValidationError as error:
            errors += [f"--seeds: {constraint(problem)}" for problem in error.errors()[:1]]
    collected: list[Setting] = []
    collected += _file_settings(defaults, f"{path} [defaults", errors)
    collected += _file_settings(table, f"{path} [benchmarks.{name}", errors)
    collected += _command_line_settings(settings, errors)
    if errors:
        raise UserError(*errors)
    return Benchmark(
        name=name or "",
        **{key: tuple(value) for key, value in chosen.items()},
        seeds=tuple(dict.fromkeys(all_seeds)),
        n_samples=first("n_samples", None, 1000),
        n_draws=first("n_draws", None, 5),
        settings=tuple(collected),
    )


def _file_settings(table: _Table, where: str, errors: list[str]) -> list[Setting]:
    found = []
    for key, tree in (("set", table.set), ("grid", table.grid)):
        for outer, inner in tree.items():
            target, dot, parameter = outer.rpartition(".")
            leaves = {parameter: inner}
            if dot and not (target and parameter):
                errors.append(
                    f"{where}.{key}] {outer}: must be parameter or plugin.parameter; got "
                    f"'{outer}'. For example iml-gmm.n_components."
                )
                continue
            if isinstance(inner, dict):
                target, leaves = outer, inner
            for name, value in leaves.items():
                origin = f"{where}.{key}] {f'{target}.' if target else ''}{name}"
                if key == "grid" and not (isinstance(value, list) and value):
                    errors.append(f"{origin}: must be a list of values to try; got {value!r}.")
                else:
                    values = tuple(value) if key == "grid" else (value,)
                    found.append(Setting(target, name, values, origin))
    return sorted(found, key=lambda setting: setting.target != "")


def _command_line_settings(texts: Sequence[str], errors: list[str]) -> list[Setting]:
    found = []
    for text in texts:
        address, equals, right = text.partition("=")
        target, _, name = address.strip().rpartition(".")
        values = _split_values(right)
        if equals and name and all(values):
            parsed = tuple(_parse_value(value) for value in values)
            found.append(Setting(target, name, parsed, f"--set {text}"))
        else:
            errors.append(
                f"--set {text}: must be parameter=value or plugin.parameter=value; got {text!r}. "
                "For example --set latent_dim=20,40."
            )
    return sorted(found, key=lambda setting: setting.target != "")


def _split_values(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def _parse_value(text: str) -> Any:
    """Read a TOML value; what is none is a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
