"""Trials: faults as data, carried out two at a time, and what came of them."""

from __future__ import annotations

import os
import queue
import random
import shutil
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.oracle import Kind, Problem, Truth, read_truth
from tests.campaign.process import Place, kill_marked, on_processors

TOY = (
    *("--set", "toy-2d.n_train=200", "--set", "toy-2d.n_valid=60", "--set", "toy-2d.n_test=60"),
    *("--n-samples", "50", "--n-draws", "2"),
)
"""Options that make every job on ``toy-2d`` take about a second."""

SMALL = ("--set", "vae.epochs=2", "--set", "vae.hidden_dim=16")
"""Options that make a ``vae`` small."""

BASIC = (
    *("run", "--models", "reference-train,vae", "--datasets", "toy-2d", *TOY, *SMALL),
    *("--metrics", "kde,reconstruction_error,modes_covered", "--seeds", "0,1"),
)
"""Four small jobs."""


class Skipped(Exception):
    """A trial cannot be carried out on this machine; the message says why."""


@dataclass(frozen=True)
class Trial:
    """What is run to see one fault, or several that cannot disturb each other.

    Arguments:
        faults: Their names.
        run: Carries them out in a place of its own; returns what is wrong, by fault, or under the
            empty name what cannot be said to be of one of them.
        alone: The same with one fault each, run if something is wrong of which it cannot be said.
        everywhere: Whether it needs all processors, as what it does must happen at once.
    """

    faults: tuple[str, ...]
    run: Callable[[Place], dict[str, list[Problem]]]
    alone: tuple[Trial, ...] = ()
    everywhere: bool = False


def single(
    name: str, run: Callable[[Place], Iterable[Problem]], *, everywhere: bool = False
) -> Trial:
    """Return the trial of one fault.

    Arguments:
        name: The fault.
        run: Carries it out, and returns what is wrong.
        everywhere: Whether it needs all processors.
    """
    return Trial((name,), lambda place: {name: list(run(place))}, everywhere=everywhere)


@dataclass
class Tally:
    """What came of one class of faults.

    Arguments:
        n_tried: How many faults were tried.
        problems: What was wrong, by fault; those that were survived are absent.
        skipped: Why, by fault.
        broken: Trials that the campaign itself failed to carry out, and why.
        seconds: Wall time.
    """

    n_tried: int = 0
    problems: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, kind: Kind) -> int:
        """Return how many faults had a problem of one kind."""
        return sum(any(k == kind for k, _ in found) for found in self.problems.values())

    @property
    def n_survived(self) -> int:
        """How many faults were survived."""
        return self.n_tried - len(self.problems)


class Lab:
    """What trials share: undisturbed runs, computed once, and chance.

    Arguments:
        folder: Where everything is.
        seed: What chance follows from.
        scale: How many times as many faults as usual where chance chooses them; below 1, this part
            of all faults.

    Attributes:
        at_end: What is to be closed when all trials have ended.
    """

    def __init__(self, folder: Path, seed: int = 0, scale: float = 1.0) -> None:
        self.folder, self.seed, self.scale = folder, seed, scale
        self.at_end = ExitStack()
        self._truths: dict[object, Truth] = {}
        self._locks: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()

    def random(self, name: str) -> random.Random:
        """Return a generator of its own for a class of faults."""
        return random.Random(f"{self.seed} {name}")

    def times(self, n: int) -> range:
        """Return the numbers of repetitions of something that chance decides."""
        return range(max(1, round(n * max(self.scale, 1.0))))

    def truth(
        self, *commands: Sequence[str], prepare: Callable[[Place], object] = lambda place: None
    ) -> Truth:
        """Return what undisturbed commands leave behind, one after the other in one folder.

        Arguments:
            commands: Command lines; computed once for each number of processors.
            prepare: Called with the place before; what it does is part of the commands.
        """
        key = (commands, len(os.sched_getaffinity(0)))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._truths:
                place = Place(Path(tempfile.mkdtemp(dir=self.folder, prefix="truth-")))
                prepare(place)
                for command in commands:
                    truth = read_truth(place.imlbench(*command), place.results)
                self._truths[key] = truth
            return self._truths[key]

    def copy(self, truth: Truth, place: Place) -> None:
        """Copy a folder that an undisturbed run has left, links and times as they are."""
        copy_folder(truth.results, place.results)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with its links and times; ``target`` must not exist."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


