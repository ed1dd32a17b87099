"""What identifies code: the syntax of everything that a module imports, without its comments.

A result depends on the code that made it: the module of a class, and whatever that imports in turn
from its own distribution or from imlbench. A changed comment or docstring changes nothing; neither
does a module that is not imported. Other libraries are not looked into: their versions are part of
a result's provenance, not of its identity.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue, TypeAdapter, ValidationError

from imlbench.api.sources import Sources
from imlbench.files import read_facts, write_facts

_spell = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def digest(*parts: object) -> str:
    """Return a hash of JSON values, of 16 hexadecimal digits."""
    return hashlib.sha256(_spell(parts).encode()).hexdigest()[:16]


@functools.cache
def code_of(*modules: str) -> str:
    """Return what identifies the code of modules and of all that they import.

    Arguments:
        modules: Their names, such as ``cls.__module__``.

    Example:
        >>> code_of("imlbench.errors") == code_of("imlbench.errors", "imlbench.errors")
        True
    """
    files = {file for module in modules for file in closure(module)}
    return digest(sorted(_look(file).syntax for file in files))


@functools.cache
def closure(module: str) -> frozenset[Path]:
    """Return the source files of a module and of what it imports in turn.

    Packages are not taken as a whole: ``from package import name`` leads to the module that defines
    the name, so that what else a package exports does not count.
    """
    roots = _source_roots(module.partition(".")[0])
    found: set[Path] = set()
    waiting = [_find(module, roots) or _file_of(module)]
    while waiting:
        file = waiting.pop()
        if file is not None and file not in found:
            found.add(file)
            package = _package_of(file, roots)
            waiting += [_resolve(_absolute(i, package), roots) for i in _look(file).imports]
    return frozenset(found)


def forget() -> None:
    """Look at the files anew: they may have changed since the last plan of this process."""
    for function in (code_of, closure, _look, _source_roots, _place, _known):
        function.cache_clear()
    _STAMPS.clear()


def refresh() -> None:
    """Look at the files anew if one of them is another than when it was looked at."""
    if any(_stamp(file) != stamp for file, stamp in _STAMPS.items()):
        forget()


_STAMPS: dict[Path, tuple[int, int]] = {}
"""Times of modification and sizes of the files that were looked at."""


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def is_within(module: str, home: str) -> bool:
    """Whether a module is of imlbench or of the distribution that the module ``home`` is of."""
    return module.partition(".")[0] in _source_roots(home.partition(".")[0])


class Import(NamedTuple):
    """``from module import name``, or ``import module`` if there is no name.

    A relative one begins with dots, as it is written.
    """

    module: str
    name: str = ""


class Seen(NamedTuple):
    """What is known of a source file, so that it need not be parsed again.

    Arguments:
        syntax: A hash of its syntax tree without docstrings.
        imports: What it imports.
        reexports: Where the names come from that it imports from elsewhere.
    """

    syntax: str
    imports: tuple[Import, ...]
    reexports: dict[str, Import]


_TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")

Roots = dict[str, Path]
"""Top-level modules that count, with the file or the folder of each."""


@functools.cache
def _source_roots(top: str) -> Roots:
    """Return the top-level modules of the distribution that ``top`` is of, and of imlbench."""
    roots = _neighbours(top) | _neighbours("imlbench") | _entry_points("imlbench")
    return {name: place for name in roots if (place := _place(name)) is not None}


def _neighbours(top: str) -> set[str]:
    """Return the top-level modules of one distribution, installed or in a tree of sources."""
    place = _place(top)
    if place is None:
        return {top}
    if place.parent.name not in ("site-packages", "dist-packages"):
        return {top, *(path.stem for path in place.parent.iterdir() if _is_module(path))}
    owners = packages_distributions().get(top, [])
    files = [file for owner in owners for file in distribution(owner).files or ()]
    return {top, *(file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py")}


def _entry_points(name: str) -> set[str]:
    """Return the top-level modules of a distribution's plugins: in a tree of sources, no others."""
    try:
        found = distribution(name).entry_points.select(group="imlbench")
    except PackageNotFoundError:
        return set()
    return {entry.value.partition(":")[0].partition(".")[0] for entry in found}


