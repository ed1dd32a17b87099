"""The pieces: each does something that goes on where it was stopped, and shows what there is."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import imlbench
from imlbench.errors import brief
from imlbench.files import write_text
from imlbench.records.record import Record, Status
from speed import report
from speed.gpu import ROOT, twice
from speed.gpu.cases import FULL, QUICK, make_cases
from speed.gpu.setup import Setup
from speed.runner import measure


@dataclass(frozen=True)
class Piece:
    """Something to do on a device.

    Arguments:
        name: Its name on the command line.
        about: What its table shows.
        table: Where that is written.
        do: Does it, without what is done already; returns what went wrong.
        show: Returns the table of what there is.
    """

    name: str
    about: str
    table: str
    do: Callable[[Setup], list[str]]
    show: Callable[[Setup], str]


def run_tests(setup: Setup) -> list[str]:
    """Run the tests that need a device; to try it, some that need none."""
    marker, where = "gpu", ["tests"]
    if setup.quick:
        marker = "not gpu"
        where = ["tests/test_accelerator.py", "-k", "nothing_else_is_counted"]
    command = ["-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-m", marker, *where]
    with _output(setup).open("w") as output:
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    return [f"pytest ended with status {code}"] if code else []


def show_tests(setup: Setup) -> str:
    """Return the end of what pytest has printed."""
    lines = _output(setup).read_text(errors="replace").splitlines()
    return "\n".join(["```", *lines[-20:], "```"])


def _output(setup: Setup) -> Path:
    setup.results.mkdir(parents=True, exist_ok=True)
    return setup.results / "tests.txt"


def paper(
    name: str, about: str, datasets: Sequence[str], workers: int, quick: Mapping[str, Any]
) -> Piece:
    """Return the piece that runs a benchmark of ``benchmarks.toml``.

    Arguments:
        name: The benchmark.
        about: What its table shows.
        datasets: Its datasets.
        workers: How many jobs share the device.
        quick: What to run instead, to try it.
    """

    def run(setup: Setup) -> list[str]:
        smaller = {**quick, "n_samples": 20, "n_draws": 1} if setup.quick else {}
        found = imlbench.run(
            name,
            config=ROOT / "benchmarks.toml",
            path=setup.results,
            device=str(setup.device),
            workers=workers,
            **smaller,
        )
        return [f"{r.id}: {r.status}: {r.reason}" for r in found if r.status is not Status.DONE]

    def show(setup: Setup) -> str:
        found = imlbench.results(setup.results, config=ROOT / "benchmarks.toml")
        chosen = quick["datasets"] if setup.quick else datasets
        table = found.leaderboard(datasets=chosen).render("github")
        costs = _costs([record for record in found if record.dataset in chosen])
        together = f"Up to {workers} jobs shared the device, so seconds are not those of one alone."
        return "\n\n".join([table, "### What it took", costs, together])

    return Piece(name, about, f"results/tables/gpu-{name}.md", run, show)


def _costs(records: Sequence[Record]) -> str:
    """Return examples, seconds and memory, by dataset and model."""
    fits = sorted(
        ((record.dataset, record.model), record.fit)
        for record in records
        if record.fit is not None and record.status is Status.DONE
    )
    rows = []
    for names, group in groupby(fits, key=lambda pair: pair[0]):
        found = [fit for _, fit in group]
        rows.append(
            [
                *names,
                len(found),
                max(fit.n_train for fit in found),
                f"{statistics.median(fit.seconds for fit in found):.1f}",
                f"{max(fit.peak_memory_bytes for fit in found) / 2**20:.0f}",
            ]
        )
    headers = ("dataset", "model", "jobs", "training examples", "fit s, median", "peak memory, MiB")
    return tabulate(rows, headers, "github", disable_numparse=True)


def time_cases(setup: Setup) -> list[str]:
    """Measure the cases that were not measured yet."""
    known, problems = _measured(setup), []
    for case in make_cases(setup.device, QUICK if setup.quick else FULL):
        if case.name in known:
            continue
        try:
            with _deterministic():
                record = measure(case, torch.get_num_threads())
        except Exception as error:  # one case must not cost the others
            traceback.print_exc()
            problems.append(f"{case.name}: {brief(error)}")
            continue
        print(report.text(record), flush=True)
        known[case.name] = record
        write_text(setup.results / "speed.json", json.dumps(known, indent=2) + "\n")
    disagree = [name for name, record in known.items() if not report.agrees(record)]
    return [*problems, *(f"{name}: results disagree" for name in disagree)]


@contextmanager
def _deterministic() -> Iterator[None]:
    """Choose algorithms as jobs do."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def show_cases(setup: Setup) -> str:
    """Return what was measured."""
    return report.sections(list(_measured(setup).values()))


def _measured(setup: Setup) -> dict[str, Any]:
    path = setup.results / "speed.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


_TINY = {"epochs": 1, "latent_dim": 2}
PIECES: Mapping[str, Piece] = {
    piece.name: piece
    for piece in (
        Piece(
            "tests",
            "The tests that need a CUDA device.",
            "results/tables/gpu-tests.md",
            run_tests,
            show_tests,
        ),
        Piece(
            "twice",
            "The same jobs, run twice: whether they come out the same, what their models compute "
            "on the device and on the CPU, and the memory they take.",
            "results/tables/gpu-twice.md",
            twice.run,
            twice.show,
        ),
        Piece(
            "speed",
            "How fast it is: beside the CPU of the same machine, and as the share of what the "
            "device reaches in a large matrix product of the same precision.",
            "speed/GPU.md",
            time_cases,
            show_cases,
        ),
        paper(
            "paper-mnist",
            "Table 1 and Figure 3 of the paper on MNIST.",
            ["mnist"],
            workers=4,
            quick={"models": ["iml-gaussian", "vae"], "datasets": ["digits"], "set": _TINY},
        ),
        paper(
            "paper-celeba",
            "Table 1 of the paper on CelebA, or on as many of its images as there are.",
            ["celeba"],
            workers=2,
            quick={"models": ["reference-train"], "datasets": ["toy-2d"]},
        ),
        paper(
            "paper-audio",
            "Speech and a violin, with the networks of the paper.",
            ["spoken-digits", "violin"],
            workers=4,
            quick={
                "models": ["iml-gaussian"],
                "datasets": ["synth-violin"],
                "set": {"synth-violin.seconds": 10, "width": 2, **_TINY},
            },
        ),
    )
}