class Engine:
    """Carries out trials, one on every processor, each in a place of its own.

    Arguments:
        lab: What they share.
        keep: Whether to keep the folders of trials.
        like: Only trials with this in the name of a fault.
        tell: Called with a line for each fault that was not survived.
    """

    def __init__(
        self, lab: Lab, *, keep: bool = False, like: str = "", tell: Callable[[str], None] = print
    ) -> None:
        self._lab, self._keep, self._like, self._tell = lab, keep, like, tell

    def run(self, name: str, trials: Iterable[Trial]) -> Tally:
        """Return what came of all trials of a class."""
        tally, start, lock = Tally(), time.monotonic(), threading.Lock()
        chosen = self.choose(name, trials)
        here = [trial for trial in chosen if not trial.everywhere]
        with processors() as free:

            def carry_out(trial: Trial) -> None:
                with free() as own:
                    self._carry_out(trial, own, tally, lock)

            with ThreadPoolExecutor(n_processors()) as pool:
                try:
                    list(pool.map(carry_out, here))
                except BaseException:  # the campaign is stopped
                    pool.shutdown(wait=False, cancel_futures=True)
                    kill_marked()
                    raise
        for trial in chosen:
            if trial.everywhere:
                self._carry_out(trial, all_processors(), tally, lock)
        tally.seconds = time.monotonic() - start
        return tally

    def choose(self, name: str, trials: Iterable[Trial]) -> list[Trial]:
        """Return those trials of a class that are wanted: a random part, if the scale says so."""
        with on_processors({min(all_processors())}):  # as every trial, for equal numbers of threads
            found = [trial for trial in trials if any(self._like in f for f in trial.faults)]
        if self._lab.scale >= 1:
            return found
        n = max(1, round(len(found) * self._lab.scale))
        return self._lab.random(name).sample(found, min(n, len(found)))

    def _carry_out(self, trial: Trial, own: set[int], tally: Tally, lock: threading.Lock) -> None:
        folder = Path(tempfile.mkdtemp(dir=self._lab.folder, prefix="trial-"))
        place = Place(folder)
        try:
            with on_processors(own):
                problems = trial.run(place)
        except Skipped as reason:
            with lock:
                tally.skipped |= dict.fromkeys(trial.faults, str(reason))
            return
        except Exception:  # the campaign's own mistake: told, and the exit status says it
            with lock:
                tally.broken |= dict.fromkeys(trial.faults, traceback.format_exc())
            self._tell(f"  broken: {trial.faults[0]}")
            return
        finally:
            if not self._keep:
                shutil.rmtree(folder, ignore_errors=True)
        if problems.get("") and trial.alone:
            for lonely in trial.alone:
                self._carry_out(lonely, own, tally, lock)
            return
        with lock:
            self._note(trial, problems, tally, folder)

    def _note(
        self, trial: Trial, problems: dict[str, list[Problem]], tally: Tally, folder: Path
    ) -> None:
        tally.n_tried += len(trial.faults)
        for fault in trial.faults:
            found = [*problems.get(fault, ()), *problems.get("", ())]
            if found:
                tally.problems[fault] = [(str(p.kind), p.what) for p in found]
                where = f"  [{folder}]" if self._keep else ""
                self._tell(f"  {found[0].kind}: {fault}: {found[0].what}{where}")


def all_processors() -> set[int]:
    """Return the processors that this process may use."""
    return os.sched_getaffinity(0)


def n_processors() -> int:
    """Return how many trials are carried out at once."""
    return len(all_processors())


@contextmanager
def processors() -> Iterator[Callable[[], AbstractContextManager[set[int]]]]:
    """Yield a function that lends one processor at a time to whoever asks."""
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for processor in all_processors():
        free.put(processor)

    @contextmanager
    def lend() -> Iterator[set[int]]:
        processor = free.get()
        try:
            yield {processor}
        finally:
            free.put(processor)

    yield lend
