"""What is asked of plugins before anything runs: in processes that may die, and with a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError

from imlbench.api.sources import Sources
from imlbench.errors import UserError
from imlbench.plan.config import Benchmark
from imlbench.plan.jobs import Plan
from imlbench.runner.pool import Pool, TaskDied
from imlbench.runner.requests import (
    PLAN,
    REQUEST,
    CountDevices,
    Describe,
    MakePlan,
    PlanAgain,
    ReadData,
)

LONGEST_LOAD = 3600.0
"""Seconds that a dataset may take to be read, downloads and decoding included."""


def make_plan(pool: Pool, benchmark: Benchmark) -> Plan:
    """Expand a benchmark; a pair of model and dataset that ends the process is left out.

    Raises:
        UserError: Everything that is wrong with the request.
    """
    barred: dict[str, str] = {}
    while True:
        try:
            request = REQUEST.dump_json(MakePlan(benchmark, barred))
        except PydanticSerializationError as error:
            raise UserError(f"set: values must be numbers, texts or lists; got {error}.") from error
        try:
            return PLAN.validate_json(pool.call(request, limit=pool.limit()))
        except TaskDied as died:
            if not died.step or died.step in barred:
                raise UserError(f"plan: it cannot be made; {died}.") from died
            barred[died.step] = died.reason


def plan_again(
    pool: Pool, benchmark: Benchmark, results: Path, jobs: list[str], as_fitted: bool
) -> Plan:
    """Plan jobs of a results folder, as they were fitted or by today's code.

    Raises:
        UserError: A metric or a parameter is unknown, or a plugin cannot be asked.
    """
    request = PlanAgain(benchmark, results.resolve(), tuple(jobs), as_fitted)
    try:
        return PLAN.validate_json(pool.call(REQUEST.dump_json(request), limit=pool.limit()))
    except TaskDied as died:
        raise UserError(f"plan: it cannot be made; {died}.") from died


def read_data(pool: Pool, plan: Plan, sources: Sources) -> Plan:
    """Read every dataset once and enter its fingerprint into its jobs; leave out what fails.

    So that missing or damaged data are found before anything is trained, downloads and decoding
    happen once, and results of one set of files are never taken for those of another.

    Arguments:
        pool: Where it is done.
        plan: The plan.
        sources: Where the data are.

    Raises:
        UserError: One message for every dataset whose files are missing or damaged.
    """
    found: dict[str, str] = {}
    failed: dict[str, str] = {}
    errors: list[str] = []
    for key, job in plan.data.items():
        request = REQUEST.dump_json(ReadData(job, sources))
        try:
            answer = json.loads(pool.call(request, limit=pool.limit(LONGEST_LOAD)))
        except UserError as error:
            errors += error.messages
        except TaskDied as died:
            failed[key] = died.reason
        else:
            (failed if "failed" in answer else found)[key] = next(iter(answer.values()))
    if errors:
        raise UserError(*errors)
    return plan.with_fingerprints(found, failed)


def describe(pool: Pool) -> dict[str, str]:
    """Return the descriptions of all plugins, by name, and of all together, by the empty name."""
    answer: dict[str, str] = _ask(pool, Describe())
    return answer


def count_devices(pool: Pool) -> int:
    """Return how many CUDA devices are visible."""
    answer: int = _ask(pool, CountDevices())
    return answer


def _ask(pool: Pool, request: Describe | CountDevices) -> Any:
    try:
        return json.loads(pool.call(REQUEST.dump_json(request), limit=pool.limit()))["answer"]
    except TaskDied as died:
        raise UserError(f"{request.kind}: cannot be told; {died}.") from died
