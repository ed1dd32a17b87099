"""The report: a table of counts, with what each class does and what surviving it means."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NotRequired, TypedDict

from imlbench.runner.provenance import git_commit
from tests.campaign.faults import FaultClass
from tests.campaign.oracle import Kind
from tests.campaign.trials import Tally

MOST_SHOWN = 20


class Machine(TypedDict):
    """Where and with what a class was tried."""

    processor: str
    processors: int
    system: str
    versions: dict[str, str]


class Row(TypedDict):
    """What came of one class, as it is kept."""

    tried: int
    survived: int
    kinds: dict[str, int]
    problems: dict[str, list[tuple[str, str]]]
    skipped: dict[str, int]
    seconds: float
    seed: int
    scale: float
    commit: NotRequired[str]
    machine: Machine


def make_row(tally: Tally, seed: int, scale: float) -> Row:
    """Return what is kept of a tally."""
    reasons = list(tally.skipped.values())
    return {
        "tried": tally.n_tried,
        "survived": tally.n_survived,
        "kinds": {str(kind): tally.count(kind) for kind in Kind},
        "problems": tally.problems,
        "skipped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "seconds": round(tally.seconds),
        "seed": seed,
        "scale": scale,
        "commit": git_commit(),
        "machine": describe_machine(),
    }


def describe_machine() -> Machine:
    """Return where and with what this runs."""
    names = ("imlbench", "torch", "mlflow", "safetensors", "pydantic", "filelock")
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": {"Python": platform.python_version(), **{n: version(n) for n in names}},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(rows: Mapping[str, Row], classes: Sequence[FaultClass]) -> str:
    """Return the table of counts, with a line of sums."""
    kinds = [str(kind) for kind in Kind]
    lines = [["class", "tried", "survived", *kinds, "commit"]]
    found = [rows[c.name] for c in classes if c.name in rows]
    for fault_class in classes:
        if fault_class.name in rows:
            row = rows[fault_class.name]
            commit = row.get("commit", "")  # older counts have none
            lines.append([fault_class.name, *_counts(row, kinds), commit])
    sums = [[int(n) for n in _counts(row, kinds)] for row in found]
    totals = [sum(column) for column in zip(*sums, strict=True)]
    lines.append(["**all**", *(f"**{n:,}**" for n in totals), ""])
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(kinds) + 2) + "---|", *rest])


def _counts(row: Row, kinds: Sequence[str]) -> list[str]:
    return [str(n) for n in (row["tried"], row["survived"], *(row["kinds"][k] for k in kinds))]


def markdown(rows: Mapping[str, Row], classes: Sequence[FaultClass]) -> str:
    """Return the whole page."""
    seconds = sum(row["seconds"] for row in rows.values())
    parts = [
        "# Reliability",
        "What imlbench survives, counted by a fault campaign: real processes, started by the "
        "command line, disturbed, and judged by the files that they leave. This page is written "
        "by the command below; the counts behind it are in "
        "[reliability.json](reliability.json).",
        "```sh\nmake campaign    # python -m tests.campaign --report docs/reliability.md\n```",
        table(rows, classes),
        "A fault is *survived* if none of these is seen. *Lost*: a job is not done, or its scores "
        "are not exactly those of an undisturbed run, or MLflow lacks it, after at most two plain "
        "reruns of the same command. *Duplicated*: a job is twice in the folder, or has two active "
        "runs in MLflow. *Hidden*: damage that is neither mended nor told, a wrong exit status, "
        "a command that does not end, a process that outlives its command. *Traceback*: a command "
        "prints one. A fault with several of these counts in each column.",
        "## The classes",
    ]
    parts += [
        f"**{c.name}.** {c.description} *Survived:* {c.survived}" for c in classes if c.name in rows
    ]
    missing = [c.name for c in classes if c.name not in rows]
    if missing:
        parts.append(f"**Not tried:** {', '.join(missing)}.")
    parts += _not_survived(rows)
    parts += ["## Where", *_places(rows, seconds)]
    return "\n\n".join(parts) + "\n"


def _not_survived(rows: Mapping[str, Row]) -> list[str]:
    lines = []
    for name, row in rows.items():
        problems = list(row["problems"].items())
        lines += [f"- {name}: `{_plain(f)}`: {_plain(p[0][1])}" for f, p in problems[:MOST_SHOWN]]
        if len(problems) > MOST_SHOWN:
            lines.append(f"- {name}: {len(problems) - MOST_SHOWN} more, in the counts")
    return ["## What is not survived", "\n".join(lines)] if lines else []


def _plain(text: str) -> str:
    """Return text on one line, without what Markdown would take for its own."""
    line = " ".join(ascii(text)[1:-1].replace("\\n", " ").split())
    return line.replace("`", "'").replace("|", "¦").replace("<", "‹")[:200]


def _places(rows: Mapping[str, Row], seconds: float) -> list[str]:
    machines = {str(row["machine"]): row["machine"] for row in rows.values()}
    lines = []
    for machine in machines.values():
        packages = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        lines.append(
            f"{machine['processor']}, {machine['processors']} processors, {machine['system']}; "
            f"{packages}."
        )
    seeds = sorted({row["seed"] for row in rows.values()})
    lines.append(
        f"{seconds / 60:.0f} minutes in all; chance follows from the seed "
        f"{', '.join(map(str, seeds))}."
    )
    skipped = [
        f"- {name}: {n} skipped: {_plain(reason)}"
        for name, row in rows.items()
        for reason, n in row["skipped"].items()
    ]
    parts = [row for row in rows.values() if row["scale"] != 1]
    if parts:
        lines.append(f"{len(parts)} of the classes were tried at another scale than 1.")
    return [*lines, *(["\n".join(skipped)] if skipped else [])]
