"""From ``benchmarks.toml`` and the command line to one validated :class:`Benchmark`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from imlbench.errors import UserError, unknown

HERE = Path("benchmarks.toml")
MOST_SEEDS = 10_000
MOST_SAMPLES = 10_000_000
MOST_DRAWS = 10_000
LARGEST_FILE = 10_000_000

_T = TypeVar("_T")


def parse_seeds(text: object) -> object:
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
            found = range(int(first), int(last if dots else first) + 1)
        except ValueError:
            raise ValueError("must be like 0..2 or 0,1,2") from None
        if found.stop <= found.start:
            raise ValueError("must be like 0..2, the smaller number first")
        if len(seeds) + (found.stop - found.start) > MOST_SEEDS:  # len() knows no such numbers
            raise ValueError(f"must be at most {MOST_SEEDS} seeds")
        seeds += found
    return seeds


Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]],
    Field(min_length=1),
    BeforeValidator(parse_seeds),
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
    n_samples: Annotated[int, Field(ge=2, le=MOST_SAMPLES, strict=True)] | None = None
    n_draws: Annotated[int, Field(ge=1, le=MOST_DRAWS, strict=True)] | None = None
    set: dict[str, object] = {}
    grid: dict[str, object] = {}


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
        strict: Whether its target must be among what is run; a file's settings may be for others.
    """

    target: str
    name: str
    values: tuple[object, ...]
    origin: str
    strict: bool = False

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
        settings: Parameters of models, datasets, metrics and artifacts.
    """

    name: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    n_samples: int
    n_draws: int
    settings: tuple[Setting, ...]


def find_file(path: Path | None) -> Path | None:
    """Return the file of named benchmarks: the given one, the one here, or the one that ships."""
    package = Path(__file__).parents[1]
    shipped = [package / HERE.name, package.parent / HERE.name]  # a wheel's, a source tree's
    return path or next((file for file in (HERE, *shipped) if file.is_file()), None)


def read_file(path: Path) -> _File:
    """Return the defaults, the named benchmarks, and the published values of a TOML file.

    Raises:
        UserError: Unreadable, malformed, or with unknown or invalid keys: all errors at once.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_FILE):
            raise UserError(f"{path}: must be a file of at most {LARGEST_FILE:,} bytes.")
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except ValidationError as error:
        raise UserError(*(_table_error(path, problem) for problem in error.errors())) from error
    except (ValueError, RecursionError) as error:  # malformed, too deep, or a number too long
        raise UserError(f"{path}: is not valid TOML: {error}.") from error


def _table_error(path: Path, problem: ErrorDetails) -> str:
    loc = [str(part) for part in problem["loc"]]
    depth = 2 if loc[0] == "benchmarks" and len(loc) > 1 else 1
    table, key = ".".join(loc[:depth]), ".".join(loc[depth:])
    if problem["type"] == "extra_forbidden":
        tables = list(_File.model_fields) if len(loc) == 1 else list(_Table.model_fields)
        where = f"[{table}]" if key else ""
        return f"{path} {where}: ".replace(" :", ":") + unknown("key", key or table, tables)
    return f"{path} [{table}] {key}: {constraint(problem)}"


