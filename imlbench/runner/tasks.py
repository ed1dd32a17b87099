"""What the processes of the pool do: one task each.

While a call is carried out, lines ``{"step": ...}`` say what is being done; the last line is the
answer, or ``{"errors": [messages]}``. A job's lines are events, of :mod:`imlbench.runner.contract`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from typing import NoReturn

import torch

from imlbench.api.sources import Sources
from imlbench.errors import ANYTHING, Diverged, UserError, brief, plain
from imlbench.plan.data import fingerprint
from imlbench.plan.describe import describe_all, describe_one
from imlbench.plan.jobs import Job
from imlbench.plan.planning import have_changed, make_plan
from imlbench.plan.registry import Registry
from imlbench.records.folder import Store
from imlbench.records.record import Status
from imlbench.runner import requests
from imlbench.runner.again import plan_again
from imlbench.runner.context import StageIsTaken
from imlbench.runner.contract import Assignment, Ended, Event, Noticed, Progress, Waits
from imlbench.runner.job import run_job
from imlbench.runner.requests import PLAN, REQUEST

Tell = Callable[[bytes], None]


def carry_out(task: int, events: int, registry: Registry) -> NoReturn:
    """Do what is asked, answer, and end this process.

    Arguments:
        task: The file descriptor of a :data:`~imlbench.runner.requests.Request`.
        events: The file descriptor to answer to.
        registry: Where the plugins are.
    """
    before = set(sys.modules)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def tell(line: bytes) -> None:
        line += b"\n"
        while line:
            line = line[os.write(events, line) :]

    code = 1
    try:
        with os.fdopen(task, "rb") as file:
            request = REQUEST.validate_json(file.read())
        if isinstance(request, requests.Run):
            _run(request.assignment, registry, tell)
            answer = b""
        else:
            answer = _answer(request, registry, tell)
        tell(json.dumps({"imported": _new_modules(before)}).encode())
        if answer:
            tell(answer)
        code = 0
    except BrokenPipeError:  # nobody waits for this any more
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _answer(request: requests.Request, registry: Registry, tell: Tell) -> bytes:
    """Return the answer to a call."""

    @cache
    def announce(step: str) -> None:
        tell(json.dumps({"step": step}).encode())

    try:
        match request:
            case requests.MakePlan(benchmark, barred):
                return PLAN.dump_json(
                    make_plan(benchmark, registry, announce=announce, barred=barred)
                )
            case requests.PlanAgain(benchmark, results, jobs, as_fitted):
                found = [Store(results).folder(job).read() for job in jobs]
                records = [record for record in found if record is not None]
                return PLAN.dump_json(plan_again(records, benchmark, registry, as_fitted))
            case requests.ReadData(job, sources):
                return json.dumps(_read_data(job, registry, sources)).encode()
            case requests.Describe():
                texts = {name: describe_one(registry, name) for name in registry.classes}
                return json.dumps({"answer": {"": describe_all(registry), **texts}}).encode()
            case requests.CountDevices():
                return json.dumps({"answer": torch.cuda.device_count()}).encode()
            case _:
                raise UserError(f"there is no task of the kind {request.kind}")
    except UserError as error:
        return json.dumps({"errors": error.messages}).encode()


def _read_data(job: Job, registry: Registry, sources: Sources) -> dict[str, str]:
    """Return the fingerprint of a job's data, or why their plugin has failed."""
    try:
        return {"answer": fingerprint(job, registry, sources)}
    except UserError:
        raise
    except ANYTHING as error:  # a plugin can raise anything
        traceback.print_exc()
        return {"failed": brief(error)}


def _new_modules(before: set[str]) -> list[str]:
    """Return the modules that are new in this process and can be imported by their names."""
    found = [(name, module) for name, module in sys.modules.items() if name not in before]
    return [name for name, module in found if getattr(module, "__spec__", None) is not None]


def _run(assignment: Assignment, registry: Registry, tell: Tell) -> None:
    """Run a job, and say how it ended."""
    start = time.monotonic()
    send = _sender(tell)
    handler = _Noticing(send)
    logging.getLogger("imlbench").addHandler(handler)
    _set_threads(assignment.n_threads)
    try:
        with assignment.folder.lock.acquire(timeout=0):
            status, reason = _attempt(assignment, registry, send)
            seconds = time.monotonic() - start
            ended = Ended(status=status, reason=reason, seconds=seconds)
            try:
                assignment.folder.end(status, reason)
            except OSError as error:  # the disk is full: nothing is done that cannot be written
                ended = Ended(status=Status.FAILED, reason=brief(error), seconds=seconds)
            send(ended)
    except TimeoutError:
        send(Waits(lock=assignment.folder.lock.lock_file))
    except StageIsTaken as taken:
        send(Waits(lock=taken.lock))


def _set_threads(n_threads: int) -> None:
    """Let torch and the libraries of numpy and scikit-learn use so many threads."""
    from threadpoolctl import threadpool_limits

    os.environ["OMP_NUM_THREADS"] = str(n_threads)  # for what is loaded later
    threadpool_limits(n_threads)
    torch.set_num_threads(n_threads)


def _attempt(
    assignment: Assignment, registry: Registry, send: Callable[[Event], None]
) -> tuple[Status, str]:
    tasks = assignment.metrics, assignment.artifacts
    try:
        if have_changed(assignment.job, *tasks, registry, is_fitted=assignment.is_fitted):
            raise UserError("the code changed during the run. Run again.")
        torch.backends.cudnn.benchmark = False
        torch.set_deterministic_debug_mode("warn")
        run_job(assignment, registry, send)
    except (BrokenPipeError, StageIsTaken):
        raise
    except Diverged as error:
        traceback.print_exc()
        return Status.DIVERGED, plain(str(error))
    except ANYTHING as error:  # a plugin can raise anything; the other jobs go on
        traceback.print_exc()
        return (Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED), brief(error)
    return Status.DONE, ""


_NO_MEMORY = (
    "can't allocate memory",  # the CPU's allocator
    "out of memory",  # CUDA, also where it is no OutOfMemoryError
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and others
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a way to say that no memory is left."""
    while error is not None:
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, RuntimeError) and any(s in str(error) for s in _NO_MEMORY))
        ):
            return True
        error = error.__cause__
    return False


def _sender(tell: Tell, interval: float = 0.1) -> Callable[[Event], None]:
    """Return a function that hands on events, at most ten points of learning curves a second."""
    last = -interval

    def send(event: Event) -> None:
        nonlocal last
        if isinstance(event, Progress):
            is_final = event.point.step == event.point.n_steps
            if not is_final and time.monotonic() - last < interval:
                return
            last = time.monotonic()
        tell(event.model_dump_json().encode())

    return send


class _Noticing(logging.Handler):
    """Hands the harness' own warnings on to the user."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self._send(Noticed(text=plain(record.getMessage())))
