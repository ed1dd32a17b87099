"""From records to tables: per dataset, a row for each model with its parameters."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from operator import attrgetter

from pydantic import JsonValue

from imlbench.errors import UserError, unknown
from imlbench.plan.settings import assignments, ranges
from imlbench.records.record import Record, Scored, Status

Published = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Published values by dataset, metric, and label of the row."""


@dataclass(frozen=True)
class Cell:
    """One metric of one row.

    Arguments:
        mean: Mean over seeds.
        spread: Standard deviation over seeds (n - 1 in the denominator); ``None`` for one seed.
        stderr: Standard error over test examples, if there is one seed; otherwise ``None``.
    """

    mean: float
    spread: float | None = None
    stderr: float | None = None

    def __str__(self) -> str:
        """Two significant digits of the uncertainty decide how many decimals are shown.

        Example:
            >>> str(Cell(190.234, spread=0.4321)), str(Cell(10.62, stderr=0.051))
            ('190.23 ±0.43', '10.620 (0.051)')
        """
        uncertainty = self.stderr if self.spread is None else self.spread
        if not uncertainty:
            text = f"{self.mean:.5g}"
            return text if self.spread is None else f"{text} ±0"
        decimals = min(max(0, 1 - math.floor(math.log10(uncertainty))), 6)
        mean, size = f"{self.mean:.{decimals}f}", f"{uncertainty:.{decimals}f}"
        return f"{mean} ({size})" if self.spread is None else f"{mean} ±{size}"

    @classmethod
    def of(cls, scores: Sequence[Scored], n_seeds: int) -> Cell:
        """Return the cell of one metric's results for several seeds."""
        mean = math.fsum(score.value for score in scores) / len(scores)
        if len(scores) == 1:
            return cls(mean, stderr=scores[0].stderr if n_seeds == 1 else None)
        squares = math.fsum((score.value - mean) ** 2 for score in scores)
        return cls(mean, spread=math.sqrt(squares / (len(scores) - 1)))


@dataclass(frozen=True)
class Row:
    """One model with one set of parameters on one dataset; or, with n = 0, a published value.

    Arguments:
        model: The model's name.
        params: Its parameters, and how samples were drawn, as a person reads them.
        n: The number of seeds.
        cells: By metric's label.
        fit_seconds: Mean over seeds.
    """

    model: str
    params: dict[str, str]
    n: int
    cells: dict[str, Cell]
    fit_seconds: float | None


@dataclass(frozen=True)
class Column:
    """One metric: its label, unit, and direction."""

    name: str
    unit: str
    higher_is_better: bool | None
    position: int

    @property
    def arrow(self) -> str:
        """The direction in which it is better, if there is one."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


@dataclass(frozen=True)
class Table:
    """The leaderboard of one dataset.

    Arguments:
        dataset: Its name, with parameters and fingerprint where tables must be told apart.
        rows: Best first.
        columns: The metrics.
        notes: What the reader must know: jobs without a result, settings of metrics, the machine.
    """

    dataset: str
    rows: list[Row]
    columns: list[Column]
    notes: list[str]

    def best(self, column: Column) -> float | None:
        """Return the best mean of a column, or ``None`` if there is nothing to compare."""
        ours = [row for row in self.rows if row.n]
        means = [row.cells[column.name].mean for row in ours if column.name in row.cells]
        if len(means) < 2 or column.higher_is_better is None:
            return None
        return max(means) if column.higher_is_better else min(means)

    def has_best(self, column: Column) -> bool:
        """Whether there is a best one to mark."""
        return self.best(column) is not None

    def varying_params(self) -> list[str]:
        """Return the parameters that differ between rows of one model, in alphabetical order."""
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        for row in self.rows:
            for name, value in row.params.items():
                seen[row.model, name].add(value)
        return sorted({name for (_, name), values in seen.items() if len(values) > 1})


@dataclass(frozen=True)
class Entry:
    """A record, and one of the ways in which samples were drawn from its model.

    Arguments:
        record: The record.
        draw: Such as ``5x1000``; empty if none were.
    """

    record: Record
    draw: str

    @cached_property
    def scores(self) -> dict[str, Scored]:
        """What was computed from these samples, or from the fit alone, by label."""
        found = self.record.scores
        return {score.label: score for score in found if score.draw in ("", self.draw)}

    @property
    def params(self) -> dict[str, JsonValue]:
        """The model's parameters as they were used, and how samples were drawn."""
        n_draws, _, n_samples = self.draw.partition("x")
        drawn: dict[str, JsonValue] = (
            {"n_samples": int(n_samples), "n_draws": int(n_draws)} if self.draw else {}
        )
        return {**self.record.params, **drawn}

    @property
    def row(self) -> tuple[str, str, str]:
        """What entries of one row have in common."""
        params = json.dumps(self.record.model_params, sort_keys=True)
        return self.record.model, params, self.draw


