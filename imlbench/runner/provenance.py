"""With what, and where: what a reader needs to know about the machine and the software."""

from __future__ import annotations

import contextlib
import functools
import getpass
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from imlbench import __version__
from imlbench.records.record import Environment


def environment(device: torch.device) -> Environment:
    """Return the facts about this process."""
    cuda = device.type == "cuda"
    return Environment(
        imlbench=str(__version__),
        git_commit=git_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        machine=f"{platform.system()} {platform.machine()}, {processor()}",
        n_threads=torch.get_num_threads(),
        user=user(),
    )


def processor() -> str:
    """Return the processor's model: another one's arithmetic may differ in the last digits."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def user() -> str:
    """Return who runs this; empty if nobody knows."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


@functools.cache
def git_commit() -> str:
    """Return the commit of this code, with ``+`` if it was changed; empty if it is not in git."""
    here = Path(__file__)
    for command in (
        ["git", "ls-files", "--error-unmatch", here.name],
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--match="],
    ):
        try:
            answer = subprocess.run(
                command, cwd=here.parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if answer.returncode:
            return ""
    return answer.stdout.strip()


def peak_memory(device: torch.device) -> int:
    """Return the peak of the device's memory, or of this process's if it is the CPU, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # ru_maxrss would include the parent's peak on Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
