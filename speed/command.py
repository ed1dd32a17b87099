"""Runs commands of imlbench as a user would, and tells what they took."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec

from speed.case import Finding

P = ParamSpec("P")


@dataclass(frozen=True)
class Ran:
    """A command that has ended well.

    Arguments:
        seconds: Wall time.
        own_seconds: Processor time of its own process, without those that it has started.
        said: What it has printed.
    """

    seconds: float
    own_seconds: float
    said: str


def imlbench(folder: Path, *arguments: str) -> Ran:
    """Run a command of imlbench in a folder; only Linux tells its own processor time.

    Raises:
        RuntimeError: It has failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "imlbench", *arguments],
            cwd=folder,
            env=environment(os.environ),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its stat stays until wait()
        seconds = time.perf_counter() - start
        own_seconds = processor_seconds(Path(f"/proc/{process.pid}/stat").read_text())
        code = process.wait()
        output.seek(0)
        said = output.read()
    if code != 0:
        raise RuntimeError(f"imlbench {shlex.join(arguments)}: exit status {code}: {said[-2000:]}")
    return Ran(seconds, own_seconds, said)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return variables without servers of MLflow, and without the harness's numbers of threads."""
    return {
        name: value
        for name, value in given.items()
        if not name.startswith("MLFLOW_") and not name.endswith("_NUM_THREADS")
    }


def processor_seconds(stat: str) -> float:
    """Return the user and system time that a file ``/proc/<pid>/stat`` tells of the process.

    Arguments:
        stat: Its content; the name of the program may hold spaces and parentheses.
    """
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def options(**given: object) -> list[str]:
    """Return options of the command line.

    Example:
        >>> options(n_samples=10, seeds="0..9")
        ['--n-samples', '10', '--seeds', '0..9']
    """
    named = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return [part for pair in named for part in pair]


def in_temporary_folder(
    measure: Callable[Concatenate[Path, P], Iterator[Finding]],
) -> Callable[P, Iterator[Finding]]:
    """Give the function of a case an empty folder, which is removed in the end."""

    @functools.wraps(measure)
    def run(*args: P.args, **kwargs: P.kwargs) -> Iterator[Finding]:
        with tempfile.TemporaryDirectory() as folder:
            yield from measure(Path(folder), *args, **kwargs)

    return run
