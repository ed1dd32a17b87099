"""Runs a case, in a process of its own, and makes the record of it."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import torch

from speed.case import Agreement, Case, Failed, Measured, Note, Record, Seconds
from speed.report import facts


def measure_apart(case: Case, threads: int) -> Record:
    """Run a case in a fresh process, whose thread pools have the right size from the start.

    It sees no GPU: what is compared are processors.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for pool in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ[f"{pool}_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, case, threads).result()


def measure(case: Case, threads: int) -> Record:
    """Run a case in this process, with so many threads."""
    torch.set_num_threads(threads)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    start, load = time.perf_counter(), os.getloadavg()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, about too few iterations
        findings = list(case.run())
    assert torch.get_num_threads() == threads  # nothing that was imported has changed it
    outcome = {f.claim: f for f in findings if isinstance(f, Measured | Failed)}
    assert outcome.keys() == {claim.name for claim in case.claims}, sorted(outcome)
    agreements = [f for f in findings if isinstance(f, Agreement)]
    return {
        "case": case.name,
        "title": case.title,
        "about": case.about,
        "date": date,
        "seconds": time.perf_counter() - start,
        "load": [load, os.getloadavg()[0]],
        "environment": facts(threads),
        "rows": [asdict(claim) | asdict(outcome[claim.name]) for claim in case.claims],
        "times": [asdict(f) for f in findings if isinstance(f, Seconds)],
        "agreements": [asdict(f) | {"holds": f.holds} for f in agreements],
        "notes": [f.text for f in findings if isinstance(f, Note)],
    }