def _is_module(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


@functools.cache
def _place(top: str) -> Path | None:
    """Return the file of a top-level module, or the folder of a package."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.origin is None and spec.submodule_search_locations:  # a package without __init__.py
        return Path(next(iter(spec.submodule_search_locations)))
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _file_of(module: str) -> Path | None:
    """Return the source file of a module that was loaded from an unusual place."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and file.endswith(".py") else None


def _find(module: str, roots: Roots) -> Path | None:
    """Return the source file of a module, without importing anything."""
    top, *inner = module.split(".")
    place = roots.get(top)
    if place is None or (place.suffix == ".py" and inner):
        return None
    if place.suffix == ".py":
        return place
    path = place.joinpath(*inner)
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None


def _resolve(wanted: Import, roots: Roots, passed: frozenset[Import] = frozenset()) -> Path | None:
    """Return the file that defines what is imported, through packages that only pass it on."""
    inner = _find(f"{wanted.module}.{wanted.name}", roots) if wanted.name else None
    file = inner or _find(wanted.module, roots)
    if inner is None and file is not None and file.name == "__init__.py" and wanted not in passed:
        further = _look(file).reexports.get(wanted.name)
        if further is not None:
            further = _absolute(further, _package_of(file, roots))
            return _resolve(further, roots, passed | {wanted}) or file
    return file


def _absolute(wanted: Import, package: str) -> Import:
    """Return an import by the whole name of its module, as seen from a package."""
    inner = wanted.module.lstrip(".")
    level = len(wanted.module) - len(inner)
    if not level:
        return wanted
    above = package.split(".")[: len(package.split(".")) - level + 1]
    return wanted._replace(module=".".join([*filter(None, above), *filter(None, [inner])]))


@functools.cache
def _look(file: Path) -> Seen:
    """Return what is known of a file, from an earlier process if it has not changed since."""
    _STAMPS[file] = stamp = _stamp(file)
    if known := _known().get(str(file)):
        found_stamp, seen = known
        if found_stamp == stamp:
            return seen
    tree = _parse(file)
    seen = Seen(_syntax(file, tree), _imports(tree), _reexports(tree))
    _known()[str(file)] = stamp, seen
    return seen


_Known = dict[str, tuple[tuple[int, int], Seen]]
_KNOWN = TypeAdapter(_Known)


@functools.cache
def _known() -> _Known:
    """Return what earlier processes have noted of files, with their stamps then."""
    facts = read_facts(_notes())
    try:
        return _KNOWN.validate_python(facts["files"]) if facts and facts["by"] == _by() else {}
    except (ValidationError, KeyError):
        return {}


def note() -> None:
    """Note for later processes what was seen of files; where it cannot be written, nothing is."""
    files = {file: known for file, known in _known().items() if Path(file) in _STAMPS}
    with contextlib.suppress(OSError):
        write_facts(_notes(), {"by": _by(), "files": _KNOWN.dump_python(files, mode="json")})


def _notes() -> Path:
    return Sources().cache_dir / "code.json"


def _by() -> list[JsonValue]:
    """What else the notes depend on: Python's grammar, and this module."""
    return [*sys.version_info[:3], *_stamp(Path(__file__))]


def _reexports(tree: ast.Module) -> dict[str, Import]:
    found: dict[str, Import] = {}
    for module, names in _from_imports(ast.walk(tree)):
        for name, there in names.items():
            found.setdefault(name, Import(module, there))
    return found


def _imports(tree: ast.Module) -> tuple[Import, ...]:
    """Return what a file imports; ``import a`` followed by ``a.b`` counts as importing b from a."""
    nodes = list(_runtime_nodes(tree))
    modules: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    found = [
        Import(module, name) for module, names in _from_imports(nodes) for name in names.values()
    ]
    used = {alias: set[str]() for alias in modules}
    for node in ast.walk(tree) if modules else ():
        if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)) in used:
            used[owner].add(node.attr)
    for alias, module in modules.items():
        found += [Import(module, name) for name in used[alias] or {""}]
    return tuple(found)


def _dotted(node: ast.expr) -> str:
    """Return an expression such as ``a.b.c`` as text; empty if it is another."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _from_imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield module and {name here: name there} of every ``from module import name``."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module, {alias.asname or alias.name: alias.name for alias in node.names}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk over a tree without what only type checkers read."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        skipped: Sequence[ast.AST] = ()
        if isinstance(node, ast.If) and _dotted(node.test) in _TYPES_ONLY:
            skipped = node.body
        children = ast.iter_child_nodes(node)
        waiting += [child for child in children if child not in skipped] if skipped else children


def _package_of(file: Path, roots: Roots) -> str:
    """Return the package that relative imports in a file start from."""
    for top, place in roots.items():
        if place.suffix != ".py" and file.is_relative_to(place):
            return ".".join([top, *file.parent.relative_to(place).parts])
    return ""


def _parse(file: Path) -> ast.Module:
    """Return a file's syntax tree; of one that cannot be parsed, its bytes stand for it."""
    content = file.read_bytes()
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([ast.Expr(ast.Constant(content))], [])


def _syntax(file: Path, tree: ast.Module) -> str:
    """Return a hash of a file's syntax tree without docstrings."""
    content = hashlib.sha256()
    try:
        for token in _tokens(tree):
            content.update(token.encode())
    except RecursionError:  # a sum of a thousand terms: the bytes stand for it
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return content.hexdigest()


def _tokens(node: ast.AST) -> Iterable[str]:
    """Spell out a syntax tree; empty fields are left out, as Python's versions differ in them."""
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        values = value if isinstance(value, list) else [value]
        for part in values:
            if isinstance(part, ast.AST):
                if not _is_docstring(part):
                    yield name
                    yield from _tokens(part)
            elif part is not None or isinstance(value, list):
                yield f"{name}={part!r};"
    yield ")"


def _is_docstring(node: ast.AST) -> bool:
    """Whether a node is a string that stands by itself."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
