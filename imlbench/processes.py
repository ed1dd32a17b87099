"""What processes that imlbench starts have in common: where they import from, and when they end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux, which alone has them


def python_path() -> str:
    """Return ``PYTHONPATH`` for an interpreter that is to import what this one does.

    The standard library and site-packages are left out: other interpreters, which plugins may
    start, must not be given those of this one.
    """
    usual = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")})
    return os.pathsep.join(path for path in sys.path if path and not path.startswith(usual))


@contextlib.contextmanager
def sharing_python_path() -> Iterator[None]:
    """Have others, which pass their environment on, import what this process does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, for whatever reason.

    Arguments:
        parent: The parent's process number: if it is no longer that, this process ends at once.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform == "linux" and os.getppid() != parent:  # it was too late
        os._exit(1)


def outlive_parent() -> None:
    """Take :func:`die_with_parent` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
