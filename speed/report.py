"""Tables of what was measured, for a terminal and for RESULTS.md."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tabulate import tabulate

from imlbench.runner.provenance import environment, processor
from speed.case import Record

LIBRARIES = ("numpy", "scikit-learn", "hmmlearn", "pomegranate", "pythae")
HEADERS = ("", "predicted", "target", "measured", "")
WIDTH = 80


def facts(threads: int) -> dict[str, str]:
    """Return what a reader needs to know about this machine and its software."""
    usual = environment(torch.device("cpu"))
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": str(threads),
        "system": usual.machine.partition(",")[0],
        "imlbench": f"{usual.imlbench} {usual.git_commit}".strip(),
        "python": usual.python,
        "torch": usual.torch,
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def number(value: float, unit: str) -> str:
    """Return a number of three digits with its unit.

    Example:
        >>> number(5.617, "x"), number(1234.5, "nats"), number(3e-10, "nats")
        ('5.62x', '1230 nats', '3e-10 nats')
    """
    return f"{digits(value)}{unit}" if unit == "x" else f"{digits(value)} {unit}"


def digits(value: float) -> str:
    """Return a number of three digits."""
    return f"{float(f'{value:.3g}'):g}"


def target(row: Record) -> str:
    """Return a row's target, or nothing."""
    for sign, key in (("≥", "at_least"), ("≤", "at_most")):
        if row[key] is not None:
            return f"{sign} {digits(row[key])}"
    return ""


def measured(row: Record) -> str:
    """Return a row's median, and its spread if it was measured more than once."""
    if "reason" in row:
        return "no result"
    spread = row["spread"]
    middle = number(spread["value"], row["unit"])
    if spread["low"] == spread["high"]:
        return middle
    return f"{middle} ({digits(spread['low'])}..{digits(spread['high'])})"


def verdict(row: Record) -> str:
    """Return whether a row's target was met, or nothing if it has none."""
    low, high = row["at_least"], row["at_most"]
    if low is None and high is None:
        return ""
    if "reason" in row:
        return "missed"
    value = row["spread"]["value"]
    is_met = (low is None or value >= low) and (high is None or value <= high)
    return "met" if is_met else "missed"


def _cells(row: Record) -> list[str]:
    return [row["name"], digits(row["predicted"]), target(row), measured(row), verdict(row)]


def text(record: Record) -> str:
    """Return a case's table and what else must be seen at once, at most 80 columns wide."""
    rows = [_cells(row) for row in record["rows"]]
    table = tabulate(rows, HEADERS, "plain", disable_numparse=True)
    lines = [f"{record['case']}: {record['title']}", *_agreements(record), *_failures(record)]
    title, *rest = (textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)
    return "\n".join([title, table, *rest])


def _agreements(record: Record) -> list[str]:
    return [
        f"{'agrees' if item['holds'] else 'DISAGREES'}: {item['name']}: differ by "
        f"{item['difference']:.2g}, at most {item['tolerance']:g} {item['unit']}"
        for item in record["agreements"]
    ]


def _failures(record: Record) -> list[str]:
    rows = (row for row in record["rows"] if "reason" in row)
    return [f"no result: {row['name']}: {row['reason']}" for row in rows]


def agrees(record: Record) -> bool:
    """Whether all results that must be the same are."""
    return all(item["holds"] for item in record["agreements"])


def markdown(records: Sequence[Record]) -> str:
    """Return RESULTS.md, made of records alone."""
    return f"# What `make speed` measured\n\n{sections(records)}\n"


def sections(records: Sequence[Record]) -> str:
    """Return the tables of all records, and of the machines that they come from."""
    parts = [
        "Numbers are medians over repetitions that take turns, with the smallest and the largest "
        "in parentheses. Predictions stand in the code and were made before measuring.",
        *(_section(record) for record in records),
        "## Machines",
        *(_machine(found, records) for found in _distinct(records)),
    ]
    return "\n\n".join(parts)


def _section(record: Record) -> str:
    rows = [[*_cells(row), row["because"]] for row in record["rows"]]
    load = " and ".join(f"{value:.1f}" for value in record["load"])
    times = [
        f"{item['name']}: {measured({'spread': item['spread'], 'unit': 's'})}"
        for item in record["times"]
    ]
    lists = [
        _list("Times", times),
        _list("Results", [*_agreements(record), *_failures(record), *record["notes"]]),
    ]
    return "\n\n".join(
        [
            f"## {record['case']}",
            f"**{record['title']}.** {record['about']}",
            tabulate(rows, (*HEADERS, "prediction's reason"), "github", disable_numparse=True),
            *filter(None, lists),
            f"{record['date']}, {record['seconds']:.0f} s; load average {load} at start and end.",
        ]
    )


def _list(title: str, items: list[str]) -> str:
    return "\n".join([f"{title}:", "", *(f"- {item}" for item in items)]) if items else ""


def _distinct(records: Sequence[Record]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for record in records:
        if record["environment"] not in found:
            found.append(record["environment"])
    return found


def _machine(found: dict[str, Any], records: Sequence[Record]) -> str:
    names = ", ".join(record["case"] for record in records if record["environment"] == found)
    return f"{names}:\n\n" + tabulate(found.items(), ("", ""), "github", disable_numparse=True)
