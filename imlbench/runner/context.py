"""What a model is given while it is fitted: learning curves, checkpoints, the cache of stages."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from filelock import Timeout
from pydantic import JsonValue, ValidationError
from torch import nn

from imlbench.api.model import FitContext, Stateful
from imlbench.errors import Diverged
from imlbench.files import lock, read_sealed, write_sealed
from imlbench.plan.identity import code_of, digest, is_within
from imlbench.plan.jobs import Job
from imlbench.records.record import Point
from imlbench.runner.resuming import Checkpoints
from imlbench.runner.values import as_json

MOST_POINTS = 20_000
"""Points that are kept of one learning curve of more steps."""


class StageIsTaken(BaseException):
    """Another job is fitting the stage that this one needs, which steps back until it is there.

    No :class:`Exception`, so that no plugin catches it.

    Arguments:
        lock: The file that the other job holds.
    """

    def __init__(self, lock: Path) -> None:
        super().__init__(lock)
        self.lock = lock


class JobContext(FitContext):
    """The context of one job.

    Arguments:
        job: The job.
        device: Where to compute.
        stages: The folder of the cache.
        home: The module of the model: what a stage's code is looked for beside, and in imlbench.
        checkpoints: The folder of checkpoints within the fit.
        checkpoint_every: Seconds between two of them.
        report: Called with every point of the learning curves.
        refit_before: What was fitted before this time is fitted again.

    Attributes:
        curves: What was reported.
        used: What was recorded.
        stages_used: Names of the stages that were fitted or found.
        seconds_reused: What the stages took that another job had fitted.
        seconds_staged: What the stages took that this job has fitted, also before it was ended.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        *,
        stages: Path,
        home: str,
        checkpoints: Path,
        checkpoint_every: float,
        report: Callable[[Point], None],
        refit_before: float = 0.0,
    ) -> None:
        self.device, self.seed, self._home = device, job.seed, home
        self._data = [job.dataset, job.fingerprint]
        self._stages, self._report, self._refit_before = stages, report, refit_before
        self._every = checkpoint_every
        self.curves: list[Point] = []
        self.used: dict[str, JsonValue] = {}
        self.stages_used: list[str] = []
        self.seconds_reused = self.seconds_staged = self._spent = 0.0
        self.checkpoints = self._checkpoints_in(checkpoints)

    def _checkpoints_in(self, folder: Path) -> Checkpoints:
        return Checkpoints(
            folder,
            self._every,
            self.curves,
            self.used,
            not_before=self._refit_before,
            clock=self.seconds,
        )

    def seconds(self) -> float:
        """Return the time of a clock that stands still while a stage is fitted."""
        return time.perf_counter() - self._spent

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        return self.checkpoints.tracked(purpose, super().generator(purpose, device))

    def steps(self, stage: str, n_steps: int, *parts: Stateful | torch.Generator) -> Iterable[int]:
        return self.checkpoints.steps(stage, n_steps, parts)

    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        plain = {name: float(value) for name, value in values.items()}
        for name, value in plain.items():
            if not math.isfinite(value):
                raise Diverged(stage, step, f"{name} is {value}")
        point = Point(stage=str(stage), step=int(step), n_steps=int(n_steps), values=plain)
        every = math.ceil(point.n_steps / MOST_POINTS)
        if len(self.curves) < 10 * MOST_POINTS and (
            point.step % every == 0 or point.step == point.n_steps
        ):
            self.curves.append(point)
        self._report(point)

    def record(self, **facts: JsonValue) -> None:
        self.used |= {name: as_json(value) for name, value in facts.items()}

    def fit_once(
        self,
        stage: str,
        module: nn.Module,
        settings: Mapping[str, JsonValue],
        fit: Callable[[], None],
    ) -> None:
        name = self._name_of(stage, module, settings, fit)
        self.stages_used.append(name)
        base, guard = self._stages / name, lock(self._stages / f"{name}.lock")
        try:
            with guard.acquire(timeout=0):
                if not self._load(base, module):
                    self._fit(base, module, fit)
        except Timeout:
            raise StageIsTaken(Path(guard.lock_file).resolve()) from None

    def _name_of(
        self,
        stage: str,
        module: nn.Module,
        settings: Mapping[str, JsonValue],
        fit: Callable[[], None],
    ) -> str:
        homes = [type(module).__module__, _home_of(fit)]
        code = code_of("imlbench.runner.fitting", *(h for h in homes if is_within(h, self._home)))
        kind = type(module).__qualname__
        what = [stage, kind, self._data, self.seed, as_json(settings)]
        return f"{stage}-{digest('stage', code, what)}"

    def _fit(self, base: Path, module: nn.Module, fit: Callable[[], None]) -> None:
        """Fit a stage, going on where another process was, and keep it for all jobs."""
        start, n_curves, used = time.perf_counter(), len(self.curves), dict(self.used)
        outer = self.checkpoints
        self.checkpoints = self._checkpoints_in(base.with_name(f"{base.name}.fit"))
        try:
            fit()
            spent = time.perf_counter() - start
            seconds = spent + self.checkpoints.seconds_before
            self.seconds_staged += seconds
            facts: dict[str, JsonValue] = {
                "seconds": seconds,
                "curves": [point.model_dump(mode="json") for point in self.curves[n_curves:]],
                "used": {n: v for n, v in self.used.items() if used.get(n) != v},
            }
            write_sealed(base, module.state_dict(), facts)
            self.checkpoints.clear()
        finally:
            self._spent += time.perf_counter() - start
            self.checkpoints = outer

    def _load(self, base: Path, module: nn.Module) -> bool:
        """Load a stage that is there, whole, and not to be fitted again."""
        found = read_sealed(base)
        if found is None or _modified(base) < self._refit_before:
            return False
        tensors, facts = found
        try:
            module.load_state_dict(tensors)
            curves = [Point.model_validate(point) for point in facts["curves"]]  # type: ignore[union-attr]
            seconds, used = float(facts["seconds"]), dict(facts["used"])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, RuntimeError, ValidationError):
            return False  # of another version: fitting again mends it
        self.curves += curves
        self.used |= used
        self.seconds_reused += seconds
        return True


def _modified(base: Path) -> float:
    return base.with_name(f"{base.name}.json").stat().st_mtime


def _home_of(function: Callable[[], None]) -> str:
    """Return the module in which a function, or the method that is bound, was written."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "") or type(function).__module__)
