"""What the processes of the pool can be asked for, as it travels: JSON. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from imlbench.api.sources import Sources
from imlbench.plan.config import Benchmark
from imlbench.plan.jobs import Job, Plan
from imlbench.runner.contract import Assignment


@dataclass(frozen=True)
class Run:
    """Run a job; the answers are events."""

    assignment: Assignment
    kind: Literal["run"] = "run"


@dataclass(frozen=True)
class MakePlan:
    """Expand a benchmark into a :class:`Plan`.

    Arguments:
        benchmark: What to run.
        barred: Steps that are not taken, and why.
    """

    benchmark: Benchmark
    barred: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["plan"] = "plan"


@dataclass(frozen=True)
class PlanAgain:
    """Make the :class:`Plan` of jobs that are in a results folder.

    Arguments:
        benchmark: What is computed for each of them.
        results: The folder.
        jobs: Their ids.
        as_fitted: Whether they are taken as they were fitted, or made anew by today's code.
    """

    benchmark: Benchmark
    results: Path
    jobs: tuple[str, ...]
    as_fitted: bool
    kind: Literal["again"] = "again"


@dataclass(frozen=True)
class ReadData:
    """Read a job's data; the answer is their fingerprint."""

    job: Job
    sources: Sources
    kind: Literal["data"] = "data"


@dataclass(frozen=True)
class Describe:
    """Describe the plugins: a text for each by its name, and one for all by the empty name."""

    kind: Literal["describe"] = "describe"


@dataclass(frozen=True)
class CountDevices:
    """Count the CUDA devices."""

    kind: Literal["devices"] = "devices"


Request = Run | MakePlan | PlanAgain | ReadData | Describe | CountDevices
REQUEST: TypeAdapter[Request] = TypeAdapter(
    Annotated[Request, Field(discriminator="kind")],
    config=ConfigDict(ser_json_inf_nan="constants"),  # --checkpoint-every inf
)
PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)