def entries(records: Iterable[Record], draws: Mapping[str, str] | None = None) -> list[Entry]:
    """Return one entry for each record and way of drawing; a record counts once.

    Arguments:
        records: The records.
        draws: If given, only these jobs, by id, with these draws.
    """
    unique = {record.id: record for record in records}
    if draws is not None:
        return [Entry(unique[job], draw) for job, draw in draws.items() if job in unique]
    return [Entry(record, draw) for record in unique.values() for draw in (*record.draws,) or ("",)]


def make_tables(
    found: Sequence[Entry],
    *,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    sort: str | None = None,
    published: Published | None = None,
) -> list[Table]:
    """Aggregate results over seeds.

    Arguments:
        found: From :func:`entries`. Of rows that differ only in the code that made them, the newest
            is shown.
        models: Only these, by name, family or glob.
        datasets: Only these, by name or glob.
        metrics: Only these columns, by label or glob, in this order.
        sort: The metric that orders the rows; by default the first column.
        published: Values from the literature, to stand beside ours.

    Raises:
        UserError: There is no result, or a name is unknown.
    """
    chosen = _matching(found, "model", models)
    chosen = _matching(chosen, "dataset", datasets)
    if not any(entry.record.scores for entry in chosen):
        raise UserError(
            "leaderboard: there must be at least one finished run; got none. "
            "Run some first, for example: imlbench run --models iml,vae --datasets digits"
        )
    replaced = set(superseded(entry.record for entry in chosen))
    chosen = [entry for entry in chosen if entry.record.id not in replaced]
    _check_metrics(chosen, [*metrics, *([sort] if sort else [])])
    by_data: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in chosen:
        by_data[entry.record.dataset, entry.record.fingerprint].append(entry)
    names = [dataset for dataset, _ in by_data]
    tables = []
    for (dataset, _), group in sorted(by_data.items()):
        label = f"{dataset} ({_data_label(group)})" if names.count(dataset) > 1 else dataset
        theirs = (published or {}).get(dataset, {})
        tables.append(_make_table(label, group, metrics, sort, theirs))
    return [table for table in tables if table.columns or not metrics]


def _matching(found: Sequence[Entry], what: str, patterns: Sequence[str]) -> Sequence[Entry]:
    """Return the entries whose model or dataset a pattern names."""

    def names(entry: Entry) -> list[str]:
        record = entry.record
        return [record.model, record.family] if what == "model" else [record.dataset]

    known = {name for entry in found for name in names(entry) if name}
    missing = [p for p in patterns if not any(fnmatchcase(name, p) for name in known)]
    if missing and found:
        raise UserError(*(f"leaderboard: {unknown(what, m, known)}" for m in missing))
    matches = {name for name in known for p in patterns if fnmatchcase(name, p)}
    return [entry for entry in found if not patterns or matches.intersection(names(entry))]


def _check_metrics(found: Sequence[Entry], patterns: Sequence[str]) -> None:
    labels = {score.label for entry in found for score in entry.record.scores}
    missing = [p for p in patterns if not _select(labels, p)]
    if missing:
        raise UserError(*(f"leaderboard: {unknown('metric', m, labels)}" for m in missing))


def _select(labels: Iterable[str], pattern: str) -> list[str]:
    """Return the labels that a pattern names; brackets of a label's parameters are no glob."""
    return [label for label in labels if label == pattern or fnmatchcase(label, pattern)]


def _data_label(group: Sequence[Entry]) -> str:
    first = group[0].record
    return ", ".join([*assignments(first.dataset_params), f"data {first.fingerprint[:6]}"])


def _make_table(
    dataset: str,
    group: Sequence[Entry],
    metrics: Sequence[str],
    sort: str | None,
    published: Mapping[str, Mapping[str, float]],
) -> Table:
    scored = [entry for entry in group if entry.scores]  # although a metric may have failed
    columns = _columns(scored, metrics)
    by_row: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in scored:
        by_row[entry.row].append(entry)
    rows = [_make_row(_newest(members), columns) for _, members in sorted(by_row.items())]
    for label in dict.fromkeys(label for values in published.values() for label in values):
        values = {name: Cell(v[label]) for name, v in published.items() if label in v}
        if any(column.name in values for column in columns):
            rows.append(Row(label, {}, 0, values, None))
    order = next((c for c in columns if c.name == sort), columns[0] if columns else None)
    if order is not None:
        sign = -1 if order.higher_is_better else 1
        name = order.name
        rows.sort(key=lambda r: sign * r.cells[name].mean if name in r.cells else math.inf)
    return Table(dataset, rows, columns, _notes(group, columns))


