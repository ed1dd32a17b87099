"""What a model is given while it is fitted: learning curves, and the cache of fitted stages."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from filelock import FileLock
from pydantic import JsonValue
from torch import nn

from imlbench.api.model import FitContext
from imlbench.errors import Diverged
from imlbench.plan.identity import code_of, digest, is_within
from imlbench.plan.jobs import Job
from imlbench.records.folder import read_tensors, write_tensors, write_text
from imlbench.records.record import Point

logger = logging.getLogger("imlbench")

Event = Point | str
"""What a job reports: a point of its learning curves, or the step that begins."""

Report = Callable[[Event], None]


class JobContext(FitContext):
    """The context of one job.

    Arguments:
        job: The job.
        device: Where to compute.
        stages: The folder of the cache.
        report: Called with every event.
        refit_before: Stages that were fitted before this time are fitted again.
        home: The module of the model: what a stage's code is looked for beside, and in imlbench.

    Attributes:
        curves: What was reported.
        used: What was recorded.
        stages_used: Names of the stages that were fitted or found.
        seconds_reused: What the stages took that another job had fitted.
        seconds_waited: Spent waiting for another job to fit a stage.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        stages: Path,
        report: Report,
        refit_before: float = 0.0,
        home: str = "imlbench",
    ) -> None:
        self.device, self.seed, self._home = device, job.seed, home
        self._data = [job.dataset, job.fingerprint]
        self._stages, self._report, self._refit_before = stages, report, refit_before
        self.curves: list[Point] = []
        self.used: dict[str, JsonValue] = {}
        self.stages_used: list[str] = []
        self.seconds_reused = 0.0
        self.seconds_waited = 0.0

    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(stage, step, f"{name} is {float(value)}")
        plain = {name: float(value) for name, value in values.items()}
        point = Point(stage=stage, step=int(step), n_steps=int(n_steps), values=plain)
        self.curves.append(point)
        self._report(point)

    def record(self, **facts: JsonValue) -> None:
        self.used |= facts

    def fit_once(
        self,
        stage: str,
        module: nn.Module,
        settings: Mapping[str, JsonValue],
        fit: Callable[[], None],
    ) -> None:
        homes = [type(module).__module__, _home_of(fit)]
        code = code_of("imlbench.runner.fitting", *(h for h in homes if is_within(h, self._home)))
        what = [stage, type(module).__qualname__, self._data, self.seed, dict(settings)]
        key = digest("stage", code, what)
        name = f"{stage}-{key}"
        self.stages_used.append(name)
        facts, tensors = self._stages / f"{name}.json", self._stages / f"{name}.safetensors"
        self._stages.mkdir(parents=True, exist_ok=True)
        waiting = time.perf_counter()
        with FileLock(self._stages / f"{name}.lock"):
            self.seconds_waited += time.perf_counter() - waiting
            if self._load(facts, tensors, module):
                return
            start, n_curves, used = time.perf_counter(), len(self.curves), dict(self.used)
            fit()
            content = {
                "seconds": time.perf_counter() - start,
                "curves": [point.model_dump() for point in self.curves[n_curves:]],
                "used": {n: v for n, v in self.used.items() if used.get(n) != v},
            }
            write_tensors(tensors, module.state_dict())
            write_text(facts, json.dumps(content) + "\n")

    def _load(self, facts: Path, tensors: Path, module: nn.Module) -> bool:
        """Load a stage that is there, whole, and not to be fitted again."""
        if not facts.exists() or facts.stat().st_mtime < self._refit_before:
            return False
        try:
            saved = json.loads(facts.read_text(encoding="utf-8"))
            module.load_state_dict(read_tensors(tensors))
            curves = [Point.model_validate(point) for point in saved["curves"]]
            seconds, used = float(saved["seconds"]), dict(saved["used"])
        except Exception:  # whatever is wrong with the files, fitting again mends it
            logger.exception("the stage in %s cannot be read and is fitted again", tensors)
            return False
        self.curves += curves
        self.used |= used
        self.seconds_reused += seconds
        return True


def _home_of(function: Callable[[], None]) -> str:
    """Return the module in which a function, or the method that is bound, was written."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "") or type(function).__module__)
