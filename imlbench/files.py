"""Files that can be trusted: written whole, checked when read, set aside if they are damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import JsonValue, TypeAdapter

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("imlbench")


@dataclass(frozen=True)
class File:
    """A file as it was written.

    Arguments:
        sha256: Of its content, as hexadecimal digits.
        size: Bytes.
        mtime_ns: When it was modified, in nanoseconds since 1970.
    """

    sha256: str
    size: int
    mtime_ns: int


_FACTS = TypeAdapter(dict[str, JsonValue])
_OPENING, _CLOSING, _DIGITS = b'{"sha256": "', b'",', 64


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename: all of it or nothing.

    What is in the way and no file is set aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        if path.is_dir():
            set_aside(path)
        os.replace(name, path)
    finally:
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(content, temporary, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that its name is free and nothing is deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)
    logger.warning("%s is damaged; it was set aside as %s", path, target.name)
    return target


def lock(path: Path) -> FileLock:
    """Return the lock of a path, not yet held; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        set_aside(path)
    return FileLock(path)


def is_held(path: Path) -> bool:
    """Whether a process is at work on what a lock guards."""
    if not path.is_file():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


def describe(path: Path) -> File:
    """Return what a file is known by later."""
    found = path.stat()
    return File(sha256=sha256(path), size=found.st_size, mtime_ns=found.st_mtime_ns)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path | str, known: File, *, thoroughly: bool = False) -> bool:
    """Whether a file is as it was described.

    Arguments:
        path: The file.
        known: What it is known by.
        thoroughly: Read it in any case; otherwise only if its time of modification is another, as
            that of a copy is.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size != known.size:
            return False
        is_untouched = found.st_mtime_ns == known.mtime_ns and not thoroughly
        return is_untouched or sha256(Path(path)) == known.sha256
    except OSError:
        return False


def seal(text: str) -> str:
    """Return the text of a JSON object with the SHA-256 of the rest as its first member."""
    rest = text[1:]
    return f'{{"sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",{rest}'


def unseal(content: bytes) -> bytes:
    """Return the JSON object that :func:`seal` was given.

    Raises:
        ValueError: It is not what was sealed.

    Example:
        >>> unseal(seal('{"value": 1}').encode())
        b'{"value": 1}'
    """
    start = len(_OPENING) + _DIGITS
    stated, rest = content[len(_OPENING) : start], content[start + len(_CLOSING) :]
    if (
        not content.startswith(_OPENING)
        or content[start : start + len(_CLOSING)] != _CLOSING
        or hashlib.sha256(rest).hexdigest().encode() != stated
    ):
        raise ValueError("it is damaged: its SHA-256 is not the one that it states")
    return b"{" + rest


def write_facts(path: Path, facts: Mapping[str, JsonValue]) -> None:
    """Write facts as sealed JSON."""
    write_text(path, seal(json.dumps(facts)) + "\n")


def read_facts(path: Path) -> dict[str, JsonValue] | None:
    """Return what :func:`write_facts` wrote; ``None`` if there is none that can be read."""
    try:
        return _FACTS.validate_json(unseal(path.read_bytes().rstrip(b"\n")))
    except (OSError, ValueError):
        return None


def write_sealed(base: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, JsonValue]) -> None:
    """Write tensors and facts about them as ``<base>.safetensors`` and ``<base>.json``."""
    data = base.with_name(f"{base.name}.safetensors")
    write_tensors(data, tensors)
    write_facts(base.with_name(f"{base.name}.json"), {"tensors": sha256(data), **facts})


def read_sealed(base: Path) -> tuple[dict[str, Tensor], dict[str, JsonValue]] | None:
    """Return what :func:`write_sealed` wrote; ``None`` if there is none, or it is damaged."""
    from safetensors.torch import load

    data, facts = (base.with_name(f"{base.name}.{form}") for form in ("safetensors", "json"))
    if not facts.exists() and not data.exists():
        return None
    known = read_facts(facts)
    try:
        content = data.read_bytes()
        if known is None or hashlib.sha256(content).hexdigest() != known.pop("tensors", None):
            raise ValueError("it, or what is known of it, is damaged")
        return load(content), known
    except (OSError, ValueError):
        for path in (data, facts):
            if path.exists():
                set_aside(path)
        return None
