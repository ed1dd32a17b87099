"""Where the loops of a fit are: kept now and then, so that a fit that was ended goes on."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue, TypeAdapter

from imlbench.api.model import Stateful
from imlbench.files import write_atomically
from imlbench.records.record import Point

logger = logging.getLogger("imlbench")

State = dict[str, Any]
Part = Stateful | torch.Generator

_CURVES = TypeAdapter(list[Point])
_DIGITS = 64


class Checkpoints:
    """The states of a fit's loops, a file for each, which a later process goes on from.

    A loop is known by its stage and by how much was reported before it, whether what came before
    was fitted, resumed or found in the cache. A file that is damaged, or whose content does not
    fit, is not used: the loop begins at 1.

    Arguments:
        folder: Where the files are; nothing else may be there.
        interval: Seconds from the beginning of a loop to the first file, and from one to the next;
            0 for every step, infinity for none. The end of a loop is kept if an earlier step was,
            so that it is not repeated, and a loop that is shorter than this writes nothing.
        curves: What was reported; changed in place when a loop goes on. What it holds already is
            left alone and not kept: a stage that jobs share may go on in another job.
        used: What was recorded; likewise.
        not_before: Files from before this time are not used; in seconds since 1970.
        clock: Seconds that the fit has taken; by default those that pass.

    Attributes:
        interval: As given; 0 from now on makes the next step be kept.
        seconds_before: What earlier processes took for what this one need not repeat; with the time
            of this process, the time of a fit without interruption.
    """

    def __init__(
        self,
        folder: Path,
        interval: float,
        curves: list[Point],
        used: dict[str, JsonValue],
        *,
        not_before: float = -math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval, self.seconds_before = interval, 0.0
        self._folder, self._curves, self._used = folder, curves, used
        self._n_before, self._used_before = len(curves), dict(used)
        self._not_before, self._clock, self._start = not_before, clock, clock()
        self._generators: dict[str, torch.Generator] = {}
        self._begun: list[str] = []

    def tracked(self, purpose: str, generator: torch.Generator) -> torch.Generator:
        """Return a generator, which belongs from now on to the state of every loop that begins.

        Arguments:
            purpose: What it is for; it takes the place of an earlier one for the same.
            generator: The generator, just made.
        """
        self._generators[f"{purpose} on {generator.device}"] = generator
        return generator

    def steps(self, stage: str, n_steps: int, parts: Sequence[Part]) -> Iterator[int]:
        """Yield the numbers of the steps to do; see :meth:`imlbench.FitContext.steps`."""
        if not parts:  # what the steps change is not known
            yield from range(1, n_steps + 1)
            return
        path, snapshot = self._path(stage), _Snapshot(parts, dict(self._generators))
        done = self._resume(path, snapshot, n_steps)
        last = self._clock()
        for step in range(done + 1, n_steps + 1):
            yield step
            due = self._clock() - last >= self.interval
            if due or (step == n_steps and path.exists()):
                self._keep(path, snapshot, step)
                last = self._clock()

    def clear(self) -> None:
        """Remove all files: the fit is finished, and its result is safe."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _seconds(self) -> float:
        return self._clock() - self._start + self.seconds_before

    def _path(self, stage: str) -> Path:
        """Return the file of a loop that begins now."""
        place = f"{stage} after {len(self._curves) - self._n_before}"
        number = self._begun.count(place)
        self._begun.append(place)
        name = hashlib.sha256(f"{place} {number}".encode()).hexdigest()[:16]
        return self._folder / f"{name}.pt"

    def _keep(self, path: Path, snapshot: _Snapshot, step: int) -> None:
        before = self._used_before.items()
        content = {
            "step": step,
            "seconds": self._seconds,
            "curves": _CURVES.dump_json(self._curves[self._n_before :]).decode(),
            "used": {n: v for n, v in self._used.items() if (n, v) not in before},
            "state": snapshot.take(),
        }
        try:
            write_atomically(path, lambda temporary: temporary.write_bytes(_sealed(content)))
        except OSError as error:  # a full disk is no reason to give up what can still succeed
            logger.warning("step %d is not kept in %s: %s", step, path, error)

    def _resume(self, path: Path, snapshot: _Snapshot, n_steps: int) -> int:
        """Put the state of a loop back, and return the number of steps that it has done."""
        if not path.exists() or path.stat().st_mtime < self._not_before:
            return 0
        before = _sealed(snapshot.take())
        try:
            saved = read(path)
            step, seconds = int(saved["step"]), float(saved["seconds"])
            curves, used = _CURVES.validate_json(saved["curves"]), dict(saved["used"])
            if not 1 <= step <= n_steps:
                raise ValueError(f"step {step} is none of {n_steps}")
            snapshot.put_back(saved["state"])
        except Exception as error:  # whatever is wrong with the file, beginning at 1 mends it
            logger.warning("%s is not used, as it is damaged or of another fit: %s", path, error)
            snapshot.put_back(_opened(before))
            return 0
        self._curves[self._n_before :] = curves
        self._used |= used
        self.seconds_before = seconds - (self._clock() - self._start)
        return step


def read(path: Path) -> State:
    """Return what is kept in a file of :class:`Checkpoints`; nothing in it is executed.

    Raises:
        ValueError: It is damaged.
        pickle.UnpicklingError: A part of the loop has a state that is more than tensors, numbers
            and strings in dictionaries, lists and tuples.
    """
    return _opened(path.read_bytes())


def _sealed(content: Mapping[str, Any]) -> memoryview:
    """Return a state as bytes that begin with the SHA-256 of the rest."""
    buffer = io.BytesIO(bytes(_DIGITS))
    buffer.seek(_DIGITS)
    torch.save(content, buffer)
    sealed = buffer.getbuffer()
    sealed[:_DIGITS] = hashlib.sha256(sealed[_DIGITS:]).hexdigest().encode()
    return sealed


def _opened(sealed: bytes | memoryview) -> State:
    """Return the state that :func:`_sealed` was given, on the CPU."""
    stated, rest = bytes(sealed[:_DIGITS]), memoryview(sealed)[_DIGITS:]
    if hashlib.sha256(rest).hexdigest().encode() != stated:
        raise ValueError("its SHA-256 is not the one that it states")
    state: State = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    return state


class _Snapshot:
    """Takes the states of a loop's parts, of generators, and of the global random states."""

    def __init__(self, parts: Sequence[Part], generators: Mapping[str, torch.Generator]) -> None:
        self._parts, self._generators = parts, generators

    def take(self) -> State:
        """Return all states; tensors may be those that are in use."""
        return {
            "parts": [_state(part) for part in self._parts],
            "generators": {name: _state(each) for name, each in self._generators.items()},
            "global": _global_states(),
        }

    def put_back(self, state: State) -> None:
        """Put all states back.

        More generators may have been kept than there are: an earlier stage, which made them, may
        have been found in the cache this time.
        """
        for name, generator in self._generators.items():
            _put_back(generator, state["generators"][name])
        for part, value in zip(self._parts, state["parts"], strict=True):
            _put_back(part, value)
        _put_back_global(state["global"])


def _state(part: Part) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _put_back(part: Part, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _global_states() -> State:
    """Return the random states that models may use, as the harness seeds them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - for plugins that use the global state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def _put_back_global(state: State) -> None:
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