def superseded(records: Iterable[Record]) -> list[str]:
    """Return the jobs that were run again after their code had changed, by id."""
    newest: dict[tuple[str, ...], Record] = {}
    older = set()
    for record in sorted(records, key=lambda record: record.confirmed):
        params = json.dumps(record.model_params, sort_keys=True)
        same = (record.model, params, record.dataset, record.fingerprint, str(record.seed))
        before = newest.get(same)
        if before is not None and before.id != record.id:
            older.add(before.id)
        newest[same] = record
    return sorted(older - {record.id for record in newest.values()})


def _newest(members: Sequence[Entry]) -> list[Entry]:
    """Leave out what older code made, for seeds that newer code has not run."""
    newest = max(members, key=lambda entry: entry.record.confirmed).record.code
    return [entry for entry in members if entry.record.code == newest]


def _make_row(members: Sequence[Entry], columns: Sequence[Column]) -> Row:
    by_label: dict[str, list[Scored]] = defaultdict(list)
    for entry in members:
        for label, score in entry.scores.items():
            by_label[label].append(score)
    cells = {
        column.name: Cell.of(by_label[column.name], len(members))
        for column in columns
        if column.name in by_label
    }
    params = dict(pair.split("=", 1) for pair in assignments(members[0].params))
    fits = [entry.record.fit.seconds for entry in members if entry.record.fit]
    seconds = math.fsum(fits) / len(fits) if fits else None
    return Row(members[0].record.model, params, len(members), cells, seconds)


def _columns(scored: Sequence[Entry], metrics: Sequence[str]) -> list[Column]:
    found = {
        score.label: Column(score.label, score.unit, score.higher_is_better, score.position)
        for entry in scored
        for score in entry.scores.values()
    }
    ordered = sorted(found.values(), key=lambda column: (column.position, column.name))
    if not metrics:
        return ordered
    names = [column.name for column in ordered]
    return [found[name] for name in dict.fromkeys(n for p in metrics for n in _select(names, p))]


def _notes(group: Sequence[Entry], columns: Sequence[Column]) -> list[str]:
    scored = [entry for entry in group if entry.scores]
    notes = _settings(scored, columns)
    for record in {entry.record.id: entry.record for entry in group}.values():
        if record.status is not Status.DONE:
            what = ", ".join([record.model, *assignments(record.changed), f"seed {record.seed}"])
            because = f" ({record.reason.splitlines()[0]})" if record.reason else ""
            lack = "Not complete" if record.scores else "No result"
            notes.append(f"{lack}: {what}: {record.status}{because}.")
    return [*notes, *_provenance(scored)]


def _settings(scored: Sequence[Entry], columns: Sequence[Column]) -> list[str]:
    """Say what the numbers depend on; metrics and models with the same settings share a line.

    Real numbers, such as bandwidths that suit the validation split, are told by their range.
    """
    metrics_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in columns:
        groups: dict[str, list[tuple[str, dict[str, JsonValue]]]] = {}
        for entry in scored:
            score = entry.scores.get(column.name)
            if score is not None and score.settings:
                kept = {k: None if isinstance(v, float) else v for k, v in score.settings.items()}
                group = groups.setdefault(json.dumps(kept), [])
                group.append((entry.record.model, score.settings))
        for members in groups.values():
            models = tuple(sorted({model for model, _ in members}))
            told = [
                f"{key} = {_range([settings[key] for _, settings in members])}"
                for key in members[0][1]
            ]
            which = models if len(groups) > 1 else ()
            metrics_of.setdefault((", ".join(told), which), []).append(column.name)
    return [
        f"{', '.join(names)}{' of ' if which else ''}{', '.join(which)}: {label}."
        for (label, which), names in metrics_of.items()
    ]


def _range(values: Sequence[JsonValue]) -> str:
    """Return the one value there is, or the least and the greatest of real numbers."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(set(map(str, values))) == 1 or len(numbers) < len(values):
        return str(values[0])
    return f"{min(numbers):g} to {max(numbers):g}"


def _provenance(scored: Sequence[Entry]) -> list[str]:
    """Say with what, where and from which seeds the numbers came."""
    where = [entry.record.fit.environment for entry in scored if entry.record.fit]
    if not where:
        return []

    def values(name: str) -> str:
        found = set(map(str, set(map(attrgetter(name), where)))) - {""}
        return ", ".join(sorted(found)) or "unknown"

    seeds = ranges(entry.record.seed for entry in scored)
    fitted = ((entry.record.model, entry.record.fit) for entry in scored)
    rounded = {model for model, fit in fitted if fit and fit.used.get("precision") == "bfloat16"}
    names = ", ".join(sorted(rounded))
    commit = values("git_commit")
    return [
        f"Seeds {seeds}. Run by imlbench {values('imlbench')}"
        f"{'' if commit == 'unknown' else f' (commit {commit})'}, torch {values('torch')}, "
        f"on {values('device')} ({values('machine')}, threads: {values('n_threads')})."
        f"{f' Trained in bfloat16: {names}.' if names else ''}"
    ]