def constraint(problem: ErrorDetails) -> str:
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
    seeds: object = None,
    n_samples: int | None = None,
    n_draws: int | None = None,
    settings: Sequence[str] = (),
    set: Mapping[str, object] | None = None,
    grid: Mapping[str, object] | None = None,
) -> Benchmark:
    """Combine the defaults, a named benchmark, and what is given here, which wins.

    Arguments:
        name: The benchmark's name; ``None`` for one made of the arguments alone.
        path: The TOML file; ``None`` if there is none.
        models: Names, families or globs.
        datasets: Names or globs.
        metrics: Names or globs.
        seeds: Such as ``"0..2"``, ``"0,1"`` or ``[0, 1]``.
        n_samples: Samples per draw.
        n_draws: Independent draws.
        settings: As on the command line: ``"latent_dim=20,40"``, ``"iml-gmm.n_components=30"``.
        set: One value for each parameter, by ``"parameter"`` or ``"plugin.parameter"``.
        grid: A list of values for each parameter.

    Raises:
        UserError: Everything that is wrong, at once.
    """
    file = read_file(path) if path else _File()
    errors: list[str] = []
    table = _Table()
    if name is not None:
        if name in file.benchmarks:
            table = file.benchmarks[name]
        else:
            where = path or HERE.name
            errors.append(f"{where}: {unknown('benchmark', name, file.benchmarks)}")
    given = _given(
        {"seeds": seeds, "n_samples": n_samples, "n_draws": n_draws, "set": set, "grid": grid},
        errors,
    )
    tables = (given, table, file.defaults)

    def names(key: str, chosen: Sequence[str], fallback: tuple[str, ...] = ()) -> tuple[str, ...]:
        found = chosen or first((getattr(t, key) for t in tables[1:]), fallback)
        if not found and not errors:
            errors.append(
                f"command line: --{key} must be given; got nothing. Name some, or run a benchmark "
                f"of benchmarks.toml: {', '.join(file.benchmarks) or 'none'}."
            )
        return tuple(found)

    chosen = {
        "models": names("models", models),
        "datasets": names("datasets", datasets),
        "metrics": names("metrics", metrics, ("*",)),
    }
    collected: list[Setting] = []
    collected += _table_settings(file.defaults, f"{path} [defaults.", "]", errors)
    collected += _table_settings(table, f"{path} [benchmarks.{name}.", "]", errors)
    collected += [
        replace(setting, strict=True) for setting in _table_settings(given, "", "", errors)
    ]
    collected += _command_line_settings(settings, errors)
    if errors:
        raise UserError(*errors)
    return Benchmark(
        name=name or "",
        models=chosen["models"],
        datasets=chosen["datasets"],
        metrics=chosen["metrics"],
        seeds=tuple(dict.fromkeys(first((t.seeds for t in tables), [0]))),
        n_samples=first((t.n_samples for t in tables), 1000),
        n_draws=first((t.n_draws for t in tables), 5),
        settings=tuple(collected),
    )


def first(values: Iterable[_T | None], fallback: _T) -> _T:
    """Return the first value that is not ``None``, or the fallback."""
    return next((value for value in values if value is not None), fallback)


def _given(arguments: Mapping[str, object], errors: list[str]) -> _Table:
    """Check what was given beside the file."""
    present = {key: value for key, value in arguments.items() if value is not None}
    try:
        return _Table.model_validate(present)
    except ValidationError as error:
        problems = {str(problem["loc"][0]): problem for problem in reversed(error.errors())}
        errors += [
            f"--{key.replace('_', '-')}: {constraint(problem)}" for key, problem in problems.items()
        ]
        return _Table()


def _table_settings(table: _Table, before: str, after: str, errors: list[str]) -> list[Setting]:
    found = []
    for key, tree in (("set", table.set), ("grid", table.grid)):
        where = f"{before}{key}{after}"
        for outer, inner in tree.items():
            target, dot, parameter = outer.rpartition(".")
            leaves: Mapping[str, object] = {parameter: inner}
            if dot and not (target and parameter):
                errors.append(
                    f"{where} {outer}: must be parameter or plugin.parameter; got '{outer}'. "
                    "For example iml-gmm.n_components."
                )
                continue
            if isinstance(inner, dict):
                target, leaves = outer, inner
            for name, value in leaves.items():
                origin = f"{where} {f'{target}.' if target else ''}{name}"
                if key == "set":
                    found.append(Setting(target, name, (value,), origin))
                elif isinstance(value, Sequence) and not isinstance(value, str) and value:
                    found.append(Setting(target, name, tuple(value), origin))
                else:
                    errors.append(f"{origin}: must be a list of values to try; got {value!r}.")
    return sorted(found, key=lambda setting: setting.target != "")


def _command_line_settings(texts: Sequence[str], errors: list[str]) -> list[Setting]:
    found = []
    for text in texts:
        address, equals, right = text.partition("=")
        target, _, name = address.strip().rpartition(".")
        values = _split_values(right)
        if equals and name and all(values) and not address.strip().startswith("."):
            parsed = tuple(_parse_value(value) for value in values)
            found.append(Setting(target, name, parsed, f"--set {text}", strict=True))
        else:
            errors.append(
                f"--set {text}: must be parameter=value or plugin.parameter=value; got {text!r}. "
                "For example --set latent_dim=20,40."
            )
    return sorted(found, key=lambda setting: setting.target != "")


def _split_values(text: str) -> list[str]:
    """Split at the commas that are outside brackets and quotation marks.

    Example:
        >>> _split_values('1, [2, 3], "a,b.wav"')
        ['1', '[2, 3]', '"a,b.wav"']
    """
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote or (character in "\"'" and (depth or not values[-1].strip())):
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def _parse_value(text: str) -> object:
    """Read a TOML value; what is none is a plain string."""
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value
