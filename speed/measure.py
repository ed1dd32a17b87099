"""Timing: repetitions that take turns, and ratios of neighbours in time."""

from __future__ import annotations

import gc
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from speed.case import Spread

Clock = Callable[[], float]
Timer = Callable[[], float]
"""Runs something and returns its time in seconds."""


def seconds(function: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Return how long a call takes, with the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        function()
        return clock() - start
    finally:
        gc.enable()


def per_iteration(
    prepare: Callable[[int], Callable[[], object]],
    first: int = 1,
    more: int = 2,
    clock: Clock = time.perf_counter,
) -> Timer:
    """Return a timer of one iteration of a fit: that of ``more`` iterations beyond ``first``.

    What a fit does once, before or after its iterations, cancels.

    Arguments:
        prepare: Takes a number of iterations; returns the fit, ready to be called and timed.
        first: Iterations of the shorter fit.
        more: How many more the longer one makes.
        clock: What tells the time.
    """

    def timer() -> float:
        short, long = (seconds(prepare(n), clock) for n in (first, first + more))
        return (long - short) / more

    return timer


def interleaved(
    timers: Mapping[str, Timer], repetitions: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the times of all timers, which take turns, so that a slow moment hits them alike.

    Arguments:
        timers: What to time.
        repetitions: How often.
        warm_up: Whether to run each once before.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repetitions + warm_up):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: all_times[warm_up:] for name, all_times in times.items()}


def spread(values: Sequence[float]) -> Spread:
    """Return median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the spread of ratios between the repetitions of two timers.

    Raises:
        ValueError: A time is not positive: too short to be told from noise.
    """
    if min(*times, *reference) <= 0:
        raise ValueError(
            f"ratio: times must be positive; got {min(*times, *reference):.3g} s. "
            "Measure more iterations."
        )
    return spread([a / b for a, b in zip(times, reference, strict=True)])


def memory(field: str) -> int:
    """Return the bytes of memory that this process has (``VmRSS``) or has had (``VmHWM``).

    Where the system does not tell what it has, the most that it has had stands for both.
    """
    status = Path("/proc/self/status")
    if status.exists():  # there ru_maxrss starts at the parent's
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
